"""Samples that break in the middle of a training: named, or skipped and counted."""

from typing import Any

import torch
import torch.distributed

from rfield.segmentation.data import ParsingDataset, SkippingDataset
from rfield.segmentation.inference.predict import compute_device


def worker_message(error: Exception) -> str | None:
    """What a process that loads samples has met: its error has its traceback as text, the message last."""
    lines = str(error).strip().splitlines()
    return lines[-1].partition(": ")[2] if lines and "in DataLoader worker process" in lines[0] else None


def share_skipped(datasets: list[ParsingDataset]) -> None:
    """Each process of a distributed run learns what the others have left out."""
    if not torch.distributed.is_initialized():
        return
    for dataset in datasets:
        if isinstance(dataset, SkippingDataset):
            bad = dataset.bad.to(compute_device())
            torch.distributed.all_reduce(bad, torch.distributed.ReduceOp.MAX)
            dataset.bad.copy_(bad)


def count_skipped(train_set: ParsingDataset, val_set: ParsingDataset) -> dict[str, Any]:
    """What a run's metrics say of the samples that were left out, if they may be."""
    if not (isinstance(train_set, SkippingDataset) and isinstance(val_set, SkippingDataset)):
        return {}
    names = {"train": train_set.skipped(), "val": val_set.skipped()}
    return {"skipped": sum(map(len, names.values())), "skipped_samples": names}
