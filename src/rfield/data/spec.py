"""What a data set is called by: a short text or a YAML file."""

import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rfield.data.listing import MaskOptions
from rfield.data.masks import Colour
from rfield.data.resized import working_size
from rfield.reading import read_yaml

_OF_MASKS = ("ignore", "reduce_zero_label", "colours", "mask_suffix", "mirrored")
_KEYS: dict[str, tuple[str, ...]] = {
    "voc": ("root", "train", "val", "test", "size", *_OF_MASKS),
    "camvid": ("root", "size", *_OF_MASKS),
    "helen": ("root", "size", *_OF_MASKS),
    "cityscapes": ("root", "size", *_OF_MASKS),
    "folder": ("root", "size", *_OF_MASKS),
    "synthetic": ("size", "distance", "length", "seed"),
}
_LAYOUTS = [name for name in _KEYS if name != "synthetic"]


@dataclass(frozen=True)
class DataSource:
    """Where a data set is and how it is read.

    Attributes:
        format: the name of its layout, or "synthetic".
        root: its folder; none for synthetic.
        size: the working size, (height, width) in px, if there is one.
        splits: the lists that stand for splits of other names.
        options: of `SyntheticCues`.
        masks: what is said of the masks.
        file: the YAML file that says so, if there is one.
    """

    format: str
    root: Path | None = None
    size: tuple[int, int] | None = None
    splits: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    masks: MaskOptions = field(default_factory=MaskOptions)
    file: Path | None = None


def parse_spec(spec: str) -> DataSource:
    """What `load_dataset` is given; nothing of the data is opened.

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
    raise ValueError(
        f"data {spec!r} is not understood; write {', '.join(f'{layout}:ROOT' for layout in _LAYOUTS)}, "
        f"synthetic, or the path of a .yaml file with a format of {', '.join(_KEYS)}"
    )


def _folder(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # ~NAME of nobody
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
    of_masks = {key: config.pop(key) for key in _OF_MASKS if key in config}
    for key, value in config.items():
        if not isinstance(value, str):
            raise ValueError(f"{path}: {key} must be text, got {value!r}; put it in quotation marks")
    try:
        size = None if size is None else working_size(size)
        root = path.parent / _folder(config.pop("root"))
        masks = _mask_options(of_masks)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return DataSource(data_format, root, size, splits=config, masks=masks, file=path)


def _mask_options(config: dict[str, Any]) -> MaskOptions:
    reduce = config.get("reduce_zero_label", False)
    if not isinstance(reduce, bool):
        raise ValueError(f"reduce_zero_label must be true or false, got {reduce!r}")
    colours = None if config.get("colours") is None else _colours(config["colours"])
    if colours is not None and reduce:
        raise ValueError("reduce_zero_label does not fit colours, which give every class its own; leave it out")
    suffix = config.get("mask_suffix")
    if suffix is not None and (not isinstance(suffix, str) or {"/", "\\", "\0"} & {*suffix}):
        raise ValueError(f"mask_suffix must be the end of a file's name, such as _mask, got {suffix!r}")
    ignore = config.get("ignore")
    return MaskOptions(
        ignore=() if ignore is None else _ignored(ignore, in_colours=colours is not None),
        reduce_zero_label=reduce,
        colours=colours,
        mask_suffix=suffix,
        mirrored=None if config.get("mirrored") is None else _mirrored(config["mirrored"]),
    )


def _is_level(value: Any) -> bool:
    return type(value) is int and 0 <= value <= 255


def _is_colour(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(map(_is_level, value))


def _ignored(value: Any, in_colours: bool) -> tuple[int | Colour, ...]:
    if in_colours:
        found = [value] if _is_colour(value) else value
        if not isinstance(found, list) or not all(map(_is_colour, found)):
            raise ValueError(f"ignore must be a colour [red, green, blue] or several beside colours, got {value!r}")
        return tuple((red, green, blue) for red, green, blue in found)
    found = value if isinstance(value, list) else [value]
    if not all(map(_is_level, found)):
        raise ValueError(f"ignore must be a mask value of 0 to 255 or several, such as [0, 7], got {value!r}")
    return tuple(found)


def _colours(value: Any) -> dict[str, tuple[Colour, ...]]:
    wanted = "colours must hold names and colours, such as {road: [128, 64, 128], car: [0, 0, 142]}"
    if not isinstance(value, dict) or not 1 <= len(value) <= 255:
        raise ValueError(f"{wanted}; got {value!r}")
    colours = {}
    for name, own in value.items():
        found = [own] if _is_colour(own) else own
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"{wanted}; got the name {name!r}, put it in quotation marks")
        if not isinstance(found, list) or not found or not all(map(_is_colour, found)):
            raise ValueError(f"{wanted}, of 0 to 255, or a list of them; got {own!r} for {name}")
        colours[name] = tuple((red, green, blue) for red, green, blue in found)
    return colours


def _mirrored(value: Any) -> tuple[tuple[str, str], ...]:
    pairs = value if isinstance(value, list) else [value]
    for pair in pairs:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(name, str) for name in pair)):
            raise ValueError(f"mirrored must hold pairs of classes, such as [[left_hand, right_hand]], got {pair!r}")
    names = [name for pair in pairs for name in pair]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"mirrored names {twice[0]!r} twice; a class has one counterpart")
    return tuple((one, other) for one, other in pairs)
