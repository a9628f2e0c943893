"""The base class of all data sets, and helpers for their masks."""

import functools
from abc import abstractmethod
from collections.abc import Sequence

from torch import Tensor
from torch.utils.data import Dataset
from torchvision.tv_tensors import Image, Mask


class ParsingDataset(Dataset[tuple[Image, Mask]]):
    """Images with one class index for each pixel.

    Sample `i` is a pair of an `Image` uint8 [3, H, W] and a `Mask` uint8 [H, W] whose values are indices of
    `class_names`, or 255 where a pixel has no label.

    Attributes:
        class_names: the name of every class, in the order of the mask values.
        palette: 256 RGB colours (0..255), one for every mask value.
        mirrored_classes: pairs of classes that a mirrored image exchanges, such as left and right eye; by default none.
        ids: the name of every sample.

    Example:
        >>> from rfield.segmentation.data import SyntheticCues
        >>> dataset = SyntheticCues("val", size=(65, 97), distance=16)
        >>> isinstance(dataset, ParsingDataset), dataset.num_classes
        (True, 4)
        >>> image, mask = dataset[0]
        >>> tuple(image.shape), tuple(mask.shape)
        ((3, 65, 97), (65, 97))
    """

    class_names: tuple[str, ...]
    palette: list[tuple[int, int, int]]
    ids: list[str]
    mirrored_classes: tuple[tuple[int, int], ...] = ()

    @property
    def num_classes(self) -> int:
        """Return the number of classes, without 255 (no label)."""
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.ids)

    @abstractmethod
    def __getitem__(self, index: int) -> tuple[Image, Mask]:
        """Return the image, uint8 [3, H, W], and the mask, uint8 [H, W], of one sample."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a hexadecimal hash that changes when the samples may have changed: the key of a feature cache."""

    @abstractmethod
    def sizes(self) -> list[tuple[int, int]]:
        """Return the (height, width) in px of every image, without reading the pixels."""


def exchange_classes(mask: Tensor, pairs: Sequence[tuple[int, int]]) -> Tensor:
    """Exchange the classes of each pair, for the mask of a mirrored image.

    Args:
        mask: integer Tensor of any shape.
        pairs: the data set's `mirrored_classes`.

    Returns:
        A new tensor like `mask`, or `mask` itself if there are no pairs.

    Example:
        >>> import torch
        >>> exchange_classes(torch.tensor([0, 1, 2, 3, 255]), [(2, 3)])
        tensor([  0,   1,   3,   2, 255])
    """
    exchanged = mask.clone() if pairs else mask
    for one, other in pairs:
        exchanged[mask == one] = other
        exchanged[mask == other] = one
    return exchanged


def voc_palette() -> list[tuple[int, int, int]]:
    """Return the 256 colours of PASCAL VOC: the bits of a class index go to red, green and blue in turn.

    Returns:
        256 RGB colours, 0..255.

    Example:
        >>> voc_palette()[:4]
        [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0)]
    """
    return [*_voc_colours()]


@functools.cache
def _voc_colours() -> tuple[tuple[int, int, int], ...]:
    return tuple(
        (
            sum((index >> 3 * bit & 1) << 7 - bit for bit in range(3)),
            sum((index >> 3 * bit + 1 & 1) << 7 - bit for bit in range(3)),
            sum((index >> 3 * bit + 2 & 1) << 7 - bit for bit in range(3)),
        )
        for index in range(256)
    )
