"""The training images that a sampled search reads its curve on."""

import random
import sys
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from rfield.search.certainty import LEAST_IMAGES
from rfield.search.held_out import half_of, held_out_count
from rfield.segmentation.data import IGNORE_INDEX, ParsingDataset, evaluation_transform
from rfield.segmentation.inference.feature_cache import CachedFeatures
from rfield.segmentation.training.distributed import rank_and_world_size
from rfield.text import counted


class WholeImages(Dataset[tuple[Tensor, Tensor]]):
    """Samples at their own size: normalised images, or cached features, with their masks."""

    def __init__(self, dataset: ParsingDataset, features: CachedFeatures | None) -> None:
        self.dataset = dataset
        self.features = features
        self.transform = evaluation_transform()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if self.features is not None:
            return self.features.plain(index)
        image, mask = self.transform(*self.dataset[index])
        return image, mask


class HeldOut:
    """Batches of one held-out training image, whole and not augmented, dealt to the processes.

    Args:
        samples: all training images.
        indices: those held out; the ones without any label are not read.

    Raises:
        ValueError: if there are indices, but none of an image with a label.
    """

    def __init__(self, samples: WholeImages, indices: Sequence[int]) -> None:
        self.samples = samples
        self.indices = [index for index in indices if bool((samples[index][1] != IGNORE_INDEX).any())]
        if indices and not self.indices:
            if not any(bool((samples[index][1] != IGNORE_INDEX).any()) for index in range(len(samples))):
                raise ValueError(
                    f"none of the {counted(len(samples), 'training image')} has a labelled pixel: label the images, or "
                    "check the values that the data config ignores"
                )
            raise ValueError(
                f"the sampled search holds {counted(len(indices), 'training image')} out, but none of them has a "
                "labelled pixel: label more images, or try another --seed"
            )

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.batches(*rank_and_world_size())

    def __len__(self) -> int:
        return len(self.indices)

    def batches(self, rank: int = 0, processes: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Return the batches of one of several processes; by default all."""
        return self._read(self.indices[rank::processes])

    def half(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Return this process's batches of every second image, or of all if they are few."""
        rank, processes = rank_and_world_size()
        return self._read(half_of(self.indices, processes)[rank::processes])

    def _read(self, indices: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        for index in indices:
            input, mask = self.samples[index]
            yield input[None], mask[None]

    @property
    def ids(self) -> list[str]:
        """The names of the images."""
        return [self.samples.dataset.ids[index] for index in self.indices]

    def class_weights(self, num_classes: int) -> Tensor:
        """The root of one over each class's share of the labelled pixels, so that all count, and large ones count more.

        The loss counts pixels, and the scores that count are means over classes or parts. A pixel weighs 1 on average.
        """
        masks = [self.samples[index][1] for index in self.indices]
        labels = torch.cat([mask[mask != IGNORE_INDEX] for mask in masks])
        shares = torch.bincount(labels, minlength=num_classes) / len(labels)
        return torch.where(shares > 0, shares.rsqrt(), 0.0) / shares.sqrt().sum()


def draw_held_out(count: int, data: str, seed: int) -> list[int]:
    """Draw the indices of the images that a sampled search holds out, of `count` training images of `data`.

    A tenth, but at least the 16 that a verdict needs, at most 64, and never more than a third.

    Raises:
        ValueError: if there are fewer than 3 to train on.

    >>> [len(draw_held_out(count, "synthetic", seed=0)) for count in (3, 47, 48, 160, 300, 9000)]
    [1, 15, 16, 16, 30, 64]
    """
    if count < 3:
        raise ValueError(
            f"a sampled search holds up to a third of the training images out, but {data} has "
            f"{counted(count, 'image')} to train on, and 3 are needed"
        )
    return sorted(random.Random(seed).sample(range(count), held_out_count(count)))


def tell_of_few(held_out: int, count: int) -> None:
    """Says before the training that its answer will not be reliable, if too few images can be held out."""
    if 0 < held_out < LEAST_IMAGES:
        print(
            f"note: the search reads its curve on {held_out} of {counted(count, 'training image')}, at most a third; "
            f"with fewer than {LEAST_IMAGES} labelled ones its answer will be called not reliable",
            file=sys.stderr,
        )
