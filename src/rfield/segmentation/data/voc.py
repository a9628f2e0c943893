"""The PASCAL VOC devkit layout: `JPEGImages`, `SegmentationClass`, `ImageSets/Segmentation`."""

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import PIL.Image
from scipy.io import loadmat

from rfield.segmentation.data.dataset import voc_palette
from rfield.segmentation.data.files import check_files, list_names, read_class_names, read_lines
from rfield.segmentation.data.listed import ListedDataset
from rfield.segmentation.data.listing import Entry, Listing, Refuse, list_entries, make_listing, raise_error
from rfield.segmentation.data.mask_options import MaskOptions
from rfield.segmentation.data.masks import MaskCode, plain_labels
from rfield.segmentation.data.paths import Folders, mask_ending, sample_path

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


class VOCDataset(ListedDataset):
    """Images and masks of any folder in the layout of a PASCAL VOC devkit.

    The list `ImageSets/Segmentation/SPLIT.txt` names the samples, `JPEGImages/ID.jpg` is an image and
    `SegmentationClass/ID.png` its mask, palette or 8-bit grey. The class names are the lines of `classes.txt`, or the
    21 of VOC if there is no such file. The masks of the split `train_aug` are in `SegmentationClassAug` (see
    `convert_sbd`).

    Args:
        root: the folder that holds `JPEGImages`.
        split: the name of a list, without ".txt".
        options: the mask options of a data config.

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

    def __init__(self, root: str | os.PathLike[str], split: str = "train", options: MaskOptions | None = None) -> None:
        listing = list_voc(Path(root), split, options or MaskOptions())
        images, masks = [entry.image for entry in listing.entries], [entry.masks[0] for entry in listing.entries]
        for paths in (images, masks):
            check_files(paths, f"the split {split!r} in {paths[0].relative_to(root).parts[0]}")
        super().__init__(root, listing)
        self.split = split


def list_voc(root: Path, split: str, options: MaskOptions, refuse: Refuse = raise_error) -> Listing:
    """Return the samples in the list of a split. Pass lines that leave the root to `refuse`.

    Raises:
        FileNotFoundError: if the root or the list is missing.
        ValueError: if the list is empty or not text, or `classes.txt` or the options do not fit.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder; give the one that holds JPEGImages and SegmentationClass")
    classes = root / "classes.txt"
    class_names = read_class_names(classes, VOC_CLASSES)
    masks = "SegmentationClassAug" if split == "train_aug" else "SegmentationClass"
    folders = Folders()

    def make(name: str) -> Entry:
        listed_in = f"the list of the split {split!r}"
        image = sample_path(root, "JPEGImages", name, ".jpg", listed_in, folders)
        ending = mask_ending(options.mask_suffix or "")
        return Entry(name, image, (sample_path(root, masks, name, ending, listed_in, folders),))

    source = root / "ImageSets" / "Segmentation" / f"{split}.txt"
    entries = list_entries(_read_list(root, split), make, source, refuse)
    advice = f"correct the mask or name all classes, one a line, in {classes}"
    own_names = classes if classes.is_file() else None
    return make_listing(class_names, MaskCode(plain_labels(len(class_names))), entries, advice, options, own_names)


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
        ValueError: if a .mat file is not a mask of SBD, or a list names a file outside the roots.

    Example:
        >>> convert_sbd("no/sbd", "no/VOC2012")
        Traceback (most recent call last):
        FileNotFoundError: no/sbd/train.txt is missing; give the folder of SBD that holds cls, train.txt and val.txt
    """
    sbd_root, voc_root = Path(sbd_root), Path(voc_root)
    for path in (sbd_root / "train.txt", sbd_root / "val.txt"):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; give the folder of SBD that holds cls, train.txt and val.txt")
    names = {*read_lines(sbd_root / "train.txt"), *read_lines(sbd_root / "val.txt")}
    names = (names | set(_read_list(voc_root, "train"))) - set(_read_list(voc_root, "val"))
    palette = [level for colour in voc_palette() for level in colour]
    target, folders = voc_root / "SegmentationClassAug", Folders()
    with tempfile.TemporaryDirectory(dir=voc_root, prefix=".SegmentationClassAug") as scratch:
        made = Path(scratch) / target.name
        made.mkdir()
        for name in names:
            own = sample_path(voc_root, "SegmentationClass", name, ".png", "a list of VOC or SBD", folders)
            if own.is_file():
                shutil.copyfile(own, made / own.name)
            else:
                mask = PIL.Image.fromarray(_read_sbd_mask(sbd_root / "cls" / f"{name}.mat"))
                mask.putpalette(palette)
                mask.save(made / own.name)
        listed = Path(scratch) / "train_aug.txt"
        listed.write_text("".join(f"{name}\n" for name in sorted(names)), encoding="utf-8")
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


def _read_list(root: Path, split: str) -> list[str]:
    folder = root / "ImageSets" / "Segmentation"
    lists = list_names(folder)
    if split not in lists:
        raise FileNotFoundError(
            f"there is no list of the split {split!r} in {folder}; the lists are: {', '.join(lists) or 'none'}"
        )
    ids = read_lines(folder / f"{split}.txt")
    if not ids:
        raise ValueError(f"{folder / f'{split}.txt'} is empty; it must name the images, one a line, without .jpg")
    return ids
