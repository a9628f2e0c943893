"""Faces in the layout of the Helen face-parsing data set: one map for each class of each photograph."""

import os
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torchvision.tv_tensors import Image, Mask

from rfield.data.dataset import ParsingDataset, voc_palette
from rfield.data.files import (
    check_files,
    fingerprint_of,
    read_grey,
    read_lines,
    sample_path,
)
from rfield.data.images import image_sizes, read_image
from rfield.data.listing import Entry, Listing, Refuse, list_entries, plain_labels, raise_error

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


class HelenDataset(ParsingDataset):
    """Faces with 11 classes in the layout of Helen face parsing (Smith et al., CVPR 2013).

    The list of a split, `exemplars.txt` for train, `tuning.txt` for val and `testing.txt` for test, has the lines
    `number , ID`. `images/ID.jpg` is a photograph, `labels/ID/ID_lbl00.png` to `ID_lbl10.png` are 8-bit maps of how
    surely a pixel belongs to each class; its label is the surest one, of equally sure ones the first. "Left" is
    what the data set calls left: in Helen itself the viewer's left. A mirrored photograph has left and right
    exchanged: `mirrored_classes`.

    Args:
        root: the folder that holds `images`, `labels` and the lists.
        split: "train", "val" or "test".

    Raises:
        FileNotFoundError: if the root, the list, a photograph or a map is missing.
        ValueError: if the split has another name, the list is empty, or a line is not understood or names a file
            outside the root.

    Reading a sample raises `OSError` for a damaged file and `ValueError` for a map of another size than its
    photograph or of another kind than 8-bit grey; both name the file.

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

    def __init__(self, root: str | os.PathLike[str], split: str = "train") -> None:
        self.root = Path(root)
        listing = list_helen(self.root, split)
        self._files = listing.files
        check_files(self._files, f"the split {split!r}")
        self.ids = [entry.name for entry in listing.entries]
        self.image_paths = [entry.image for entry in listing.entries]
        self.map_paths = [entry.masks for entry in listing.entries]
        self.palette = _COLOURS + voc_palette()[len(_COLOURS) :]

    def __getitem__(self, index: int) -> tuple[Image, Mask]:
        image = read_image(self.image_paths[index])
        size = (image.shape[1], image.shape[2])
        maps = np.stack([read_grey(path, size, self.image_paths[index]) for path in self.map_paths[index]])
        return image, Mask(torch.from_numpy(maps.argmax(0).astype(np.uint8)))

    def fingerprint(self) -> str:
        """A hexadecimal hash of every file's name, size and time of change."""
        return fingerprint_of(self.root, self._files, "Helen")

    def sizes(self) -> list[tuple[int, int]]:
        """The (height, width) in px of every photograph, read from the files' headers.

        Raises:
            OSError: if a file is not an image; the message names it.
        """
        return image_sizes(self.image_paths)


def list_helen(root: Path, split: str, refuse: Refuse = raise_error) -> Listing:
    """What the list of a split names; a line that is not understood or leaves the root goes to `refuse`.

    Raises:
        FileNotFoundError: if the root or the list is missing.
        ValueError: if the split has another name, or the list is empty or not text.
    """
    if split not in HELEN_LISTS:
        raise ValueError(f"Helen has no split {split!r}; it has {', '.join(HELEN_LISTS)}")
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder; name the one that holds images and labels")
    source = root / HELEN_LISTS[split]
    if not source.is_file():
        raise FileNotFoundError(f"{source} is missing; it must hold a line `number , ID` for each photograph")
    lines = read_lines(source)
    if not lines:
        raise ValueError(f"{source} is empty; it must hold a line `number , ID` for each photograph")

    def make(line: str) -> Entry:
        _, comma, name = line.partition(",")
        name = name.strip()
        if not comma or not name:
            raise ValueError(f"{source} has the line {line!r}; a line reads `number , ID`")
        path = partial(sample_path, root, "labels", f"{name}/{Path(name).name}", listed_in=str(source))
        first = path("_lbl00.png")
        maps = [first.with_name(f"{first.name[:-6]}{label:02d}.png") for label in range(len(HELEN_CLASSES))]
        # The others lie in the folder where the first does, unless they are links.
        maps = [path(other.name[-10:]) if other.is_symlink() else other for other in maps]
        return Entry(name, sample_path(root, "images", name, ".jpg", str(source)), tuple(maps))

    entries = list_entries(lines, make, source, refuse)
    return Listing(HELEN_CLASSES, plain_labels(len(HELEN_CLASSES)), entries, maps=True)
