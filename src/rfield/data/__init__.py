"""Data sets: what they share, one file for each family, and the transforms of their samples."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from rfield.data.dataset import IGNORE_INDEX, ParsingDataset, voc_palette
from rfield.data.synthetic import SyntheticCues
from rfield.data.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    AugmentedDataset,
    EpochSampler,
    evaluation_transform,
    training_transform,
)
from rfield.data.voc import VOCDataset, convert_sbd, download_voc2012

__all__ = [
    "IGNORE_INDEX",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "AugmentedDataset",
    "EpochSampler",
    "ParsingDataset",
    "SyntheticCues",
    "VOCDataset",
    "convert_sbd",
    "download_voc2012",
    "evaluation_transform",
    "load_dataset",
    "training_transform",
    "voc_palette",
]


def load_dataset(spec: str, split: str = "train") -> ParsingDataset:
    """Open one split of the data set that a short text or a YAML file describes.

    Args:
        spec: `voc:ROOT`, a folder in the layout of a PASCAL VOC devkit; or `synthetic`; or the path of a .yaml file
            with the key `format` and the keys of that format:

            - voc: `root` (relative to the YAML file) and optionally `train`, `val`, `test`, the lists of these splits
            - synthetic: optionally `size`, `distance`, `length`, `seed`, see `SyntheticCues`
        split: which part of the data, as "train" or "val".

    Returns:
        The samples of that split.

    Raises:
        ValueError: if the spec, the file's text, its format or one of its keys or values is not understood.
        FileNotFoundError: if the YAML file or something of the data is missing.

    Example:
        >>> dataset = load_dataset("synthetic", split="val")
        >>> len(dataset), dataset.class_names
        (40, ('neither', 'green below', 'red right', 'both'))
    """
    if spec.endswith((".yaml", ".yml")):
        return _load_config(Path(spec), split)
    name, _, root = spec.partition(":")
    if name == "voc" and root:
        return VOCDataset(Path(root).expanduser(), split)
    if spec == "synthetic":
        return SyntheticCues(split)
    raise ValueError(
        f"data {spec!r} is not understood; write voc:ROOT, synthetic, or the path of a .yaml file with a format of "
        f"{', '.join(_FORMATS)}"
    )


def _load_config(path: Path, split: str) -> ParsingDataset:
    if not path.is_file():
        raise FileNotFoundError(f"there is no data config {path}")
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(config, dict) or "format" not in config:
        raise ValueError(f"{path} must hold keys and values, `format` ({', '.join(_FORMATS)}) among them")
    data_format = config.pop("format")
    if not isinstance(data_format, str) or data_format not in _FORMATS:
        raise ValueError(f"{path}: format {data_format!r} is not known; the known ones are {', '.join(_FORMATS)}")
    load, keys = _FORMATS[data_format]
    unknown = [str(key) for key in config if key not in keys]
    if unknown:
        raise ValueError(
            f"{path}: unknown key {', '.join(unknown)}; a config of format {data_format} has the keys format, "
            f"{', '.join(keys)}"
        )
    return load(path, config, split)


def _load_voc(path: Path, config: dict[str, Any], split: str) -> ParsingDataset:
    if "root" not in config:
        raise ValueError(f"{path}: the key root is missing, the folder that holds JPEGImages")
    for key, value in config.items():
        if not isinstance(value, str):
            raise ValueError(f"{path}: {key} must be text, got {value!r}; put it in quotation marks")
    return VOCDataset(path.parent / Path(config["root"]).expanduser(), config.get(split, split))


def _load_synthetic(path: Path, config: dict[str, Any], split: str) -> ParsingDataset:
    try:
        return SyntheticCues(split, **config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


_FORMATS: dict[str, tuple[Callable[[Path, dict[str, Any], str], ParsingDataset], tuple[str, ...]]] = {
    "voc": (_load_voc, ("root", "train", "val", "test")),
    "synthetic": (_load_synthetic, ("size", "distance", "length", "seed")),
}
