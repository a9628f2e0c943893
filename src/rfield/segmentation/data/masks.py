"""Read masks: from the pixels of a file to the class of every pixel."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image

from rfield.segmentation.conventions import IGNORE_INDEX
from rfield.segmentation.data.images import (
    apply_orientation,
    deep_bits,
    depth_problem,
    load_named,
    open_named,
    orientation,
    orientation_problem,
    rgb_pixels,
    upright_size,
)

UNKNOWN = -1
MOST_VALUES = 8

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class MaskCode:
    """The meaning of the pixels of a data set's masks.

    Attributes:
        labels: int16 [256], the class of each value; 255 for no label, -1 for a value that is not allowed.
        colours: if masks hold colours, the class of each (255 for no label); `labels` is then unused.
        maps: a mask is one grey map of certainty for each value of `labels`; the highest wins, of equal ones the first.
    """

    labels: npt.NDArray[np.int16]
    colours: dict[Colour, int] | None = None
    maps: bool = False

    def wrong_kind(self, mask: PIL.Image.Image) -> tuple[str, str] | None:
        """Return what is wrong with the kind of an opened mask or map and what to do, or None."""
        if self.colours is not None:
            if deep_bits(mask) or depth_problem(mask):
                return f"has more than 8 bits a pixel (Pillow mode {mask.mode!r})", "save its colours with 8 bits each"
            return None
        few_bits = _has_few_bits(mask)
        if mask.mode in (("L",) if self.maps else ("L", "P")) and not few_bits:
            return None
        kind = f"(Pillow mode {mask.mode!r})"
        fix = "a mask must be a palette image or 8-bit grey whose values are class indices"
        if self.maps:
            fix = "a map must be 8-bit grey and hold the certainty of each pixel"
        if deep_bits(mask) or depth_problem(mask):
            return f"has more than 8 bits a pixel {kind}", fix
        by_colour = "name the colour of each class in a data config (`colours`)"
        if few_bits or mask.mode == "1":
            spread = f"has fewer than 8 bits a pixel {kind}, which reading spreads over 0..255"
            return spread, fix if self.maps else f"{fix}; or {by_colour}, as [0, 0, 0] and [255, 255, 255] of 1 bit"
        if mask.mode in ("RGB", "RGBA"):
            count, grey = _count_colours(mask)
            if grey:
                what = f"holds grey values{count} saved as {mask.mode}, not class indices"
                return what, fix if self.maps else f"save one of its channels as 8-bit grey, or {by_colour}"
            what = f"holds colours{count}, not class indices"
            if self.maps:
                return what, fix
            fix = f"{by_colour}, or save an 8-bit grey or palette image"
            return f"{what}: a palette mask that was read and saved as {mask.mode}?", fix
        return f"has the wrong kind {kind}", fix

    def values(self, mask: PIL.Image.Image, path: Path) -> npt.NDArray[Any]:
        """Return the upright values of a loaded mask: uint8 [H, W], or with `colours` int64 of their bits."""
        if self.colours is None:
            return apply_orientation(np.asarray(mask), orientation(mask, path))
        red, green, blue = rgb_pixels(mask, path).astype(np.int64).transpose(2, 0, 1)
        codes: npt.NDArray[np.int64] = red << 16 | green << 8 | blue
        return codes

    def classes(self, values: npt.NDArray[Any]) -> npt.NDArray[np.int16]:
        """Return the class of every value, -1 if it has none."""
        if self.colours is None:
            plain: npt.NDArray[np.int16] = self.labels[values]
            return plain
        known = np.array(sorted(_bits(colour) for colour in self.colours))
        labels = np.array([label for _, label in sorted((_bits(c), label) for c, label in self.colours.items())])
        place = np.searchsorted(known, values).clip(max=len(known) - 1)
        return np.where(known[place] == values, labels[place], UNKNOWN).astype(np.int16)

    def unknown(self, values: npt.NDArray[Any], classes: npt.NDArray[np.int16]) -> str | None:
        """Return which values or colours have no class, with the number of px, or None if all have one."""
        wrong, counts = np.unique(values[classes == UNKNOWN], return_counts=True)
        if not wrong.size:
            return None
        order = counts.argsort(kind="stable")[::-1] if self.colours is not None else range(len(wrong))
        shown = ", ".join(f"{self._name(wrong[index])} ({counts[index]} px)" for index in list(order)[:MOST_VALUES])
        more = f" and {len(wrong) - MOST_VALUES} more" * (len(wrong) > MOST_VALUES)
        what = "value" if self.colours is None else "colour"
        return f"holds the {what}{'s' * (len(wrong) > 1)} {shown}{more}, which no class has"

    def _name(self, value: int) -> str:
        return str(value) if self.colours is None else f"[{value >> 16}, {value >> 8 & 255}, {value & 255}]"


def read_mask(paths: tuple[Path, ...], size: tuple[int, int], code: MaskCode, advice: str, image: Path) -> Any:
    """Read the labels of one sample's mask, or of its maps: uint8 [H, W].

    Args:
        paths: the mask's file, or the maps'.
        size: the (height, width) in px of their image, which they must have.
        code: the meaning of their pixels.
        advice: what to do about a value that no class has.
        image: the image's file; its EXIF orientation may explain another size.

    Raises:
        OSError: if a file is not an image or is damaged.
        ValueError: if its kind or size is wrong, or it holds a value that no class has. All name the file.
    """
    if not code.maps:
        with open_named(paths[0]) as file:
            return read_opened(file, paths[0], size, code, advice, image)
    values = []
    for path in paths:
        with open_named(path) as file:
            values.append(_read_values(file, path, size, code, image))
    return code.labels[np.stack(values).argmax(0)].astype(np.uint8)


def read_opened(
    mask: PIL.Image.Image, path: Path, size: tuple[int, int], code: MaskCode, advice: str, image: Path | None = None
) -> npt.NDArray[np.uint8]:
    """Read the labels of an opened mask that is no map, as `read_mask`; `image` is None if it is no file."""
    values = _read_values(mask, path, size, code, image)
    classes = code.classes(values)
    unknown = code.unknown(values, classes)
    if unknown is not None:
        raise ValueError(f"{path} {unknown}; {advice}")
    return classes.astype(np.uint8)


def _read_values(
    mask: PIL.Image.Image, path: Path, size: tuple[int, int], code: MaskCode, image: Path | None
) -> npt.NDArray[Any]:
    wrong = code.wrong_kind(mask)
    if wrong is not None:
        raise ValueError(f"{path} {'; '.join(wrong)}")
    other = wrong_size(mask, path, size, image)
    if other is not None:
        raise ValueError(f"{path} {other}")
    load_named(mask, path)
    return code.values(mask, path)


def wrong_size(mask: PIL.Image.Image, path: Path, size: tuple[int, int], image: Path | None) -> str | None:
    """Return how an opened mask's size differs from its image's (height, width) and what to do, or None."""
    own = upright_size(mask, path)
    if own == size:
        return None
    turned = None if image is None else orientation_problem(image, own, size)
    fix = turned or "; both must have the same size"
    return f"is {own[0]}x{own[1]} px (height x width) but its image is {size[0]}x{size[1]}{fix}"


def plain_labels(num_classes: int, void: int | None = None) -> npt.NDArray[np.int16]:
    """Return `MaskCode.labels` of masks that hold class indices, 255, and optionally `void` for no label.

    >>> plain_labels(3, void=3)[[0, 2, 3, 4, 255]].tolist()
    [0, 2, 255, -1, 255]
    """
    labels = np.full(256, UNKNOWN, np.int16)
    labels[:num_classes] = range(num_classes)
    labels[[IGNORE_INDEX] if void is None else [void, IGNORE_INDEX]] = IGNORE_INDEX
    return labels


def _bits(colour: Colour) -> int:
    return colour[0] << 16 | colour[1] << 8 | colour[2]


def _has_few_bits(image: PIL.Image.Image) -> bool:
    """Return whether a grey image has 1, 2 or 4 bits, whose values Pillow spreads over 0..255."""
    return image.mode == "L" and image.format == "PNG" and any(tile[3] != "L" for tile in getattr(image, "tile", []))


def _count_colours(mask: PIL.Image.Image) -> tuple[str, bool]:
    """Return the number of colours of a mask in words, and whether all of them are grey."""
    try:
        colours: Any = mask.getcolors(256)
    except Exception:  # a damaged file is reported separately
        return "", False
    grey = len(colours or ()) > 1 and all(red == green == blue for _, (red, green, blue, *_) in colours)
    return (f" ({len(colours)} different)" if colours else ""), grey
