"""Check the files of one sample."""

import hashlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import PIL.Image

from rfield.segmentation.conventions import IGNORE_INDEX
from rfield.segmentation.data.images import (
    deep_bits,
    depth_problem,
    load_named,
    open_image,
    orientation,
    rgb_pixels,
    upright_size,
)
from rfield.segmentation.data.listing import Entry, Listing
from rfield.segmentation.data.masks import UNKNOWN, Colour, wrong_size
from rfield.segmentation.data.paths import NearMisses

Level = Literal["error", "warning"]
Found = Callable[[Level, Path, str], None]

# Pillow's own limit: it warns above it and refuses twice as many.
_MOST_PIXELS = 89_478_485
_TAILS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
_ALPHA = ("RGBA", "RGBa", "LA", "La", "PA")
_DARK = 16


@dataclass(frozen=True)
class Finding:
    """One fault of a data set.

    Attributes:
        level: an error spoils the training or ends it; a warning may be intended.
        file: the file that has the fault.
        split: the split of the file.
        index: of the sample in the split; None if the finding is about the split.
        text: what was found and what to do.
    """

    level: Level
    file: str
    split: str
    index: int | None
    text: str

    def __str__(self) -> str:
        place = self.split if self.index is None else f"{self.split}[{self.index}]"
        line = f"{self.level}: {place}: {' '.join(self.text.split())}"
        return line.encode("utf-8", "backslashreplace").decode()  # a file name may hold bytes that are not text


@dataclass
class Sample:
    """The results of the check of one sample.

    Attributes:
        findings: the faults of its files.
        classes: the classes in its mask; None if it was not read.
        void: the values in its mask that mean "no label".
        palette: the colours of the values that a palette mask uses.
        digest: a hash of the image's pixels; None if they were not read.
    """

    findings: list[Finding] = field(default_factory=list)
    classes: set[int] | None = None
    void: set[int] = field(default_factory=set)
    palette: dict[int, Colour] = field(default_factory=dict)
    digest: bytes | None = None


def check_sample(
    listing: Listing, entry: Entry, split: str, index: int, pixels: bool = True, values: bool = True
) -> Sample:
    """Check the files of one sample.

    Args:
        listing: the split of the sample.
        entry: the sample.
        split: the name of the split, for the findings.
        index: of the sample in the split, for the findings.
        pixels: read the image's pixels; without it only the header, and the pixels of a file whose end is missing.
        values: the same for the mask; without it only the first of a face's maps is checked.
    """
    sample = Sample()

    def found(level: Level, path: Path, text: str) -> None:
        sample.findings.append(Finding(level, str(path), split, index, f"{path} {text}"))

    image_size, turned = None, 1
    opened = _open(entry.image, listing.near, found)
    if opened is not None:
        with opened as image:
            image_size, turned = upright_size(image, entry.image), orientation(image, entry.image)
            if _check_kind_of_image(image, entry.image, found) and _load(image, entry.image, pixels, found) and pixels:
                sample.digest = _digest(image, entry.image, found)
    maps = []
    for path in entry.masks if values else entry.masks[:1]:
        mask = _read_mask(path, entry, listing, image_size, turned, values, sample, found)
        if mask is not None:
            maps.append(mask)
    if maps and len(maps) == len(entry.masks):
        first = entry.masks[0]
        sample.classes = (
            _classes_of_maps(maps, first, listing, found)
            if listing.code.maps
            else _classes(maps[0], first, listing, sample, found)
        )
    return sample


def _open(path: Path, near: NearMisses, found: Found) -> PIL.Image.Image | None:
    """Open an image. Return None, with a finding, if the header is wrong or decoding is unsafe."""
    try:
        if not path.is_file():
            found("error", path, f"is missing{near.of(path)}; add the file or remove its sample from the split")
            return None
        image = open_image(path)
    except PIL.Image.DecompressionBombError as error:
        found("error", path, f"is too large and was not decoded ({error}); replace it or scale it down")
        return None
    except Exception as error:  # Pillow raises many kinds for damaged files
        found("error", path, f"cannot be opened as an image ({error}); replace the file")
        return None
    if image.width * image.height > _MOST_PIXELS:
        image.close()
        text = f"is too large, {image.height}x{image.width} px, and was not decoded; replace it or scale it down"
        found("error", path, text)
        return None
    return image


def _load(image: PIL.Image.Image, path: Path, pixels: bool, found: Found) -> bool:
    """Decode an opened image (without `pixels` only if its end is missing). Return whether it is complete."""
    if not pixels and _has_end(path, image.format):
        return True
    try:
        load_named(image, path)
        if pixels and image.format == "PNG":
            # Pillow decodes damaged or truncated PNGs as far as it can; only the checksums reveal the damage.
            with open_image(path) as again:
                again.verify()
    except OSError as error:
        found("error", path, str(error).removeprefix(f"{path} "))
        return False
    except Exception as error:
        found("error", path, f"is a damaged image ({error}); replace the file")
        return False
    return True


def _has_end(path: Path, kind: str | None) -> bool:
    if kind not in _TAILS:
        return True
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 64))
        return _TAILS[kind] in file.read()


def _check_kind_of_image(image: PIL.Image.Image, path: Path, found: Found) -> bool:
    """Return whether an opened image can be converted to 8 bits."""
    problem = depth_problem(image)
    if problem is not None:
        found("error", path, problem)
        return False
    if deep_bits(image) or any(";16" in str(tile[3]) for tile in getattr(image, "tile", [])):
        found(
            "warning",
            path,
            f"is a {deep_bits(image) or 16}-bit image, of which only the upper 8 bits are read; save it with 8 bits",
        )
    if image.mode in _ALPHA or "transparency" in image.info:
        text = "has an alpha channel, which is dropped, so transparent pixels get their hidden colour"
        found("warning", path, f"{text}; save it without one, on the right background")
    return True


def _check_orientations(entry: Entry, image: int, mask: int, size: tuple[int, int], found: Found) -> None:
    """Warn of EXIF orientations if the mask's size does not show whether it was drawn on the rotated image."""
    if image == mask or ((image < 5) != (mask < 5) and size[0] != size[1]):
        return
    path, value, other, its = entry.image, image, mask, "mask"
    if image == 1:
        path, value, other, its = entry.masks[0], mask, image, "image"
    has = f"has {other}" if other > 1 else "has none"
    text = f"has the EXIF orientation {value}, which is applied, but its {its} {has}"
    fix = "look at both, or save both without EXIF data"
    found("warning", path, f"{text}, and their sizes do not show whether the mask fits the rotated image; {fix}")


def _digest(image: PIL.Image.Image, path: Path, found: Found) -> bytes | None:
    try:
        pixels = rgb_pixels(image, path)
    except ValueError as error:
        found("error", path, str(error).removeprefix(f"{path} "))
        return None
    if deep_bits(image) and pixels.max() < _DARK:
        text = f"is read as nearly black: its values use less than {_DARK}/256 of the range of {deep_bits(image)} bits"
        found("warning", path, f"{text}; scale them to 0..255 and save them with 8 bits")
    return hashlib.blake2b(repr(pixels.shape).encode() + pixels.data, digest_size=16).digest()


def _read_mask(
    path: Path,
    entry: Entry,
    listing: Listing,
    size: tuple[int, int] | None,
    turned: int,
    values: bool,
    sample: Sample,
    found: Found,
) -> npt.NDArray[Any] | None:
    """Return the values of a mask, or None if its file has a fault or `values` is not set."""
    opened = _open(path, listing.near, found)
    if opened is None:
        return None
    with opened as mask:
        if size is not None and path == entry.masks[0]:
            _check_orientations(entry, turned, orientation(mask, path), size, found)
        if mask.format == "JPEG":
            found("warning", path, "is a JPEG file, whose compression changes values; save masks as PNG")
        wrong = listing.code.wrong_kind(mask)
        if wrong is not None:
            found("error", path, "; ".join(wrong))
        other = None if size is None else wrong_size(mask, path, size, entry.image)
        if other is not None:
            found("error", path, other)
        if not _load(mask, path, values, found) or wrong or other or not values:
            return None
        read = listing.code.values(mask, path)
        if mask.mode == "P" and listing.code.colours is None:
            sample.palette = _used_colours(mask, read, listing)
        return read


def _used_colours(mask: PIL.Image.Image, values: npt.NDArray[Any], listing: Listing) -> dict[int, Colour]:
    """Return the colour of each value of a palette mask that stands for a class."""
    levels = mask.getpalette("RGB") or []
    used = [value for value in np.unique(values).tolist() if listing.code.labels[value] not in (UNKNOWN, IGNORE_INDEX)]
    return {
        value: (levels[3 * value], levels[3 * value + 1], levels[3 * value + 2])
        for value in used
        if 3 * value + 2 < len(levels)
    }


def _classes(values: npt.NDArray[Any], path: Path, listing: Listing, sample: Sample, found: Found) -> set[int] | None:
    """Return the classes in a mask. Add findings for unknown values and for a mask without labels."""
    classes = listing.code.classes(values)
    unknown = listing.code.unknown(values, classes)
    if unknown is not None:
        found("error", path, f"{unknown} (there are {len(listing.class_names)}); {listing.advice}")
    labels = set(np.unique(classes).tolist())
    if listing.code.colours is None:
        sample.void = set(np.unique(values[classes == IGNORE_INDEX]).tolist())
    if labels == {IGNORE_INDEX}:
        found("warning", path, "has no labelled pixel, so nothing is learned from it; label or remove it")
    return labels - {IGNORE_INDEX, UNKNOWN}


def _classes_of_maps(maps: list[npt.NDArray[Any]], path: Path, listing: Listing, found: Found) -> set[int]:
    """Return the classes that have the highest certainty at some pixel."""
    stack = np.stack(maps)
    if not stack.any():
        text = "and the other maps of its face are 0 everywhere, so all of it is background; label or remove it"
        found("warning", path, text)
    return set(np.unique(listing.code.labels[stack.argmax(0)]).tolist()) - {IGNORE_INDEX}


def ignore_bomb_warnings() -> None:
    """Silence Pillow's warning of large images, which are findings. Call within `warnings.catch_warnings`."""
    warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
