"""Skip samples that cannot be read."""

import hashlib
import warnings
from collections.abc import Iterable

import torch
from torchvision.tv_tensors import Image, Mask

from rfield.segmentation.conventions import IGNORE_INDEX
from rfield.segmentation.data.dataset import ParsingDataset
from rfield.text import counted


class SkippingDataset(ParsingDataset):
    """A data set in which the next readable sample replaces one that cannot be read.

    Each skipped sample is named in one warning and remembered, also across the processes that load samples.

    Args:
        dataset: the samples.
        labelled: a replacement keeps its mask; otherwise it gets a mask without labels, so that no sample is scored
            twice.

    Example:
        >>> from rfield.segmentation.data import SyntheticCues
        >>> dataset = SkippingDataset(SyntheticCues("val"))
        >>> len(dataset), dataset.skipped()
        (40, [])
    """

    def __init__(self, dataset: ParsingDataset, labelled: bool = True) -> None:
        self.dataset = dataset
        self.labelled = labelled
        self.class_names = dataset.class_names
        self.mirrored_classes = dataset.mirrored_classes
        self.palette = dataset.palette
        self.ids = dataset.ids
        self.bad = torch.zeros(len(dataset), dtype=torch.uint8).share_memory_()  # type: ignore[no-untyped-call]

    def __getitem__(self, index: int) -> tuple[Image, Mask]:
        """Return the sample, or the next one that can be read.

        Raises:
            ValueError: if none can be read.
        """
        for place in (*range(index, len(self)), *range(index)):
            if self.bad[place]:
                continue
            try:
                image, mask = self.dataset[place]
            except (OSError, ValueError) as error:
                self.bad[place] = 1
                warnings.warn(f"skipped: {error}", stacklevel=2)
                continue
            if place != index and not self.labelled:
                mask = Mask(torch.full_like(mask, IGNORE_INDEX))
            return image, mask
        raise ValueError(f"none of the {counted(len(self), 'sample')} can be read; `rfield check-data` says why")

    def skipped(self) -> list[str]:
        """Return the names of the samples that could not be read so far."""
        return [self.ids[index] for index in self.skipped_indices()]

    def skipped_indices(self) -> list[int]:
        """Return the indices of the samples that could not be read so far."""
        found: list[int] = self.bad.nonzero().flatten().tolist()
        return found

    def skip(self, indices: Iterable[int]) -> None:
        """Skip samples that were found bad before."""
        self.bad[list(indices)] = 1

    def fingerprint(self) -> str:
        """Return a hexadecimal hash of the other data set's fingerprint."""
        return hashlib.sha256(f"{self.dataset.fingerprint()} skipping {self.labelled}".encode()).hexdigest()

    def sizes(self) -> list[tuple[int, int]]:
        """Return the (height, width) in px of every image, or of its replacement if the header cannot be read."""
        try:
            return self.dataset.sizes()
        except OSError:
            masks = (self[index][1] for index in range(len(self)))
            return [(mask.shape[0], mask.shape[1]) for mask in masks]
