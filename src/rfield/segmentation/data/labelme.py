"""The JSON files of LabelMe: shapes drawn on an image."""

import base64
import binascii
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image
import PIL.ImageDraw

from rfield.segmentation.conventions import IGNORE_INDEX
from rfield.segmentation.data.images import image_sizes
from rfield.segmentation.data.pairing import Pair, images_below, split_of
from rfield.segmentation.files.untrusted import read_json

BACKGROUND, IGNORED = "_background_", "__ignore__"  # LabelMe's own names
_FAR = 1e6  # px; Pillow draws no farther.


def find_labelme(root: Path) -> list[Pair]:
    """Return each image below a folder with its LabelMe file; empty if there is no such file.

    Raises:
        ValueError: a LabelMe file has no image or an image no such file, while others do.
    """
    folders = images_below(root)
    images = {path.with_suffix(""): path for paths in folders.values() for path in paths}
    by_stem: dict[str, list[Path]] = {}
    for path in images.values():
        by_stem.setdefault(path.stem, []).append(path)
    files = [path for path in sorted(root.rglob("*.json")) if not path.name.startswith(".") and _has_shapes(path)]
    found: dict[Path, Path] = {}
    for file in files:
        near = [images[file.with_suffix("")]] if file.with_suffix("") in images else by_stem.get(file.stem, [])
        if len(near) != 1:
            raise ValueError(f"{file} has {len(near)} images named {file.stem} below {root}; it needs one")
        found[near[0]] = file
    left = [path for path in images.values() if path not in found]
    if files and left:
        raise ValueError(
            f"{left[0]} has no LabelMe file ({len(left)} of {len(images)} images have none); save one without shapes "
            "if nothing is on it, or remove the image"
        )
    return [Pair(image, found[image], split_of(image.relative_to(root))) for image in sorted(found)]


def labels_in(path: Path) -> set[str]:
    """Return the names of the shapes in a LabelMe file.

    Raises:
        ValueError: a shape is not understood; names the file and the shape.
    """
    return {shape["label"] for shape in _shapes(path)}


def draw_labelme(pair: Pair, class_names: tuple[str, ...]) -> npt.NDArray[np.uint8]:
    """Return the mask [H, W] of a LabelMe file: later shapes cover earlier ones, and the rest is the first class.

    The label `__ignore__` means "no label", and `_background_` the first class.

    Raises:
        ValueError: the file is for an image of another size, or a shape is not understood.
    """
    height, width = image_sizes([pair.image])[0]
    content = read_json(pair.labels)
    said = content.get("imageHeight") or height, content.get("imageWidth") or width
    if said != (height, width):
        raise ValueError(
            f"{pair.labels} is for an image of {said[0]}x{said[1]} px (height x width), but {pair.image} has "
            f"{height}x{width}; use the image that was labelled"
        )
    mask = PIL.Image.new("L", (width, height), 0)
    values = {BACKGROUND: 0, IGNORED: IGNORE_INDEX} | {name: index for index, name in enumerate(class_names)}
    for index, shape in enumerate(_shapes(pair.labels)):
        try:
            _draw(mask, shape, values[shape["label"]])
        except (ValueError, TypeError, OSError) as error:  # noqa: PERF203
            raise ValueError(f"{pair.labels}: shape {index} ({shape['label']!r}): {error}") from error
    return np.asarray(mask)


def _draw(mask: PIL.Image.Image, shape: dict[str, Any], value: int) -> None:
    kind = shape.get("shape_type") or "polygon"
    points = [(_number(x), _number(y)) for x, y in shape.get("points", ())]
    drawing = PIL.ImageDraw.Draw(mask)
    if kind == "polygon" and len(points) > 2:
        drawing.polygon(points, fill=value, outline=value)
    elif kind == "rectangle" and len(points) == 2:
        xs, ys = zip(*points, strict=True)
        drawing.rectangle([min(xs), min(ys), max(xs), max(ys)], fill=value)
    elif kind == "circle" and len(points) == 2:
        (x, y), edge = points
        radius = math.dist((x, y), edge)
        drawing.ellipse([x - radius, y - radius, x + radius, y + radius], fill=value)
    elif kind == "mask" and len(points) == 2:
        try:
            data = base64.b64decode(shape.get("mask", ""), validate=True)
            drawn = PIL.Image.open(io.BytesIO(data), formats=["PNG"]).convert("1")
        except (binascii.Error, PIL.UnidentifiedImageError) as error:
            raise ValueError("its mask is no PNG image; draw it again") from error
        mask.paste(value, (int(points[0][0]), int(points[0][1])), drawn)
    else:
        raise ValueError(f"it is a {kind} of {len(points)} points, which has no area; draw a polygon or remove it")


def _number(value: Any) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"a point must be two numbers, got {value!r}")
    return max(-_FAR, min(_FAR, value))


def _has_shapes(path: Path) -> bool:
    content = read_json(path)
    return isinstance(content, dict) and "shapes" in content and "imagePath" in content


def _shapes(path: Path) -> list[dict[str, Any]]:
    shapes = read_json(path)["shapes"]
    if not isinstance(shapes, list):
        raise ValueError(f"{path}: shapes must be a list, got {type(shapes).__name__}")
    for index, shape in enumerate(shapes):
        if not isinstance(shape, dict) or not isinstance(shape.get("label"), str) or not shape["label"].strip():
            raise ValueError(f"{path}: shape {index} has no label; name it in LabelMe, or remove it")
    return shapes
