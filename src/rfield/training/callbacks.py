"""What is written and shown while a network trains."""

import csv
import io
import os
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only

from rfield.checkpoints import written_whole
from rfield.training.module import ParsingModule, present_field, present_fields

FACTOR_COLUMNS = (
    "step",
    "factor",
    "effective_dilation",
    "receptive_field_px",
    "grad_inflation",
    "grad_interpolation",
    "loss",
)
PATH_COLUMNS = ("step", "path", "axis", "factor", "effective_dilation", "receptive_field_px")


class _StepLog(Callback):
    """Writes a CSV file, a row a step or more; on resuming, drops the rows after the checkpoint."""

    columns: tuple[str, ...]

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: list[list[Any]] = []

    def rows(self, trainer: L.Trainer, module: ParsingModule, loss: float) -> list[list[Any]]:
        """What a step adds after the step's number."""
        raise NotImplementedError

    @rank_zero_only
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        kept: list[list[str]] = []
        if trainer.global_step and self.path.is_file():
            with self.path.open(newline="") as file:
                whole = [row for row in list(csv.reader(file))[1:] if len(row) == len(self.columns)]
            kept = [row for row in whole if int(row[0]) <= trainer.global_step]
        text = io.StringIO(newline="")
        csv.writer(text).writerows([self.columns, *kept])
        with written_whole(self.path) as file:
            file.write(text.getvalue().encode())

    @rank_zero_only
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_index: int
    ) -> None:
        assert isinstance(pl_module, ParsingModule)
        rows = self.rows(trainer, pl_module, float(outputs["loss"]))
        self._rows += [[trainer.global_step, *row] for row in rows]
        if len(self._rows) >= 50:
            self._flush()

    @rank_zero_only
    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._flush()  # No checkpoint is ahead of its rows.

    def _flush(self) -> None:
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerows(self._rows)
            file.flush()
            os.fsync(file.fileno())
        self._rows = []


class FactorLog(_StepLog):
    """`factor.csv`: a row a step, of the first path along the height."""

    columns = FACTOR_COLUMNS

    def rows(self, trainer: L.Trainer, module: ParsingModule, loss: float) -> list[list[Any]]:
        gradients = module.factor_gradients or ("", "")
        return [[*(f"{x:.6g}" for x in present_field(module.network)), *gradients, f"{loss:.6g}"]]


class PathLog(_StepLog):
    """`paths.csv`: a row a step, path and axis."""

    columns = PATH_COLUMNS

    def rows(self, trainer: L.Trainer, module: ParsingModule, loss: float) -> list[list[Any]]:
        return [
            [
                field.path + 1,
                ("height", "width")[field.axis],
                *(f"{x:.6g}" for x in (field.factor, field.effective_dilation, field.receptive_field_px)),
            ]
            for field in present_fields(module.network)
        ]


class LastValidation(Callback):
    """Has the last epoch end with a validation, whatever the interval, so that it can be the best."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.on_train_epoch_start(trainer, pl_module)  # A run resumed inside an epoch does not start it again.

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


def read_paths_csv(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Steps and factors of each path and axis of a run's `paths.csv`, by name."""
    found: dict[str, list[tuple[float, float]]] = {}
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    axes = {row["axis"] for row in rows}
    for row in rows:
        name = f"path {row['path']}" + (f", {row['axis']}" if len(axes) > 1 else "")
        found.setdefault(name, []).append((float(row["step"]), float(row["factor"])))
    return {name: (np.array(points)[:, 0], np.array(points)[:, 1]) for name, points in found.items()}
