"""CamVid in the layout of the SegNet tutorial: lists of image and mask pairs."""

import os
from pathlib import Path

from rfield.segmentation.conventions import IGNORE_INDEX
from rfield.segmentation.data.dataset import voc_palette
from rfield.segmentation.data.files import check_files, list_names, read_class_names, read_lines
from rfield.segmentation.data.listed import ListedDataset
from rfield.segmentation.data.listing import Entry, Listing, Refuse, list_entries, make_listing, raise_error
from rfield.segmentation.data.mask_options import MaskOptions
from rfield.segmentation.data.masks import MaskCode, plain_labels
from rfield.segmentation.data.paths import Folders, mask_ending, sample_path

CAMVID_CLASSES = (
    "sky",
    "building",
    "pole",
    "road",
    "pavement",
    "tree",
    "sign",
    "fence",
    "car",
    "pedestrian",
    "bicyclist",
)

_VOID = len(CAMVID_CLASSES)
_ADVICE = f"correct the mask; {_VOID} means no label too"
_PREFIX = "/SegNet/CamVid/"
_COLOURS = [
    (128, 128, 128),
    (128, 0, 0),
    (192, 192, 128),
    (128, 64, 128),
    (60, 40, 222),
    (128, 128, 0),
    (192, 128, 128),
    (64, 64, 128),
    (64, 0, 128),
    (64, 64, 0),
    (0, 128, 192),
    (0, 0, 0),
]


class CamVidDataset(ListedDataset):
    """Street scenes of CamVid (Brostow et al., PRL 2009) with the 11 classes of SegNet (Badrinarayanan et al., 2017).

    Each line of the list `SPLIT.txt` names an image and its mask, as `train/ID.png trainannot/ID.png`, relative to
    the root; the leading `/SegNet/CamVid/` of the tutorial's own lists is removed. The mask value 11, void, becomes
    255. The class names are the lines of `classes.txt`, or SegNet's if there is no such file.

    Args:
        root: the folder that holds the lists.
        split: the name of a list, without ".txt".
        options: the mask options of a data config.

    Raises:
        FileNotFoundError: if the root, the list, an image or a mask is missing.
        ValueError: if the list is empty, a line is no pair or names a file outside the root, or `classes.txt` does
            not hold 11 names.

    Reading a sample raises `OSError` for a damaged file and `ValueError` for a mask of another size than its image,
    of another kind than palette or 8-bit grey, or with a value above 11 that is not 255; both name the file.

    Example:
        >>> import tempfile, numpy as np, PIL.Image
        >>> scratch = tempfile.TemporaryDirectory()
        >>> root = Path(scratch.name)
        >>> for folder in ("train", "trainannot"):
        ...     (root / folder).mkdir()
        >>> PIL.Image.new("RGB", (16, 12)).save(root / "train/one.png")
        >>> PIL.Image.fromarray(np.array([[8, 11] * 8] * 12, np.uint8)).save(root / "trainannot/one.png")
        >>> _ = (root / "train.txt").write_text("/SegNet/CamVid/train/one.png /SegNet/CamVid/trainannot/one.png")
        >>> dataset = CamVidDataset(root, "train")
        >>> image, mask = dataset[0]
        >>> tuple(image.shape), dataset.class_names[mask[0, 0]], mask[0, 1].item()
        ((3, 12, 16), 'car', 255)
        >>> scratch.cleanup()
    """

    def __init__(self, root: str | os.PathLike[str], split: str = "train", options: MaskOptions | None = None) -> None:
        listing = list_camvid(Path(root), split, options or MaskOptions())
        check_files(listing.files, f"the split {split!r}")
        super().__init__(root, listing, _COLOURS + voc_palette()[len(_COLOURS) : IGNORE_INDEX] + [(0, 0, 0)])


def list_camvid(root: Path, split: str, options: MaskOptions, refuse: Refuse = raise_error) -> Listing:
    """Return the samples in the list of a split. Pass wrong lines (no pair, outside the root) to `refuse`.

    Raises:
        FileNotFoundError: if the root or the list is missing.
        ValueError: if the list is empty or not text, or `classes.txt` or the options do not fit.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder; give the one that holds train.txt and val.txt")
    classes = root / "classes.txt"
    class_names = read_class_names(classes, CAMVID_CLASSES)
    if len(class_names) != _VOID and options.colours is None:
        raise ValueError(
            f"{classes} holds {len(class_names)} class names, but the masks of the SegNet "
            f"tutorial have {_VOID} classes and the value {_VOID} for void; name the {_VOID}, without void"
        )
    lists = [name for name in list_names(root) if name != "classes"]
    if split not in lists:
        raise FileNotFoundError(f"there is no list {split}.txt in {root}; the lists are: {', '.join(lists) or 'none'}")
    source = root / f"{split}.txt"
    lines = read_lines(source)
    if not lines:
        raise ValueError(f"{source} is empty; each of its lines must name an image and its mask")

    def make(line: str) -> Entry:
        names = [name.removeprefix(_PREFIX) for name in line.split()]
        if len(names) != 2:
            raise ValueError(
                f"{source} has the line {line!r}; a line names an image and its mask, separated by a blank"
            )
        image = _find(root, names[0], source, folders)
        mask = _find(root, names[1], source, folders, options.mask_suffix)
        if image == mask and image.is_file():
            raise ValueError(f"{source} has the line {line!r}, but both are the file {image}; add the mask")
        return Entry(image.stem, image, (mask,))

    folders = Folders()
    entries = list_entries(lines, make, source, refuse)
    own_names = classes if classes.is_file() else None
    return make_listing(class_names, MaskCode(plain_labels(_VOID, void=_VOID)), entries, _ADVICE, options, own_names)


def _find(root: Path, name: str, listed_in: Path, folders: Folders, mask_suffix: str | None = None) -> Path:
    folder, _, file = name.partition("/")
    if not file or folder in ("", ".", ".."):  # in the root itself, or an absolute path
        folder, file = "", name
    if mask_suffix is not None and not Path(file).stem.endswith(Path(mask_ending(mask_suffix)).stem):
        file = str(Path(file).with_suffix("")) + mask_ending(mask_suffix)
    return sample_path(root, folder, file, "", str(listed_in), folders)
