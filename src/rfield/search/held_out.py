"""Hold samples of a training loader out, for a search to read its curve on, and give them back."""

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from rfield.search.certainty import LEAST_IMAGES
from rfield.text import counted

# Share of the training samples, and the most of them.
_SHARE = 0.1
_MOST = 64


def held_out_count(count: int) -> int:
    """Return how many of `count` training samples a sampled search holds out.

    A tenth, but at least the 16 that a verdict needs, at most 64, and never more than a third.

    Example:
        >>> [held_out_count(count) for count in (3, 47, 48, 160, 300, 9000)]
        [1, 15, 16, 16, 30, 64]
    """
    return min(max(round(_SHARE * count), LEAST_IMAGES), _MOST, count // 3)


def half_of(indices: Sequence[int], processes: int = 1) -> Sequence[int]:
    """Return every second of the held-out samples, the same for any number of processes; all if they are few.

    Example:
        >>> half_of(range(16)), half_of([3, 5, 8])
        (range(0, 16, 2), [3, 5, 8])
    """
    half = indices[::2]
    return half if len(indices) >= LEAST_IMAGES and len(half) >= processes else indices


class HeldOut:
    """Batches of one training sample each, which a `DataLoader` leaves out until they are given back.

    In the loader another sample takes the place of each one that is held out, so that an epoch has as many steps as
    before. The batches are read once, so that random augmentation is the same at every reading. Several processes
    share them.

    Args:
        loader: of a data set with a length and an index; it is changed in place.
        seed: determines which samples are drawn.

    Attributes:
        indices: of the samples that are held out, in all processes.

    Raises:
        ValueError: if the loader is no `DataLoader` of such a data set, or has fewer than 3 samples.

    Example:
        >>> loader = DataLoader(range(9), batch_size=3)
        >>> held_out = HeldOut(loader)
        >>> held_out.indices, torch.cat([*loader]).tolist()
        ([0, 6, 8], [1, 1, 2, 3, 4, 5, 2, 7, 3])
        >>> held_out.give_back()
        >>> torch.cat([*loader]).tolist() == [*range(9)]
        True
    """

    def __init__(self, loader: Any, seed: int = 0) -> None:
        loader = getattr(loader, "base_dataloader", loader)  # inside of accelerate's
        how = "give batches by held_out="
        if not isinstance(loader, DataLoader):
            raise ValueError(f"samples are held out of a DataLoader, got a {type(loader).__name__}: {how}")
        dataset: Any = loader.dataset
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise ValueError(f"the samples of a {type(dataset).__name__} have no index, so none can be held out: {how}")
        if loader.batch_sampler is None:
            raise ValueError(f"the loader makes no batches (batch_size is None), so none can be held out: {how}")
        if len(dataset) < 3:
            raise ValueError(f"a search holds up to a third of the samples out, but there are {len(dataset)}")
        self.indices = sorted(random.Random(seed).sample(range(len(dataset)), held_out_count(len(dataset))))
        rank, processes = 0, 1
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            rank, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
        collate = loader.collate_fn
        own, half = self.indices[rank::processes], half_of(self.indices, processes)[rank::processes]
        batches = {index: collate([dataset[index]]) for index in sorted({*own, *half})}
        self._batches, self._half = [batches[index] for index in own], [batches[index] for index in half]
        self._loader, self._dataset = loader, dataset
        self._rest = _Rest(dataset, self.indices)
        # A DataLoader refuses to set its data set; the sampler and the workers of the next epoch see this one.
        vars(loader)["dataset"] = self._rest

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Any:
        return iter(self._batches)

    def half(self) -> list[Any]:
        """Return the batches of every second sample, or of all if they are few."""
        return self._half

    def give_back(self) -> None:
        """Let the loader return all samples again, also from workers that are running."""
        self._rest.held_out.zero_()
        vars(self._loader)["dataset"] = self._dataset

    def note(self) -> str:
        """Return one line: how many samples are held out, and whether a verdict needs more."""
        few = f"; with fewer than {LEAST_IMAGES} the answer will be called not reliable"
        held = counted(len(self.indices), "sample")
        return f"{held} of {len(self._dataset)} are held out" + few * (len(self.indices) < LEAST_IMAGES)


class _Rest:
    """A data set in which other samples take the place of those that are held out."""

    def __init__(self, dataset: Any, indices: list[int]) -> None:
        self.dataset = dataset
        rest = [index for index in range(len(dataset)) if index not in {*indices}]
        self.places = {index: rest[place % len(rest)] for place, index in enumerate(indices)}
        # Workers see when it changes.
        self.held_out: Tensor = torch.ones(1, dtype=torch.bool).share_memory_()  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[self.places.get(int(index), index) if self.held_out else index]

    def __getattr__(self, name: str) -> Any:
        # Not `__getitems__`, by which a loader would read the data set itself.
        if name.startswith("__") or name == "dataset":
            raise AttributeError(name)
        return getattr(self.dataset, name)
