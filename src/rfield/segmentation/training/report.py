"""The receptive field in a finished run's metrics, and the run's figures."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rfield.segmentation import plots
from rfield.segmentation.config.train import SearchOptions
from rfield.segmentation.files.checkpoints import LAST, read_checkpoint
from rfield.segmentation.files.untrusted import read_json
from rfield.segmentation.runs import read_factor_csv, read_paths_csv
from rfield.segmentation.training.fields import Field, first_dilated
from rfield.segmentation.training.search_report import describe_search

# Lines in one axes; there are as many colours.
_MOST_LINES = 5


def describe_fields(
    out: Path,
    options: SearchOptions,
    random_backbone: bool,
    fields: list[Field],
    held_out: Sequence[str],
    chances: Sequence[float],
) -> dict[str, Any]:
    """Return the part of a run's metrics that describes its receptive field, its paths, and its search.

    Args:
        out: the run folder.
        options: of the run's search.
        random_backbone: whether the backbone stays at random weights.
        fields: the receptive fields of the trained network.
        held_out: the names of the held-out images.
        chances: for each factor the held-out loss of predicting the classes' shares everywhere.
    """
    saved = read_checkpoint(out / "checkpoints" / LAST)
    search = saved.get("search", {}).get("search", {})
    left_out = search.get("left_out", ())
    kept = [path for path in range(len(fields) + len(left_out)) if path not in left_out]
    described = {**_numbers(first_dilated(fields)), **_describe_paths(out, options.rectangular, fields, search)}
    fields = [dataclasses.replace(field, path=kept[field.path]) for field in fields]
    if "search" in saved:
        described["search"] = describe_search(
            options.search, saved["search"], fields, held_out, chances, random_backbone
        )
    return described


def plot_results(out: Path, search: str, metrics: dict[str, Any], stride: int) -> None:
    """Draw the run's figures; `stride`: input px between neighbouring features."""
    field = 2.0 * stride, metrics["receptive_field_px"] - 2 * stride * metrics["effective_dilation"]
    found = metrics.get("search", {})
    drawn_until = found["steps"] if search == "sampled" else None
    columns = read_factor_csv(out / "factor.csv")
    figure = plots.factor_curve(
        columns["step"],
        columns["effective_dilation"],
        columns["receptive_field_px"],
        columns["loss"],
        drawn_until=drawn_until,
    )
    plots.save(figure, out / "factor.png")
    if (out / "paths.csv").is_file():
        lines = list(read_paths_csv(out / "paths.csv").items())
        groups = {
            lines[first][0]: dict(lines[first : first + _MOST_LINES]) for first in range(0, len(lines), _MOST_LINES)
        }
        titled = {"" if len(groups) == 1 else f"from {name} on": group for name, group in groups.items()}
        plots.save(plots.dilation_paths(titled, field, drawn_until), out / "paths.png")
    if search == "sampled":
        _plot_curves(out, found, metrics["effective_dilation"], field)
        if "sets" in found:
            kept = [path for path, rate in enumerate(found["sets"]["chosen"]["rates"]) if rate is not None]
            costs = [[row[path] for path in kept] for row in found["sets"]["class_costs"]]
            names = [
                f"path {number}\n" + each.get("branch", f"dilation {each['effective_dilation']:.3g}")
                for number, each in enumerate(metrics["paths"], 1)
            ]
            classes = read_json(out / "classes.json")["class_names"]
            plots.save(plots.class_paths(costs, classes, names), out / "class_paths.png")


def _plot_curves(out: Path, found: dict[str, Any], delivered: float, field: tuple[float, float]) -> None:
    """Draw the curves of a sampled search: each evaluation of one factor, or the last of each of several."""
    last = found.get("factors", [{"path": 0, "axis": "height", **found}])
    if len(last) == 1:
        curves = {f"step {reading['step']}": reading for reading in found["readings"][-_MOST_LINES:]}
        marked = {"delivered": delivered}
    else:
        axes = {each["axis"] for each in last}
        names = [f"path {each['path'] + 1}" + (f", {each['axis']}" if len(axes) > 1 else "") for each in last]
        curves = dict(zip(names, last[:_MOST_LINES], strict=False))
        marked = {f"{name} delivered": each["verdict"]["dilation"] for name, each in curves.items()}
    drawn = {name: {at: [loss] for at, loss in each["curve"]} for name, each in curves.items()}
    errors = {name: dict(each["errors"]) for name, each in curves.items()}
    plots.save(plots.rf_curve(drawn, "held-out loss", marked, field, errors=errors), out / "curve.png")


def _describe_paths(out: Path, rectangular: bool, fields: list[Field], search: dict[str, Any]) -> dict[str, Any]:
    """Return the paths of a head of several, and the rectangle if height and width are learned apart."""
    described: dict[str, Any] = {}
    heights = [field for field in fields if field.axis == 0]
    if len(heights) > 1 or search.get("left_out"):
        classes = read_json(out / "classes.json")
        groups = list(classes.get("class_groups", {}).items())
        served = _served_classes(search, classes["class_names"])
        described["paths"] = [
            {
                **_numbers(field),
                **({"branch": field.branch} if field.branch else {}),
                **({"serves": served[field.path]} if served else {}),
                "class_group": groups[field.path][1] if groups else None,
                "class_group_name": groups[field.path][0] if groups else None,
            }
            for field in heights
        ]
    if rectangular:
        described["rectangle"] = [{"path": f.path, "axis": ("height", "width")[f.axis], **_numbers(f)} for f in fields]
    return described


def _served_classes(search: dict[str, Any], class_names: Sequence[str]) -> list[list[str]]:
    """Return for each path that was kept the classes that would lose most by its removal; none without combinations."""
    if not search.get("set_readings"):
        return []
    costs = search["set_readings"][-1]["class_costs"]
    served: dict[int, list[str]] = {path: [] for path in range(len(costs[0])) if path not in search["left_out"]}
    for name, row in zip(class_names, costs, strict=True):
        known = {path: row[path] for path in served if row[path] is not None}
        if known:
            served[max(known, key=lambda path: known[path])].append(name)
    return list(served.values())


def _numbers(field: Field) -> dict[str, float | None]:
    return {
        "factor": field.factor,
        "effective_dilation": field.effective_dilation,
        "receptive_field_px": field.receptive_field_px if math.isfinite(field.receptive_field_px) else None,
    }
