"""Synthetic images whose labels depend on cues at one fixed distance: the best receptive field is known."""

import hashlib

import numpy as np
import numpy.typing as npt
import torch
from scipy.ndimage import gaussian_filter
from torchvision.tv_tensors import Image, Mask

from rfield.segmentation.conventions import IGNORE_INDEX
from rfield.segmentation.data.dataset import ParsingDataset, voc_palette

_LENGTHS = {"train": 200, "val": 40, "test": 40}
_MOST = 1_000_000
_COLOURS = [(38, 44, 74), (64, 176, 166), (214, 93, 77), (247, 201, 72)]

# Chosen by a grid over fixed dilations: wide enough that the loss still falls toward the best dilation from half and
# from twice of it, narrow enough that a pixel's surroundings say nothing about its cues.
_BLOB_SIGMA = 0.25  # of the Gaussian that smooths the noise, in distances
_EDGE_CONTRAST = 3.0
_PIXEL_NOISE = 20.0  # in grey levels


class SyntheticCues(ParsingDataset):
    """Red, green and blue blobs; a pixel's label depends on what is at a fixed distance to its right and below it.

    `label(y, x) = 2 * red(y, x + distance) + green(y + distance, x)`; pixels whose cue lies outside the image have
    no label (255). Blue blobs and pixel noise have no meaning. The blobs have no preferred place, so only the image at
    that distance determines the label. Blobs reach about half the distance to either side of their centre: a receptive
    field that is slightly wrong sees part of the right blob, and the loss falls smoothly toward the best dilation
    from half of it and from twice of it.
    Every sample is drawn from (seed, split, index).

    Args:
        split: "train", "val" or "test".
        size: height and width of the images in px.
        distance: from a pixel to its cues in px, less than both sides of `size`.
        length: number of samples; by default 200 in train and 40 elsewhere.
        seed: 0 or more; each seed gives another data set of the same kind.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> dataset = SyntheticCues("train", distance=48)
        >>> image, mask = dataset[0]
        >>> tuple(image.shape), tuple(mask.shape)
        ((3, 129, 129), (129, 129))
        >>> dataset.best_dilation(stride=4)
        12.0
    """

    class_names = ("neither", "green below", "red right", "both")

    def __init__(
        self,
        split: str = "train",
        size: tuple[int, int] = (129, 129),
        distance: int = 48,
        length: int | None = None,
        seed: int = 0,
    ) -> None:
        if split not in _LENGTHS:
            raise ValueError(f"the synthetic data set has no split {split!r}; it has {', '.join(_LENGTHS)}")
        if not (isinstance(size, (tuple, list)) and len(size) == 2 and all(map(_is_positive_integer, size))):
            raise ValueError(f"size must be (height, width) in whole px, both above 0; got {size!r}")
        if not _is_positive_integer(distance) or distance >= min(size):
            raise ValueError(
                f"distance must be a whole number of px from 1 to {min(size) - 1}, less than both sides of the "
                f"{size[0]}x{size[1]} images; got {distance!r}"
            )
        if length is not None and not (_is_positive_integer(length) and length <= _MOST):
            raise ValueError(f"length must be a whole number of samples from 1 to {_MOST}; got {length!r}")
        if seed != 0 and not _is_positive_integer(seed):
            raise ValueError(f"seed must be a whole number, 0 or more; got {seed!r}")
        self.split = split
        self.size = (size[0], size[1])
        self.distance = distance
        self.seed = seed
        self.palette = _COLOURS + voc_palette()[len(_COLOURS) :]
        self.ids = [f"{split}_{index:05d}" for index in range(length or _LENGTHS[split])]

    def best_dilation(self, stride: int) -> float:
        """Return the effective dilation at which a 3x3 convolution sees exactly the cues.

        Args:
            stride: px from one feature to the next at the convolution.

        Returns:
            `distance / stride`, in feature px.

        Raises:
            ValueError: if `stride` is not above 0.

        Example:
            >>> SyntheticCues(distance=32).best_dilation(stride=8)
            4.0
        """
        if stride <= 0:
            raise ValueError(f"stride must be above 0, got {stride}")
        return self.distance / stride

    def __getitem__(self, index: int) -> tuple[Image, Mask]:
        index = range(len(self))[index]
        random = np.random.default_rng([self.seed, list(_LENGTHS).index(self.split), index])
        fields = np.stack([self._field(random) for _ in range(3)])
        noise = _PIXEL_NOISE * random.standard_normal(fields.shape, dtype=np.float32)
        image = (127.5 + 80 * np.tanh(_EDGE_CONTRAST * fields) + noise).clip(0, 255).astype(np.uint8)
        red, green, _ = fields > 0
        mask = np.full(self.size, IGNORE_INDEX, np.uint8)
        d = self.distance
        mask[:-d, :-d] = 2 * red[:-d, d:] + green[d:, :-d]
        return Image(torch.from_numpy(image)), Mask(torch.from_numpy(mask))

    def fingerprint(self) -> str:
        """Return a hexadecimal hash of all parameters of the samples.

        Example:
            >>> SyntheticCues(seed=0).fingerprint() == SyntheticCues(seed=1).fingerprint()
            False
        """
        parameters = (self.split, self.size, self.distance, self.seed, len(self))
        recipe = ("SyntheticCues", _BLOB_SIGMA, _EDGE_CONTRAST, _PIXEL_NOISE)
        return hashlib.sha256(repr(parameters + recipe).encode()).hexdigest()

    def sizes(self) -> list[tuple[int, int]]:
        """Return the (height, width) in px of every image.

        Example:
            >>> SyntheticCues("val", size=(65, 97), length=2, distance=16).sizes()
            [(65, 97), (65, 97)]
        """
        return [self.size] * len(self)

    def _field(self, random: np.random.Generator) -> npt.NDArray[np.float32]:
        """Draw smooth noise [H, W] of mean near 0 and standard deviation 1; it is positive in the blobs."""
        noise = random.standard_normal(self.size, dtype=np.float32)
        field = gaussian_filter(noise, _BLOB_SIGMA * self.distance, mode="wrap", truncate=3)
        unit: npt.NDArray[np.float32] = field / field.std()
        return unit


def _is_positive_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
