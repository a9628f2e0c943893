"""What is written and shown while a network trains."""

import csv
import os
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only

from rfield.training.module import ParsingModule, present_field

FACTOR_COLUMNS = (
    "step",
    "factor",
    "effective_dilation",
    "receptive_field_px",
    "grad_inflation",
    "grad_interpolation",
    "loss",
)


class FactorLog(Callback):
    """Writes `factor.csv`, a row a step; on resuming, drops the rows after the checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[list[Any]] = []

    @rank_zero_only
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        kept: list[list[str]] = []
        if trainer.global_step and self.path.is_file():
            with self.path.open(newline="") as file:
                whole = [row for row in list(csv.reader(file))[1:] if len(row) == len(FACTOR_COLUMNS)]
            kept = [row for row in whole if int(row[0]) <= trainer.global_step]
        partial = self.path.with_suffix(".partial")
        with partial.open("w", newline="") as file:
            csv.writer(file).writerows([FACTOR_COLUMNS, *kept])
        os.replace(partial, self.path)

    @rank_zero_only
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_index: int
    ) -> None:
        assert isinstance(pl_module, ParsingModule)
        gradients = pl_module.factor_gradients or ("", "")
        loss = float(outputs["loss"])
        self.rows.append(
            [trainer.global_step, *(f"{x:.6g}" for x in present_field(pl_module.network)), *gradients, f"{loss:.6g}"]
        )
        if len(self.rows) >= 50:
            self._flush()

    @rank_zero_only
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._flush()

    def _flush(self) -> None:
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerows(self.rows)
        self.rows = []


class LastValidation(Callback):
    """Has the last epoch end with a validation, whatever the interval, so that it can be the best."""

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch + 1 == trainer.max_epochs:
            trainer.check_val_every_n_epoch = 1


class LineProgress(Callback):
    """One line an epoch, for logs and pipes where a progress bar cannot move."""

    @rank_zero_only
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        names = ("loss", "miou", "factor", "rf_px")
        metrics = trainer.callback_metrics
        shown = [f"{name} {float(metrics[name]):.4g}" for name in names if name in metrics]
        print(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}: {', '.join(shown)}", flush=True)


def read_factor_csv(path: Path) -> dict[str, np.ndarray]:
    """The columns of a run's `factor.csv`; an empty cell is NaN."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: np.array([float(row[name] or "nan") for row in rows]) for name in FACTOR_COLUMNS}
