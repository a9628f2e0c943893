"""Read image files: formats, bit depth, orientation. Data sets, prediction and inspection all use this module."""

import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import PIL.Image
import torch
from torchvision.tv_tensors import Image

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")

_FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP")
_ORIENTATION = 0x0112
_TIFF_WIDTH, _TIFF_HEIGHT, _TIFF_BITS, _TIFF_PHOTOMETRIC = 256, 257, 258, 262
_PREMULTIPLIED = {"RGBa": "RGBA", "La": "LA"}


def is_image_name(name: str) -> bool:
    """Return whether a file's name has an image suffix, in upper or lower case, and is no dot file (`._a.jpg`).

    >>> is_image_name("a.JPG"), is_image_name("._a.jpg"), is_image_name("Thumbs.db")
    (True, False, False)
    """
    return not name.startswith(".") and name.lower().endswith(IMAGE_SUFFIXES)


def image_files(folder: Path) -> list[Path]:
    """Return the image files of a folder (not of its subfolders) by their names, sorted."""
    return sorted(path for path in folder.iterdir() if is_image_name(path.name))


def open_image(path: Path | BinaryIO) -> PIL.Image.Image:
    """Open an image or mask without reading its pixels.

    Pillow detects the format from the contents. Only plain formats are allowed, because others start programs, as EPS
    starts Ghostscript.
    """
    return PIL.Image.open(path, formats=_FORMATS)


def open_named(path: Path, data: BinaryIO | None = None) -> PIL.Image.Image:
    """Open an image or mask, or `data` in its place. Raise an OSError that names the file if it cannot be opened."""
    try:
        return open_image(path if data is None else data)
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise OSError(f"{path} cannot be opened as an image ({error}); replace the file") from error


def load_named(image: PIL.Image.Image, path: Path) -> None:
    """Decode an opened image. Raise an OSError that names the file if it is damaged."""
    if image.format == "TIFF":
        image.filename = ""  # type: ignore[attr-defined]  # Pillow 13 scrambles a memory-mapped TIFF that it rotates.
    try:
        image.load()
    except Exception as error:
        raise OSError(f"{path} is a damaged image ({error}); replace the file") from error


def read_image(path: Path, data: BinaryIO | None = None) -> Image:
    """Read an image, or `data` in its place, as RGB, rotated by its EXIF orientation.

    Grey, palette, CMYK and 1-bit images become RGB; an alpha channel is dropped. Of 16 bits (12 in some TIFF files) the
    upper 8 are used, also for grey images.

    Returns:
        uint8 [3, H, W].

    Raises:
        OSError: if the file is not an image or a damaged one.
        ValueError: if the format does not define the range of its values (32-bit integers, floats), or it is not RGB.
    """
    with open_named(path, data) as file:
        problem = depth_problem(file)
        if problem is not None:
            raise ValueError(f"{path} {problem}")
        load_named(file, path)
        pixels = rgb_pixels(file, path)
    return Image(torch.from_numpy(pixels).permute(2, 0, 1).contiguous())


def read_single_image(path: Path) -> Image:
    """Read an image outside of a data set, as `read_image`. Raise a ValueError that names the file on any failure."""
    try:
        return read_image(path)
    except OSError as error:
        reason = str(error).removeprefix(f"{path} ")
        raise ValueError(f"{path} cannot be read as an image: {reason}") from error


def rgb_pixels(image: PIL.Image.Image, path: Path) -> npt.NDArray[np.uint8]:
    """Return the upright pixels uint8 [H, W, 3] of the loaded image of `path`. `depth_problem` must allow it.

    Raises:
        ValueError: if it cannot be read as RGB; names the file.
    """
    image.info.pop("transparency", None)  # not used, and Pillow warns of it in palettes
    bits = deep_bits(image)
    if bits:
        grey = np.asarray(image).astype(np.int64) >> (bits - 8)
        if image.format == "TIFF" and _tag(image, _TIFF_PHOTOMETRIC) == 0:  # white is 0, and Pillow does not invert it
            grey = 255 - grey
        pixels = np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)
    else:
        try:
            plain = image.convert(_PREMULTIPLIED[image.mode]) if image.mode in _PREMULTIPLIED else image
            pixels = np.asarray(plain.convert("RGB"))
        except Exception as error:
            raise ValueError(
                f"{path} cannot be read as RGB (Pillow mode {image.mode!r}: {error}); save it as RGB"
            ) from error
    return apply_orientation(pixels, orientation(image, path))


def deep_bits(image: PIL.Image.Image) -> int:
    """Return the bits per pixel of a deep grey image, from 0 (black) to all ones; 0 for other images."""
    if image.mode.startswith("I;16"):
        bits = _tag(image, _TIFF_BITS) if image.format == "TIFF" else 16
        return bits if isinstance(bits, int) and 8 < bits <= 16 else 16
    return 16 if image.mode == "I" and image.format == "PNG" else 0  # Pillow before 11


def depth_problem(image: PIL.Image.Image) -> str | None:
    """Return why an image cannot be converted to 8 bits and what to do, or None if it can."""
    if deep_bits(image) or image.mode not in ("I", "F"):
        return None
    kind = "floats" if image.mode == "F" else "whole numbers of up to 32 bits"
    return f"holds {kind}, whose range the format does not define; scale them to 0..255 and save them with 8 bits"


def _tag(image: PIL.Image.Image, tag: int) -> Any:
    value = getattr(image, "tag_v2", {}).get(tag)
    return value[0] if isinstance(value, tuple) and value else value


def orientation(image: PIL.Image.Image, path: Path) -> int:
    """Return the EXIF orientation that is still to be applied to the pixels, 1 to 8; 1 changes nothing.

    Pillow applies it when it loads a TIFF file.
    """
    try:
        if image.format == "PNG" and "exif" not in image.info and _metadata_follows(path):
            image.load()
        value = PIL.Image.Image.getexif(image).get(_ORIENTATION, 1)  # PngImageFile.getexif would decode every PNG
    except Exception:  # damaged EXIF data changes nothing
        return 1
    return value if value in range(2, 9) else 1


def apply_orientation(pixels: npt.NDArray[Any], orientation: int) -> npt.NDArray[Any]:
    """Apply an EXIF orientation to pixels [H, W, ...], in a new array.

    >>> apply_orientation(np.array([[1, 2, 3]]), 6).tolist(), apply_orientation(np.array([[1, 2, 3]]), 8).tolist()
    ([[1], [2], [3]], [[3], [2], [1]])
    """
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.array(pixels, order="C")


def upright_size(image: PIL.Image.Image, path: Path) -> tuple[int, int]:
    """Return the (height, width) in px of an opened, not yet loaded image, as `read_image` returns it."""
    width, height = image.size
    if image.format == "TIFF":  # Pillow's releases differ in its `size`
        width, height = _tag(image, _TIFF_WIDTH) or width, _tag(image, _TIFF_HEIGHT) or height
    return (width, height) if orientation(image, path) >= 5 else (height, width)


def orientation_problem(image: Path, mask: tuple[int, ...], size: tuple[int, int]) -> str | None:
    """Return how the image's EXIF orientation explains another size of its mask and what to do, or None."""
    with open_named(image) as file:
        value = orientation(file, image)
    if value < 5 or mask != size[::-1]:
        return None
    return (
        f", rotated by its EXIF orientation {value}: the mask was drawn on the stored pixels; rotate the mask "
        "too (set the same orientation in its EXIF data, or transpose its pixels), or save the image without EXIF data"
    )


def image_sizes(paths: Sequence[Path]) -> list[tuple[int, int]]:
    """Return the (height, width) in px of every image as `read_image` returns it, from the files' headers.

    Raises:
        OSError: if a file is not an image; the message names it.
    """
    sizes = []
    for path in paths:
        with open_named(path) as image:
            sizes.append(upright_size(image, path))
    return sizes


def palette_of(paths: Iterable[Path]) -> list[tuple[int, int, int]]:
    """Return the palette of the first file that can be opened, or [] if that is no palette image."""
    for path in paths:
        try:
            with open_named(path) as image:
                load_named(image, path)
                levels = image.getpalette() or []
                return list(zip(levels[::3], levels[1::3], levels[2::3], strict=True))
        except OSError:  # noqa: PERF203  # reading the sample reports a damaged file
            continue
    return []


def _metadata_follows(path: Path) -> bool:
    """Return whether a PNG file has chunks after its pixels that may hold an orientation."""
    with path.open("rb") as file:
        file.seek(8)
        pixels = False
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if pixels and kind in (b"eXIf", b"iTXt", b"tEXt", b"zTXt"):
                return True
            pixels = pixels or kind == b"IDAT"
            file.seek(length + 4, 1)
    return False
