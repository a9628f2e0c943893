"""Checkpoints: checked before use, and the one before the last is kept."""

import os
import sys
import zipfile
from pathlib import Path
from typing import Any

from rfield.segmentation.files.atomic import atomic_write, sync_folder
from rfield.segmentation.files.format import check_format
from rfield.segmentation.files.untrusted import is_zip_bomb

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"


def write_checkpoint(path: Path, content: bytes | memoryview) -> None:
    """Write a checkpoint, whole or not at all; the last one's predecessor is kept as `previous.ckpt`.

    Raises:
        OSError: the file cannot be written, see `atomic_path`.
    """
    with atomic_write(path, path.with_name(PREVIOUS) if path.name == LAST else None) as file:
        file.write(content)


def checkpoint_error(path: Path) -> str | None:
    """Return what is wrong with the bytes of a checkpoint, or None.

    A checkpoint is a zip archive whose directory, at its end, holds the CRC-32 of every record. PyTorch writes these
    checksums but does not check them; this function reads every record and compares. A file that was cut off has no
    directory, and a changed byte of a record changes its checksum (random damage goes unseen once in 2^32 times).
    Bytes outside the records have no checksum.
    """
    try:
        if is_zip_bomb(path):
            return "its records are larger than the file"
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except OSError as error:
        return error.strerror or str(error)
    except Exception as error:  # Damaged archives raise a dozen different types.
        return str(error) or type(error).__name__
    return None if bad is None else f"the checksum of its record {bad} does not match"


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return what a checkpoint holds: `state_dict`, `rfield` (see `describe_network`), and the state of the training.

    Raises:
        ValueError: it is damaged or no checkpoint, or another version of rfield wrote it.
    """
    import torch

    wrong = checkpoint_error(path)
    if wrong is not None:
        raise ValueError(f"{path} is damaged or not a checkpoint of this run: {wrong}")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # Damaged files raise a dozen different types.
        raise ValueError(f"{path} is damaged or not a checkpoint of this run: {error}") from error
    described = saved.get("rfield", {}) if isinstance(saved, dict) and "state_dict" in saved else None
    if not isinstance(described, dict):
        raise ValueError(f"{path} is damaged or not a checkpoint of this run: it has no state_dict")
    check_format(described, path)
    return dict(saved)


def find_checkpoint(folder: Path, name: str = "last") -> Path:
    """Return the path of the checkpoint to read, `last` or `best`.

    If the last one is damaged or missing, the one before it is used, and a line on stderr says so. If that one is
    damaged too, the last one's path is returned.
    """
    path, previous = folder / f"{name}.ckpt", folder / PREVIOUS
    if name != "last" or not previous.is_file():
        return path
    wrong = checkpoint_error(path) if path.is_file() else "it is missing"
    if wrong is None or checkpoint_error(previous) is not None:
        return path
    print(f"note: {path} cannot be used ({wrong}); the checkpoint before it is used, {previous.name}", file=sys.stderr)
    return previous


def settle_checkpoints(folder: Path) -> Path | None:
    """Make the newest undamaged checkpoint the last one, and remove unfinished files that a kill has left.

    Returns:
        The last checkpoint, or None if there is none yet.
    """
    for partial in folder.glob(".*.partial.*"):
        partial.unlink()
    last = folder / LAST
    found = find_checkpoint(folder)
    if found != last:
        os.replace(found, last)
        sync_folder(folder)
    return last if last.is_file() else None
