"""Transform an image together with its mask, at random by (seed, epoch, sample) in training."""

from collections.abc import Iterator, Sequence, Sized
from itertools import islice
from typing import Any, cast

import numpy as np
import torch
import torch.distributed
from torch import Tensor
from torch.utils.data import Dataset
from torch.utils.data.distributed import DistributedSampler
from torchvision.transforms import v2
from torchvision.tv_tensors import Image, Mask

from rfield.segmentation.conventions import IGNORE_INDEX, IMAGENET_MEAN, IMAGENET_STD
from rfield.segmentation.data.dataset import ParsingDataset, exchange_classes
from rfield.segmentation.data.resized import resize_mask


def training_transform(
    crop_size: tuple[int, int],
    scale_range: tuple[float, float] = (0.5, 1.5),
    flip: bool = True,
    colour_jitter: float = 0.0,
    mirrored_classes: Sequence[tuple[int, int]] = (),
) -> v2.Transform:
    """Return the random transform of training: colours, scale, crop and mirroring, the same for image and mask.

    An image that is smaller than the crop after scaling is padded with the image mean (0 after normalisation), its mask
    with 255.

    Args:
        crop_size: height and width of the result in px.
        scale_range: smallest and largest factor of the random scale; (1, 1) does not scale.
        flip: mirror every second sample, left to right.
        colour_jitter: brightness, contrast and saturation change by at most this share (0..1), hue by a quarter of
            it; 0 changes nothing.
        mirrored_classes: pairs of classes that mirroring exchanges, a data set's `mirrored_classes`.

    Returns:
        A transform of (Image uint8 [3, H, W], Mask uint8 [H, W]) to (float32 [3, *crop_size], normalised by
        `IMAGENET_MEAN` and `IMAGENET_STD`; int64 [*crop_size]).

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> image, mask = Image(torch.zeros(3, 40, 60, dtype=torch.uint8)), Mask(torch.zeros(40, 60, dtype=torch.uint8))
        >>> image, mask = training_transform((65, 65), scale_range=(1, 1))(image, mask)
        >>> image.shape, image.dtype, mask.shape, mask.dtype
        (torch.Size([3, 65, 65]), torch.float32, torch.Size([65, 65]), torch.int64)
        >>> (mask == 255).sum().item() == 65 * 65 - 40 * 60
        True
    """
    if len(crop_size) != 2 or min(crop_size) < 1:
        raise ValueError(f"crop_size must be (height, width) in px, both above 0; got {crop_size}")
    if len(scale_range) != 2 or not 0 < scale_range[0] <= scale_range[1] < float("inf"):
        raise ValueError(f"scale_range must be (least, greatest) with 0 < least <= greatest; got {scale_range}")
    if not 0 <= colour_jitter <= 1:
        raise ValueError(f"colour_jitter must be from 0 to 1, got {colour_jitter}")
    steps: list[v2.Transform] = []
    if colour_jitter > 0:
        steps.append(v2.ColorJitter(colour_jitter, colour_jitter, colour_jitter, colour_jitter / 4))
    if tuple(scale_range) != (1, 1):
        steps.append(_RandomScale(*scale_range))
    # Normalise before the padding, so that the padding can be exactly 0.
    steps += _normalise()
    steps.append(v2.RandomCrop(crop_size, pad_if_needed=True, fill={Image: 0, Mask: IGNORE_INDEX}))
    if flip:
        steps.append(_RandomMirror(mirrored_classes))
    return v2.Compose([*steps, v2.ToPureTensor()])


def evaluation_transform() -> v2.Transform:
    """Return the transform of evaluation: to float and normalised, at the image's own size.

    Returns:
        A transform of (Image uint8 [3, H, W], Mask uint8 [H, W]) to (float32 [3, H, W], int64 [H, W]), or of an
        Image alone.

    Example:
        >>> white = Image(torch.full((3, 2, 2), 255, dtype=torch.uint8))
        >>> evaluation_transform()(white)[:, 0, 0]
        tensor([2.2489, 2.4286, 2.6400])
    """
    return v2.Compose([*_normalise(), v2.ToPureTensor()])


def _normalise() -> list[v2.Transform]:
    to_dtype = v2.ToDtype({Image: torch.float32, Mask: torch.int64, "others": None}, scale=True)
    return [to_dtype, v2.Normalize(list(IMAGENET_MEAN), list(IMAGENET_STD))]


class _RandomScale(v2.Transform):  # type: ignore[misc]  # torchvision has no types
    """Scale both sides by one random factor, uniform in [least, greatest]."""

    def __init__(self, least: float, greatest: float) -> None:
        super().__init__()
        self.least = least
        self.greatest = greatest

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        scale = torch.empty(()).uniform_(self.least, self.greatest).item()
        height, width = v2.functional.get_size(flat_inputs[0])
        return {"size": [max(1, round(height * scale)), max(1, round(width * scale))]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if isinstance(inpt, Mask):
            return resize_mask(inpt, params["size"])
        return v2.functional.resize(inpt, params["size"])


class _RandomMirror(v2.RandomHorizontalFlip):  # type: ignore[misc]  # torchvision has no types
    """Mirror every second sample, and exchange the mirrored classes in its mask."""

    def __init__(self, mirrored_classes: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.mirrored_classes = mirrored_classes

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        mirrored = super().transform(inpt, params)
        if isinstance(inpt, Mask):
            return Mask(exchange_classes(mirrored.as_subclass(Tensor), self.mirrored_classes))
        return mirrored


class AugmentedDataset(Dataset[tuple[Tensor, Tensor]]):
    """A data set with a random transform, indexed by (epoch, index).

    A sample depends only on seed, epoch and index, and not on the order, the number of workers or earlier draws. So an
    interrupted training continues exactly. The caller's random state does not change.

    Args:
        dataset: the samples.
        transform: maps (Image, Mask) to a sample; draws from torch's default CPU generator, as `v2` does.
        seed: 0 or more; each seed gives other draws.

    Raises:
        ValueError: if `seed` is negative.

    Example:
        >>> from rfield.segmentation.data import SyntheticCues
        >>> augmented = AugmentedDataset(SyntheticCues("val"), training_transform((97, 97)), seed=0)
        >>> len(augmented)
        40
        >>> image, mask = augmented[0, 7]
        >>> torch.equal(image, augmented[0, 7][0]), torch.equal(image, augmented[1, 7][0])
        (True, False)
    """

    def __init__(self, dataset: ParsingDataset, transform: v2.Transform, seed: int) -> None:
        if seed < 0:
            raise ValueError(f"seed must be 0 or more, got {seed}")
        self.dataset = dataset
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        epoch, index = key
        sample = self.dataset[index]
        state = np.random.SeedSequence([self.seed, epoch, index]).generate_state(1, np.uint64)
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would also seed the accelerators' generators.
            torch.default_generator.manual_seed(int(state[0]))
            image, mask = self.transform(*sample)
        return image, mask


class EpochSampler(DistributedSampler[tuple[int, int]]):
    """The order of an `AugmentedDataset`: pairs (epoch, index), shuffled by seed and epoch.

    Call `set_epoch` before each epoch, as Lightning does.

    Args:
        dataset: the samples; only their number matters.
        num_replicas: number of processes that share the data; by default torch.distributed's, or 1 without it.
        rank: index of this process; by default torch.distributed's, or 0 without it.
        shuffle: draw a new order for every epoch.
        seed: each seed gives other orders.
        drop_last: leave out samples that cannot be divided evenly among the processes, instead of repeating samples.

    Attributes:
        held_out: samples that are left out for now; others replace them, so that epochs keep their length.
        seen: (epoch, samples): that many samples of that epoch have been seen before, and are skipped.

    Raises:
        ValueError: if `rank` is not below `num_replicas`.

    Example:
        >>> sampler = EpochSampler(range(3), shuffle=False)
        >>> sampler.set_epoch(5)
        >>> list(sampler)
        [(5, 0), (5, 1), (5, 2)]
    """

    def __init__(
        self,
        dataset: Any,
        num_replicas: int | None = None,
        rank: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if num_replicas is None:
            num_replicas = torch.distributed.get_world_size() if distributed else 1
        if rank is None:
            rank = torch.distributed.get_rank() if distributed else 0
        super().__init__(dataset, num_replicas, rank, shuffle, seed, drop_last)
        self.held_out: frozenset[int] = frozenset()
        self.seen = (0, 0)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch, samples = self.seen
        return islice(self.order(), samples if epoch == self.epoch else 0, None)

    def repeated(self, first: int, count: int) -> list[bool]:
        """Return which of this process's samples (counted from the epoch's start) only repeat others, to fill up.

        >>> EpochSampler(range(3), num_replicas=2, rank=1).repeated(0, 2)
        [False, True]
        """
        places = range(first, first + count)
        return [place * self.num_replicas + self.rank >= len(cast(Sized, self.dataset)) for place in places]

    def order(self) -> Iterator[tuple[int, int]]:
        """Return the whole epoch, including samples that have been seen."""
        epoch, held_out = self.epoch, self.held_out
        indices = cast(Iterator[int], super().__iter__())
        if not held_out:
            return ((epoch, index) for index in indices)
        seen = [index for index in range(len(cast(Sized, self.dataset))) if index not in held_out]
        return ((epoch, seen[(index + epoch) % len(seen)] if index in held_out else index) for index in indices)
