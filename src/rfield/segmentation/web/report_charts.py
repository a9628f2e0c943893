"""The charts of a report, as Vega-Lite specifications whose colours follow the page's scheme."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rfield.segmentation.plots.style import number
from rfield.segmentation.web.report_page import Chart, Table

MOST_LINES = 5
"""Lines in one chart; there are as many colours."""
_MOST_POINTS = 400
_CONFIG: dict[str, Any] = {
    "background": None,
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": {
        **{"labelColor": "var(--soft)", "titleColor": "var(--soft)", "labelFontSize": 12, "titleFontSize": 12},
        **{"titleFontWeight": "normal", "domainColor": "var(--line)", "tickColor": "var(--line)", "titlePadding": 8},
        **{"gridColor": "var(--grid)", "labelOverlap": True},
    },
    "legend": {
        **{"labelColor": "var(--ink)", "orient": "bottom", "title": None, "labelFontSize": 12, "symbolStrokeWidth": 2},
        **{"labelLimit": 260, "columns": 2},
    },
    "range": {"category": [f"var(--c{index})" for index in range(MOST_LINES)]},
    "text": {"color": "var(--ink)"},
}


@dataclass(frozen=True)
class Point:
    """A value that was read at a dilation, with the half width of its band, and values of single seeds."""

    dilation: float
    value: float
    error: float | None = None
    singles: Sequence[float] = ()


def curve_chart(
    caption: str,
    curves: Mapping[str, Sequence[Point]],
    label: str,
    marked: Mapping[str, float] | None = None,
    field: tuple[float, float] | None = None,
    band: str = "standard error",
) -> Chart:
    """Return values over the dilation: lines with bands, and vertical lines at marked dilations.

    Args:
        caption: what the chart shows.
        curves: by name, five at most.
        label: what the values are.
        marked: names to dilations.
        field: (slope, offset) of the receptive field in px over the dilation, for the tooltips and the table.
        band: what the bands are.
    """
    rows = _curve_rows(curves, field)
    places = [row["dilation"] for row in rows] + [*(marked or {}).values()]
    x = {
        **_number("dilation", "dilation [feature px], logarithmic"),
        "scale": {"type": "log", "domain": [min(places) / 1.06, max(places) * 1.06]},
        "axis": {"values": _ticks(places), "grid": False, "format": "~g"},
    }
    legend = {"symbolType": "stroke", "symbolOpacity": 1, "symbolStrokeWidth": 3} if len(curves) > 1 else None
    colour = {"field": "curve", "type": "nominal", "sort": None, "legend": legend}
    tips = [
        *([_tip("curve", "curve", "nominal")] if len(curves) > 1 else []),
        _tip("dilation", "dilation", format=".3~g"),
        *([_tip("field", "receptive field, px", format=".4~g")] if field else []),
        _tip("value", label, format=".4~f"),
        _tip("error", band, format=".2~g"),
    ]
    y = {**_number("value", label), "scale": {"zero": False}}
    line = {"type": "line", "strokeWidth": 2.2, "point": {"size": 55, "filled": True}}
    layers = [
        {
            "mark": {"type": "area", "opacity": 0.16, "tooltip": None},
            "encoding": {"y": {**_number("low", label), "scale": {"zero": False}}, "y2": {"field": "high"}},
        },
        {"mark": line, "encoding": {"y": y}},
        {
            "mark": {"type": "point", "filled": True, "size": 500, "opacity": 0},  # A larger place to hover over.
            "encoding": {"y": y, "tooltip": tips},
        },
    ]
    # What has tooltips is on top.
    shown: list[dict[str, Any]] = [
        *_marks(marked or {}, x),
        *_singles(curves, label, x),
        {"data": {"values": rows}, "encoding": {"x": x, "color": colour}, "layer": layers},
    ]
    return Chart(caption, _spec(caption, shown), _curve_values(rows, label, field is not None, band))


def _curve_rows(curves: Mapping[str, Sequence[Point]], field: tuple[float, float] | None) -> list[dict[str, Any]]:
    return [
        {
            "curve": name,
            "dilation": point.dilation,
            "value": point.value,
            "error": point.error,
            "low": point.value - (point.error or 0.0),
            "high": point.value + (point.error or 0.0),
            "field": None if field is None else round(field[0] * point.dilation + field[1], 1),
        }
        for name, points in list(curves.items())[:MOST_LINES]
        for point in sorted(points, key=lambda point: point.dilation)
    ]


def _curve_values(rows: Sequence[Mapping[str, Any]], label: str, has_field: bool, band: str) -> Table:
    header = ["curve", "dilation", *(["receptive field, px"] if has_field else []), label, band]
    table = [
        [
            *(row["curve"], number(row["dilation"])),
            *([f"{row['field']:.4g}"] if has_field else []),
            *(f"{row['value']:.4f}", "-" if row["error"] is None else f"{row['error']:.2g}"),
        ]
        for row in rows
    ]
    return Table("The values of this chart", header, table, folded=True)


def _marks(marked: Mapping[str, float], x: dict[str, Any]) -> list[dict[str, Any]]:
    """Return vertical lines with names above the plot."""
    if not marked:
        return []
    merged: dict[float, list[str]] = {}
    for name, dilation in marked.items():
        merged.setdefault(dilation, []).append(name)
    middle = math.sqrt(x["scale"]["domain"][0] * x["scale"]["domain"][1])
    found: list[dict[str, Any]] = []
    for place, (at, names) in enumerate(merged.items()):
        text = {"type": "text", "y": -8 - 16 * place, "fontSize": 12, "tooltip": None}
        text |= {"align": "right", "dx": 4} if at > middle else {"align": "left", "dx": -4}
        values = [{"dilation": at, "text": f"{' and '.join(names)}: {number(at)}"}]
        layers = [
            {"mark": {"type": "rule", "strokeDash": [5, 3], "color": "var(--soft)", "tooltip": None}},
            {"mark": text, "encoding": {"text": {"field": "text"}}},
        ]
        found.append({"data": {"values": values}, "encoding": {"x": x}, "layer": layers})
    return found


def _singles(curves: Mapping[str, Sequence[Point]], label: str, x: dict[str, Any]) -> list[dict[str, Any]]:
    rows = [
        {"curve": name, "dilation": point.dilation, "value": value}
        for name, points in list(curves.items())[:MOST_LINES]
        for point in points
        for value in (point.singles if len(point.singles) > 1 else ())
    ]
    if not rows:
        return []
    encoding = {
        "x": x,
        "y": {**_number("value", label), "scale": {"zero": False}},
        "color": {"field": "curve", "type": "nominal", "sort": None},
    }
    return [{"data": {"values": rows}, "mark": {"type": "point", "size": 22, "opacity": 0.7}, "encoding": encoding}]


def steps_chart(
    caption: str,
    lines: Mapping[str, tuple[npt.ArrayLike, npt.ArrayLike]],
    label: str,
    drawn_until: float | None = None,
    logarithmic: bool = True,
) -> Chart:
    """Return values over the steps: a line for each name, and points up to a step, since they were drawn at random.

    Long series are thinned to 400 steps, evenly.
    """
    rows = _step_rows(lines, drawn_until)
    legend = {"symbolType": "stroke", "symbolOpacity": 1, "symbolStrokeWidth": 3} if len(lines) > 1 else None
    colour = {"field": "line", "type": "nominal", "sort": None, "legend": legend}
    y: dict[str, Any] = {**_number("value", label), "scale": {"zero": False}}
    if logarithmic and rows:
        y["scale"] = {"type": "log", "nice": False, "padding": 8}
        y["axis"] = {"values": _ticks([row["value"] for row in rows]), "format": "~g"}
    tips = [
        *([_tip("line", "line", "nominal")] if len(lines) > 1 else []),
        *(_tip("step", "step", format="d"), _tip("value", label, format=".4~g")),
    ]
    encoding = {
        "x": {**_number("step", "step"), "axis": {"grid": False, "format": ",d", "tickMinStep": 1}},
        "y": y,
        "color": colour,
    }
    dots = {"mark": {"type": "point", "filled": True, "size": 16, "opacity": 0.55}, "encoding": {"tooltip": tips}}
    line = {"mark": {"type": "line", "strokeWidth": 2.2}}
    place = {"mark": {"type": "point", "filled": True, "size": 120, "opacity": 0}, "encoding": {"tooltip": tips}}
    shown = [
        {"data": {"values": mine}, "encoding": encoding, "layer": layers}
        for layers, wanted in (([dots], True), ([line, place], False))
        if (mine := [row for row in rows if row["drawn"] == wanted])
    ]
    ends = [
        [name, *(f"{each['value']:.4g}" for each in (found[0], found[-1])), f"{found[-1]['step']:.0f}"]
        for name in lines
        if (found := [row for row in rows if row["line"] == name])
    ]
    table = Table("First and last values of this chart", ["line", "first", "last", "last step"], ends, folded=True)
    return Chart(caption, _spec(caption, shown, height=240), table)


def _step_rows(
    lines: Mapping[str, tuple[npt.ArrayLike, npt.ArrayLike]], drawn_until: float | None
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for name, (steps, values) in list(lines.items())[:MOST_LINES]:
        step, value = np.asarray(steps, float), np.asarray(values, float)
        for index in np.unique(np.linspace(0, len(step) - 1, min(_MOST_POINTS, len(step))).round().astype(int)):
            if np.isfinite(value[index]):
                drawn = drawn_until is not None and bool(step[index] <= drawn_until)
                rows.append({"line": name, "step": step[index], "value": float(f"{value[index]:.5g}"), "drawn": drawn})
    return rows


def _spec(caption: str, layers: list[dict[str, Any]], height: int = 300) -> dict[str, Any]:
    return {
        "description": caption,
        "width": "container",
        "height": height,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "padding": {"left": 4, "right": 8, "top": 8, "bottom": 4},
        "config": _CONFIG,
        "layer": layers,
    }


def _number(field: str, title: str) -> dict[str, Any]:
    return {"field": field, "type": "quantitative", "title": title}


def _tip(field: str, title: str, kind: str = "quantitative", format: str | None = None) -> dict[str, Any]:
    return {"field": field, "title": title, "type": kind, **({"format": format} if format else {})}


def _ticks(values: Sequence[float]) -> list[float]:
    """Return ticks for a logarithmic axis: 1, 2, 3, 5, 7 of each decade, or the values themselves if they are few.

    >>> _ticks([2, 6, 14]), _ticks([*range(1, 30)]), _ticks([5.81, 5.82, 5.9, 6.1])
    ([2, 6, 14], [1.0, 2.0, 3.0, 5.0, 7.0, 10.0, 20.0], [5.81, 5.88, 5.96, 6.03, 6.1])
    """
    known = sorted({*values})
    if len(known) <= 8 and all(high / low > 1.09 for low, high in itertools.pairwise(known)):
        return known
    decades = range(math.floor(math.log10(known[0])), math.ceil(math.log10(known[-1])) + 1)
    ticks = [float(f"{lead * 10.0**decade:.6g}") for decade in decades for lead in (1, 2, 3, 5, 7)]
    inside = [tick for tick in ticks if known[0] <= tick <= known[-1]]
    if len(inside) > 2:
        return inside
    return sorted({float(f"{tick:.3g}") for tick in np.linspace(known[0], known[-1], 5)})
