"""Run folders: what training leaves, opened again."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rfield.layers import LearnedFactor, ReceptiveFieldRegulator
from rfield.segmentation.config.train import TrainConfig, counted, parse_size
from rfield.segmentation.files.checkpoints import checkpoint_error, find_checkpoint
from rfield.segmentation.files.untrusted import read_json, read_weights, read_yaml
from rfield.segmentation.models import ParsingNetwork, Paths, find_model
from rfield.segmentation.models.hub import find_folder, hub_hint
from rfield.surgery.fuse import restore_fused

# What a config's YAML may hold for the fields that are not parsed: whole numbers do for others.
_KINDS: dict[Any, Any] = {
    kind: kind | int if kind in (float, float | None) else kind
    for each in (str, bool, int, float)
    for kind in (each, each | None)
}


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
    """The network of a run, in channels-last memory format.

    Args:
        config: its model, dilation, head, canvas and factor are used.
        num_classes: classes K.
        weights: pretrained weights of the backbone; None or "random" leaves it random.
        class_groups: the classes of each path, which only training needs.

    Raises:
        ValueError: if the model's name is not known, or it has no such output stride.

    >>> config = TrainConfig(data="synthetic", out="runs/x", model="small_cnn", dilation=6, factor=1.5)
    >>> build_network(config, num_classes=4).head.effective_dilation
    (4.0, 4.0)
    """
    build = find_model(config.model)
    options = {} if config.output_stride is None else {"output_stride": config.output_stride}
    network = build(
        num_classes,
        dilation=config.dilation,
        head_channels=config.head_channels,
        regulate=config.search != "none",
        weights=None if weights == "random" else weights,
        dropout=config.dropout or 0.0,
        min_size=config.canvas,
        mechanism=config.mechanism or "regulator",
        paths=Paths(
            config.paths,
            config.aspp or (),
            config.rectangular,
            None if class_groups is None else tuple(class_groups),
            config.path_weight if config.path_guidance == "gradient" else 1.0,
        ),
        decoder=config.decoder,
        **options,
    )
    for module in network.modules():
        if isinstance(module, LearnedFactor):
            module.set_factor(config.factor)
        if isinstance(module, ReceptiveFieldRegulator):
            module.memory_budget = round(config.memory_budget * 2**30)
    return network.to(memory_format=torch.channels_last)


def load_run(folder: str | Path, checkpoint: str = "last") -> Run:
    """Opens the network that `rfield train` or `rfield fuse` has left in a run folder, or `rfield push` on the Hub.

    Args:
        folder: the run folder, or a model of the Hub, see `rfield.segmentation.models.hub.find_folder`.
        checkpoint: `last` or `best`.

    Raises:
        FileNotFoundError: if the folder is no run folder or has no such checkpoint.
        ValueError: if a file in it cannot be understood.
    """
    folder = find_folder(folder)
    if (folder / "config.json").is_file() and not (folder / "config.yaml").exists():
        return _load_shared(folder)
    for name in ("config.yaml", "classes.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is not a run folder: it has no {name}{hub_hint(folder)}")
    path = find_checkpoint(folder / "checkpoints", checkpoint)
    fused = folder / "fused.json"
    if checkpoint == "last" and fused.is_file():
        path = folder / "model.safetensors"
    if not path.is_file():
        kept = sorted(file.stem for file in path.parent.glob("[!.]*.ckpt"))
        raise FileNotFoundError(f"{folder} has no checkpoint {checkpoint!r}; it has {', '.join(kept) or 'none yet'}")
    config = load_config(folder / "config.yaml")
    class_names, palette, size = read_classes(read_json(folder / "classes.json"), folder / "classes.json")
    try:
        network = build_network(config, len(class_names))
    except Exception as error:  # Any part of a network may be what fails.
        raise ValueError(f"{folder / 'config.yaml'} describes no network that can be built: {error}") from error
    try:
        prefix = "network."
        if path.suffix == ".safetensors":
            restore_fused(network, read_json(fused))
            state = {prefix + key: value for key, value in read_weights(path).items()}
        else:
            wrong = checkpoint_error(path)
            if wrong is not None:
                raise ValueError(wrong)
            state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
        network.load_state_dict({key.removeprefix(prefix): v for key, v in state.items() if key.startswith(prefix)})
    except Exception as error:  # Damaged files raise a dozen different types.
        raise ValueError(f"{path} is damaged or not a checkpoint of this run: {error}") from error
    return Run(folder, config, class_names, palette, network.eval(), size)


def _load_shared(folder: Path) -> Run:
    """Open the run that `find_folder` keeps of the Hub; its config is what use needs, its data are not known."""
    network: ParsingNetwork = ParsingNetwork.from_pretrained(folder)
    path = folder / "config.json"
    notes = read_json(path)
    class_names, palette, size = read_classes(notes, path)
    try:
        recipe = notes["network"]
        config = TrainConfig(
            data="",
            out=str(folder),
            model=recipe["model"],
            dilation=recipe["dilation"],
            search="none",
            freeze_backbone=bool(notes.get("freeze_backbone")),
            canvas=None if recipe["min_size"] is None else network.min_size,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not say what rfield push writes of the network: {error}") from error
    if network.num_classes != len(class_names):
        names = counted(len(class_names), "class name")
        raise ValueError(f"{path} has {names} for a network of {counted(network.num_classes, 'class')}")
    return Run(folder, config, class_names, palette, network, size)


def read_classes(notes: Any, path: Path) -> tuple[tuple[str, ...], list[tuple[int, int, int]], tuple[int, int] | None]:
    """The names and colours of the classes and the working size, as run folders and exported files hold them.

    Raises:
        ValueError: if they are not there or of another kind; names `path`.

    >>> read_classes({"class_names": ["sky"], "palette": [[0, 0, 255]]}, Path("classes.json"))
    (('sky',), [(0, 0, 255)], None)
    """
    try:
        names = tuple(notes["class_names"])
        palette = [(red, green, blue) for red, green, blue in notes["palette"]]
        size = parse_size(notes["size"]) if notes.get("size") else None
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
    """A run's resolved config.

    Raises:
        ValueError: if the file is not what `rfield train` writes.
    """
    values = read_yaml(path)
    try:
        config = TrainConfig(**values)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{path} is not a run's config: {error}") from error
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.type in _KINDS and not isinstance(value, _KINDS[field.type]):
            raise ValueError(f"{path} is not a run's config: {field.name} is {value!r}")
    return config
