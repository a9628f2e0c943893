"""Training a parsing network with a learned receptive field; Lightning runs the loop."""

import csv
import dataclasses
import json
import logging
import os
import platform
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
import yaml
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, RichProgressBar, Timer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from rfield import plots
from rfield.config import TrainConfig, differences
from rfield.data import (
    IGNORE_INDEX,
    AugmentedDataset,
    EpochSampler,
    ParsingDataset,
    evaluation_transform,
    load_dataset,
    training_transform,
)
from rfield.data.cache import CachedFeatures, cache_features
from rfield.inference import (
    Progress,
    build_network,
    compute_device,
    evaluate,
    feature_logits,
    load_config,
    load_run,
    predict_logits,
)
from rfield.layers import ReceptiveFieldRegulator
from rfield.metrics import confusion_matrix, segmentation_scores
from rfield.models import ParsingNetwork
from rfield.receptive_field import receptive_field_px
from rfield.search import factor_parameters

FACTOR_COLUMNS = (
    "step",
    "factor",
    "effective_dilation",
    "receptive_field_px",
    "grad_inflation",
    "grad_interpolation",
    "loss",
)
_RUN_FILES = ("config.yaml", "classes.json", "metrics.json", "factor.csv", "factor.png", "checkpoints", "logs")


class ParsingModule(L.LightningModule):
    """The training step of a parsing network: pixel-wise cross-entropy, poly schedule, a factor with its own rate.

    Args:
        network: what to train.
        config: resolved.
        class_names: the classes' names.
    """

    def __init__(self, network: ParsingNetwork, config: TrainConfig, class_names: tuple[str, ...]) -> None:
        super().__init__()
        # Plain types only, so that a checkpoint loads with weights_only.
        self.save_hyperparameters({"config": config.plain(), "class_names": list(class_names)})
        self.network = network
        self.config = config
        self.class_names = class_names
        self.confusion = confusion_matrix(len(class_names))
        self.regulators = [module for module in network.modules() if isinstance(module, ReceptiveFieldRegulator)]
        self.factor_gradients: tuple[float, float] | None = None
        if config.freeze_backbone:
            network.backbone.requires_grad_(False)

    def on_fit_start(self) -> None:
        for regulator in self.regulators:
            regulator.record_gradients = True

    def on_train_epoch_start(self) -> None:
        if self.config.freeze_backbone:
            self.network.backbone.eval()

    def on_train_batch_start(self, batch: Any, batch_index: int) -> None:
        # Dropout depends on seed, step and process alone, so that a resumed epoch repeats itself. Not an epoch's
        # affair: whether its loader draws before or after the hook is another matter in a resumed run.
        seeds = np.random.SeedSequence([self.config.seed, self.global_step, self.global_rank])
        torch.manual_seed(int(seeds.generate_state(1)[0]))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        """Mean cross-entropy over the batch's labelled pixels."""
        input, mask = batch
        input = input.contiguous(memory_format=torch.channels_last)
        frozen = self.config.freeze_backbone
        features = input.float() if frozen else self.network.backbone(self.network.pad(input))
        height, width = ((size - 1) * self.network.stride + 1 for size in features.shape[2:])
        mask = F.pad(mask, (0, width - mask.shape[2], 0, height - mask.shape[1]), value=IGNORE_INDEX)
        if self.config.loss_resolution == "features":
            logits = self.network.head(features)
            mask = mask[:, :: self.network.stride, :: self.network.stride]
        else:
            logits = self.network.head(features, output_size=(mask.shape[1], mask.shape[2]))
        total = F.cross_entropy(logits.float(), mask, ignore_index=IGNORE_INDEX, reduction="sum")
        loss: Tensor = total / (mask != IGNORE_INDEX).sum().clamp(min=1)
        self.log("loss", loss.detach(), prog_bar=True)
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        learned = [regulator for regulator in self.regulators if regulator.log_factor.requires_grad]
        if learned:
            scaler = getattr(self.trainer.precision_plugin, "scaler", None)
            scale = scaler.get_scale() if scaler is not None else 1.0
            terms = [regulator.pop_factor_gradients() for regulator in learned]
            self.factor_gradients = (
                sum(float(inflation.sum()) for inflation, _ in terms) / scale,
                sum(float(interpolation.sum()) for _, interpolation in terms) / scale,
            )
        if self.global_step < self.config.factor_start:
            for factor in factor_parameters(self.network):
                factor.grad = None

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_index: int) -> None:
        field = receptive_field_px(self.network)[0]
        self.log_dict({"rf_px": field, **({"factor": factor_of(self.network)} if self.regulators else {})}, True)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        """Scores one image, or one image's cached features, at the image's own size."""
        input, mask = batch[0][0], batch[1][0]
        if self.config.freeze_backbone:
            logits = feature_logits(self.network, input, (mask.shape[0], mask.shape[1]))
        else:
            logits = predict_logits(self.network, input)
        self.confusion.update(logits.argmax(0), mask)

    def on_validation_epoch_end(self) -> None:
        scores = segmentation_scores(self.confusion.compute(), self.class_names)
        # Every process scores all images and needs the score, to agree on the best checkpoint.
        self.log("miou", scores["miou"] or 0.0, prog_bar=True, sync_dist=True)
        self.confusion.reset()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        config = self.config
        lr, factor_lr = config.lr or 0.0, config.factor_lr or 0.0
        factors = [factor for factor in factor_parameters(self.network) if factor.requires_grad]
        known = {id(factor) for factor in factors}
        head = [weight for weight in self.network.head.parameters() if id(weight) not in known]
        groups: list[dict[str, Any]] = [{"params": head, "lr": lr * config.head_lr_scale}]
        if factors:
            groups.append({"params": factors, "lr": factor_lr, "weight_decay": 0.0})
        if not config.freeze_backbone:
            groups.append({"params": list(self.network.backbone.parameters()), "lr": lr})
        optimizer: torch.optim.Optimizer
        if config.optimizer == "sgd":
            optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9, weight_decay=config.weight_decay)
        else:
            optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=config.weight_decay)
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps) ** 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def factor_of(network: ParsingNetwork) -> float:
    """The network's factor; 1 where nothing is learned."""
    factors = factor_parameters(network)
    return float(factors[0].detach().exp()[0]) if factors else 1.0


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
        network = pl_module.network
        gradients = pl_module.factor_gradients or ("", "")
        numbers = [factor_of(network), network.head.effective_dilation[0], receptive_field_px(network)[0]]
        loss = float(outputs["loss"])
        self.rows.append([trainer.global_step, *(f"{x:.6g}" for x in numbers), *gradients, f"{loss:.6g}"])
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


class _WholeImages(Dataset[tuple[Tensor, Tensor]]):
    """Validation samples at their own size: normalised images, or cached features, with their masks."""

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


class _Loaders(L.LightningDataModule):
    """Asked for its loaders when the processes are there, so that the sampler deals the samples to them."""

    def __init__(
        self,
        train_samples: Dataset[tuple[Tensor, Tensor]],
        val_samples: Dataset[tuple[Tensor, Tensor]],
        config: TrainConfig,
        workers: int,
        first_epoch: int,
    ) -> None:
        super().__init__()
        self.train_samples = train_samples
        self.val_samples = val_samples
        self.config = config
        self.workers = workers
        self.first_epoch = first_epoch

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        sampler = EpochSampler(self.train_samples, seed=self.config.seed)
        # Workers fetch the first batches before Lightning tells the sampler its epoch.
        sampler.set_epoch(self.first_epoch)
        share = self.config.batch_size // self.config.devices
        return DataLoader(self.train_samples, share, sampler=sampler, num_workers=self.workers)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return DataLoader(self.val_samples, batch_size=1, num_workers=self.workers)


def train(config: TrainConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Trains a network and leaves a run folder.

    Args:
        config: what to train, on what, and how.
        progress: called with (images done, images in all) while features are computed and the result is scored.

    Returns:
        What the run's `metrics.json` holds; nothing in the second and further processes.

    Raises:
        ValueError: if the config does not fit the data, the weights, or the run that is resumed.
        FileExistsError: if the run folder holds a run already and `resume` is not set.
        FileNotFoundError: if data or weights are missing.
    """
    progress = progress or (lambda done, total: None)
    if torch.cuda.is_available() and config.devices > torch.cuda.device_count():
        raise ValueError(f"devices is {config.devices}, but there are {torch.cuda.device_count()} GPUs")
    torch.manual_seed(config.seed)
    train_set = load_dataset(config.data, config.train_split)
    val_set = load_dataset(config.data, config.val_split)
    config = config.resolved()
    if config.freeze_backbone:
        config = dataclasses.replace(config, canvas=config.canvas or _canvas([train_set, val_set]))
    out = Path(config.out)
    if _is_first_process():
        _check_run_folder(out, config)
    network = build_network(config, train_set.num_classes, config.weights)
    train_samples: Dataset[tuple[Tensor, Tensor]]
    val_features: CachedFeatures | None = None
    if config.freeze_backbone:
        network.to(compute_device()).backbone.eval()
        folder = Path(config.cache) if config.cache else None
        train_samples = cache_features(network, train_set, folder, config.flip, config.seed, progress)
        val_features = cache_features(network, val_set, folder, mirrored=False, progress=progress)
    else:
        transform = training_transform(config.crop_size, config.scale_range, config.flip, config.colour_jitter)
        train_samples = AugmentedDataset(train_set, transform, config.seed)
    if _is_first_process():
        _start_run_folder(out, config, train_set)

    module = ParsingModule(network, config, train_set.class_names)
    timer = Timer(verbose=False)
    # Cached features come from the page cache; a worker process would only copy them once more.
    workers = 0 if config.freeze_backbone else config.workers
    last = out / "checkpoints" / "last.ckpt"
    checkpoint = last if config.resume and last.is_file() else None
    first_epoch = 0
    if checkpoint is not None:
        load_run(out)  # A damaged checkpoint is named here, and not by Lightning.
        first_epoch = torch.load(checkpoint, map_location="cpu", weights_only=True)["epoch"] + 1
    loaders = _Loaders(train_samples, _WholeImages(val_set, val_features), config, workers, first_epoch)
    with _quiet():
        trainer = _trainer(config, out, timer)
        try:
            trainer.fit(module, datamodule=loaders, ckpt_path=checkpoint, weights_only=True)
        except SystemExit:  # Lightning's answer to Ctrl-C
            raise KeyboardInterrupt from None
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # The first process scores the network alone.
    if not trainer.is_global_zero:
        return {}
    return _finish(out, config, timer.time_elapsed("train"), val_set, val_features, progress)


def _finish(
    out: Path,
    config: TrainConfig,
    seconds: float,
    val_set: ParsingDataset,
    val_features: CachedFeatures | None,
    progress: Progress,
) -> dict[str, Any]:
    """Scores the last checkpoint, just as `rfield evaluate` does, and writes the run's results."""
    network = load_run(out).network.to(compute_device())
    scores = evaluate(network, val_set, config.freeze_backbone, val_features, progress)
    metrics = {
        **scores,
        "factor": factor_of(network),
        "effective_dilation": network.head.effective_dilation[0],
        "receptive_field_px": receptive_field_px(network)[0],
        "train_seconds": seconds,
        "seed": config.seed,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("rfield", "torch", "torchvision", "lightning")},
        },
    }
    write_json(out / "metrics.json", metrics)
    columns = read_factor_csv(out / "factor.csv")
    figure = plots.factor_curve(
        columns["step"], columns["effective_dilation"], columns["receptive_field_px"], columns["loss"]
    )
    plots.save(figure, out / "factor.png")
    return metrics


def read_factor_csv(path: Path) -> dict[str, np.ndarray]:
    """The columns of a run's `factor.csv`; an empty cell is NaN."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: np.array([float(row[name] or "nan") for row in rows]) for name in FACTOR_COLUMNS}


def write_json(path: Path, content: Any) -> None:
    """Writes a whole file or none."""
    _write_text(path, json.dumps(content, indent=2) + "\n")


def _write_text(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    os.replace(partial, path)


def _is_first_process() -> bool:
    return int(os.environ.get("LOCAL_RANK", 0)) == int(os.environ.get("NODE_RANK", 0)) == 0


def _canvas(datasets: list[ParsingDataset]) -> tuple[int, int]:
    sizes = [size for dataset in datasets for size in dataset.sizes()]
    return max(height for height, _ in sizes), max(width for _, width in sizes)


def _check_run_folder(out: Path, config: TrainConfig) -> None:
    """Refuses what would overwrite a run, or continue one with other settings."""
    if not (out / "config.yaml").is_file():
        return
    if not config.resume:
        raise FileExistsError(f"{out} holds a run already: give --resume to continue it, or another --out")
    changed = differences(load_config(out / "config.yaml").plain(), config.plain(), ignored=("out", "workers", "cache"))
    if changed:
        raise ValueError(f"{out} cannot be resumed with other settings: {'; '.join(changed)}")


def _start_run_folder(out: Path, config: TrainConfig, dataset: ParsingDataset) -> None:
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "classes.json", {"class_names": dataset.class_names, "palette": dataset.palette})
    _write_text(out / "config.yaml", yaml.safe_dump(config.plain(), sort_keys=False))


def clear_run_folder(out: Path) -> None:
    """Removes an earlier run's files, and nothing else, from a folder."""
    for name in _RUN_FILES:
        path = out / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _trainer(config: TrainConfig, out: Path, timer: Timer) -> L.Trainer:
    checkpoints = out / "checkpoints"
    return L.Trainer(
        accelerator=compute_device().type,
        devices=config.devices,
        precision=config.precision,
        max_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        check_val_every_n_epoch=config.val_every,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_model_summary=False,
        log_every_n_steps=10,
        logger=[TensorBoardLogger(out / "logs", name="", version="tensorboard"), CSVLogger(out / "logs", name="csv")],
        callbacks=[
            timer,
            FactorLog(out / "factor.csv"),
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
            LastValidation(),
            RichProgressBar() if sys.stdout.isatty() else LineProgress(),
        ],
        enable_progress_bar=sys.stdout.isatty(),
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Lightning's advice, which is for those who wrote the loop, from those who run it."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        warnings.filterwarnings("ignore", ".*in eval mode at the start of training.*")
        warnings.filterwarnings("ignore", ".*smaller than the logging interval.*")
        warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.*")
        warnings.filterwarnings("ignore", ".*Checkpoint directory .* exists and is not empty.*")
        try:
            yield
        finally:
            logger.setLevel(level)
