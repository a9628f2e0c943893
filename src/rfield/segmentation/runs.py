"""Run folders: open again what a training has left."""

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rfield.layers import LearnedFactor, ReceptiveFieldRegulator
from rfield.search import learned_layers
from rfield.search.factors import override_dilation
from rfield.segmentation.config.train import TrainConfig
from rfield.segmentation.config.values import Size
from rfield.segmentation.files.checkpoints import find_checkpoint, read_checkpoint
from rfield.segmentation.files.untrusted import read_json, read_weights, read_yaml
from rfield.segmentation.models import ParsingNetwork, build_model
from rfield.segmentation.models.hub import find_folder, hub_hint
from rfield.segmentation.models.saving import rebuild_network
from rfield.text import counted

# The types that a config's YAML may hold for fields without a parser; whole numbers may stand for floats.
_KINDS: dict[Any, Any] = {
    kind: kind | int if kind in (float, float | None) else kind
    for each in (str, bool, int, float)
    for kind in (each, each | None)
}


# Paths that `paths: auto` starts with.
_AUTO_PATHS = 4
SEARCH_WEIGHTS = "search_weights.safetensors"
"""The file of a run folder with the weights at the end of a sampled search, averaged; they work at all dilations."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained network and what is needed to use it."""

    folder: Path
    config: TrainConfig
    class_names: tuple[str, ...]
    palette: list[tuple[int, int, int]]
    network: ParsingNetwork
    size: tuple[int, int] | None = None
    """(height, width) in px that images were brought to, if the data set had a size."""


def build_network(
    config: TrainConfig,
    num_classes: int,
    weights: str | None = None,
    class_groups: Sequence[tuple[int, ...]] | None = None,
) -> ParsingNetwork:
    """Build the network of a run, in channels-last memory format.

    Args:
        config: its model, dilation, head, canvas and factor are used.
        num_classes: classes K.
        weights: pretrained weights of the backbone; None or "random" leaves it random.
        class_groups: the classes of each path, which only training needs.

    Raises:
        ValueError: the model's name is not known, or it has no such output stride.

    >>> config = TrainConfig(data="synthetic", out="runs/x", model="small_cnn", dilation=6, factor=1.5)
    >>> build_network(config, num_classes=4).head.effective_dilation
    (4.0, 4.0)
    """
    canvas = config.model.canvas
    network = build_model(
        config.model.model,
        num_classes,
        weights=None if weights == "random" else weights,
        output_stride=config.model.output_stride,
        min_size=None if canvas is None else (canvas[0], canvas[1]),  # Checkpoints hold plain tuples.
        decoder=config.model.decoder,
        dilation=config.model.dilation,
        head_channels=config.model.head_channels,
        dropout=config.model.dropout or 0.0,
        regulate=config.search.search != "none",
        mechanism=config.search.mechanism or "regulator",
        paths=_AUTO_PATHS if config.model.paths == "auto" else config.model.paths,
        norm=config.model.path_norm,
        rates=tuple(config.model.aspp or ()),
        gates=config.model.gates,
        extra_paths=tuple(config.model.extra_paths or ()),
        rectangular=config.search.rectangular,
        class_groups=class_groups,
        gradient_weight=config.search.path_weight if config.search.path_guidance == "gradient" else 1.0,
    )
    return _set_up(network, config)


def _set_up(network: ParsingNetwork, config: TrainConfig) -> ParsingNetwork:
    """Apply what a config says of learned layers; return the network in channels-last memory format."""
    for module in network.modules():
        if isinstance(module, LearnedFactor):
            module.set_factor(config.search.factor)
        if isinstance(module, ReceptiveFieldRegulator):
            module.memory_budget = round(config.search.memory_budget * 2**30)
    return network.to(memory_format=torch.channels_last)


def load_run(folder: str | Path, checkpoint: str = "last", search_weights: bool = False) -> Run:
    """Open the network that `rfield train` or `rfield fuse` has left in a run folder, or `rfield push` on the Hub.

    Args:
        folder: the run folder, or a model of the Hub, see `rfield.segmentation.models.hub.find_folder`.
        checkpoint: `last` or `best`.
        search_weights: use the weights that the sampled search ended with, with all its paths.

    Raises:
        FileNotFoundError: the folder is no run folder or has no such checkpoint.
        ValueError: a file in it cannot be understood, or was written by another version.
    """
    folder = find_folder(folder)
    averaged = _read_search_weights(folder / SEARCH_WEIGHTS) if search_weights else {}
    if (folder / "config.json").is_file() and not (folder / "config.yaml").exists():
        return _load_shared(folder)
    for name in ("config.yaml", "classes.json"):
        if not (folder / name).is_file():
            reason = f"it has no {name}" if folder.is_dir() else "there is no such folder"
            advice = hub_hint(folder) or "; give the --out of rfield train"
            raise FileNotFoundError(f"{folder} is not a run folder: {reason}{advice}")
    path, description, state = _read_network(folder, checkpoint)
    config = load_config(folder / "config.yaml")
    class_names, palette, size = read_classes(read_json(folder / "classes.json"), folder / "classes.json")
    network = _set_up(rebuild_network(description, path), config)
    _check_classes(network, class_names, folder / "classes.json")
    spec, model = network.spec, config.model
    assert spec is not None
    if (spec.model, spec.head.dilation, spec.head.head_channels) != (model.model, model.dilation, model.head_channels):
        raise ValueError(f"{path} is damaged or not a checkpoint of this run: its network is not that of config.yaml")
    try:
        network.load_state_dict({**state, **averaged})
    except Exception as error:  # Strangers' tensors raise a dozen different types.
        raise ValueError(f"{path} is damaged or not a checkpoint of this run: {error}") from error
    network.take_out_silent_paths()
    return Run(folder, config, class_names, palette, network.eval(), size)


def _read_search_weights(path: Path) -> dict[str, Tensor]:
    """Return the weights of a finished search, without what says at which dilation it ended."""
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no {path}: a run has it once its sampled search has ended, but not with --no-save-search-weights"
        )
    learned = ("log_factor", "snapped")
    return {
        name: value for name, value in read_weights(path).items() if not name.rpartition(".")[2].startswith(learned)
    }


def run_at_dilations(network: ParsingNetwork, dilations: Sequence[float]) -> None:
    """Make the learned layers of a network run at other dilations, one for each path.

    Raises:
        ValueError: the network has no learned layer, or another number of them.
    """
    groups = learned_layers(network)
    if len(groups) != len(dilations):
        have = counted(len(groups), "learned dilation") if groups else "none that is learned, as after fuse"
        raise ValueError(f"got {counted(len(dilations), 'dilation')}, but the network has {have}")
    for group, dilation in zip(groups, dilations, strict=True):
        for layer in group:
            if isinstance(layer, ReceptiveFieldRegulator) and layer.snapped:
                layer.freeze_factor(frozen=False)  # A snapped regulator would stay at its dilation.
        override_dilation(group, [dilation] * group[0].log_factor.numel())


def _read_network(folder: Path, checkpoint: str) -> tuple[Path, Any, dict[str, Tensor]]:
    """Return the file that describes a run's network, the description, and the weights."""
    fused, weights = folder / "fused.json", folder / "model.safetensors"
    if checkpoint == "last" and fused.is_file():
        return fused, read_json(fused), read_weights(weights)
    path = find_checkpoint(folder / "checkpoints", checkpoint)
    if not path.is_file():
        kept = sorted(file.stem for file in path.parent.glob("[!.]*.ckpt"))
        raise FileNotFoundError(f"{folder} has no checkpoint {checkpoint!r}; it has {', '.join(kept) or 'none yet'}")
    saved, prefix = read_checkpoint(path), "network."
    state = {str(key): value for key, value in dict(saved["state_dict"]).items()}
    return path, saved.get("rfield"), {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def _load_shared(folder: Path) -> Run:
    """Open a folder of `rfield push`. Its config holds what use needs; its data set is not known."""
    network: ParsingNetwork = ParsingNetwork.from_pretrained(folder)
    path = folder / "config.json"
    notes = read_json(path)
    class_names, palette, size = read_classes(notes, path)
    _check_classes(network, class_names, path)
    assert network.spec is not None
    config = TrainConfig(
        data="",
        out=str(folder),
        model=network.spec.model,
        dilation=network.spec.head.dilation,
        search="none",
        freeze_backbone=bool(notes.get("freeze_backbone")),
        canvas=None if network.spec.min_size is None else network.min_size,
    )
    return Run(folder, config, class_names, palette, network, size)


def _check_classes(network: ParsingNetwork, class_names: tuple[str, ...], path: Path) -> None:
    if network.num_classes != len(class_names):
        names = counted(len(class_names), "class name")
        raise ValueError(f"{path} has {names} for a network of {counted(network.num_classes, 'class')}")


def read_classes(notes: Any, path: Path) -> tuple[tuple[str, ...], list[tuple[int, int, int]], tuple[int, int] | None]:
    """Return the classes' names and colours and the working size, from a run folder or an exported file.

    Raises:
        ValueError: one is missing or of another type; names `path`.

    >>> read_classes({"class_names": ["sky"], "palette": [[0, 0, 255]]}, Path("classes.json"))
    (('sky',), [(0, 0, 255)], None)
    """
    try:
        names = tuple(notes["class_names"])
        palette = [(red, green, blue) for red, green, blue in notes["palette"]]
        size = Size(notes["size"]) if notes.get("size") else None
        if not names or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
            raise ValueError("class_names must be texts, none of them twice")
        if len(palette) < len(names):
            raise ValueError(f"the palette has {len(palette)} colours for {counted(len(names), 'class')}")
        if not all(type(level) is int and 0 <= level <= 255 for colour in palette for level in colour):
            raise ValueError("palette must hold 0 to 255")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not say what rfield writes of the classes: {error}") from error
    return names, palette, size


def load_config(path: Path) -> TrainConfig:
    """Return a run's resolved config.

    Raises:
        ValueError: the file is not what `rfield train` writes.
    """
    values = read_yaml(path)
    try:
        config = TrainConfig(**values)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{path} is not a run's config: {error}") from error
    flat = config.flat()
    for group in config.groups().values():
        for field in dataclasses.fields(group):  # type: ignore[arg-type]
            value = flat[field.name]
            if field.type in _KINDS and not isinstance(value, _KINDS[field.type]):
                raise ValueError(f"{path} is not a run's config: {field.name} is {value!r}")
    return config


def read_factor_csv(path: Path) -> dict[str, np.ndarray]:
    """Return the columns of a run's `factor.csv`; an empty cell is NaN."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        cells = list(rows)
    return {name: np.array([float(row[name] or "nan") for row in cells]) for name in rows.fieldnames or ()}


def read_paths_csv(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return steps and dilations of each path and axis of a run's `paths.csv`, by name; not of paths without one."""
    found: dict[str, list[tuple[float, float]]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if float(row["effective_dilation"])]
    axes = {row["axis"] for row in rows}
    for row in rows:
        name = f"path {row['path']}" + (f", {row['axis']}" if len(axes) > 1 else "")
        found.setdefault(name, []).append((float(row["step"]), float(row["effective_dilation"])))
    return {name: (np.array(points)[:, 0], np.array(points)[:, 1]) for name, points in found.items()}
