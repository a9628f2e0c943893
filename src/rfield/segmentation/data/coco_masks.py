"""The pixels of segments in COCO's format: polygons, run lengths, and the ids in panoptic images."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rfield.segmentation.data.images import load_named, open_named, rgb_pixels, upright_size


def segment_pixels(segmentation: Any, size: tuple[int, int], where: str) -> npt.NDArray[np.bool_]:
    """Return the pixels bool [H, W] of a `segmentation`: a list of polygons, or run lengths, plain or compressed.

    Polygons are drawn by pycocotools, as the published scores are. Its decoder of run lengths is not used, because it
    trusts them.

    Raises:
        ValueError: it is not understood, is for another size, or pycocotools is not installed; begins with `where`.
    """
    if isinstance(segmentation, list):
        return _polygons(segmentation, size, where)
    if isinstance(segmentation, dict) and isinstance(segmentation.get("counts"), list | str):
        if segmentation.get("size") != list(size):
            raise ValueError(
                f"{where}: segmentation has the size {segmentation.get('size')!r}, but its image {list(size)}"
            )
        counts = segmentation["counts"]
        try:
            lengths = np.array(_counts(counts) if isinstance(counts, str) else counts, dtype=np.int64)
        except (ValueError, TypeError, OverflowError):
            lengths = np.array([-1])
        if (
            lengths.ndim != 1
            or (lengths < 0).any()
            or (lengths > math.prod(size)).any()
            or lengths.sum() != math.prod(size)
        ):
            raise ValueError(f"{where}: the run lengths of segmentation do not cover its {size[0]}x{size[1]} px")
        pixels = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)
        return pixels.reshape(size, order="F")
    raise ValueError(f"{where}: segmentation must be polygons or run lengths, got {str(segmentation)[:60]!r}")


def panoptic_ids(path: Path, size: tuple[int, int]) -> npt.NDArray[np.int64]:
    """Return the id of the segment of each pixel of a panoptic PNG file: red + 256 green + 65536 blue.

    Raises:
        OSError: it is damaged.
        ValueError: it has another size than its image.
    """
    with open_named(path) as file:
        own = upright_size(file, path)
        if own != size:
            raise ValueError(f"{path} is {own[0]}x{own[1]} px (height x width) but its image is {size[0]}x{size[1]}")
        load_named(file, path)
        red, green, blue = rgb_pixels(file, path).astype(np.int64).transpose(2, 0, 1)
    ids: npt.NDArray[np.int64] = red + 256 * green + 65536 * blue
    return ids


def _polygons(polygons: list[Any], size: tuple[int, int], where: str) -> npt.NDArray[np.bool_]:
    try:
        from pycocotools import mask as coco
    except ImportError as error:
        raise ValueError(f"{where}: polygons need the package pycocotools: pip install 'rfield[coco]'") from error
    height, width = size
    drawn = np.zeros(size, bool)
    for polygon in polygons:
        try:
            points = np.array(polygon, dtype=np.float64)
        except (ValueError, TypeError, OverflowError):
            points = np.array([math.nan])
        if points.ndim != 1 or len(points) < 6 or len(points) % 2 or not np.isfinite(points).all():
            raise ValueError(
                f"{where}: a polygon of segmentation must be 6 or more numbers x, y, x, y and so on, got "
                f"{str(polygon)[:60]}"
            )
        # pycocotools walks along every edge: one that leads far away would fill the memory.
        points[::2], points[1::2] = points[::2].clip(-width, 2 * width), points[1::2].clip(-height, 2 * height)
        drawn |= coco.decode(coco.frPyObjects([points.tolist()], height, width))[..., 0] > 0
    return drawn


def _counts(text: str) -> list[int]:
    """Return the run lengths in COCO's compressed text: 5 bits a character, differences from the fourth length on."""
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 30:
            raise ValueError(f"{character!r} is no part of run lengths")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                value -= 1 << shift
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    return counts
