"""What a data set's lists and folders name: read once for the loaders, which refuse, and the check, which goes on."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from rfield.data.dataset import IGNORE_INDEX
from rfield.data.files import lies_in

UNKNOWN = -1

Refuse = Callable[[Path, Exception], None]
T = TypeVar("T")


@dataclass(frozen=True)
class Entry:
    """The files of one sample: a photograph and its mask, or the maps of its classes."""

    name: str
    image: Path
    masks: tuple[Path, ...]


@dataclass(frozen=True)
class Listing:
    """One split of a data set, before any of its samples is opened.

    Attributes:
        class_names: the classes' names.
        labels: int16 [256], the class that each value of a mask stands for; 255 for no label, -1 where the value
            has no business in a mask.
        entries: the samples.
        advice: what to do about values that have no business in a mask.
        maps: whether the masks are maps of one class each, the surest of which is the label, and `labels` is unused.
    """

    class_names: tuple[str, ...]
    labels: npt.NDArray[np.int16]
    entries: list[Entry]
    advice: str = ""
    maps: bool = False

    @property
    def files(self) -> list[Path]:
        """The photographs, then the masks or maps."""
        return [*(entry.image for entry in self.entries), *(path for entry in self.entries for path in entry.masks)]


def raise_error(path: Path, error: Exception) -> None:
    """Refuses at the first mistake; `path` is the file that it is about."""
    raise error


def list_entries(items: Iterable[T], make: Callable[[T], Entry], source: Path, refuse: Refuse) -> list[Entry]:
    """An entry for each item; what `make` raises for one, ValueError or OSError, goes to `refuse`."""
    entries = []
    for item in items:
        try:
            entries.append(make(item))
        except (ValueError, OSError) as error:  # noqa: PERF203
            refuse(source, error)
    return entries


def entries_inside(entries: Iterable[Entry], root: Path, refuse: Refuse) -> list[Entry]:
    """The entries without those whose files are links out of the root; the folders may be links, a file may not."""
    inside = []
    for entry in entries:
        links = [path for path in (entry.image, *entry.masks) if path.is_symlink()]
        outside = [path for path in links if not lies_in(path, *_folders_between(root, path))]
        for path in outside:
            refuse(path, ValueError(f"{path} is a link to a file outside {root}; put the file itself there"))
        if not outside:
            inside.append(entry)
    return inside


def _folders_between(root: Path, path: Path) -> list[Path]:
    return [folder for folder in path.parents if folder.is_relative_to(root)]


def plain_labels(num_classes: int, void: int | None = None) -> npt.NDArray[np.int16]:
    """`Listing.labels` of masks that hold class indices, 255, and `void` where there is another value for no label.

    >>> plain_labels(3, void=3)[[0, 2, 3, 4, 255]].tolist()
    [0, 2, 255, -1, 255]
    """
    labels = np.full(256, UNKNOWN, np.int16)
    labels[:num_classes] = range(num_classes)
    labels[[IGNORE_INDEX] if void is None else [void, IGNORE_INDEX]] = IGNORE_INDEX
    return labels
