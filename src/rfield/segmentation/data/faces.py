"""Convert other face data sets to the layout and the 11 classes of Helen (see `HelenDataset`)."""

import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import PIL.Image
import torch
from torch import Tensor
from torchvision.tv_tensors import Mask

from rfield.segmentation.conventions import IGNORE_INDEX, Progress
from rfield.segmentation.data.dataset import exchange_classes
from rfield.segmentation.data.files import new_folder, read_lines
from rfield.segmentation.data.helen import HELEN_CLASSES, HELEN_LISTS, HelenDataset
from rfield.segmentation.data.images import image_files, image_sizes, read_image
from rfield.segmentation.data.masks import UNKNOWN, MaskCode, plain_labels, read_mask
from rfield.segmentation.data.paths import Folders, is_inside, near_miss
from rfield.segmentation.data.resized import resize_mask
from rfield.text import format_size

# In the order of the authors' script, because a later part covers earlier ones. Glasses (eye_g), which Helen does not
# have, are not painted: skin is also labelled below them.
_CELEBAMASK_PARTS = {
    "skin": "face skin",
    "nose": "nose",
    "l_eye": "left eye",
    "r_eye": "right eye",
    "l_brow": "left brow",
    "r_brow": "right brow",
    "l_ear": "background",
    "r_ear": "background",
    "mouth": "inner mouth",
    "u_lip": "upper lip",
    "l_lip": "lower lip",
    "hair": "hair",
    "hat": "background",
    "ear_r": "background",
    "neck_l": "background",
    "neck": "background",
    "cloth": "background",
}
_CELEBA_SPLITS = ("train", "val", "test")  # 0, 1 and 2 in CelebA's list
_FIRST_OF_CELEBA_VAL, _FIRST_OF_CELEBA_TEST = 162771, 182638
_LOOKED_AT = 200


class Conversion(NamedTuple):
    """The result of a converter.

    Attributes:
        root: the folder to give to `HelenDataset`.
        counts: split to number of faces.
        exchanged: left and right were exchanged, because the source's "left" is the person's own.
    """

    root: Path
    counts: dict[str, int]
    exchanged: bool


class _Face(NamedTuple):
    name: str
    split: str
    image: Path


def convert_celebamask(
    source: str | os.PathLike[str], target: str | os.PathLike[str], progress: Progress = lambda done, total: None
) -> Conversion:
    """Convert CelebAMask-HQ (Lee et al., CVPR 2020) to the layout of Helen.

    `CelebA-HQ-img/N.jpg` is an image, `CelebAMask-HQ-mask-anno/K/0000N_PART.png` with K = N // 2000 the binary
    mask of a part, which may be missing if the part is not visible. Parts are painted in the order of the data set's
    own script. Ears, earrings, neck, necklace, cloth and hat become background, glasses the class below them.
    Masks are resized to the image's size with the nearest label.

    The splits are CelebA's own if `CelebA-HQ-to-CelebA-mapping.txt` is in the source: by `list_eval_partition.txt`
    beside it, or without that file by the same rule (CelebA's numbers up to 162770 are train, from 182638 on test).
    Without a mapping, N ending in 8 is val, in 9 test.

    "Left" becomes the viewer's left, as in Helen. The side that the source means is measured from the positions of its
    eyes and brows, in faces from the whole set.

    Args:
        source: folder with `CelebA-HQ-img` and `CelebAMask-HQ-mask-anno`.
        target: folder to make; appears only when it is whole.
        progress: called with the number of faces done and of all.

    Returns:
        What was made.

    Raises:
        FileExistsError: if the target exists.
        FileNotFoundError: if the images, or all parts of one, are missing.
        ValueError: if a list is not understood, an image is not named by a number or is not in the mapping, or
            the parts differ in size or have other proportions than the image.
        OSError: if a file is damaged; the message names it.

    Example:
        >>> convert_celebamask("no/CelebAMask-HQ", "faces")
        Traceback (most recent call last):
        FileNotFoundError: no/CelebAMask-HQ/CelebA-HQ-img holds no images (.jpg); is the source the right folder?
    """
    source = Path(source)
    images = _images(source / "CelebA-HQ-img")
    odd = [path for path in images if not path.stem.isdecimal()]
    if odd:
        raise ValueError(f"{odd[0]} is not named by a number, as the images of CelebAMask-HQ are; remove it")
    images.sort(key=lambda path: int(path.stem))
    splits = _celeba_splits(source, [int(path.stem) for path in images])
    faces = [_Face(str(int(path.stem)), split, path) for path, split in zip(images, splits, strict=True)]
    folders = Folders()

    def read(face: _Face) -> Tensor:
        number = int(face.name)
        stem = source / "CelebAMask-HQ-mask-anno" / str(number // 2000) / f"{number:05d}"
        return _paint_parts(stem, face.image, folders)

    return _convert(faces, read, Path(target), progress)


def convert_lapa(
    source: str | os.PathLike[str], target: str | os.PathLike[str], progress: Progress = lambda done, total: None
) -> Conversion:
    """Convert LaPa (Liu et al., AAAI 2020), which has Helen's 11 classes in the same order, to the layout of Helen.

    `SPLIT/images/ID.jpg` is an image, `SPLIT/labels/ID.png` its mask; the splits are train, val and test. "Left"
    becomes the viewer's left, as in `convert_celebamask`.

    Args:
        source: folder with `train`, `val` and `test`.
        target: folder to make; appears only when it is whole.
        progress: called with the number of faces done and of all.

    Returns:
        What was made.

    Raises:
        FileExistsError: if the target exists.
        FileNotFoundError: if a split's images or a mask are missing.
        ValueError: if a mask is of another size than its image, of another kind than 8-bit grey or palette, or
            holds a value above 10, or two splits have an image of one name.
        OSError: if a file is damaged; the message names it.

    Example:
        >>> convert_lapa("no/LaPa", "faces")
        Traceback (most recent call last):
        FileNotFoundError: no/LaPa/train/images holds no images (.jpg); is the source the right folder?
    """
    source = Path(source)
    faces = [_Face(path.stem, split, path) for split in HELEN_LISTS for path in _images(source / split / "images")]
    folders = Folders()
    for face in faces:
        mask = _lapa_mask(face, folders)
        if not mask.is_file():
            raise FileNotFoundError(f"{mask} is missing, the mask of {face.image}{near_miss(mask)}; unpack LaPa again")
    return _convert(faces, lambda face: _read_lapa(face, folders), Path(target), progress)


def _images(folder: Path) -> list[Path]:
    paths = image_files(folder) if folder.is_dir() else []
    if not paths:
        raise FileNotFoundError(f"{folder} holds no images (.jpg); is the source the right folder?")
    return [_inside(path) for path in paths]


def _inside(path: Path) -> Path:
    """Return the file, or raise an error if it is a link out of its folder."""
    if path.is_symlink() and not is_inside(path, path.parent):
        raise ValueError(f"{path} is a link to a file outside {path.parent}; put the file itself there")
    return path


def _celeba_splits(source: Path, numbers: list[int]) -> list[str]:
    """Return the split of every image of CelebA-HQ."""
    mapping = source / "CelebA-HQ-to-CelebA-mapping.txt"
    if not mapping.is_file():
        return [{8: "val", 9: "test"}.get(number % 10, "train") for number in numbers]
    rows = _read_table(mapping, r"(\d+)\s+\d+\s+(\d+\.jpg)", "0 119613 119614.jpg")
    names = {int(index): name for index, name in rows}
    unmapped = [number for number in numbers if number not in names]
    if unmapped:
        raise ValueError(f"{mapping} has no line for {unmapped[0]}.jpg ({len(unmapped)} such images)")
    partition = source / "list_eval_partition.txt"
    if not partition.is_file():
        celeba = [int(Path(names[number]).stem) for number in numbers]
        return [_CELEBA_SPLITS[(n >= _FIRST_OF_CELEBA_VAL) + (n >= _FIRST_OF_CELEBA_TEST)] for n in celeba]
    groups = {name: int(group) for name, group in _read_table(partition, r"(\d+\.jpg)\s+([012])", "000001.jpg 0")}
    ungrouped = [names[number] for number in numbers if names[number] not in groups]
    if ungrouped:
        raise ValueError(f"{partition} has no line for {ungrouped[0]} ({len(ungrouped)} such images)")
    return [_CELEBA_SPLITS[groups[names[number]]] for number in numbers]


def _read_table(path: Path, pattern: str, example: str) -> list[tuple[str, ...]]:
    """Return the matches of the pattern's groups in every line except the heading."""
    rows = []
    for line in read_lines(path):
        match = re.fullmatch(pattern, line)
        if match:
            rows.append(match.groups())
        elif not line.startswith("idx "):
            raise ValueError(f"{path} has the line {line!r}; a line reads, for example, {example!r}")
    return rows


def _paint_parts(stem: Path, image: Path, folders: Folders) -> Tensor:
    """Paint all parts of a face in one mask of its image's size, uint8 [H, W]."""
    mask: Tensor | None = None
    for part, name in _CELEBAMASK_PARTS.items():
        path = _inside(folders.find(stem.with_name(f"{stem.name}_{part}.png")))
        if not path.is_file():
            continue
        drawn = (read_image(path) > 0).any(0)
        if mask is None:
            mask = torch.zeros(drawn.shape, dtype=torch.uint8)
        if drawn.shape != mask.shape:
            raise ValueError(
                f"{path} is {format_size(drawn.shape)} px, but other parts of this face {format_size(mask.shape)}"
            )
        mask[drawn] = HELEN_CLASSES.index(name)
    if mask is None:
        raise FileNotFoundError(f"{image} has no masks: there is no {stem}_skin.png and no other part")
    height, width = image_sizes([image])[0]
    if height * mask.shape[1] != width * mask.shape[0]:
        raise ValueError(
            f"{stem}_skin.png and the other parts are {format_size(mask.shape)} px (height x width), other proportions "
            f"than those of {image}, {height}x{width}"
        )
    resized: Tensor = resize_mask(Mask(mask), (height, width))
    return resized


def _lapa_mask(face: _Face, folders: Folders) -> Path:
    return _inside(folders.find(face.image.parents[1] / "labels" / f"{face.name}.png"))


def _read_lapa(face: _Face, folders: Folders) -> Tensor:
    labels = plain_labels(len(HELEN_CLASSES))
    labels[IGNORE_INDEX] = UNKNOWN
    size = image_sizes([face.image])[0]
    advice = "LaPa has the classes 0..10; unpack it again"
    mask = read_mask((_lapa_mask(face, folders),), size, MaskCode(labels), advice, face.image)
    return torch.from_numpy(mask)


def _convert(faces: list[_Face], read: Callable[[_Face], Tensor], target: Path, progress: Progress) -> Conversion:
    splits: dict[str, list[str]] = {split: [] for split in HELEN_LISTS}
    seen: dict[str, Path] = {}
    for face in faces:
        if face.name in seen:
            raise ValueError(f"{seen[face.name]} and {face.image} have the same name; rename one of them and its mask")
        seen[face.name] = face.image
        splits[face.split].append(face.name)
    with new_folder(target) as made:
        exchanged = _is_persons_left(read(face) for face in faces[:: max(1, len(faces) // _LOOKED_AT)])
        (made / "images").mkdir()
        for done, face in enumerate(faces, start=1):
            mask = exchange_classes(read(face), HelenDataset.mirrored_classes if exchanged else ())
            _write_face(made, face, mask)
            progress(done, len(faces))
        for split, names in splits.items():
            lines = [f"{number} , {name}\n" for number, name in enumerate(names, start=1)]
            (made / HELEN_LISTS[split]).write_text("".join(lines), encoding="utf-8")
    return Conversion(target, {split: len(names) for split, names in splits.items()}, exchanged)


def _is_persons_left(masks: Iterable[Tensor]) -> bool:
    """Return whether the classes named left are on the right in most of the faces with both sides."""
    votes = 0
    for mask in masks:
        for sides in HelenDataset.mirrored_classes:
            left, right = ((mask == side).nonzero()[:, 1].double() for side in sides)
            if len(left) and len(right):
                votes += 1 if left.mean() > right.mean() else -1
    return votes > 0


def _write_face(root: Path, face: _Face, mask: Tensor) -> None:
    shutil.copyfile(face.image, root / "images" / f"{face.name}{face.image.suffix}")
    folder = root / "labels" / face.name
    folder.mkdir(parents=True)
    for label in range(len(HELEN_CLASSES)):
        sure = PIL.Image.fromarray(((mask == label) * 255).byte().numpy())
        # Maps are black and white: the highest compression takes ten times as long and saves little.
        sure.save(folder / f"{face.name}_lbl{label:02d}.png", compress_level=1)
