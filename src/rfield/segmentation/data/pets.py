"""The Oxford-IIIT Pet data set, in the folders that torchvision downloads."""

import os
from pathlib import Path

import numpy as np

from rfield.segmentation.conventions import IGNORE_INDEX
from rfield.segmentation.data.dataset import voc_palette
from rfield.segmentation.data.files import check_files, draw_names, read_lines
from rfield.segmentation.data.listed import ListedDataset
from rfield.segmentation.data.listing import Entry, Listing, Refuse, list_entries, make_listing, raise_error
from rfield.segmentation.data.mask_options import MaskOptions
from rfield.segmentation.data.masks import UNKNOWN, MaskCode
from rfield.segmentation.data.paths import Folders, mask_ending, sample_path

_LISTS = {"train": "trainval", "val": "trainval", "test": "test"}
_VAL = 0.2
_FOLDER = "oxford-iiit-pet"
PETS_CLASSES = ("background", "pet")


class PetsDataset(ListedDataset):
    """Cats and dogs of the Oxford-IIIT Pet data set (Parkhi et al., CVPR 2012): background and pet.

    `images/ID.jpg` is an image and `annotations/trimaps/ID.png` its mask: 1 is the pet, 2 the background, and 3, the
    border that the data set calls not classified, has no label. The lists `annotations/trainval.txt` and `test.txt`
    name the samples. A fifth of trainval, always the same one, is the split val, because the data set has none.

    Args:
        root: the folder that holds `images` and `annotations`, or the one that holds `oxford-iiit-pet`.
        split: "train", "val" or "test".
        options: what a data config says of the masks.

    Raises:
        FileNotFoundError: the root, a list, an image or a mask is missing.
        ValueError: there is no such split, or a list is empty or names a file outside the root.

    Reading a sample raises `OSError` for a damaged file and `ValueError` for a mask of another size than its image, of
    another kind than palette or 8-bit grey, or with another value; both name the file.

    Example:
        >>> PetsDataset("no/pets")
        Traceback (most recent call last):
        FileNotFoundError: no/pets/annotations/trainval.txt is missing; give the folder of images and annotations
    """

    def __init__(self, root: str | os.PathLike[str], split: str = "train", options: MaskOptions | None = None) -> None:
        listing = list_pets(Path(root), split, options or MaskOptions())
        check_files(listing.files, f"the split {split!r}")
        super().__init__(root, listing, voc_palette()[: len(listing.class_names)])


def list_pets(root: Path, split: str, options: MaskOptions, refuse: Refuse = raise_error) -> Listing:
    """Return what the list of a split names; a line that leaves the root goes to `refuse`.

    Raises:
        FileNotFoundError: the list is missing.
        ValueError: there is no such split, the list is empty, or the options do not fit.
    """
    if split not in _LISTS:
        raise ValueError(f"Oxford-IIIT Pet has no split {split!r}; it has {', '.join(_LISTS)}")
    if (root / _FOLDER).is_dir():
        root = root / _FOLDER
    source = root / "annotations" / f"{_LISTS[split]}.txt"
    if not source.is_file():
        raise FileNotFoundError(f"{source} is missing; give the folder of images and annotations")
    names = [line.split()[0] for line in read_lines(source) if not line.startswith("#")]
    if not names:
        raise ValueError(f"{source} is empty; each of its lines must begin with the name of an image")
    if split != "test":
        val = draw_names(names, _VAL)
        names = [name for name in names if (name in val) == (split == "val")]
    folders, ending = Folders(), mask_ending(options.mask_suffix or "")

    def make(name: str) -> Entry:
        image = sample_path(root, "images", name, ".jpg", str(source), folders)
        return Entry(name, image, (sample_path(root, "annotations/trimaps", name, ending, str(source), folders),))

    labels = np.full(256, UNKNOWN, np.int16)
    labels[[1, 2, 3, IGNORE_INDEX]] = 1, 0, IGNORE_INDEX, IGNORE_INDEX
    entries = list_entries(names, make, source, refuse)
    return make_listing(
        PETS_CLASSES, MaskCode(labels), entries, "the trimaps have the values 1, 2 and 3", options, None
    )
