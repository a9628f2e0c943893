"""Where a network's scores on a data set are written."""

import sys
from pathlib import Path
from typing import Any

from rfield.segmentation.files.untrusted import read_json


def scores_path(given: str | None, default: Path, about: dict[str, str]) -> Path:
    """Where scores go: those of another data set or model are replaced only where the path is given, with a word.

    Those of another checkpoint, or of other files at the same place, are replaced with a word.

    Args:
        given: the path that was asked for, if one was.
        default: the path otherwise.
        about: what the scores are of, as the file holds it beside them.

    Raises:
        ValueError: if the default path holds other scores.
    """
    path = Path(given or default)
    if not path.is_file():
        return path
    try:
        earlier = read_json(path)
        known = {"data": None, **earlier}
        others = {
            key: "other files" if key == "files" else f"{key} {known[key]}"
            for key in about
            if key in known and not _is_same(known[key], about[key])
        }
        if len(others) > 1:
            others.pop("files", None)
    except (TypeError, ValueError):
        others = {"": "something else"}
    if given is None and set(others) - {"checkpoint", "files"}:
        raise ValueError(
            f"{path} holds the scores of {', '.join(others.values())}: give --json FILE for those of {about['data']}"
        )
    if others:
        print(f"note: {path} held the scores of {', '.join(others.values())}, which are replaced", file=sys.stderr)
    return path


def _is_same(one: Any, other: str) -> bool:
    """Whether two texts name one thing, their paths written alike or not."""
    (kind, _, path), (other_kind, _, other_path) = (str(text).rpartition(":") for text in (one, other))
    return one == other or (
        kind == other_kind and Path(path).expanduser().resolve() == Path(other_path).expanduser().resolve()
    )
