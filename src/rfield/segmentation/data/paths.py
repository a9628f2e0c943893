"""Find the files of a data set by name, and never outside of its root."""

import difflib
import os
import re
import unicodedata
from pathlib import Path

from rfield.segmentation.data.images import IMAGE_SUFFIXES, image_files

_MOST_SHOWN = 5
_ALIKE = 0.7  # difflib's ratio


class Folders:
    """Find files by their names without a suffix. Every folder is read once."""

    def __init__(self) -> None:
        self._names: dict[Path, dict[str, list[str]]] = {}

    def find(self, path: Path) -> Path:
        """Return the file or, if it is missing, the only image of its name with another suffix (`.PNG`, `.tif`).

        Returns:
            `path` itself if there is no such file.

        Raises:
            ValueError: if there are several.
        """
        if path.is_file():
            return path
        names = self._stems(path.parent).get(path.stem, [])
        if len(names) > 1:
            listed = " and ".join(sorted(names))
            raise ValueError(f"{path} is missing, and {listed} have its name; remove all but one of them")
        return path.with_name(names[0]) if names else path

    def _stems(self, folder: Path) -> dict[str, list[str]]:
        if folder not in self._names:
            stems: dict[str, list[str]] = {}
            for path in image_files(folder) if folder.is_dir() else ():
                stems.setdefault(path.stem, []).append(path.name)
            self._names[folder] = stems
        return self._names[folder]


def subfolders(folder: Path) -> list[Path]:
    """Return the folders in a folder, sorted, without dot files; [] if the folder is missing."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in found if path.is_dir() and not path.name.startswith("."))


def mask_ending(suffix: str) -> str:
    """Return what follows an image's name in its mask's name: the suffix, with .png if it has no file suffix.

    >>> mask_ending("_mask"), mask_ending("_mask.tif")
    ('_mask.png', '_mask.tif')
    """
    return suffix if suffix.lower().endswith(IMAGE_SUFFIXES) else f"{suffix}.png"


def sample_path(root: Path, folder: str, name: str, suffix: str, listed_in: str, folders: Folders) -> Path:
    """Return `root/folder/name` with the suffix, or with another image suffix (see `Folders.find`).

    The folder itself may be a link to another place; a sample may not.

    Raises:
        ValueError: if the file would be outside; names `listed_in`, where the name was read.
    """
    path = root / folder / f"{name}{suffix}"
    # A plain name can leave the folder only as a link; resolving every path is slow.
    plain = not {"/", os.sep} & {*name, *suffix} and name not in ("", ".", "..")

    def inside(path: Path) -> Path:
        if (not plain or path.is_symlink()) and not is_inside(path, root, root / folder):
            raise ValueError(f"{listed_in} names {name!r}, a file outside {root}; remove that line")
        return path

    return inside(folders.find(inside(path)))


def is_inside(path: Path, *folders: Path) -> bool:
    """Return whether a file, with all links resolved, is in one of the folders. The folders may be links."""
    try:
        resolved = path.resolve()
        return any(resolved.is_relative_to(folder.resolve()) for folder in folders)
    except (OSError, RuntimeError, ValueError):  # such as a link to itself, or a name with a zero byte
        return False


class NearMisses:
    """Find similar names of missing files. Every folder is read once."""

    def __init__(self) -> None:
        self._folders: dict[Path, _Names] = {}

    def of(self, path: Path) -> str:
        """Return what may be meant by a missing file, as the end of the error, or ""."""
        folder, stem = path.parent, path.stem
        if folder not in self._folders and folder.is_dir():
            self._folders[folder] = _Names(folder)
        if folder not in self._folders:
            others = [other.name for other in subfolders(folder.parent)]
            close = [f"one named {name}" for name in difflib.get_close_matches(folder.name, others, 1)]
            there = close or [f"there is {', '.join(others[:_MOST_SHOWN])}"] if others else []
            return f" (there is no folder {folder}{''.join(f', but {words}' for words in there)})"
        names = self._folders[folder]
        if stem in names.whole:
            return f" (there is {stem}: give the name without its suffix)"
        if other := next((other for other in names.same.get(_same(stem), ()) if other.stem != stem), None):
            return f" (there is {other.name}, whose name is spelled differently: rename it)"
        if other := names.longer.get(stem):
            after = other.stem.removeprefix(stem)
            return f" (there is {other.name}: if that is the mask, give `mask_suffix: {after}` in a data config)"
        if other := names.after.get(stem):
            return f" (there is {other.name}: if that is meant, rename it)"
        alike = [other for other in names.numbered.get(_numbers(stem), ()) if other.stem != stem]
        close = difflib.get_close_matches(stem, [other.stem for other in alike], 1, _ALIKE)
        return next(
            (f" (there is {other.name}, which has a similar name)" for other in alike if other.stem in close), ""
        )


class _Names:
    """The images of a folder, by the names that they may be mistaken for."""

    def __init__(self, folder: Path) -> None:
        self.whole: set[str] = set()
        self.same: dict[str, list[Path]] = {}
        self.longer: dict[str, Path] = {}
        self.after: dict[str, Path] = {}
        self.numbered: dict[tuple[str, ...], list[Path]] = {}
        for path in image_files(folder):
            self.whole.add(path.name)
            self.same.setdefault(_same(path.stem), []).append(path)
            for gap in re.finditer(r"[\W_]", path.stem):
                self.longer.setdefault(path.stem[: gap.start()], path)
                self.after.setdefault(path.stem[gap.end() :], path)
            if _numbers(path.stem)[1:]:
                self.numbered.setdefault(_numbers(path.stem), []).append(path)


def near_miss(path: Path) -> str:
    """Return what may be meant by one missing file, see `NearMisses.of`."""
    return NearMisses().of(path)


def _numbers(stem: str) -> tuple[str, ...]:
    """Return the start of a name, and the numbers in it."""
    return (stem[:2], *re.findall(r"\d+", stem))


def _same(name: str) -> str:
    """Normalise the spelling of a name: case, Unicode form, leading zeros, separators."""
    plain = unicodedata.normalize("NFC", name).casefold()
    return re.sub(r"(?<!\d)0+(?=\d)", "", re.sub(r"[-_\s]+", "_", plain))
