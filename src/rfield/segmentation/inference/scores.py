"""Choose the file of a network's scores, and keep other scores in it."""

import sys
from pathlib import Path
from typing import Any

from rfield.segmentation.files.untrusted import read_json


def scores_path(given: str | None, default: Path, about: dict[str, str]) -> Path:
    """Return the path for scores. Replace those of another data set or model only if the path is given, with a note.

    Scores of another checkpoint, or of other files at the same place, are replaced with a note.

    Args:
        given: the path that the user gave, if any.
        default: the path otherwise.
        about: the model, data and checkpoint of the scores, as the file holds them.

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
    """Return whether two texts name the same thing, even if their paths are spelled differently."""
    (kind, _, path), (other_kind, _, other_path) = (str(text).rpartition(":") for text in (one, other))
    return one == other or (
        kind == other_kind and Path(path).expanduser().resolve() == Path(other_path).expanduser().resolve()
    )
