"""Reading the files of a data set, with errors that name the file and say what to do."""

import difflib
import hashlib
import os
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from rfield.config import counted
from rfield.data.dataset import IGNORE_INDEX
from rfield.data.images import IMAGE_SUFFIXES, image_files


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


class Folders:
    """Finds files by their names without a suffix; every folder is read once."""

    def __init__(self) -> None:
        self._names: dict[Path, dict[str, list[str]]] = {}

    def find(self, path: Path) -> Path:
        """The file, or if there is none the one image there of the same name with another suffix (`.PNG`, `.tif`).

        Returns:
            `path` itself where there is no such file.

        Raises:
            ValueError: if there are several.
        """
        if path.is_file():
            return path
        names = self._stems(path.parent).get(path.stem, [])
        if len(names) > 1:
            listed = " and ".join(sorted(names))
            raise ValueError(f"{path} is missing, and {listed} there have its name; remove all but one of them")
        return path.with_name(names[0]) if names else path

    def _stems(self, folder: Path) -> dict[str, list[str]]:
        if folder not in self._names:
            stems: dict[str, list[str]] = {}
            for path in image_files(folder) if folder.is_dir() else ():
                stems.setdefault(path.stem, []).append(path.name)
            self._names[folder] = stems
        return self._names[folder]


def mask_ending(suffix: str) -> str:
    """The end of a mask's name, behind that of its image: the suffix, and .png where it has no ending of its own.

    >>> mask_ending("_mask"), mask_ending("_mask.tif")
    ('_mask.png', '_mask.tif')
    """
    return suffix if suffix.lower().endswith(IMAGE_SUFFIXES) else f"{suffix}.png"


def sample_path(root: Path, folder: str, name: str, suffix: str, listed_in: str, folders: Folders) -> Path:
    """`root/folder/name` with the suffix, or with that of another image; see `Folders.find`.

    The folder itself may be a link to elsewhere, a sample may not.

    Raises:
        ValueError: if the file would lie elsewhere; names `listed_in`, where the name was read.
    """
    path = root / folder / f"{name}{suffix}"
    # A file right in the folder leaves it as a link alone; following every path takes long.
    plain = not {"/", os.sep} & {*name, *suffix} and name not in ("", ".", "..")

    def inside(path: Path) -> Path:
        if (not plain or path.is_symlink()) and not lies_in(path, root, root / folder):
            raise ValueError(f"{listed_in} names {name!r}, a file outside {root}; remove that line")
        return path

    return inside(folders.find(inside(path)))


def lies_in(path: Path, *folders: Path) -> bool:
    """Whether a file, all links followed, is in one of the folders, which may be links themselves."""
    try:
        resolved = path.resolve()
        return any(resolved.is_relative_to(folder.resolve()) for folder in folders)
    except (OSError, RuntimeError, ValueError):  # a link to itself, a name with a zero byte
        return False


def near_miss(path: Path) -> str:
    """What lies where a missing file was looked for and may be meant, in words that go on the error; else nothing."""
    folder = path.parent
    if not folder.is_dir():
        others = [other.name for other in folder.parent.iterdir() if other.is_dir()] if folder.parent.is_dir() else []
        close = difflib.get_close_matches(folder.name, others, 1)
        return f" (there is no folder {folder}{f', but one named {close[0]}' if close else ''})"
    stem = path.stem
    for other in image_files(folder):
        if other.name == stem:
            return f" (there is {stem}: name it without its ending)"
        if other.stem != stem and _same(other.stem) == _same(stem):
            return f" (there is {other.name}, whose name is written otherwise: rename it)"
        before, found, after = other.stem.partition(stem)
        if found and not before and not after[:1].isalnum():
            return f" (there is {other.name}: if that is the mask, give `mask_suffix: {after}` in a data config)"
        if found and not after and not before[-1:].isalnum():
            return f" (there is {other.name}: if that is meant, rename it)"
    return ""


def _same(name: str) -> str:
    """A name without what is easily written in another way: case, Unicode form, leading zeros, kinds of gaps."""
    plain = unicodedata.normalize("NFC", name).casefold()
    return re.sub(r"(?<!\d)0+(?=\d)", "", re.sub(r"[-_\s]+", "_", plain))


def check_files(
    paths: Sequence[Path], what: str, kind: str = "files", fix: str = "add the file or remove its line from the list"
) -> None:
    """Raises FileNotFoundError for the first that is missing; `what` says whose files they are."""
    missing = [path for path in paths if not path.is_file()]
    if missing:
        found = f"({len(missing)} of the {len(paths)} {kind} of {what}){near_miss(missing[0])}"
        raise FileNotFoundError(f"{missing[0]} is missing {found}; {fix}")
