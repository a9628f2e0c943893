"""Find the images and their masks in a folder whose layout is not known."""

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rfield.segmentation.data.images import image_files, open_named
from rfield.segmentation.data.paths import is_inside, near_miss

_MASK_WORDS = r"masks?|labels?|annotations?|annots?|anns?|gt|groundtruth|seg|segmentations?|targets?"
_IMAGE_WORDS = r"images?|imgs?|photos?|pictures?|rgb|jpegimages|inputs?"
_GAP = r"(?:^|$|[-_. /])"
_MASK = re.compile(rf"{_GAP}(?:{_MASK_WORDS})(?={_GAP})", re.IGNORECASE)
_ROLE = re.compile(rf"{_GAP}(?:{_MASK_WORDS}|{_IMAGE_WORDS})(?={_GAP})", re.IGNORECASE)
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_MANY = 2**14  # colours; Pillow makes a table of this length.
_LOSSY = (".jpg", ".jpeg")


@dataclass(frozen=True)
class Pair:
    """An image and the file of its labels.

    Attributes:
        image: the image.
        labels: its mask, or the JSON file that LabelMe has written for it.
        split: train, val or test if a folder says so; None otherwise.
    """

    image: Path
    labels: Path
    split: str | None


def find_pairs(root: Path) -> list[Pair]:
    """Return each image below a folder with its mask, in the order of the images' paths.

    Images and masks may lie in one folder or in two, for each split or for all. The names of a pair are equal, or that
    of the mask has an ending (`a.jpg`, `a_mask.png`), or both name their kind (`image_1.jpg`, `mask_1.png`).

    Raises:
        FileNotFoundError: the root is no folder.
        ValueError: no pairs are found, or some images or masks are of none.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder; give the one that holds the images and masks")
    folders = images_below(root)
    found: dict[Path, Path] = {}
    taken: set[Path] = set()
    for images, masks, pairs in _matches(root, folders):
        if not {images, masks} & taken:
            taken |= {images, masks}
            found |= pairs
    used = {*found, *found.values()}
    left = [path for paths in folders.values() for path in paths if path not in used]
    if not found:
        raise ValueError(
            f"{root} holds no pairs of images and masks ({len(left)} image files below it); name each mask like its "
            "image, as a.jpg and a_mask.png, or a.png in a folder `masks`"
        )
    if left:
        raise ValueError(
            f"{left[0]} is neither a mask nor has one ({len(left)} of {len(left) + len(used)} image files have no "
            f"counterpart){near_miss(left[0]) if left[0].parent not in taken else ''}; add its counterpart or remove it"
        )
    return [Pair(image, found[image], split_of(image.relative_to(root))) for image in sorted(found)]


def images_below(root: Path) -> dict[Path, list[Path]]:
    """Return the image files of a folder and of those in it, by folder; dot folders are left out.

    Raises:
        ValueError: a file is a link out of the root.
    """
    folders = {}
    for path, inside, _ in os.walk(root):
        inside[:] = sorted(name for name in inside if not name.startswith("."))
        files = image_files(Path(path))
        for file in files:
            if file.is_symlink() and not is_inside(file, root):
                raise ValueError(f"{file} is a link to a file outside {root}; put the file itself there")
        if files:
            folders[Path(path)] = files
    return folders


def split_of(path: Path) -> str | None:
    """Return the split that the folders of a relative path name.

    >>> split_of(Path("valid/images/a.jpg")), split_of(Path("train2017/a.jpg")), split_of(Path("photos/test.jpg"))
    ('val', 'train', None)
    """
    words = (word for part in path.parts[:-1] for word in re.split(r"[^a-z]", part.lower()))
    return next((SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES), None)


def _matches(root: Path, folders: dict[Path, list[Path]]) -> Iterator[tuple[Path, Path, dict[Path, Path]]]:
    """Yield a folder of images, that of their masks, and the pairs in them; the likeliest first."""
    found = []
    for folder, files in folders.items():
        pairs = _inside_one(files)
        if pairs:
            whole = 2 * len(pairs) == len(files)
            found.append((2 if whole else 0, len(pairs), folder, folder, pairs))
    for one in folders:
        for other in folders:
            if one == other or not _is_first(
                one.relative_to(root), other.relative_to(root), folders[one], folders[other]
            ):
                continue
            pairs = _pairs(folders[one], folders[other])
            if pairs:
                alike = _plain(str(one.relative_to(root))) == _plain(str(other.relative_to(root)))
                found.append((int(alike), len(pairs), one, other, pairs))
    found.sort(key=lambda match: match[:2], reverse=True)
    for _, _, images, masks, pairs in found:
        yield images, masks, pairs


def _inside_one(files: Sequence[Path]) -> dict[Path, Path]:
    """Return the pairs in one folder: by an ending, by words such as mask, or a PNG file beside a JPEG one."""
    stems = {path.stem for path in files}
    ending = _ending(stems, stems)
    ways = [
        [bool(ending) and path.stem.endswith(ending) and path.stem.removesuffix(ending) in stems for path in files],
        [_MASK.search(path.stem) is not None for path in files],
        [path.suffix.lower() not in _LOSSY for path in files],
    ]
    found = []
    for is_mask in ways:
        images = [path for path, mask in zip(files, is_mask, strict=True) if not mask]
        masks = [path for path, mask in zip(files, is_mask, strict=True) if mask]
        found.append(_pairs(images, masks))
    return max(found, key=len)


def _is_first(one: Path, other: Path, files: Sequence[Path], others: Sequence[Path]) -> bool:
    """Return whether the first of two folders is that of the images: by its name, its format, or its colours."""
    named = [_MASK.search(str(path)) is not None for path in (one, other)]
    if named[0] != named[1]:
        return named[1]
    lossy = [paths[0].suffix.lower() in _LOSSY for paths in (files, others)]
    if lossy[0] != lossy[1]:
        return lossy[0]
    return _count_colours(files[0]) > _count_colours(others[0])


def _count_colours(path: Path) -> int:
    try:
        with open_named(path) as image:
            return len(image.convert("RGB").getcolors(_MANY) or range(_MANY))
    except (OSError, ValueError):
        return 0


def _pairs(images: Sequence[Path], masks: Sequence[Path]) -> dict[Path, Path]:
    """Return the mask of each image that has one, by the way of naming that gives the most pairs."""
    ending = _ending({path.stem for path in images}, {path.stem for path in masks})
    ways = [("", False), (ending, False), ("", True)]
    found = []
    for end, plain in ways:
        by_name: dict[str, list[Path]] = {}
        for mask in masks:
            by_name.setdefault(_plain(mask.stem) if plain else mask.stem, []).append(mask)
        names = {image: _plain(image.stem) if plain else f"{image.stem}{end}" for image in images}
        once = Counter(names.values())
        found.append(
            {image: by_name[name][0] for image, name in names.items() if once[name] == len(by_name.get(name, ())) == 1}
        )
    return max(found, key=len)


def _ending(images: set[str], masks: set[str]) -> str:
    """Return what most masks' names have behind those of images, "" if none has."""
    gaps = ((stem, gap.start()) for stem in masks for gap in re.finditer(r"[-_.]", stem))
    endings = Counter(stem[place:] for stem, place in gaps if stem[:place] in images)
    return max(endings.items(), key=lambda item: item[1], default=("", 0))[0]


def _plain(name: str) -> str:
    """Return a name without the words for images and masks.

    >>> _plain("image_001"), _plain("train/masks"), _plain("a_seg")
    ('_001', 'train', 'a')
    """
    return _ROLE.sub("", name)
