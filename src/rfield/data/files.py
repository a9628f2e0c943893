"""Reading the files of a data set, with errors that name the file and say what to do."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import PIL.Image

from rfield.config import counted
from rfield.data.dataset import IGNORE_INDEX
from rfield.data.images import load_named, open_named, orientation, turn, turned_size_problem


def read_mask(path: Path, size: tuple[int, int], image: Path | None = None) -> npt.NDArray[np.uint8]:
    """The class indices in a palette or 8-bit grey image, uint8 [H, W].

    Args:
        path: the file.
        size: the (height, width) in px that it must have, its image's.
        image: the image's file, to explain another size by its EXIF orientation.

    Raises:
        OSError: if the file is not an image or a damaged one.
        ValueError: if it is of another kind or size.
    """
    wanted = "a mask must be a palette image ('P') or 8-bit grey ('L') whose values are class indices"
    return _read_values(path, size, ("P", "L"), wanted, image)


def read_grey(path: Path, size: tuple[int, int], image: Path | None = None) -> npt.NDArray[np.uint8]:
    """The values of an 8-bit grey image, uint8 [H, W]; arguments and errors as of `read_mask`."""
    return _read_values(path, size, ("L",), "a map must be 8-bit grey ('L')", image)


def check_labels(mask: npt.NDArray[np.uint8], num_classes: int, path: Path, advice: str) -> None:
    """Raises ValueError where a mask holds a value that is neither a class nor 255; `advice` says what to do."""
    wrong = mask[(mask >= num_classes) & (mask != IGNORE_INDEX)]
    if wrong.size:
        raise ValueError(
            f"{path} holds {wrong.size} px of the values {np.unique(wrong).tolist()}, but the data set has "
            f"{counted(num_classes, 'class')}, 0..{num_classes - 1}, and 255 for no label; {advice}"
        )


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


def has_few_bits(image: PIL.Image.Image) -> bool:
    """Whether it is grey of 1, 2 or 4 bits, whose values Pillow spreads over 0..255, other classes than meant."""
    return image.mode == "L" and image.format == "PNG" and any(tile[3] != "L" for tile in getattr(image, "tile", []))


def _read_values(
    path: Path, size: tuple[int, int], modes: tuple[str, ...], wanted: str, image: Path | None
) -> npt.NDArray[np.uint8]:
    with open_named(path) as file:
        few_bits = has_few_bits(file)
        if file.mode not in modes or few_bits:
            raise ValueError(
                f"{path} is of Pillow mode {file.mode!r}{' with less than 8 bits' if few_bits else ''}; {wanted}"
            )
        load_named(file, path)
        values: npt.NDArray[np.uint8] = turn(np.asarray(file), orientation(file, path))
    if values.shape != size:
        fix = None if image is None else turned_size_problem(image, values.shape, size)
        raise ValueError(
            f"{path} is {values.shape[0]}x{values.shape[1]} px (height x width) but its image is {size[0]}x{size[1]}"
            f"{fix or '; both must have one size'}"
        )
    return values
