"""The held-out curves of a run, as its folder keeps them."""

from pathlib import Path
from typing import Any

from rfield.segmentation.files.untrusted import read_json

Curve = list[tuple[float, float, float | None]]
"""Points (dilation, held-out loss, standard error of the difference to the best or None)."""


def read_curves(folder: Path) -> dict[int, Curve]:
    """Return the curve of each path along the height, by the path's index; {} if the run has read none.

    A search reads its curve several times, at fewer dilations each time. The last reading of at least three points is
    taken, or else the widest.
    """
    try:
        search = read_json(folder / "metrics.json")["search"]
        factors = search.get("factors", [{"path": 0, "axis": "height", **search}])
        return {
            int(each["path"]): _reading(each) for each in factors if each["axis"] == "height" and "readings" in each
        }
    except (OSError, AttributeError, KeyError, TypeError, ValueError):
        return {}


def _reading(factor: dict[str, Any]) -> Curve:
    readings = factor["readings"]
    enough = min(3, max(len(reading["curve"]) for reading in readings))
    reading = [each for each in readings if len(each["curve"]) >= enough][-1]
    errors = dict(map(tuple, reading["errors"]))
    return sorted((float(at), float(loss), errors.get(at)) for at, loss in reading["curve"])
