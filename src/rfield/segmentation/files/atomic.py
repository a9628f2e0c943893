"""The one place that writes files: whole, or not at all."""

import csv
import errno
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:  # Text and JSON are written without torch.
    from torch import Tensor


@contextmanager
def atomic_path(path: Path, previous: Path | None = None, sync: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write a file to; rename it to `path` when the block ends.

    Until then the old file stays. The order is: write, fsync, rename, fsync of the folder. If the block raises, the
    temporary file is removed. Several processes may write the same file: the last one wins. Whatever is no regular
    file, such as /dev/stdout, is written directly.

    Args:
        path: the file to write.
        previous: where the old file is kept; None replaces it.
        sync: whether the file survives a power cut; False is faster for many files that can be made again.

    Raises:
        OSError: the file cannot be written, for example on a full disk; the message says what is left.
    """
    if path.exists() and not path.is_file():
        yield path
        return
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        yield partial
        if sync:
            with partial.open("rb") as file:
                os.fsync(file.fileno())
        if previous is not None and path.is_file():
            _keep(path, previous)
        os.replace(partial, path)
        if sync:
            sync_folder(path.parent)
    except OSError as error:
        partial.unlink(missing_ok=True)
        kept = "the file that was there is untouched" if path.exists() else "no file was there before"
        raise write_error(path, error, kept) from error
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_write(path: Path, previous: Path | None = None, sync: bool = True) -> Iterator[BinaryIO]:
    """Open a file to write in binary mode; it appears under its name when the block ends.

    Args, Raises: as for `atomic_path`.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "note.txt"
    >>> with atomic_write(path) as file:
    ...     _ = file.write(b"whole")
    >>> path.read_bytes(), [each.name for each in path.parent.iterdir()]
    (b'whole', ['note.txt'])
    """
    with atomic_path(path, previous, sync) as partial, partial.open("wb") as file:
        yield file


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8."""
    with atomic_write(path) as file:
        file.write(text.encode())


def write_json(path: Path, content: Any, allow_nan: bool = True) -> None:
    """Write a JSON file, indented, with each list of numbers on one line.

    Raises:
        ValueError: `content` holds a number that is not finite, and `allow_nan` is False.
    """
    text = json.dumps(content, indent=2, allow_nan=allow_nan)
    # Strings have no line breaks in JSON.
    text = re.sub(r"\[\n([-+.\w\s,]*)\]", lambda found: f"[{' '.join(found[1].split())}]", text)
    write_text(path, text + "\n")


def write_csv(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    """Write a CSV file."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    write_text(path, text.getvalue())


def write_weights(path: Path, state: Mapping[str, "Tensor"]) -> None:
    """Write tensors by name to a .safetensors file."""
    from safetensors.torch import save

    # Not save_file, whose files nobody else may read.
    with atomic_write(path) as file:
        file.write(save({key: value.contiguous() for key, value in state.items()}))


def write_error(path: Path, error: OSError, kept: str) -> OSError:
    """Return the error to raise where a file of a run cannot be written: what, why, what is left, what to do."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    advice = ": make room on the disk" + ", then go on (rfield train: with --resume)" * (
        path.suffix in (".ckpt", ".csv")
    )
    return OSError(f"{path} cannot be written: {error.strerror or error}; {kept}{advice if full else ''}")


def sync_folder(folder: Path) -> None:
    """Flush a folder, so that a rename in it survives a power cut."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _keep(path: Path, previous: Path) -> None:
    """Keep a file under another name, too, or move it there on file systems without links."""
    # A link first, so that there is a file under `path` at every moment.
    link = previous.with_name(f".{previous.stem}.partial{previous.suffix}")
    try:
        link.unlink(missing_ok=True)
        os.link(path, link)
    except OSError:
        os.replace(path, previous)
    else:
        os.replace(link, previous)
