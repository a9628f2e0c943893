"""The data loaders of a training run, and the place in them where a checkpoint continues."""

from typing import Any

import lightning as L
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from rfield.segmentation.data import EpochSampler
from rfield.segmentation.training.distributed import rank_and_world_size
from rfield.segmentation.training.stopping import leave_signals


class Loaders(L.LightningDataModule):
    """Build loaders after the process group exists, so that the sampler can shard.

    Args:
        train_samples: samples to train on.
        val_samples: samples to validate on, one in a batch.
        batch_size: training samples in a batch of one process.
        workers: processes that load samples.
        seed: of the order of the training samples.
        position: the epoch to start with, and how many of its batches are done.
        held_out: indices of training samples that are left out.
    """

    def __init__(
        self,
        train_samples: Dataset[tuple[Tensor, Tensor]],
        val_samples: Dataset[tuple[Tensor, Tensor]],
        *,
        batch_size: int,
        workers: int,
        seed: int,
        position: tuple[int, int] = (0, 0),
        held_out: frozenset[int] = frozenset(),
    ) -> None:
        super().__init__()
        self.train_samples = train_samples
        self.val_samples = val_samples
        self.batch_size = batch_size
        self.workers = workers
        self.seed = seed
        self.position = position
        self.held_out = held_out

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        sampler = EpochSampler(self.train_samples, seed=self.seed)
        # Workers fetch the first batches before Lightning tells the sampler its epoch.
        epoch, batches = self.position
        sampler.set_epoch(epoch)
        sampler.seen = (epoch, batches * self.batch_size)
        sampler.held_out = self.held_out
        return DataLoader(
            self.train_samples,
            self.batch_size,
            sampler=sampler,
            num_workers=self.workers,
            worker_init_fn=leave_signals,
        )

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        # Split without padding, so that no image counts twice; if a process would have none, all score all.
        rank, world_size = rank_and_world_size()
        own: Any = self.val_samples
        if len(own) >= world_size:
            own = Subset(own, range(rank, len(own), world_size))
        return DataLoader(own, batch_size=1, num_workers=self.workers, worker_init_fn=leave_signals)


def loader_position(saved: dict[str, Any]) -> tuple[int, int]:
    """Return the epoch that a checkpoint continues with, and how many of its batches are done."""
    loops = saved["loops"]["fit_loop"]
    epochs = loops["epoch_progress"]["current"]
    epoch, inside = epochs["processed"], epochs["started"] > epochs["processed"]
    return epoch, loops["epoch_loop.batch_progress"]["current"]["processed"] if inside else 0
