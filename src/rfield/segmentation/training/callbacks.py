"""Write and show the course of a training."""

import csv
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, RichProgressBar
from lightning.pytorch.utilities import rank_zero_only

from rfield.layers import LearnedFactor
from rfield.search import GradientSearch, SampledSearch, SpsaSearch
from rfield.segmentation.files.atomic import write_csv, write_error
from rfield.segmentation.training.fields import present_field, present_fields
from rfield.segmentation.training.module import ParsingModule
from rfield.segmentation.training.search_phase import SearchPhase
from rfield.segmentation.web.report import try_report

FACTOR_COLUMNS = (
    "step",
    "factor",
    "effective_dilation",
    "receptive_field_px",
    "grad_inflation",
    "grad_interpolation",
    "loss",
)
_AXES = ("height", "width")
# Fewer steps at a bound are no reason to warn, however short the search is.
_LEAST_PINNED = 20
# Seconds after which a browser reads a live report again.
_RELOAD = 15
PATH_COLUMNS = ("step", "path", "axis", "factor", "effective_dilation", "receptive_field_px")


class _StepLog(Callback):
    """Writes one or more rows per step to a CSV file; drops the rows after the checkpoint when a run is resumed."""

    columns: tuple[str, ...]

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: list[list[Any]] = []

    def rows(self, trainer: L.Trainer, module: ParsingModule, loss: float) -> list[list[Any]]:
        """Return the rows of a step, without the step's number."""
        raise NotImplementedError

    @rank_zero_only
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        kept: list[list[str]] = []
        if trainer.global_step and self.path.is_file():
            with self.path.open(newline="", encoding="utf-8") as file:
                whole = [row for row in list(csv.reader(file))[1:] if len(row) == len(self.columns)]
            kept = [row for row in whole if int(row[0]) <= trainer.global_step]
        write_csv(self.path, [self.columns, *kept])

    @rank_zero_only
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_index: int
    ) -> None:
        assert isinstance(pl_module, ParsingModule)
        rows = self.rows(trainer, pl_module, float(pl_module.mean_loss))
        self._rows += [[trainer.global_step, *row] for row in rows]
        if len(self._rows) >= 50:
            self._flush()

    @rank_zero_only
    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._flush()  # The rows of a checkpoint's steps are on the disk before it.

    def _flush(self) -> None:
        try:
            with self.path.open("a", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows(self._rows)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise write_error(self.path, error, "the checkpoints are untouched") from error
        self._rows = []


class FactorLog(_StepLog):
    """Writes `factor.csv`: one row per step, of the first path along the height."""

    columns = FACTOR_COLUMNS

    def rows(self, trainer: L.Trainer, module: ParsingModule, loss: float) -> list[list[Any]]:
        gradients = module.factor_gradients or ("", "")
        return [[*(f"{x:.6g}" for x in present_field(module.network)), *gradients, f"{loss:.6g}"]]


class PathLog(_StepLog):
    """Writes `paths.csv`: one row per step, path and axis."""

    columns = PATH_COLUMNS

    def rows(self, trainer: L.Trainer, module: ParsingModule, loss: float) -> list[list[Any]]:
        return [
            [
                field.path + 1,
                _AXES[field.axis],
                *(f"{x:.6g}" for x in (field.factor, field.effective_dilation, field.receptive_field_px)),
            ]
            for field in present_fields(module.network)
        ]


class PinnedFactor(Callback):
    """Warns once for each factor that has been at a bound for a fifth of its search, and says what to do."""

    def __init__(self) -> None:
        self.steps: dict[tuple[int, int, bool], int] = {}

    @rank_zero_only
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_index: int
    ) -> None:
        assert isinstance(pl_module, ParsingModule)
        search = pl_module.search
        if search is None or pl_module.phase is not SearchPhase.SEARCHING or isinstance(search, SampledSearch):
            return  # A sampled search evaluates the whole curve, and its end may be the best.
        if isinstance(search, GradientSearch) and trainer.global_step <= pl_module.factor_start:
            return
        for index, group in enumerate(search.groups):
            for axis, at_most in bounds_reached(group[0], isinstance(search, SpsaSearch)).items():
                for large in (False, True):
                    key = (index, axis, large)
                    self.steps[key] = self.steps.get(key, 0) + 1 if at_most == large else 0
                    if self.steps[key] == max(_LEAST_PINNED, search.steps // 5):
                        name = f"step {trainer.global_step}: the factor of path {index + 1}, {_AXES[axis]}"
                        _warn_of_bound(name, large, self.steps[key])


def bounds_reached(layer: LearnedFactor, tighter: bool) -> dict[int, bool | None]:
    """Return for each axis with a factor whether it is at its bounds.

    Args:
        layer: has seen a map.
        tighter: whether the tighter axis's bounds hold for both, as in a search that overrides dilations.

    Returns:
        By axis: True if the field is as large as it may be, False if it is as small as it may be, None if neither.
    """
    if layer.map_size is None:
        return {}
    axes = layer.log_factor.numel()
    lower, upper = layer.factor_bounds(layer.map_size)
    reached: dict[int, bool | None] = {}
    for axis, factor in enumerate(layer.factor.tolist()):
        if tighter:
            low, high = max(lower), min(upper)
        else:
            low, high = (min(lower), max(upper)) if axes == 1 else (lower[axis], upper[axis])
        near = 1 + 1e-3
        at_most = True if factor <= low * near else False if factor >= high / near else None
        reached[axis] = at_most if low * near < high else None
    return reached


def _warn_of_bound(name: str, large: bool, steps: int) -> None:
    if large:
        bound = "lower bound, where the dilation is the map's size"
        advice = "Use a larger crop_size or canvas, a smaller factor_lr or a later factor_start"
    else:
        bound = "upper bound, where the dilation is 1"
        advice = "Use a smaller output_stride, whose features are finer, or a smaller factor_lr"
    warnings.warn(
        f"{name}, has been at its {bound} for {steps} steps. {advice}; or search sampled, which tries all dilations",
        stacklevel=2,
    )


class SearchStep(Callback):
    """Does the search's part of each step.

    Its place is after the callbacks that log a step, and before those that may save and stop. Lightning calls the
    module's own hook after all callbacks, which would be too late for the latter.
    """

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_index: int
    ) -> None:
        assert isinstance(pl_module, ParsingModule)
        pl_module.end_step()


class LastValidation(Callback):
    """Validates after the last epoch, whatever the interval, so that the last checkpoint can be the best."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.on_train_epoch_start(trainer, pl_module)  # It does not run if a run resumes inside an epoch.

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch + 1 == trainer.max_epochs:
            trainer.check_val_every_n_epoch = 1


class _FreshScore(Callback):
    """Tracks whether the last score is of this epoch; Lightning shows an old one."""

    _validated = -1

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._validated = trainer.current_epoch
        super().on_validation_end(trainer, pl_module)

    def names(self, trainer: L.Trainer, names: Iterable[str]) -> list[str]:
        """Return the names of the metrics to show."""
        return [name for name in names if name != "miou" or self._validated == trainer.current_epoch]


class LiveReport(Callback):
    """Writes the report of a run after each validation, when its checkpoint is on the disk."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self._validated = False

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._validated = True

    @rank_zero_only
    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._validated:
            return
        self._validated = False
        for logger in trainer.loggers:
            logger.save()
        with torch.random.fork_rng(devices=[]):  # A network that is opened draws weights first.
            try_report(self.out, refresh=_RELOAD)


class BarProgress(_FreshScore, RichProgressBar):
    """Shows a progress bar, for terminals."""

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Any:
        metrics = super().get_metrics(trainer, pl_module)
        return {name: metrics[name] for name in self.names(trainer, metrics)}


class LineProgress(_FreshScore):
    """Prints one line per epoch, for logs and pipes, where a progress bar cannot move."""

    @rank_zero_only
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        names = self.names(trainer, ("loss", "miou", "factor", "rf_px"))
        metrics = trainer.callback_metrics
        shown = [f"{name} {float(metrics[name]):.4g}" for name in names if name in metrics]
        print(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}: {', '.join(shown)}", flush=True)
