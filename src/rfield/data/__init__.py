"""Data sets: what they share, one file for each family, and the transforms of their samples."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from rfield.data.camvid import CAMVID_CLASSES, CamVidDataset
from rfield.data.cityscapes import CITYSCAPES_CLASSES, CityscapesDataset
from rfield.data.dataset import IGNORE_INDEX, ParsingDataset, voc_palette
from rfield.data.faces import Conversion, convert_celebamask, convert_lapa
from rfield.data.folder import FolderDataset
from rfield.data.helen import HELEN_CLASSES, HelenDataset
from rfield.data.resized import ResizedDataset
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
    "CAMVID_CLASSES",
    "CITYSCAPES_CLASSES",
    "HELEN_CLASSES",
    "IGNORE_INDEX",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "AugmentedDataset",
    "CamVidDataset",
    "CityscapesDataset",
    "Conversion",
    "EpochSampler",
    "FolderDataset",
    "HelenDataset",
    "ParsingDataset",
    "ResizedDataset",
    "SyntheticCues",
    "VOCDataset",
    "convert_celebamask",
    "convert_lapa",
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
        spec: `voc:ROOT`, a folder in the layout of a PASCAL VOC devkit; `camvid:ROOT`, in that of the SegNet
            tutorial; `helen:ROOT`, in that of Helen face parsing; `cityscapes:ROOT`, as Cityscapes is downloaded;
            `folder:ROOT`, with `classes.txt` and `SPLIT/images` and `SPLIT/masks`; or `synthetic`; or the path of a
            .yaml file with the key `format` and the keys of that format:

            - voc: `root` (relative to the YAML file) and optionally `train`, `val`, `test`, the lists of these
              splits, and `size`, see below
            - camvid, helen, cityscapes, folder: `root` and optionally `size`
            - synthetic: optionally `size`, `distance`, `length`, `seed`, see `SyntheticCues`

            `size: [height, width]` in px is a working size: every image and mask is brought to it when it is read,
            and scores are taken at it, see `ResizedDataset`.
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
    if name in _FOLDERS and root:
        return _FOLDERS[name](Path(root).expanduser(), split)
    if spec == "synthetic":
        return SyntheticCues(split)
    raise ValueError(
        f"data {spec!r} is not understood; write {', '.join(f'{layout}:ROOT' for layout in _FOLDERS)}, "
        f"synthetic, or the path of a .yaml file with a format of {', '.join(_FORMATS)}"
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


def _load_folder(
    open_folder: Callable[[Path, str], ParsingDataset], path: Path, config: dict[str, Any], split: str
) -> ParsingDataset:
    if "root" not in config:
        raise ValueError(f"{path}: the key root is missing, the folder that holds the data")
    size = config.pop("size", None)
    for key, value in config.items():
        if not isinstance(value, str):
            raise ValueError(f"{path}: {key} must be text, got {value!r}; put it in quotation marks")
    root = path.parent / Path(config.pop("root")).expanduser()
    dataset = open_folder(root, config.get(split, split))
    if size is None:
        return dataset
    try:
        return ResizedDataset(dataset, size)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _load_synthetic(path: Path, config: dict[str, Any], split: str) -> ParsingDataset:
    try:
        return SyntheticCues(split, **config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


_FOLDERS: dict[str, Callable[[Path, str], ParsingDataset]] = {
    "voc": VOCDataset,
    "camvid": CamVidDataset,
    "helen": HelenDataset,
    "cityscapes": CityscapesDataset,
    "folder": FolderDataset,
}
_FORMATS: dict[str, tuple[Callable[[Path, dict[str, Any], str], ParsingDataset], tuple[str, ...]]] = {
    "voc": (partial(_load_folder, VOCDataset), ("root", "train", "val", "test", "size")),
    "camvid": (partial(_load_folder, CamVidDataset), ("root", "size")),
    "helen": (partial(_load_folder, HelenDataset), ("root", "size")),
    "cityscapes": (partial(_load_folder, CityscapesDataset), ("root", "size")),
    "folder": (partial(_load_folder, FolderDataset), ("root", "size")),
    "synthetic": (_load_synthetic, ("size", "distance", "length", "seed")),
}
