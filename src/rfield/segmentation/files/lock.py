"""Locks on files, which end with the process that holds them."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let one process at a time in; the others wait."""
    with path.open("w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


_HELD: set[Path] = set()
"""The folders that this process writes to: a second lock of the same process would not be refused."""


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Make a folder where it is missing, and let one process write to it.

    Raises:
        BlockingIOError: another process writes to the folder; names that process.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> with only_writer(folder):
    ...     with only_writer(folder):
    ...         pass
    Traceback (most recent call last):
    BlockingIOError: ... is being written by process ...: wait until it has ended, or give another folder
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder.resolve() / ".lock"
    if path in _HELD:
        raise _busy(folder, str(os.getpid()))
    while True:
        with path.open("a+", encoding="utf-8") as file:
            try:
                # Not flock, which processes forked from this one keep.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise
                file.seek(0)
                raise _busy(folder, file.read() or "(not known)") from None
            if not path.exists() or os.fstat(file.fileno()).st_ino != path.stat().st_ino:
                continue  # Its owner has removed the file between our two calls.
            file.truncate(0)
            file.write(f"{os.getpid()} on {os.uname().nodename}")
            file.flush()
            _HELD.add(path)
            try:
                yield
            finally:
                _HELD.discard(path)
                path.unlink(missing_ok=True)
                if made:
                    with suppress(OSError):  # It is not empty.
                        folder.rmdir()
            return


def _busy(folder: Path, owner: str) -> BlockingIOError:
    return BlockingIOError(
        f"{folder} is being written by process {owner}: wait until it has ended, or give another folder"
    )
