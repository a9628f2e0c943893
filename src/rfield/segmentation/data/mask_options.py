"""The mask options of a data config."""

from dataclasses import dataclass
from typing import Any

from rfield.segmentation.data.masks import Colour

MASK_KEYS = ("ignore", "reduce_zero_label", "colours", "mask_suffix", "mirrored")


@dataclass(frozen=True)
class MaskOptions:
    """The mask options of a data config.

    Attributes:
        ignore: mask values that mean "no label"; colours if `colours` is set.
        reduce_zero_label: 0 means "no label", and the first class has the value 1.
        colours: the colours of each class, by its name, if masks hold colours.
        mask_suffix: what follows an image's name in the name of its mask.
        mirrored: pairs of classes that a mirrored image exchanges; None for the format's own.
    """

    ignore: tuple[int | Colour, ...] = ()
    reduce_zero_label: bool = False
    colours: dict[str, tuple[Colour, ...]] | None = None
    mask_suffix: str | None = None
    mirrored: tuple[tuple[str, str], ...] | None = None


def mask_options(config: dict[str, Any]) -> MaskOptions:
    """Parse the options in a config's values.

    Raises:
        ValueError: if one is not understood.
    """
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
