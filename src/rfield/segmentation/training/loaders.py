"""The loaders of a training run, and where a checkpoint has it go on in them."""

from typing import Any

import lightning as L
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from rfield.segmentation.config.train import TrainConfig
from rfield.segmentation.data import EpochSampler
from rfield.segmentation.training.distributed import rank_and_processes
from rfield.segmentation.training.stopping import leave_signals


class Loaders(L.LightningDataModule):
    """Builds loaders after the process group exists, so that the sampler can share the samples out."""

    def __init__(
        self,
        train_samples: Dataset[tuple[Tensor, Tensor]],
        val_samples: Dataset[tuple[Tensor, Tensor]],
        config: TrainConfig,
        position: tuple[int, int],
        held_out: frozenset[int],
    ) -> None:
        super().__init__()
        self.train_samples = train_samples
        self.val_samples = val_samples
        self.config = config
        # Cached features come from the page cache; a worker process would only copy them once more.
        self.workers = 0 if config.freeze_backbone else config.workers
        self.position = position
        self.held_out = held_out

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        sampler = EpochSampler(self.train_samples, seed=self.config.seed)
        share = (self.config.batch_size or 1) // self.config.devices
        # Workers fetch the first batches before Lightning tells the sampler its epoch.
        epoch, batches = self.position
        sampler.set_epoch(epoch)
        sampler.seen = (epoch, batches * share)
        sampler.held_out = self.held_out
        return DataLoader(
            self.train_samples, share, sampler=sampler, num_workers=self.workers, worker_init_fn=leave_signals
        )

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        # Dealt unpadded, so that no image counts twice; where some would have none, all score all.
        rank, processes = rank_and_processes()
        own: Any = self.val_samples
        if len(own) >= processes:
            own = Subset(own, range(rank, len(own), processes))
        return DataLoader(own, batch_size=1, num_workers=self.workers, worker_init_fn=leave_signals)


def loader_position(saved: dict[str, Any]) -> tuple[int, int]:
    """The epoch that a checkpoint goes on with, and how many of its batches are done."""
    loops = saved["loops"]["fit_loop"]
    epochs = loops["epoch_progress"]["current"]
    epoch, inside = epochs["processed"], epochs["started"] > epochs["processed"]
    return epoch, loops["epoch_loop.batch_progress"]["current"]["processed"] if inside else 0
