"""One working size for images of many sizes."""

import hashlib
from typing import Any

from torch import Tensor
from torchvision.transforms import v2
from torchvision.tv_tensors import Image, Mask

from rfield.segmentation.data.dataset import ParsingDataset


class ResizedDataset(ParsingDataset):
    """Another data set with every image and mask brought to one size, whatever its proportions.

    Images are resized bilinearly with antialiasing, masks to the nearest pixel. Scores of this data set are taken
    at this size, not at the images' own, and are not to be compared with those.

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
        """A hexadecimal hash of the other data set's fingerprint and the size."""
        return hashlib.sha256(f"{self.dataset.fingerprint()} {self.size}".encode()).hexdigest()

    def sizes(self) -> list[tuple[int, int]]:
        """The size, once for every image."""
        return [self.size] * len(self)


def working_size(size: Any) -> tuple[int, int]:
    """The (height, width) in px that a list of two stands for.

    Raises:
        ValueError: if it is not two whole numbers of at least 1.
    """
    whole = isinstance(size, (tuple, list)) and all(type(side) is int and side >= 1 for side in size)
    if not whole or len(size) != 2:
        raise ValueError(f"size must be [height, width] in whole px, both above 0; got {size!r}")
    return size[0], size[1]


def resize_mask(mask: Mask, size: tuple[int, int]) -> Mask:
    """The mask [H, W] at another (height, width): every pixel has the label at its centre.

    Example:
        >>> import torch
        >>> resize_mask(Mask(torch.tensor([[0, 1, 2], [3, 4, 5], [6, 7, 8]], dtype=torch.uint8)), (1, 2))
        Mask([[3, 5]], dtype=torch.uint8)
    """
    # v2 resizes a Mask by "nearest", which takes the pixel's upper left corner: up to half a pixel off the image.
    exact = v2.InterpolationMode.NEAREST_EXACT
    return Mask(v2.functional.resize(mask.as_subclass(Tensor)[None], list(size), exact)[0])
