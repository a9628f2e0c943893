"""What a run folder holds for its report, finished or not."""

import csv
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rfield.segmentation.config.train import TrainConfig
from rfield.segmentation.files.checkpoints import LAST, read_checkpoint
from rfield.segmentation.files.untrusted import read_json
from rfield.segmentation.plots.style import number
from rfield.segmentation.runs import Run, load_config, load_run, read_classes
from rfield.segmentation.web.report_page import Box
from rfield.text import counted

_AXES = ("height", "width")


@dataclass(frozen=True)
class Baseline:
    """A fixed run to compare with."""

    name: str
    path: Path
    metrics: dict[str, Any]


@dataclass(frozen=True)
class Folder:
    """What a run folder holds; what is missing is None or empty, and `notes` say why."""

    path: Path
    config: TrainConfig
    class_names: tuple[str, ...]
    metrics: dict[str, Any] | None
    search: dict[str, Any]
    """The search of the metrics, or the readings so far of a run that goes on."""
    run: Run | None
    notes: tuple[str, ...]

    @property
    def start(self) -> float | None:
        """Return the effective dilation at which the search started; None without a search."""
        config = self.config
        return None if config.search.search == "none" else config.model.dilation / config.search.factor

    @property
    def field(self) -> tuple[float, float] | None:
        """Return (slope, offset) of the receptive field in px over the dilation, if it is known."""
        if self.run is None or self.metrics is None:
            return None
        slope = 2.0 * self.run.network.stride
        return slope, self.metrics["receptive_field_px"] - slope * self.metrics["effective_dilation"]

    @property
    def validations(self) -> tuple[list[float], list[float]]:
        """Return the steps and mIoUs that the CSV logger has written; none without it."""
        steps, scores = [], []
        for path in sorted(self.path.glob("logs/csv/*/metrics.csv")):
            with path.open(newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    if row.get("miou") and row.get("step"):
                        steps.append(float(row["step"]))
                        scores.append(float(row["miou"]))
        return steps, scores


def read_folder(path: Path) -> Folder:
    """Read a run folder, finished or not.

    Raises:
        FileNotFoundError, ValueError: its config, classes or metrics are missing or damaged.
    """
    config = load_config(path / "config.yaml")
    class_names, _, _ = read_classes(read_json(path / "classes.json"), path / "classes.json")
    metrics = read_json(path / "metrics.json") if (path / "metrics.json").is_file() else None
    search: dict[str, Any] = (metrics or {}).get("search", {})
    notes = []
    if metrics is None:
        said, search = _how_far(path, config)
        notes.append(said)
    try:
        run = load_run(path)
    except (ValueError, OSError) as error:
        run = None
        if metrics is not None or not isinstance(error, FileNotFoundError):
            notes.append(f"The network cannot be opened, so that no image is labelled: {error}.")
    return Folder(path, config, class_names, metrics, search, run, tuple(notes))


def _how_far(path: Path, config: TrainConfig) -> tuple[str, dict[str, Any]]:
    """Return how much of a run is done, and what its search has read."""
    last = path / "checkpoints" / LAST
    if (path / "fused.json").is_file():
        return "This folder holds a fused network without the results of its training.", {}
    total = counted(config.optim.epochs, "epoch")
    if not last.is_file():
        return f"The run is not finished: nothing of its {total} is saved yet.", {}
    saved = read_checkpoint(last)
    said = f"The run is not finished: {int(saved['epoch']) + 1} of {total} are saved, and there are no scores yet."
    readings = saved.get("search", {}).get("search", {}).get("readings", {})
    factors = [
        {
            "path": path,
            "axis": _AXES[axis],
            "readings": [{"step": step, "curve": [*curve.items()], "errors": []} for step, curve in found],
        }
        for (path, axis), found in readings.items()
        if found
    ]
    return said, {"factors": factors} if factors else {}


def find_baseline(folder: Folder) -> Baseline | None:
    """Return a run to compare with: of the same seed, and fixed at the dilation where the search started.

    It is the folder `before` of a demo, or stands beside the run in the folder of a sweep or of `tune --verify`.
    """
    own = folder.config
    if own.search.search == "none":
        return None
    for path in [folder.path / "before", *sorted(folder.path.resolve().parent.glob("d*-seed*"))]:
        if not (path / "metrics.json").is_file():
            continue
        other = load_config(path / "config.yaml")
        same = (other.run.seed, other.model.dilation) == (own.run.seed, own.model.dilation)
        if other.search.search == "none" and same:
            return Baseline(f"fixed at dilation {other.model.dilation}", path, read_json(path / "metrics.json"))
    return None


def field_boxes(folder: Folder) -> list[Box]:
    """Return the receptive fields at the start and now, as boxes."""
    metrics = folder.metrics
    if metrics is None or folder.run is None:
        return []
    if "rectangle" in metrics:
        known = metrics["rectangle"]
        boxes = _rectangles(known)
    elif "paths" in metrics:
        known = metrics["paths"]
        boxes = [
            _square(f"path {path}", each, 1 + (path - 1) % 4)
            for path, each in enumerate(known, 1)
            if each["receptive_field_px"] and each["effective_dilation"]
        ]
    else:
        known = [metrics]
        fixed = "at most" if "gates" in metrics else "fixed"
        boxes = [_square(fixed if folder.start is None else "learned", metrics, 1)]
    first = next((each for each in known if each["effective_dilation"]), None)
    if folder.start is None or first is None or math.isclose(folder.start, first["effective_dilation"]):
        return boxes
    side = first["receptive_field_px"] + 2 * folder.run.network.stride * (folder.start - first["effective_dilation"])
    if side <= 0:
        return boxes
    return [_square("start", {"effective_dilation": folder.start, "receptive_field_px": side}, 0), *boxes]


def _square(name: str, found: dict[str, Any], colour: int) -> Box:
    side = found["receptive_field_px"]
    return Box(f"{name}: dilation {number(found['effective_dilation'])}, {side:.0f} px", side, side, colour)


def _rectangles(known: list[dict[str, Any]]) -> list[Box]:
    sides: dict[int, dict[str, float]] = {}
    for each in known:
        sides.setdefault(each["path"], {})[each["axis"]] = each["receptive_field_px"]
    return [
        Box(
            f"path {path + 1}: {axes['height']:.0f}x{axes['width']:.0f} px", axes["height"], axes["width"], 1 + path % 4
        )
        for path, axes in sides.items()
        if axes["height"] and axes["width"]
    ]
