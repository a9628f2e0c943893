"""Resize a data set's images to one working size."""

import hashlib
from typing import Any

from torch import Tensor
from torchvision.transforms import v2
from torchvision.tv_tensors import Image, Mask

from rfield.segmentation.data.dataset import ParsingDataset


class ResizedDataset(ParsingDataset):
    """A data set with every image and mask resized to one size, regardless of its proportions.

    Images are resized bilinearly with antialiasing, masks to the nearest pixel. Scores of this data set are computed at
    this size and cannot be compared with scores at the images' own sizes.

    Args:
        dataset: the samples at their own sizes.
        size: the (height, width) in px of every sample.

    Raises:
        ValueError: if `size` is not two whole numbers of at least 1.

    Example:
        >>> from rfield.segmentation.data import SyntheticCues
        >>> dataset = ResizedDataset(SyntheticCues("val"), (64, 48))
        >>> image, mask = dataset[0]
        >>> tuple(image.shape), tuple(mask.shape), dataset.sizes()[0]
        ((3, 64, 48), (64, 48), (64, 48))
    """

    def __init__(self, dataset: ParsingDataset, size: tuple[int, int]) -> None:
        self.dataset = dataset
        self.size = working_size(size)
        self.class_names = dataset.class_names
        self.mirrored_classes = dataset.mirrored_classes
        self.palette = dataset.palette
        self.ids = dataset.ids

    def __getitem__(self, index: int) -> tuple[Image, Mask]:
        image, mask = self.dataset[index]
        return Image(v2.functional.resize(image, list(self.size), antialias=True)), resize_mask(mask, self.size)

    def fingerprint(self) -> str:
        """Return a hexadecimal hash of the other data set's fingerprint and the size."""
        return hashlib.sha256(f"{self.dataset.fingerprint()} {self.size}".encode()).hexdigest()

    def sizes(self) -> list[tuple[int, int]]:
        """Return the size, once for every image."""
        return [self.size] * len(self)


def working_size(size: Any) -> tuple[int, int]:
    """Parse a (height, width) in px.

    Raises:
        ValueError: if it is not two whole numbers of at least 1.
    """
    whole = isinstance(size, (tuple, list)) and all(type(side) is int and side >= 1 for side in size)
    if not whole or len(size) != 2:
        raise ValueError(f"size must be [height, width] in whole px, both above 0; got {size!r}")
    return size[0], size[1]


def resize_mask(mask: Mask, size: tuple[int, int]) -> Mask:
    """Resize a mask [H, W] to another (height, width): every pixel gets the label at its centre.

    Example:
        >>> import torch
        >>> resize_mask(Mask(torch.tensor([[0, 1, 2], [3, 4, 5], [6, 7, 8]], dtype=torch.uint8)), (1, 2))
        Mask([[3, 5]], dtype=torch.uint8)
    """
    # v2 resizes a Mask by "nearest", which takes the pixel's upper left corner: an offset of up to half a pixel.
    exact = v2.InterpolationMode.NEAREST_EXACT
    return Mask(v2.functional.resize(mask.as_subclass(Tensor)[None], list(size), exact)[0])
