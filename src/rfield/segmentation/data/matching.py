"""Match the classes of a data set with those of a network by name."""

import hashlib
import sys
from collections.abc import Sequence

import torch
from torchvision.tv_tensors import Image, Mask

from rfield.segmentation.data.dataset import ParsingDataset
from rfield.text import counted

_SHOWN = 8


class ReorderedDataset(ParsingDataset):
    """A data set with its classes in another order.

    Args:
        dataset: the samples.
        class_names: the same names as the data set's, in the new order.

    Example:
        >>> from rfield.segmentation.data import SyntheticCues
        >>> dataset = ReorderedDataset(SyntheticCues("val"), ("both", "neither", "green below", "red right"))
        >>> int((dataset[0][1] == 0).sum()) == int((SyntheticCues("val")[0][1] == 3).sum())
        True
    """

    def __init__(self, dataset: ParsingDataset, class_names: Sequence[str]) -> None:
        self.dataset = dataset
        self.class_names = tuple(class_names)
        self.ids = dataset.ids
        places = [self.class_names.index(name) for name in dataset.class_names]
        colours = dict(zip(places, dataset.palette, strict=False))
        self.palette = [colours.get(place, colour) for place, colour in enumerate(dataset.palette)]
        self.mirrored_classes = tuple((places[one], places[other]) for one, other in dataset.mirrored_classes)
        self._places = torch.arange(256, dtype=torch.uint8)
        self._places[: len(places)] = torch.tensor(places, dtype=torch.uint8)

    def __getitem__(self, index: int) -> tuple[Image, Mask]:
        image, mask = self.dataset[index]
        return image, Mask(self._places[mask.as_subclass(torch.Tensor).long()])

    def fingerprint(self) -> str:
        """Return a hexadecimal hash of the other data set's fingerprint and the order."""
        return hashlib.sha256(f"{self.dataset.fingerprint()} {self.class_names}".encode()).hexdigest()

    def sizes(self) -> list[tuple[int, int]]:
        """Return the sizes of the other data set."""
        return self.dataset.sizes()


def match_classes(dataset: ParsingDataset, class_names: Sequence[str], ignore_names: bool = False) -> ParsingDataset:
    """Return the data set with its classes in a network's order. If the order changes, print a line on stderr.

    Args:
        dataset: the samples.
        class_names: the network's classes.
        ignore_names: compare only the numbers of classes, and keep the order.

    Raises:
        ValueError: if the names or their number differ.
    """
    if tuple(class_names) == dataset.class_names or (ignore_names and len(class_names) == dataset.num_classes):
        return dataset
    if sorted(class_names) != sorted(dataset.class_names):
        advice = "; --ignore-class-names compares them by position" * (len(class_names) == dataset.num_classes)
        raise ValueError(class_difference("the network was trained on", class_names, dataset.class_names) + advice)
    order = ", ".join(dataset.class_names)
    print(f"note: the data set has the network's classes in another order ({order}): matched by name", file=sys.stderr)
    return ReorderedDataset(dataset, class_names)


def class_difference(whose: str, class_names: Sequence[str], others: Sequence[str]) -> str:
    """Describe the difference of two class lists in a sentence.

    >>> class_difference("the network was trained on", ["sky", "sea"], ["sky", "land"])
    'the network was trained on 2 classes, but the data set has 2: sea missing, land new'
    """
    head = f"{whose} {counted(len(class_names), 'class')}"
    if sorted(class_names) == sorted(others):
        return f"{head}, which the data set has in another order: {_names(others)} instead of {_names(class_names)}"
    lost = [name for name in class_names if name not in others]
    new = [name for name in others if name not in class_names]
    parts = [f"{_names(names)} {word}" for names, word in ((lost, "missing"), (new, "new")) if names]
    return f"{head}, but the data set has {len(others)}: {', '.join(parts)}"


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
