"""Parse the name of a data set: a short text or a YAML file."""

import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rfield.segmentation.data.looks_like import looks_like
from rfield.segmentation.data.mask_options import MASK_KEYS, MaskOptions, mask_options
from rfield.segmentation.data.resized import working_size
from rfield.segmentation.files.untrusted import read_yaml

_KEYS: dict[str, tuple[str, ...]] = {
    "voc": ("root", "train", "val", "test", "size", *MASK_KEYS),
    "camvid": ("root", "size", *MASK_KEYS),
    "helen": ("root", "size", *MASK_KEYS),
    "cityscapes": ("root", "size", *MASK_KEYS),
    "ade20k": ("root", "size", "ignore", "mask_suffix", "mirrored"),
    "pets": ("root", "size", "ignore", "mask_suffix", "mirrored"),
    "coco": ("root", "train", "val", "test", "size", "mirrored"),
    "folder": ("root", "size", *MASK_KEYS),
    "hf": (
        *("root", "train", "val", "test", "image", "mask", "classes", "size"),
        *(key for key in MASK_KEYS if key != "mask_suffix"),
    ),
    "synthetic": ("size", "distance", "length", "seed"),
}
_LAYOUTS = [name for name in _KEYS if name != "synthetic"]
SCENES = Path(__file__).parent / "scenes"
"""The data set that the package ships; see its licence there."""


@dataclass(frozen=True)
class DataSource:
    """Where a data set is and how it is read.

    Attributes:
        format: the name of its layout, or "synthetic".
        root: its folder, for hf possibly a name on the Hub; None for synthetic.
        size: the working size, (height, width) in px, if there is one.
        splits: the names of the lists that are read for the splits.
        options: those of `SyntheticCues` or `HuggingFaceDataset`.
        masks: the mask options.
        file: the data config, if there is one.
    """

    format: str
    root: Path | None = None
    size: tuple[int, int] | None = None
    splits: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    masks: MaskOptions = field(default_factory=MaskOptions)
    file: Path | None = None


def parse_spec(spec: str) -> DataSource:
    """Parse the argument of `load_dataset`, without opening the data.

    Raises:
        ValueError: if the spec, the file's text, its format or one of its keys or values is not understood.
        FileNotFoundError: if the YAML file is missing.

    >>> parse_spec("voc:VOC2012").root
    PosixPath('VOC2012')
    """
    if spec.endswith((".yaml", ".yml")):
        return _read_config(Path(spec))
    name, _, root = spec.partition(":")
    if name in _LAYOUTS and root:
        return DataSource(name, _folder(root))
    if spec == "synthetic":
        return DataSource(spec)
    if spec == "scenes":
        return DataSource("folder", SCENES)
    if spec and _folder(spec).is_dir():
        raise ValueError(f"data {spec!r} names a folder without its format; {looks_like(_folder(spec))}")
    raise ValueError(
        f"data {spec!r} is not understood; write {', '.join(f'{layout}:ROOT' for layout in _LAYOUTS)}, "
        f"scenes, synthetic, or the path of a .yaml file with a format of {', '.join(_KEYS)}"
    )


def _folder(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # ~NAME of an unknown user
        raise ValueError(f"{text!r} names no folder: {error}") from error


def _read_config(path: Path) -> DataSource:
    if not path.is_file():
        raise FileNotFoundError(f"there is no data config {path}")
    config = read_yaml(path)
    if not isinstance(config, dict) or "format" not in config:
        raise ValueError(f"{path} must hold keys and values, `format` ({', '.join(_KEYS)}) among them")
    data_format = config.pop("format")
    if not isinstance(data_format, str) or data_format not in _KEYS:
        raise ValueError(f"{path}: format {data_format!r} is not known; the known ones are {', '.join(_KEYS)}")
    unknown = [str(key) for key in config if key not in _KEYS[data_format]]
    if unknown:
        close = difflib.get_close_matches(unknown[0], _KEYS[data_format], 1)
        raise ValueError(
            f"{path}: unknown key {', '.join(unknown)}{f' (did you mean {close[0]}?)' if close else ''}; a config of "
            f"format {data_format} has the keys format, {', '.join(_KEYS[data_format])}"
        )
    if data_format == "synthetic":
        return DataSource(data_format, options=config, file=path)
    return _folder_source(path, data_format, config)


def _folder_source(path: Path, data_format: str, config: dict[str, Any]) -> DataSource:
    if "root" not in config:
        raise ValueError(f"{path}: the key root is missing, the folder that holds the data")
    size = config.pop("size", None)
    of_masks = {key: config.pop(key) for key in MASK_KEYS if key in config}
    classes = config.pop("classes", [])  # Of hf alone.
    if not isinstance(classes, list) or not all(isinstance(name, str) and name.strip() for name in classes):
        raise ValueError(f"{path}: classes must be a list of names, such as [road, car], got {classes!r}")
    for key, value in config.items():
        if not isinstance(value, str):
            raise ValueError(f"{path}: {key} must be text, got {value!r}; put it in quotation marks")
    try:
        size = None if size is None else working_size(size)
        root = path.parent / _folder(given := config.pop("root"))
        masks = mask_options(of_masks)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    options: dict[str, Any] = {}
    if data_format == "hf":
        options = {key: config.pop(key) for key in ("image", "mask") if key in config} | {"classes": tuple(classes)}
        root = root if root.is_dir() else Path(given)
    return DataSource(data_format, root, size, splits=config, options=options, masks=masks, file=path)
