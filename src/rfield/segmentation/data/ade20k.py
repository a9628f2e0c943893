"""ADE20K as its scene-parsing benchmark is downloaded: 150 classes."""

import os
from pathlib import Path

import numpy as np

from rfield.segmentation.conventions import IGNORE_INDEX
from rfield.segmentation.data.dataset import voc_palette
from rfield.segmentation.data.files import check_files, read_class_names, read_lines
from rfield.segmentation.data.images import image_files
from rfield.segmentation.data.listed import ListedDataset
from rfield.segmentation.data.listing import Entry, Listing, Refuse, entries_inside, make_listing, raise_error
from rfield.segmentation.data.mask_options import MaskOptions
from rfield.segmentation.data.masks import MaskCode, plain_labels
from rfield.segmentation.data.paths import Folders, mask_ending

_SPLITS = {"train": "training", "val": "validation"}
_NUM_CLASSES = 150


class ADE20KDataset(ListedDataset):
    """Scenes of ADE20K (Zhou et al., CVPR 2017), as `ADEChallengeData2016.zip` holds them.

    `images/training/ID.jpg` is an image and `annotations/training/ID.png` its mask; `validation` is the split val. The
    mask values 1 to 150 are the classes of `objectInfo150.txt` (or of `classes.txt`, one a line), and 0 means "no
    label".

    Args:
        root: the folder that holds `images` and `annotations`.
        split: "train" or "val".
        options: what a data config says of the masks.

    Raises:
        FileNotFoundError: a folder, the names of the classes or a mask is missing.
        ValueError: there is no such split, or the names or the options do not fit.

    Reading a sample raises `OSError` for a damaged file and `ValueError` for a mask of another size than its image, of
    another kind than palette or 8-bit grey, or with a value above 150; both name the file.

    Example:
        >>> ADE20KDataset("no/ADEChallengeData2016")
        Traceback (most recent call last):
        FileNotFoundError: no/ADEChallengeData2016/images/training is not a folder; unpack ADEChallengeData2016 there
    """

    def __init__(self, root: str | os.PathLike[str], split: str = "train", options: MaskOptions | None = None) -> None:
        listing = list_ade20k(Path(root), split, options or MaskOptions())
        check_files([entry.masks[0] for entry in listing.entries], f"the split {split!r}", "masks", "unpack it again")
        super().__init__(root, listing, voc_palette()[1 : 1 + len(listing.class_names)])


def list_ade20k(root: Path, split: str, options: MaskOptions, refuse: Refuse = raise_error) -> Listing:
    """Return the images of a split and their masks; a file that is a link out of the root goes to `refuse`.

    Raises:
        FileNotFoundError: a folder, the images or the names of the classes are missing.
        ValueError: there is no such split, or the names or the options do not fit.
    """
    if split not in _SPLITS:
        raise ValueError(f"ADE20K has no split {split!r}; it has {', '.join(_SPLITS)}")
    images, masks = (root / kind / _SPLITS[split] for kind in ("images", "annotations"))
    for folder in (images, masks):
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not a folder; unpack ADEChallengeData2016 there")
    folders, ending = Folders(), mask_ending(options.mask_suffix or "")
    entries = [Entry(path.stem, path, (folders.find(masks / f"{path.stem}{ending}"),)) for path in image_files(images)]
    if not entries:
        raise FileNotFoundError(f"{images} holds no image; unpack ADEChallengeData2016.zip again")
    labels = np.roll(plain_labels(_NUM_CLASSES), 1)
    labels[[0, IGNORE_INDEX]] = IGNORE_INDEX
    advice = f"ADE20K has the values 0..{_NUM_CLASSES}; unpack it again"
    inside = entries_inside(entries, root, refuse)
    return make_listing(_class_names(root), MaskCode(labels), inside, advice, options, None)


def _class_names(root: Path) -> tuple[str, ...]:
    """Return the names in `classes.txt`, or the first name of each line of `objectInfo150.txt`."""
    own, table = root / "classes.txt", root / "objectInfo150.txt"
    names = read_class_names(own, ())
    if not names:
        if not table.is_file():
            raise FileNotFoundError(f"{table} is missing; unpack it from ADEChallengeData2016.zip")
        rows = [line.split("\t") for line in read_lines(table)[1:]]
        whole = [row[-1].strip() for row in rows]
        short = [name.split(",")[0].split(";")[0].strip() for name in whole]
        names = tuple(name if short.count(name) == 1 else full for name, full in zip(short, whole, strict=True))
    if len({*names}) != _NUM_CLASSES:
        raise ValueError(
            f"{own if own.is_file() else table} names {len({*names})} classes, but ADE20K has {_NUM_CLASSES}; unpack "
            "it again, or use --data folder:ROOT"
        )
    return names
