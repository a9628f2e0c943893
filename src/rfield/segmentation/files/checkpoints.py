"""Files that survive a kill: whole or not at all, checked before use, and one kept behind the newest."""

import errno
import os
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from rfield.segmentation.files.untrusted import swells

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write that stands under its name once all of it is on the disk; until then what stood there stays.

    The order is: a temporary file beside it, fsync, rename, fsync of the folder.

    Raises:
        OSError: if it cannot be written, as on a full disk; it says that the file before it is untouched.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "note.txt"
    >>> with written_whole(path) as file:
    ...     _ = file.write(b"whole")
    >>> path.read_bytes(), [each.name for each in path.parent.iterdir()]
    (b'whole', ['note.txt'])
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if path.name == LAST:
            _keep_previous(path)
        os.replace(partial, path)
        _sync_folder(path.parent)
    except OSError as error:
        partial.unlink(missing_ok=True)
        kept = "what stood there before is untouched" if path.exists() else "nothing stood there before"
        raise write_error(path, error, kept) from error
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_error(path: Path, error: OSError, kept: str) -> OSError:
    """The error to raise where a file of a run cannot be written: what, why, what is left, what to do."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    advice = ": make room on the disk" + ", then go on (rfield train: with --resume)" * (
        path.suffix in (".ckpt", ".csv")
    )
    return OSError(f"{path} cannot be written: {error.strerror or error}; {kept}{advice if full else ''}")


def damage(path: Path) -> str | None:
    """What is wrong with the bytes of a checkpoint, or None.

    A checkpoint is a zip archive whose directory, at its end, holds the CRC-32 of every record. PyTorch writes these
    sums and does not look at them when it reads; here every record is read and compared. A file that was cut off has
    no directory, and any changed byte of a record changes its sum (of random damage one in 2^32 stays unseen). Bytes
    outside the records are not covered by a sum.
    """
    try:
        if swells(path):
            return "its records are larger than the file"
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except OSError as error:
        return error.strerror or str(error)
    except Exception as error:  # Damaged archives raise a dozen different types.
        return str(error) or type(error).__name__
    return None if bad is None else f"the checksum of its record {bad} does not fit"


def find_checkpoint(folder: Path, name: str = "last") -> Path:
    """The checkpoint to read in a folder of them, `last` or `best`.

    Where the last one is torn or missing, the one before is taken, and a line on stderr says so; if that is no better,
    the last one's path is given all the same.
    """
    path, previous = folder / f"{name}.ckpt", folder / PREVIOUS
    if name != "last" or not previous.is_file():
        return path
    wrong = damage(path) if path.is_file() else "it is missing"
    if wrong is None or damage(previous) is not None:
        return path
    print(f"note: {path} cannot be used ({wrong}); the checkpoint before it is used, {previous.name}", file=sys.stderr)
    return previous


def settle_checkpoints(folder: Path) -> Path | None:
    """Makes the newest whole checkpoint the last one again, and removes what a kill has left half written.

    Returns:
        The last checkpoint, or None if there is none yet.
    """
    for partial in folder.glob("*.partial"):
        partial.unlink()
    last = folder / LAST
    found = find_checkpoint(folder)
    if found != last:
        os.replace(found, last)
        _sync_folder(folder)
    return last if last.is_file() else None


def _keep_previous(path: Path) -> None:
    # A link first, so that there is a last checkpoint at every moment; some file systems have none.
    if not path.is_file():
        return
    previous = path.with_name(PREVIOUS)
    link = path.with_name(f"{PREVIOUS}.partial")
    try:
        link.unlink(missing_ok=True)
        os.link(path, link)
    except OSError:
        os.replace(path, previous)
    else:
        os.replace(link, previous)


def _sync_folder(folder: Path) -> None:
    """Has a rename survive a power cut."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
