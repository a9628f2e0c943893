"""The one reader of image files: formats, depth, orientation. Data sets, prediction and inspection all use it."""

import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

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
    """Whether a file's name is that of an image: a known suffix in any case, and no dot file (as macOS's `._a.jpg`).

    >>> is_image_name("a.JPG"), is_image_name("._a.jpg"), is_image_name("Thumbs.db")
    (True, False, False)
    """
    return not name.startswith(".") and name.lower().endswith(IMAGE_SUFFIXES)


def image_files(folder: Path) -> list[Path]:
    """The files of a folder (not of its subfolders) that have the name of an image, sorted."""
    return sorted(path for path in folder.iterdir() if is_image_name(path.name))


def open_image(path: Path) -> PIL.Image.Image:
    """Open an image or mask; its pixels are not yet read.

    Pillow goes by the contents, whatever the name. Of its formats only plain ones are tried: others hand the file to
    programs, as EPS does to Ghostscript.
    """
    return PIL.Image.open(path, formats=_FORMATS)


def open_named(path: Path) -> PIL.Image.Image:
    """`open_image`, whose OSError names the file."""
    try:
        return open_image(path)
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise OSError(f"{path} cannot be opened as an image ({error}); replace the file") from error


def load_named(image: PIL.Image.Image, path: Path) -> None:
    """Decode an opened image; an OSError names the file."""
    if image.format == "TIFF":
        image.filename = ""  # type: ignore[attr-defined]  # Mapped to memory, Pillow 13 scrambles one that it turns.
    try:
        image.load()
    except Exception as error:
        raise OSError(f"{path} is a damaged image ({error}); replace the file") from error


def read_image(path: Path) -> Image:
    """Read an image as RGB, turned as its EXIF orientation says.

    Grey, palette, CMYK and 1-bit images become RGB; an alpha channel is left out. Of 16 bits (12 in some TIFF files)
    the upper 8 are read, also of grey ones.

    Returns:
        uint8 [3, H, W].

    Raises:
        OSError: if the file is not an image or a damaged one.
        ValueError: if its values have no range that the format says (32-bit whole numbers, floats), or no RGB.
    """
    with open_named(path) as file:
        problem = deep_problem(file)
        if problem is not None:
            raise ValueError(f"{path} {problem}")
        load_named(file, path)
        pixels = rgb_pixels(file, path)
    return Image(torch.from_numpy(pixels).permute(2, 0, 1).contiguous())


def read_single_image(path: Path) -> Image:
    """`read_image` for an image outside of a data set: each failure is a ValueError that names the file."""
    try:
        return read_image(path)
    except OSError as error:
        reason = str(error).removeprefix(f"{path} ")
        raise ValueError(f"{path} cannot be read as an image: {reason}") from error


def rgb_pixels(image: PIL.Image.Image, path: Path) -> npt.NDArray[np.uint8]:
    """The pixels uint8 [H, W, 3] of a loaded image of `path` that `deep_problem` lets pass, turned upright.

    Raises:
        ValueError: if it cannot be read as RGB; names the file.
    """
    image.info.pop("transparency", None)  # left out; Pillow warns of a palette's
    bits = deep_bits(image)
    if bits:
        grey = np.asarray(image).astype(np.int64) >> (bits - 8)
        if image.format == "TIFF" and _tag(image, _TIFF_PHOTOMETRIC) == 0:  # white is 0, which Pillow leaves so
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
    return turn(pixels, orientation(image, path))


def deep_bits(image: PIL.Image.Image) -> int:
    """How many bits a pixel of deep grey has whose range the format says: 0 (black) to all ones; else 0."""
    if image.mode.startswith("I;16"):
        bits = _tag(image, _TIFF_BITS) if image.format == "TIFF" else 16
        return bits if isinstance(bits, int) and 8 < bits <= 16 else 16
    return 16 if image.mode == "I" and image.format == "PNG" else 0  # so before Pillow 11


def deep_problem(image: PIL.Image.Image) -> str | None:
    """Why an image cannot be brought to 8 bits, if it cannot: what it holds, then what to do."""
    if deep_bits(image) or image.mode not in ("I", "F"):
        return None
    kind = "floats" if image.mode == "F" else "whole numbers of up to 32 bits"
    return f"holds {kind}, whose range the format does not say; scale them to 0..255 and save them with 8 bits"


def _tag(image: PIL.Image.Image, tag: int) -> Any:
    value = getattr(image, "tag_v2", {}).get(tag)
    return value[0] if isinstance(value, tuple) and value else value


def orientation(image: PIL.Image.Image, path: Path) -> int:
    """The EXIF orientation by which the pixels are yet to be turned, 1 to 8; 1 turns nothing.

    A TIFF file that is loaded has been turned by Pillow.
    """
    try:
        if image.format == "PNG" and "exif" not in image.info and _metadata_follows(path):
            image.load()
        value = PIL.Image.Image.getexif(image).get(_ORIENTATION, 1)  # PngImageFile's own would decode every PNG
    except Exception:  # damaged EXIF data turns nothing
        return 1
    return value if value in range(2, 9) else 1


def turn(pixels: npt.NDArray[Any], orientation: int) -> npt.NDArray[Any]:
    """Pixels [H, W, ...] as they are to be seen, in an array of their own.

    >>> turn(np.array([[1, 2, 3]]), 6).tolist(), turn(np.array([[1, 2, 3]]), 8).tolist()
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
    """The (height, width) in px of an opened image, not yet loaded, as `read_image` gives it."""
    width, height = image.size
    if image.format == "TIFF":  # where Pillow's releases differ in what they call its size
        width, height = _tag(image, _TIFF_WIDTH) or width, _tag(image, _TIFF_HEIGHT) or height
    return (width, height) if orientation(image, path) >= 5 else (height, width)


def turned_size_problem(image: Path, mask: tuple[int, ...], size: tuple[int, int]) -> str | None:
    """Why a mask has not its image's size (height, width), if the image's EXIF orientation explains it; what to do."""
    with open_named(image) as file:
        value = orientation(file, image)
    if value < 5 or mask != size[::-1]:
        return None
    return (
        f", turned by its EXIF orientation {value}: the mask was drawn on the pixels as they are stored; turn the mask "
        "too (set the same orientation in its EXIF data, or transpose its pixels), or save the image without EXIF data"
    )


def image_sizes(paths: Sequence[Path]) -> list[tuple[int, int]]:
    """The (height, width) in px of every image as `read_image` gives it, from the files' headers.

    Raises:
        OSError: if a file is not an image; the message names it.
    """
    sizes = []
    for path in paths:
        with open_named(path) as image:
            sizes.append(upright_size(image, path))
    return sizes


def palette_of(paths: Iterable[Path]) -> list[tuple[int, int, int]]:
    """The colours in the first of the files that can be opened, if it is a palette image."""
    for path in paths:
        try:
            with open_named(path) as image:
                load_named(image, path)
                levels = image.getpalette() or []
                return list(zip(levels[::3], levels[1::3], levels[2::3], strict=True))
        except OSError:  # noqa: PERF203  # a damaged file is named when it is read
            continue
    return []


def _metadata_follows(path: Path) -> bool:
    """Whether a PNG file has chunks behind its pixels that may hold an orientation."""
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
