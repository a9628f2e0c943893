"""Faces in the layout of the Helen face-parsing data set: one map for each class of each image."""

import os
from pathlib import Path

from rfield.segmentation.data.files import check_files, read_lines
from rfield.segmentation.data.listed import ListedDataset
from rfield.segmentation.data.listing import Entry, Listing, Refuse, list_entries, make_listing, raise_error
from rfield.segmentation.data.mask_options import MaskOptions
from rfield.segmentation.data.masks import MaskCode, plain_labels
from rfield.segmentation.data.paths import Folders, sample_path

HELEN_CLASSES = (
    "background",
    "face skin",
    "left brow",
    "right brow",
    "left eye",
    "right eye",
    "nose",
    "upper lip",
    "inner mouth",
    "lower lip",
    "hair",
)

HELEN_MIRRORED = (("left brow", "right brow"), ("left eye", "right eye"))
HELEN_LISTS = {"train": "exemplars.txt", "val": "tuning.txt", "test": "testing.txt"}
_COLOURS = [
    (0, 0, 0),
    (243, 201, 165),
    (121, 85, 61),
    (184, 134, 72),
    (38, 139, 210),
    (102, 204, 238),
    (84, 160, 84),
    (220, 50, 60),
    (255, 255, 255),
    (240, 128, 150),
    (106, 76, 147),
]


class HelenDataset(ListedDataset):
    """Faces with 11 classes in the layout of Helen face parsing (Smith et al., CVPR 2013).

    The list of a split, `exemplars.txt` for train, `tuning.txt` for val and `testing.txt` for test, has the lines
    `number , ID`. `images/ID.jpg` is an image, `labels/ID/ID_lbl00.png` to `ID_lbl10.png` are 8-bit maps of each
    class's certainty. The label of a pixel is the class with the highest certainty, of equal ones the first. "Left" is
    what the data set calls left: in Helen itself the viewer's left. A mirrored image exchanges left and right, see
    `mirrored_classes`.

    Args:
        root: the folder that holds `images`, `labels` and the lists.
        split: "train", "val" or "test".
        options: the mask options of a data config.

    Raises:
        FileNotFoundError: if the root, the list, an image or a map is missing.
        ValueError: if the split has another name, the list is empty, or a line is not understood or names a file
            outside the root.

    Reading a sample raises `OSError` for a damaged file and `ValueError` for a map of another size than its
    image or of another kind than 8-bit grey; both name the file.

    Example:
        >>> import tempfile, PIL.Image
        >>> scratch = tempfile.TemporaryDirectory()
        >>> root = Path(scratch.name)
        >>> for folder in ("images", "labels/one"):
        ...     (root / folder).mkdir(parents=True)
        >>> PIL.Image.new("RGB", (16, 12)).save(root / "images/one.jpg")
        >>> for label in range(11):
        ...     PIL.Image.new("L", (16, 12), 200 * (label == 6)).save(root / f"labels/one/one_lbl{label:02d}.png")
        >>> _ = (root / "exemplars.txt").write_text("1 , one")
        >>> dataset = HelenDataset(root, "train")
        >>> image, mask = dataset[0]
        >>> tuple(image.shape), dataset.class_names[mask[0, 0]]
        ((3, 12, 16), 'nose')
        >>> scratch.cleanup()
    """

    class_names = HELEN_CLASSES
    mirrored_classes = ((2, 3), (4, 5))

    def __init__(self, root: str | os.PathLike[str], split: str = "train", options: MaskOptions | None = None) -> None:
        listing = list_helen(Path(root), split, options or MaskOptions())
        check_files(listing.files, f"the split {split!r}")
        self.map_paths = [entry.masks for entry in listing.entries]
        super().__init__(root, listing, [_COLOURS[HELEN_CLASSES.index(name)] for name in listing.class_names])


def list_helen(root: Path, split: str, options: MaskOptions, refuse: Refuse = raise_error) -> Listing:
    """Return the samples in the list of a split. Pass wrong lines (not understood, outside the root) to `refuse`.

    Raises:
        FileNotFoundError: if the root or the list is missing.
        ValueError: if the split has another name, the list is empty or not text, or the options do not fit.
    """
    if split not in HELEN_LISTS:
        raise ValueError(f"Helen has no split {split!r}; it has {', '.join(HELEN_LISTS)}")
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder; give the one that holds images and labels")
    source = root / HELEN_LISTS[split]
    if not source.is_file():
        raise FileNotFoundError(f"{source} is missing; it must hold a line `number , ID` for each image")
    lines = read_lines(source)
    if not lines:
        raise ValueError(f"{source} is empty; it must hold a line `number , ID` for each image")

    def make(line: str) -> Entry:
        _, comma, name = line.partition(",")
        name = name.strip()
        if not comma or not name:
            raise ValueError(f"{source} has the line {line!r}; a line reads `number , ID`")
        image = sample_path(root, "images", name, ".jpg", str(source), folders)
        stem = f"{name}/{Path(name).name}{'_lbl' if options.mask_suffix is None else options.mask_suffix}"
        endings = (f"{label:02d}.png" for label in range(len(HELEN_CLASSES)))
        return Entry(
            name, image, tuple(sample_path(root, "labels", stem, end, str(source), folders) for end in endings)
        )

    folders = Folders()
    entries = list_entries(lines, make, source, refuse)
    code = MaskCode(plain_labels(len(HELEN_CLASSES)), maps=True)
    return make_listing(HELEN_CLASSES, code, entries, "", options, None, HELEN_MIRRORED)
