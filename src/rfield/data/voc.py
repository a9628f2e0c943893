"""The PASCAL VOC devkit layout: `JPEGImages`, `SegmentationClass`, `ImageSets/Segmentation`."""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from scipy.io import loadmat
from torchvision.datasets import SBDataset, VOCSegmentation
from torchvision.tv_tensors import Image, Mask

from rfield.data.dataset import IGNORE_INDEX, ParsingDataset, voc_palette

VOC_CLASSES = (
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)


class VOCDataset(ParsingDataset):
    """Photographs and masks of any folder in the layout of a PASCAL VOC devkit.

    The list `ImageSets/Segmentation/SPLIT.txt` names the samples, `JPEGImages/ID.jpg` is a photograph and
    `SegmentationClass/ID.png` its mask, palette or 8-bit grey. The class names stand in `classes.txt`, one a line,
    or are the 21 of VOC where there is no such file. The split `train_aug` has its masks in `SegmentationClassAug`
    (see `download_voc2012`).

    Args:
        root: the folder that holds `JPEGImages`.
        split: the name of a list, without ".txt".

    Raises:
        FileNotFoundError: if the root, the list, an image or a mask is missing.
        ValueError: if the list is empty or names a file outside the root, or `classes.txt` does not fit.

    Reading a sample raises `OSError` for a damaged file and `ValueError` for a mask of another size than its image,
    of another kind than palette or 8-bit grey, or with a value that is neither a class nor 255; both name the file.

    Example:
        >>> scratch = tempfile.TemporaryDirectory()
        >>> root = Path(scratch.name)
        >>> for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        ...     (root / folder).mkdir(parents=True)
        >>> PIL.Image.new("RGB", (16, 12)).save(root / "JPEGImages/one.jpg")
        >>> PIL.Image.new("L", (16, 12), 15).save(root / "SegmentationClass/one.png")
        >>> _ = (root / "ImageSets/Segmentation/train.txt").write_text("one")
        >>> dataset = VOCDataset(root, "train")
        >>> image, mask = dataset[0]
        >>> tuple(image.shape), dataset.class_names[mask[0, 0]]
        ((3, 12, 16), 'person')
        >>> scratch.cleanup()
    """

    def __init__(self, root: str | os.PathLike[str], split: str = "train") -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise FileNotFoundError(
                f"{self.root} is not a folder; name the one that holds JPEGImages and SegmentationClass"
            )
        self.split = split
        self.class_names = _read_class_names(self.root / "classes.txt")
        self.ids = _read_list(self.root, split)
        masks = "SegmentationClassAug" if split == "train_aug" else "SegmentationClass"
        self.image_paths = _sample_paths(self.root, "JPEGImages", self.ids, ".jpg", split)
        self.mask_paths = _sample_paths(self.root, masks, self.ids, ".png", split)
        self.palette = _read_palette(self.mask_paths[0])

    def __getitem__(self, index: int) -> tuple[Image, Mask]:
        image = self._read_image(self.image_paths[index])
        mask = self._read_mask(self.mask_paths[index])
        if mask.shape != image.shape[1:]:
            raise ValueError(
                f"{self.mask_paths[index]} is {mask.shape[0]}x{mask.shape[1]} px (height x width) but its image is "
                f"{image.shape[1]}x{image.shape[2]}; a mask must have the size of its image"
            )
        return image, mask

    def fingerprint(self) -> str:
        """A hexadecimal hash of the list, the class names, and every file's name, size and time of change."""
        digest = hashlib.sha256(repr((self.ids, self.class_names)).encode())
        for path in (*self.image_paths, *self.mask_paths):
            state = path.stat()
            digest.update(repr((str(path.relative_to(self.root)), state.st_size, state.st_mtime_ns)).encode())
        return digest.hexdigest()

    def sizes(self) -> list[tuple[int, int]]:
        """The (height, width) in px of every image, read from the files' headers.

        Raises:
            OSError: if a file is not an image; the message names it.
        """
        sizes = []
        for path in self.image_paths:
            with _open(path) as image:
                sizes.append((image.height, image.width))
        return sizes

    @staticmethod
    def _read_image(path: Path) -> Image:
        with _open(path) as file:
            pixels = np.array(_load(file, path).convert("RGB"))
        return Image(torch.from_numpy(pixels).permute(2, 0, 1).contiguous())

    def _read_mask(self, path: Path) -> Mask:
        with _open(path) as file:
            # Pillow spreads the values of 1, 2 and 4-bit grey over 0..255, which would make other classes of them.
            few_bits = file.mode == "L" and file.format == "PNG" and file.tile[0][3] != "L"
            if file.mode not in ("P", "L") or few_bits:
                raise ValueError(
                    f"{path} is of Pillow mode {file.mode!r}{' with less than 8 bits' if few_bits else ''}; a mask "
                    "must be a palette image ('P') or 8-bit grey ('L') whose values are class indices"
                )
            mask = np.array(_load(file, path))
        wrong = mask[(mask >= self.num_classes) & (mask != IGNORE_INDEX)]
        if wrong.size:
            raise ValueError(
                f"{path} holds {wrong.size} px of the values {np.unique(wrong).tolist()}, but there are "
                f"{self.num_classes} classes, 0..{self.num_classes - 1}, and 255 for no label; correct the mask or "
                f"name all classes, one a line, in {self.root / 'classes.txt'}"
            )
        return Mask(torch.from_numpy(mask))


def download_voc2012(root: str | os.PathLike[str], augmented: bool = False) -> Path:
    """Download PASCAL VOC 2012 and, on request, the masks of SBD for 10,582 training images.

    A download that was cut off may simply be started again.

    Args:
        root: folder to download into; about 4 GB, with `augmented` 8 GB.
        augmented: also fetch SBD (Hariharan et al., ICCV 2011) and make the split `train_aug` of it.

    Returns:
        The devkit's folder, `root/VOCdevkit/VOC2012`: the root to give to `VOCDataset`.

    Raises:
        OSError: if a server cannot be reached.
        RuntimeError: if a file arrives damaged.

    Example:
        >>> root = download_voc2012("data", augmented=True)  # doctest: +SKIP
        >>> len(VOCDataset(root, "train_aug"))  # doctest: +SKIP
        10582
    """
    root = Path(root)
    devkit = root / "VOCdevkit" / "VOC2012"
    VOCSegmentation(root, year="2012", image_set="val", download=True)
    if augmented:
        sbd = root / "sbd"
        # torchvision moves val.txt last, and cannot move onto what an interrupted run has left.
        if not (sbd / "val.txt").is_file():
            for name in ("cls", "img", "inst", "benchmark_RELEASE"):
                shutil.rmtree(sbd / name, ignore_errors=True)
            (sbd / "train.txt").unlink(missing_ok=True)
            SBDataset(sbd, download=True)
        convert_sbd(sbd, devkit)
    return devkit


def convert_sbd(sbd_root: str | os.PathLike[str], voc_root: str | os.PathLike[str]) -> list[str]:
    """Turn the .mat masks of SBD into palette PNGs of a VOC devkit and list them as the split `train_aug`.

    The split is SBD's train and val and VOC's train, without VOC's val. Images that VOC has masks for keep them.
    Writes `SegmentationClassAug` and `ImageSets/Segmentation/train_aug.txt`, which replace older ones only when
    they are whole.

    Args:
        sbd_root: folder with `cls/ID.mat`, `train.txt` and `val.txt`.
        voc_root: the VOC devkit, with `SegmentationClass` and the lists `train` and `val`.

    Returns:
        The names in the new list, sorted.

    Raises:
        FileNotFoundError: if a list or a .mat file is missing.
        ValueError: if a .mat file is not a mask of SBD.

    Example:
        >>> convert_sbd("no/sbd", "no/VOC2012")
        Traceback (most recent call last):
        FileNotFoundError: no/sbd/train.txt is missing; give the folder of SBD that holds cls, train.txt and val.txt
    """
    sbd_root, voc_root = Path(sbd_root), Path(voc_root)
    for path in (sbd_root / "train.txt", sbd_root / "val.txt"):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; give the folder of SBD that holds cls, train.txt and val.txt")
    names = {*_read_names(sbd_root / "train.txt"), *_read_names(sbd_root / "val.txt")}
    names = (names | set(_read_list(voc_root, "train"))) - set(_read_list(voc_root, "val"))
    palette = [level for colour in voc_palette() for level in colour]
    target = voc_root / "SegmentationClassAug"
    with tempfile.TemporaryDirectory(dir=voc_root, prefix=".SegmentationClassAug") as scratch:
        made = Path(scratch) / target.name
        made.mkdir()
        for name in names:
            own = voc_root / "SegmentationClass" / f"{name}.png"
            if own.is_file():
                shutil.copyfile(own, made / own.name)
            else:
                mask = PIL.Image.fromarray(_read_sbd_mask(sbd_root / "cls" / f"{name}.mat"))
                mask.putpalette(palette)
                mask.save(made / own.name)
        listed = Path(scratch) / "train_aug.txt"
        listed.write_text("".join(f"{name}\n" for name in sorted(names)))
        shutil.rmtree(target, ignore_errors=True)
        made.rename(target)
        listed.replace(voc_root / "ImageSets" / "Segmentation" / listed.name)
    return sorted(names)


def _read_sbd_mask(path: Path) -> np.ndarray:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is listed by SBD but missing; download SBD again")
    try:
        mask = np.asarray(loadmat(path)["GTcls"][0]["Segmentation"][0])
    except Exception as error:  # scipy raises many kinds for damaged files
        raise ValueError(f"{path} is not a mask of SBD ({error}); download SBD again") from error
    if mask.ndim != 2 or mask.dtype != np.uint8:
        raise ValueError(f"{path} holds a mask of {mask.dtype} {mask.shape}; expected uint8 (height, width)")
    return mask


def _read_names(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8-sig").splitlines()
    return [line.strip() for line in lines if line.strip()]


def _read_class_names(path: Path) -> tuple[str, ...]:
    if not path.is_file():
        return VOC_CLASSES
    names = _read_names(path)
    if len(set(names)) != len(names) or not 1 <= len(names) <= IGNORE_INDEX:
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(
            f"{path} holds {len(names)} class names{f', some of them twice: {twice}' if twice else ''}; "
            f"it needs 1 to {IGNORE_INDEX} different ones, one a line"
        )
    return tuple(names)


def _read_list(root: Path, split: str) -> list[str]:
    folder = root / "ImageSets" / "Segmentation"
    lists = sorted(path.stem for path in folder.glob("*.txt"))
    if split not in lists:
        raise FileNotFoundError(
            f"there is no list of the split {split!r} in {folder}; there are: {', '.join(lists) or 'none'}"
        )
    ids = _read_names(folder / f"{split}.txt")
    if not ids:
        raise ValueError(f"{folder / f'{split}.txt'} is empty; it must name the images, one a line, without .jpg")
    return ids


def _sample_paths(root: Path, folder: str, ids: list[str], suffix: str, split: str) -> list[Path]:
    """The file of every sample; the folder itself may be a link to elsewhere, a sample may not."""
    allowed = (root.resolve(), (root / folder).resolve())
    paths = [root / folder / f"{name}{suffix}" for name in ids]
    for path, name in zip(paths, ids, strict=True):
        if not any(path.resolve().is_relative_to(place) for place in allowed):
            raise ValueError(f"the list of the split {split!r} names {name!r}, a file outside {root}; remove that line")
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{missing[0]} is missing ({len(missing)} of the {len(ids)} files of the split {split!r} in {folder}); "
            "add the file or remove its line from the list"
        )
    return paths


def _read_palette(path: Path) -> list[tuple[int, int, int]]:
    """The 256 colours of a palette mask; VOC's stand in for those that the file lacks."""
    with _open(path) as mask:
        levels = mask.getpalette() or []
    colours = list(zip(levels[::3], levels[1::3], levels[2::3], strict=True))
    return colours + voc_palette()[len(colours) :]


def _open(path: Path) -> PIL.Image.Image:
    try:
        return PIL.Image.open(path)
    except (OSError, PIL.Image.DecompressionBombError) as error:
        raise OSError(f"{path} cannot be opened as an image ({error}); replace the file") from error


def _load(image: PIL.Image.Image, path: Path) -> PIL.Image.Image:
    try:
        image.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise OSError(f"{path} is a damaged image ({error}); replace the file") from error
    return image
