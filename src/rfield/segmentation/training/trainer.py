"""Lightning's trainer for a run: callbacks in their order, checkpoints, and fewer warnings."""

import importlib.util
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.strategies import DDPStrategy

from rfield.segmentation.config.train import OptimOptions, RunOptions
from rfield.segmentation.inference.predict import compute_device
from rfield.segmentation.training.callbacks import (
    BarProgress,
    FactorLog,
    LastValidation,
    LineProgress,
    LiveReport,
    PathLog,
    PinnedFactor,
    SearchStep,
)
from rfield.segmentation.training.distributed import num_nodes
from rfield.segmentation.training.stopping import WholeCheckpoints


def make_trainer(
    out: Path, optim: OptimOptions, run: RunOptions, callbacks: list[Callback], log_paths: bool
) -> L.Trainer:
    """Make the trainer of a run.

    Args:
        out: the run folder.
        optim: of the resolved config.
        run: of the resolved config.
        callbacks: called after the search has done its part of a step.
        log_paths: write `paths.csv`, with a row for each of several factors.
    """
    checkpoints = out / "checkpoints"
    return L.Trainer(
        accelerator=compute_device().type,
        devices=run.devices // num_nodes(),
        num_nodes=num_nodes(),
        # A factor takes no part in the loss before and after its search. Buffers are the same in all processes: batch
        # norms share their statistics, and each process validates as many images as it has.
        strategy=DDPStrategy(find_unused_parameters=True, broadcast_buffers=False) if run.devices > 1 else "auto",
        precision=run.precision,
        gradient_clip_val=optim.clip_norm or None,
        max_epochs=optim.epochs,
        max_steps=optim.max_steps or -1,
        check_val_every_n_epoch=run.val_every,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_model_summary=False,
        log_every_n_steps=10,
        logger=make_loggers(out, run.logger),
        plugins=[WholeCheckpoints()],
        callbacks=[
            FactorLog(out / "factor.csv"),
            *([PathLog(out / "paths.csv")] if log_paths else []),
            ModelCheckpoint(
                checkpoints,
                "best",
                monitor="miou",
                mode="max",
                save_on_train_epoch_end=False,
                enable_version_counter=False,
                auto_insert_metric_name=False,
            ),
            ModelCheckpoint(checkpoints, "last", save_on_train_epoch_end=True, enable_version_counter=False),
            PinnedFactor(),
            LastValidation(),
            BarProgress() if sys.stdout.isatty() else LineProgress(),
            SearchStep(),
            *([LiveReport(out)] if run.report == "live" else []),
            *callbacks,
        ],
        enable_progress_bar=sys.stdout.isatty(),
    )


def make_loggers(out: Path, names: Sequence[str]) -> list[Logger]:
    """Make Lightning's loggers of a run.

    Args:
        out: the run folder; its name is the run's, in the project or experiment `rfield`.
        names: see `RunOptions.logger`.

    Raises:
        ValueError: if a logger's package is not installed.
    """
    makers: dict[str, Callable[[], Logger]] = {
        "tensorboard": lambda: TensorBoardLogger(out / "logs", name="", version="tensorboard"),
        "csv": lambda: CSVLogger(out / "logs", name="csv"),
        "wandb": lambda: WandbLogger(name=out.name, save_dir=out / "logs", project="rfield"),
        "mlflow": lambda: MLFlowLogger("rfield", out.name, save_dir=str(out / "logs" / "mlflow")),
    }
    check_loggers(names)
    return [makers[name]() for name in names]


def check_loggers(names: Sequence[str]) -> None:
    """Raise ValueError if a logger's package is not installed."""
    for name in names:
        if name != "csv" and importlib.util.find_spec(name) is None:
            raise ValueError(f"logger {name} needs the package {name}: pip install {name}")


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Silence Lightning's advice to the authors of a training loop."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        warnings.filterwarnings("ignore", ".*in eval mode at the start of training.*")
        warnings.filterwarnings("ignore", ".*smaller than the logging interval.*")
        warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.*")
        warnings.filterwarnings("ignore", ".*your dataloader is not resumable.*")  # Its sampler is.
        warnings.filterwarnings("ignore", ".*Checkpoint directory .* exists and is not empty.*")
        warnings.filterwarnings("ignore", ".*broadcast_buffers. is deprecated.*")  # Its successor is too new.
        try:
            yield
        finally:
            logger.setLevel(level)
