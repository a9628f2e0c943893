"""The format of rfield's own files: checkpoints, fused runs, and folders of the Hub."""

import re
from pathlib import Path
from typing import Any

from rfield import __version__

FORMAT = 2
"""Raised when older files can no longer be read; files of rfield 0.1 hold no number."""


def file_format() -> dict[str, Any]:
    """Return what a file holds about its format: the number, and the version of rfield that wrote it."""
    return {"format": FORMAT, "version": __version__}


def check_format(written: dict[str, Any], path: Path) -> None:
    """Refuse a file of a version of rfield whose files cannot be read.

    Args:
        written: what the file holds about its format.
        path: the file, for the message.

    Raises:
        ValueError: the format is not `FORMAT`; the message names the version that wrote the file, and what to do.

    >>> check_format({}, Path("last.ckpt"))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: last.ckpt was written by rfield 0.1, whose files rfield ... cannot read: train again, or use rfield 0.1
    """
    found = written.get("format")
    if found == FORMAT:
        return
    version = re.sub(r"[^\w.+-]", "", str(written.get("version", "0.1")))[:20]  # A stranger may have written it.
    advice = f"train again, or use rfield {version}"
    if isinstance(found, int) and found > FORMAT:
        advice = "update it with pip install --upgrade rfield"
    raise ValueError(f"{path} was written by rfield {version}, whose files rfield {__version__} cannot read: {advice}")
