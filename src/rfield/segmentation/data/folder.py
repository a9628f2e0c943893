"""A plain folder of images and masks, the layout for your own data."""

import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rfield.segmentation.data.files import read_class_names
from rfield.segmentation.data.images import IMAGE_SUFFIXES, image_files
from rfield.segmentation.data.listed import ListedDataset
from rfield.segmentation.data.listing import Entry, Listing, Refuse, entries_inside, make_listing, raise_error
from rfield.segmentation.data.mask_options import MaskOptions
from rfield.segmentation.data.masks import MaskCode, plain_labels
from rfield.segmentation.data.paths import NearMisses, mask_ending, subfolders
from rfield.text import counted

_IMAGES = ("images", "image", "imgs", "img")
_MASKS = ("masks", "mask", "labels", "label", "annotations", "gt")
_SUFFIXES = ("", "_mask")


class FolderDataset(ListedDataset):
    """Pairs of `SPLIT/images/NAME.jpg` and `SPLIT/masks/NAME.png` (or other image files, or `NAME_mask.png`).

    A mask is a palette image or 8-bit grey. Its values are the lines of `classes.txt`, counted from 0, and 255 for no
    label. A palette in the first mask gives the colours. Files without an image suffix are ignored.
    The folders may also be `images/SPLIT` and `masks/SPLIT`, or `SPLIT` and `SPLIT_masks`; `labels`, `annotations` and
    `gt` also work for `masks`; and masks may be in the folder of their images as `NAME_mask.png`.

    Args:
        root: the folder that holds `classes.txt` (one class a line) and the splits.
        split: a folder in it: "train", "val", "test" or another.
        options: the mask options of a data config; with `colours`, `classes.txt` is not needed.

    Raises:
        FileNotFoundError: if the root, `classes.txt`, the split, the image of a mask or the mask of an image is
            missing.
        ValueError: if `classes.txt` is empty or names a class twice, the split is empty, or two images have one name.

    Reading a sample raises `OSError` for a damaged file and `ValueError` for a mask of another size than its image,
    of another kind than palette or 8-bit grey, or with a value that is neither a class nor 255; both name the file.

    Example:
        >>> import tempfile, PIL.Image
        >>> scratch = tempfile.TemporaryDirectory()
        >>> root = Path(scratch.name)
        >>> for folder in ("images", "masks"):
        ...     (root / "train" / folder).mkdir(parents=True)
        >>> PIL.Image.new("RGB", (16, 12)).save(root / "train/images/one.jpg")
        >>> PIL.Image.new("L", (16, 12), 1).save(root / "train/masks/one.png")
        >>> _ = (root / "classes.txt").write_text("road\\ncar")
        >>> dataset = FolderDataset(root, "train")
        >>> image, mask = dataset[0]
        >>> tuple(image.shape), dataset.class_names[mask[0, 0]]
        ((3, 12, 16), 'car')
        >>> scratch.cleanup()
    """

    def __init__(self, root: str | os.PathLike[str], split: str = "train", options: MaskOptions | None = None) -> None:
        super().__init__(root, list_folder(Path(root), split, options or MaskOptions()))


def list_folder(root: Path, split: str, options: MaskOptions, refuse: Refuse = raise_error) -> Listing:
    """Return the samples in the folders of a split. Pass images without a mask and other faults to `refuse`.

    Raises:
        FileNotFoundError: if the root, `classes.txt` or the split is missing.
        ValueError: if `classes.txt` or the options do not fit, or there is no image.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder; give the one that holds classes.txt and train")
    classes = root / "classes.txt"
    own_names = classes if classes.is_file() else None
    if own_names is None and options.colours is None:
        first = int(options.reduce_zero_label)
        raise FileNotFoundError(
            f"{classes} is missing; it must name the classes, one a line, from mask value {first} on"
        )
    class_names = read_class_names(classes, ())
    suffixes = mask_suffixes(options)
    images, masks = _folders(root, split, suffixes)
    image_paths, mask_paths = image_files(images), image_files(masks)
    if images == masks:
        mask_paths = [path for path in image_paths if _is_mask(path, suffixes)]
        image_paths = [path for path in image_paths if not _is_mask(path, suffixes)]
    own_images: dict[str, Path] = {}
    for path in image_paths:
        other = own_images.setdefault(path.stem, path)
        if other != path:
            refuse(path, ValueError(f"{other} and {path} would have the same mask; rename or remove one of them"))
    own = _masks_of(own_images, mask_paths, suffixes, refuse)
    _refuse_unpaired(own_images, own, mask_paths, masks, images, suffixes[0], refuse)
    if not own_images:
        inside = "".join(
            f", but the folder {path.name}; move the files of that folder to {images}"
            for path in subfolders(images)[:1]
        )
        raise ValueError(f"{images} holds no image ({', '.join(IMAGE_SUFFIXES)}){inside}")

    pairs = [Entry(name, image, (own[name],)) for name, image in own_images.items() if name in own]
    advice = f"correct the mask or name all classes, one a line, in {classes}"
    code = MaskCode(plain_labels(len(class_names)))
    return make_listing(class_names, code, entries_inside(pairs, root, refuse), advice, options, own_names)


def mask_suffixes(options: MaskOptions) -> Sequence[str]:
    """Return the suffixes that may follow an image's name in its mask's name."""
    return _SUFFIXES if options.mask_suffix is None else (options.mask_suffix,)


def splits_of(root: Path, suffixes: Sequence[str] = _SUFFIXES) -> dict[str, tuple[Path, list[Path]]]:
    """Return for each split the folder of its images, and the folders that may hold its masks."""
    found: dict[str, tuple[Path, list[Path]]] = {}
    folders = subfolders(root)
    for folder in folders:
        images = _named(folder, _IMAGES)
        if images:
            found[folder.name] = (images[0], _named(folder, _MASKS))
    for shared in _named(root, _IMAGES):
        for folder in subfolders(shared):
            masks = [other / folder.name for other in _named(root, _MASKS)]
            found.setdefault(folder.name, (folder, [path for path in masks if path.is_dir()]))
    for folder in folders:
        ends = {f"{folder.name}{mark}{name}".lower() for name in (*_MASKS, "annot") for mark in ("_", "-", "")}
        masks = [other for other in folders if other.name.lower() in ends]
        if masks or any(_is_mask(path, suffixes) for path in image_files(folder)):
            found.setdefault(folder.name, (folder, masks))
    return found


def _folders(root: Path, split: str, suffixes: Sequence[str]) -> tuple[Path, Path]:
    """Return the folders of a split's images and masks; they are the same if one folder holds both."""
    found = splits_of(root, suffixes)
    if split not in found:
        known = ", ".join(sorted(found)) or "none"
        raise FileNotFoundError(
            f"there is no folder {split}/images in {root}; there are the splits: {known}{_split_advice(root, split)}"
        )
    images, masks = found[split]
    if len(masks) > 1 and masks[0].name.lower() != _MASKS[0]:
        names = " or ".join(map(str, masks))
        raise ValueError(f"the masks of {images} may lie in {names}; rename the folder that holds them to {_MASKS[0]}")
    if not masks and not any(_is_mask(path, suffixes) for path in image_files(images)):
        others = ", ".join(str(path.relative_to(root)) for path in _near(root, images)) or "no other"
        raise FileNotFoundError(
            f"there is no folder of masks beside {images}, which holds none either; looked for {', '.join(_MASKS)}, "
            f"found the folders: {others}; rename the one that holds the masks to {images.with_name(_MASKS[0])}"
            f"{_suffix_advice(images)}"
        )
    return images, masks[0] if masks else images


def _split_advice(root: Path, split: str) -> str:
    """Return what is in the place of a missing split, as the end of the error."""
    for folder in _named(root, _IMAGES):
        if image_files(folder):
            return f"; the images in {folder} belong to no split; move them to {folder / split}, and their masks too"
    if not (root / split).is_dir():
        return ""
    inside = ", ".join(path.name for path in subfolders(root / split)) or "no folder"
    return (
        f"; {root / split} holds {counted(len(image_files(root / split)), 'image')} and {inside}: put the images in "
        f"{split}/{_IMAGES[0]} and the masks in {split}/{_MASKS[0]}{_suffix_advice(root / split)}"
    )


def _suffix_advice(folder: Path) -> str:
    """Return advice on a suffix that half of a folder's images add to the names of the others, or ""."""
    stems = {path.stem for path in image_files(folder)}
    gaps = ((stem, gap.start()) for stem in stems for gap in re.finditer(r"[-_.]", stem))
    endings = Counter(stem[place:] for stem, place in gaps if stem[:place] in stems)
    ending, count = max(endings.items(), key=lambda item: item[1], default=("", 0))
    if 2 * count < len(stems) or not count:
        return ""
    return f", or if NAME{ending} are the masks of the others, give `mask_suffix: {ending}` in a data config"


def _near(root: Path, images: Path) -> list[Path]:
    """Return the folders that may hold the masks of a folder of images."""
    near = [*subfolders(images.parent), *subfolders(root)]
    return sorted({path for path in near if path != images and not images.is_relative_to(path)})


def _named(folder: Path, names: Sequence[str]) -> list[Path]:
    """Return the subfolders of these names, in upper or lower case, in the order of the names."""
    own = {path.name.lower(): path for path in subfolders(folder)}
    return [own[name] for name in names if name in own]


def _is_mask(path: Path, suffixes: Sequence[str]) -> bool:
    """Return whether a file has the name of a mask."""
    return any(path.stem.endswith(Path(mask_ending(suffix)).stem) for suffix in suffixes if suffix)


def _masks_of(
    images: dict[str, Path], mask_paths: Sequence[Path], suffixes: Sequence[str], refuse: Refuse
) -> dict[str, Path]:
    """Return the mask of each image, by the image's name, with the first suffix that exists."""
    by_stem: dict[str, list[Path]] = {}
    for path in mask_paths:
        by_stem.setdefault(path.stem, []).append(path)
    own: dict[str, Path] = {}
    taken: set[Path] = set()
    for ending in map(mask_ending, suffixes):
        for name in images:
            paths = [path for path in by_stem.get(Path(f"{name}{ending}").stem, []) if path not in taken]
            paths = [path for path in paths if path.name == f"{name}{ending}"] or paths
            if name in own or not paths:
                continue
            if len(paths) > 1:
                text = f"{paths[0]} and {paths[1]} may be the mask of {images[name]}; remove all but one of them"
                refuse(paths[0], ValueError(text))
            own[name] = paths[0]
            taken |= set(by_stem[paths[0].stem])
    return own


def _refuse_unpaired(
    images: dict[str, Path],
    own: dict[str, Path],
    mask_paths: Sequence[Path],
    masks: Path,
    folder: Path,
    suffix: str,
    refuse: Refuse,
) -> None:
    """Refuse images without a mask and masks without an image."""
    near = NearMisses()
    without_mask = [name for name in images if name not in own]
    for name in without_mask:
        path = masks / f"{name}{mask_ending(suffix)}"
        error = FileNotFoundError(
            f"{path} is missing, the mask of {images[name]} ({len(without_mask)} of {len(images)} images have none)"
            f"{near.of(path)}; add the mask or remove the image"
        )
        refuse(path, error)
    stems = {path.stem for path in own.values()}
    without_image = [path for path in mask_paths if path.stem not in stems]
    for path in without_image:
        error = FileNotFoundError(
            f"{path} is the mask of no image in {folder} ({len(without_image)} of {len(mask_paths)} "
            f"masks have none of {', '.join(IMAGE_SUFFIXES)}){near.of(folder / path.name)}; add the image or remove "
            "the mask"
        )
        refuse(path, error)
