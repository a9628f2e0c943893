"""Check, start and clear the run folder that a training writes."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from rfield.segmentation.config.train import TrainConfig, differences
from rfield.segmentation.data import ParsingDataset, ResizedDataset, SkippingDataset, class_difference
from rfield.segmentation.data.class_groups import ClassGroups
from rfield.segmentation.files.atomic import write_json, write_text, write_weights
from rfield.segmentation.files.checkpoints import LAST, read_checkpoint
from rfield.segmentation.files.untrusted import read_json
from rfield.segmentation.models import ParsingNetwork
from rfield.segmentation.runs import SEARCH_WEIGHTS, load_config, read_classes

# Settings that may change when a run is resumed.
_MAY_CHANGE = ("out", "workers", "cache", "skip_bad", "devices", "logger", "report")
_RUN_FILES = (
    "config.yaml",
    "classes.json",
    "metrics.json",
    "factor.csv",
    "factor.png",
    "paths.csv",
    "paths.png",
    "curve.png",
    "class_paths.png",
    "report.html",
    SEARCH_WEIGHTS,
    "checkpoints",
    "logs",
)


def check_run_folder(out: Path, config: TrainConfig, dataset: ParsingDataset) -> None:
    """Refuse to overwrite a run, or to continue one with other settings.

    Raises:
        FileExistsError: the folder holds a run, and `config.resume` is not set.
        ValueError: the run in it has other settings or classes, or was written by another version.
    """
    if not (out / "config.yaml").is_file():
        return
    if not config.run.resume:
        raise FileExistsError(f"{out} holds a run already: give --resume to continue it, or another --out")
    try:
        earlier = load_config(out / "config.yaml")
    except ValueError:
        if (last := out / "checkpoints" / LAST).is_file():
            read_checkpoint(last)  # It names another version, if that is the reason.
        raise
    # A finished run has saved the number of its paths.
    may_change = (*_MAY_CHANGE, "paths") if config.model.paths == "auto" else _MAY_CHANGE
    changed = differences(earlier.plain(), config.plain(), ignored=may_change)
    if changed:
        raise ValueError(f"{out} cannot be resumed with other settings: {'; '.join(changed)}")
    check_classes(out, dataset)


def check_classes(out: Path, dataset: ParsingDataset) -> None:
    """Refuse a data set whose classes or working size differ from those of the run in a folder.

    Raises:
        ValueError: they differ; names both.
    """
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


def start_run_folder(out: Path, config: TrainConfig, dataset: ParsingDataset, groups: ClassGroups | None) -> None:
    """Write `classes.json` and `config.yaml` of a run."""
    out.mkdir(parents=True, exist_ok=True)
    classes: dict[str, Any] = {"class_names": dataset.class_names, "palette": dataset.palette}
    if (size := _working_size(dataset)) is not None:
        classes["size"] = list(size)
    if groups is not None:
        classes["class_groups"] = {
            name: [dataset.class_names[index] for index in group] for name, group in groups.items()
        }
    write_json(out / "classes.json", classes)
    save_config(out, config)


def save_config(out: Path, config: TrainConfig) -> None:
    """Write a run's config.yaml."""
    write_text(out / "config.yaml", yaml.safe_dump(config.plain(), sort_keys=False))


def clear_run_folder(out: Path) -> None:
    """Remove an earlier run's files from a folder, and nothing else."""
    for name in _RUN_FILES:
        path = out / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def save_search_weights(config: TrainConfig, network: ParsingNetwork, averaged: Mapping[str, Tensor]) -> None:
    """Write the weights at the end of a sampled search, averaged over its last steps; they work at all dilations."""
    own, prefix = (network.head, "head.") if config.model.freeze_backbone else (network, "")
    state = {f"{prefix}{name}": value for name, value in own.state_dict().items()}
    averaged = {name: value.to(state[name].dtype) for name, value in averaged.items()}
    write_weights(Path(config.run.out) / SEARCH_WEIGHTS, {**state, **averaged})
