"""Read the files of a data set, with errors that name the file and say what to do."""

import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rfield.segmentation.conventions import IGNORE_INDEX
from rfield.segmentation.data.paths import near_miss
from rfield.text import counted


def fingerprint_of(root: Path, paths: Sequence[Path], *facts: object) -> str:
    """Return a hexadecimal hash of the facts, and of every file's name in the root, its size and time of change."""
    digest = hashlib.sha256(repr(facts).encode())
    for path in paths:
        state = path.stat()
        digest.update(repr((str(path.relative_to(root)), state.st_size, state.st_mtime_ns)).encode())
    return digest.hexdigest()


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file that are not empty, without surrounding blanks.

    Raises:
        ValueError: if it is not text in UTF-8.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 ({error}); save it in UTF-8") from error
    return [line.strip() for line in lines if line.strip()]


def list_names(folder: Path) -> list[str]:
    """Return the names of the lists `NAME.txt` in a folder, sorted, without dot files."""
    return sorted(path.stem for path in folder.glob("*.txt") if not path.name.startswith("."))


def read_class_names(path: Path, default: tuple[str, ...]) -> tuple[str, ...]:
    """Read class names from a file, one a line. Return `default` if there is no such file.

    Raises:
        ValueError: if there are none, more than 255, or one occurs twice.
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


def check_files(
    paths: Sequence[Path], what: str, kind: str = "files", fix: str = "add the file or remove its line from the list"
) -> None:
    """Raise FileNotFoundError for the first missing file; `what` says whose files they are."""
    missing = [path for path in paths if not path.is_file()]
    if missing:
        found = f"({len(missing)} of the {len(paths)} {kind} of {what}){near_miss(missing[0])}"
        raise FileNotFoundError(f"{missing[0]} is missing {found}; {fix}")


def draw_names(names: Sequence[str], share: float, seed: int = 0) -> set[str]:
    """Return a share of different names, at least one; the same ones on every machine and in every release.

    >>> sorted(draw_names(["a", "b", "c", "d"], 0.5)), sorted(draw_names(["a", "b", "c", "d"], 0.5, seed=1))
    (['a', 'b'], ['a', 'c'])
    """
    count = min(max(round(share * len(names)), 1), len(names) - 1)
    return {*sorted(names, key=lambda name: hashlib.sha256(f"{seed} {name}".encode(errors="replace")).digest())[:count]}


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield a folder to fill; it becomes `target` when the block ends, and is removed if the block raises.

    Raises:
        FileExistsError: the target exists.
    """
    if os.path.lexists(target):
        raise FileExistsError(f"{target} exists; name a folder that does not, or remove it")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}") as scratch:
        made = Path(scratch) / target.name
        made.mkdir()
        yield made
        made.rename(target)
