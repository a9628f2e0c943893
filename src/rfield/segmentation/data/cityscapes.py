"""Cityscapes in its original folders: `leftImg8bit` and `gtFine`, by city."""

import os
from pathlib import Path

import numpy as np
from torchvision.datasets import Cityscapes

from rfield.segmentation.conventions import IGNORE_INDEX
from rfield.segmentation.data.dataset import voc_palette
from rfield.segmentation.data.files import check_files
from rfield.segmentation.data.images import image_files
from rfield.segmentation.data.listed import ListedDataset
from rfield.segmentation.data.listing import (
    Entry,
    Listing,
    Refuse,
    entries_inside,
    list_entries,
    make_listing,
    raise_error,
)
from rfield.segmentation.data.mask_options import MaskOptions
from rfield.segmentation.data.masks import UNKNOWN, MaskCode, plain_labels
from rfield.segmentation.data.paths import Folders, mask_ending

_SPLITS = ("train", "val", "test")
_SCORED = sorted((entry for entry in Cityscapes.classes if not entry.ignore_in_eval), key=lambda entry: entry.train_id)
_TRAIN_IDS = np.full(256, UNKNOWN, np.int16)
for _entry in Cityscapes.classes:
    if _entry.id >= 0:  # masks never contain the licence plate, -1
        _TRAIN_IDS[_entry.id] = _entry.train_id
_IMAGE_SUFFIX = "_leftImg8bit"
_MASK_SUFFIX = "_gtFine_labelIds"
_TRAIN_ID_SUFFIX = "_gtFine_labelTrainIds"
_JUNK = ("thumbs.db", "desktop.ini")

CITYSCAPES_CLASSES = tuple(entry.name for entry in _SCORED)


class CityscapesDataset(ListedDataset):
    """Street scenes of Cityscapes (Cordts et al., CVPR 2016), fine annotations, with the 19 classes that are scored.

    `leftImg8bit/SPLIT/CITY/ID_leftImg8bit.png` is an image, `gtFine/SPLIT/CITY/ID_gtFine_labelIds.png` its label
    ids 0..33, which become the 19 train ids; all other ids become 255. The masks of the test split hold no scored
    class, because its labels are not published. Names, colours and ids are from torchvision's table.

    Args:
        root: the folder that holds `leftImg8bit` and `gtFine`.
        split: "train", "val" or "test".
        options: the mask options of a data config.

    Raises:
        FileNotFoundError: if one of the folders or a mask is missing, or there are no images.
        OSError: if the folders cannot be listed.
        ValueError: if the split has another name.

    Reading a sample raises `OSError` for a damaged file and `ValueError` for a mask of another size than its image,
    of another kind than 8-bit grey or palette, or with an id that Cityscapes does not have; all name the file.

    Example:
        >>> import tempfile, PIL.Image
        >>> scratch = tempfile.TemporaryDirectory()
        >>> root = Path(scratch.name)
        >>> for folder in ("leftImg8bit", "gtFine"):
        ...     (root / folder / "val/ulm").mkdir(parents=True)
        >>> PIL.Image.new("RGB", (16, 12)).save(root / "leftImg8bit/val/ulm/ulm_0_0_leftImg8bit.png")
        >>> PIL.Image.new("L", (16, 12), 26).save(root / "gtFine/val/ulm/ulm_0_0_gtFine_labelIds.png")
        >>> dataset = CityscapesDataset(root, "val")
        >>> image, mask = dataset[0]
        >>> dataset.ids, tuple(image.shape), dataset.class_names[mask[0, 0]]
        (['ulm_0_0'], (3, 12, 16), 'car')
        >>> scratch.cleanup()
    """

    class_names = CITYSCAPES_CLASSES

    def __init__(self, root: str | os.PathLike[str], split: str = "train", options: MaskOptions | None = None) -> None:
        listing = list_cityscapes(Path(root), split, options or MaskOptions())
        masks = [entry.masks[0] for entry in listing.entries]
        fix = f"unpack gtFine_trainvaltest.zip of Cityscapes in {root} again"
        check_files(masks, f"the split {split!r}", "masks", fix)
        colours = [entry.color for entry in _SCORED]
        super().__init__(root, listing, colours + voc_palette()[len(colours) : IGNORE_INDEX] + [(0, 0, 0)])


def list_cityscapes(root: Path, split: str, options: MaskOptions, refuse: Refuse = raise_error) -> Listing:
    """Return the samples in the folders of a split. Pass samples whose files are outside the root to `refuse`.

    Raises:
        FileNotFoundError: if a folder is missing or there are no images.
        OSError: if there are files among the cities.
        ValueError: if the split has another name, or the options do not fit.
    """
    if split not in _SPLITS:
        raise ValueError(f"Cityscapes has no split {split!r}; it has {', '.join(_SPLITS)}")
    for folder, archive in (("leftImg8bit", "leftImg8bit_trainvaltest.zip"), ("gtFine", "gtFine_trainvaltest.zip")):
        if not (root / folder / split).is_dir():
            raise FileNotFoundError(
                f"{root / folder / split} is not a folder; unpack {archive} of Cityscapes in {root}"
            )
    found = sorted((root / "leftImg8bit" / split).iterdir())
    cities = [path for path in found if not path.name.startswith(".") and path.name.lower() not in _JUNK]
    files = [path for path in cities if not path.is_dir()]
    if files:
        raise OSError(
            f"{root} cannot be read as Cityscapes ({files[0]} is a file); leftImg8bit/{split} must hold one folder for "
            "each city"
        )
    # Sorted by name, because the order of the file system differs between machines.
    images = [path for city in cities for path in image_files(city) if path.stem.endswith(_IMAGE_SUFFIX)]
    if not images:
        raise FileNotFoundError(f"{root / 'leftImg8bit' / split} holds no image CITY/ID{_IMAGE_SUFFIX}.png")

    suffix = _MASK_SUFFIX if options.mask_suffix is None else options.mask_suffix
    folders = Folders()

    def make(image: Path) -> Entry:
        name = image.stem.removesuffix(_IMAGE_SUFFIX)
        mask = root / "gtFine" / split / image.parent.name / f"{name}{mask_ending(suffix)}"
        return Entry(name, image, (folders.find(mask),))

    pairs = entries_inside(list_entries(images, make, root, refuse), root, refuse)
    labels = _TRAIN_IDS
    advice = "Cityscapes has the label ids 0..33; use the file as it was downloaded"
    if mask_ending(suffix).startswith(_TRAIN_ID_SUFFIX):
        labels = plain_labels(len(CITYSCAPES_CLASSES))
        advice = "Cityscapes has the train ids 0..18; use the file as its scripts make it"
    return make_listing(CITYSCAPES_CLASSES, MaskCode(labels), pairs, advice, options, None)
