"""Reading the files of a data set, with errors that name the file and say what to do."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import PIL.Image
import torch
from torchvision.tv_tensors import Image

from rfield.config import counted
from rfield.data.dataset import IGNORE_INDEX

_FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP")


def open_image(path: Path) -> PIL.Image.Image:
    """A photograph or mask, its pixels not yet read.

    Pillow goes by the contents, whatever the name. Of its formats only plain ones are tried: others hand the file to
    programs, as EPS does to Ghostscript.
    """
    return PIL.Image.open(path, formats=_FORMATS)


def read_image(path: Path) -> Image:
    """A photograph as uint8 [3, H, W].

    Raises:
        OSError: if the file is not an image or a damaged one.
        ValueError: if it has more than 8 bits a pixel, of which Pillow would keep 0..255 and make the rest white.
    """
    with _open(path) as file:
        if is_deep(file):
            raise ValueError(
                f"{path} has more than 8 bits a pixel (Pillow mode {file.mode!r}); scale its values to 8 bits"
            )
        pixels = np.array(_load(file, path, "RGB"))
    return Image(torch.from_numpy(pixels).permute(2, 0, 1).contiguous())


def read_mask(path: Path, size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """The class indices in a palette or 8-bit grey image, uint8 [H, W].

    Args:
        path: the file.
        size: the (height, width) in px that it must have, its photograph's.

    Raises:
        OSError: if the file is not an image or a damaged one.
        ValueError: if it is of another kind or size.
    """
    wanted = "a mask must be a palette image ('P') or 8-bit grey ('L') whose values are class indices"
    return _read_values(path, size, ("P", "L"), wanted)


def read_grey(path: Path, size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """The values of an 8-bit grey image, uint8 [H, W]; arguments and errors as of `read_mask`."""
    return _read_values(path, size, ("L",), "a map must be 8-bit grey ('L')")


def check_labels(mask: npt.NDArray[np.uint8], num_classes: int, path: Path, advice: str) -> None:
    """Raises ValueError where a mask holds a value that is neither a class nor 255; `advice` says what to do."""
    wrong = mask[(mask >= num_classes) & (mask != IGNORE_INDEX)]
    if wrong.size:
        raise ValueError(
            f"{path} holds {wrong.size} px of the values {np.unique(wrong).tolist()}, but the data set has "
            f"{counted(num_classes, 'class')}, 0..{num_classes - 1}, and 255 for no label; {advice}"
        )


def image_sizes(paths: Sequence[Path]) -> list[tuple[int, int]]:
    """The (height, width) in px of every image, read from the files' headers.

    Raises:
        OSError: if a file is not an image; the message names it.
    """
    sizes = []
    for path in paths:
        with _open(path) as image:
            sizes.append((image.height, image.width))
    return sizes


def palette_of(paths: Sequence[Path]) -> list[tuple[int, int, int]]:
    """The colours in the first of the files that can be opened, if it is a palette image."""
    for path in paths:
        try:
            with _open(path) as image:
                levels = _load(image, path).getpalette() or []
            return list(zip(levels[::3], levels[1::3], levels[2::3], strict=True))
        except (OSError, ValueError):  # noqa: PERF203 a finding for who reads the sample
            continue
    return []


def fingerprint_of(root: Path, paths: Sequence[Path], *facts: object) -> str:
    """A hexadecimal hash of the facts, and of every file's name in the root, its size and time of change."""
    digest = hashlib.sha256(repr(facts).encode())
    for path in paths:
        state = path.stat()
        digest.update(repr((str(path.relative_to(root)), state.st_size, state.st_mtime_ns)).encode())
    return digest.hexdigest()


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that hold something, without the blanks around them.

    Raises:
        ValueError: if it is not text in UTF-8.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 ({error}); save it as such") from error
    return [line.strip() for line in lines if line.strip()]


def read_class_names(path: Path, default: tuple[str, ...]) -> tuple[str, ...]:
    """The class names in a file, one a line; `default` where there is no such file.

    Raises:
        ValueError: if there are none, more than 255, or one stands there twice.
    """
    if not path.is_file():
        return default
    names = read_lines(path)
    if len(set(names)) != len(names) or not 1 <= len(names) <= IGNORE_INDEX:
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(
            f"{path} holds {counted(len(names), 'class name')}{f', some of them twice: {twice}' if twice else ''}; "
            f"it needs 1 to {IGNORE_INDEX} different ones, one a line"
        )
    return tuple(names)


def sample_path(root: Path, folder: str, name: str, suffix: str, listed_in: str) -> Path:
    """`root/folder/name` with the suffix; the folder itself may be a link to elsewhere, a sample may not.

    Raises:
        ValueError: if the file would lie elsewhere; names `listed_in`, where the name was read.
    """
    path = root / folder / f"{name}{suffix}"
    # A file right in the folder leaves it as a link alone; following every path takes long.
    plain = not {"/", os.sep} & {*name} and name not in ("", ".", "..") and not path.is_symlink()
    if not plain and not lies_in(path, root, root / folder):
        raise ValueError(f"{listed_in} names {name!r}, a file outside {root}; remove that line")
    return path


def lies_in(path: Path, *folders: Path) -> bool:
    """Whether a file, all links followed, is in one of the folders, which may be links themselves."""
    try:
        resolved = path.resolve()
        return any(resolved.is_relative_to(folder.resolve()) for folder in folders)
    except (OSError, RuntimeError, ValueError):  # a link to itself, a name with a zero byte
        return False


def check_files(paths: Sequence[Path], what: str) -> None:
    """Raises FileNotFoundError for the first that is missing; `what` says whose files they are."""
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{missing[0]} is missing ({len(missing)} of the {len(paths)} files of {what}); "
            "add the file or remove its line from the list"
        )


def is_deep(image: PIL.Image.Image) -> bool:
    """Whether it is grey of more than 8 bits."""
    return image.mode.startswith("I") or image.mode == "F"


def has_few_bits(image: PIL.Image.Image) -> bool:
    """Whether it is grey of 1, 2 or 4 bits, whose values Pillow spreads over 0..255, other classes than meant."""
    return image.mode == "L" and image.format == "PNG" and any(tile[3] != "L" for tile in getattr(image, "tile", []))


def _read_values(path: Path, size: tuple[int, int], modes: tuple[str, ...], wanted: str) -> npt.NDArray[np.uint8]:
    with _open(path) as file:
        few_bits = has_few_bits(file)
        if file.mode not in modes or few_bits:
            raise ValueError(
                f"{path} is of Pillow mode {file.mode!r}{' with less than 8 bits' if few_bits else ''}; {wanted}"
            )
        values: npt.NDArray[np.uint8] = np.array(_load(file, path))
    if values.shape != size:
        raise ValueError(
            f"{path} is {values.shape[0]}x{values.shape[1]} px (height x width) but its image is {size[0]}x{size[1]}; "
            "both must have one size"
        )
    return values


def _open(path: Path) -> PIL.Image.Image:
    try:
        return open_image(path)
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise OSError(f"{path} cannot be opened as an image ({error}); replace the file") from error


def _load(image: PIL.Image.Image, path: Path, mode: str | None = None) -> PIL.Image.Image:
    try:
        image.load()
        return image if mode is None else image.convert(mode)
    except Exception as error:
        raise OSError(f"{path} is a damaged image ({error}); replace the file") from error
