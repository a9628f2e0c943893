"""Draw a value over the receptive field, and the factors of several runs over the steps."""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator

from rfield.segmentation.plots.style import (
    DASHES,
    FIELD_COLOURS,
    INK,
    LEGEND,
    check_curves,
    checked_series,
    draw_steps,
    number,
    plain_axes,
    soften,
    step_axis,
)

_LEAST_GAP = 0.045  # between the labels of two dilations, as a share of the axis


def rf_curve(
    curves: Mapping[str, Mapping[float, Sequence[float]]],
    label: str,
    marked: Mapping[str, float] | None = None,
    field: tuple[float, float] | None = None,
    errors: Mapping[str, Mapping[float, float | None]] | None = None,
) -> Figure:
    """Draw a loss or a score over the dilation (logarithmic): every value, the means, and their spread.

    Args:
        curves: one to five names to curves, each {dilation in feature px: its values, one a seed}. A band of one
            standard deviation to either side is drawn where every dilation has two values or more.
        label: what the values are.
        marked: names to dilations in feature px that are marked by vertical lines, five at most.
        field: (slope, offset) of the receptive field in input px over the dilation, for an axis at the top.
        errors: names of curves to {dilation: the standard error of its difference to the best}, drawn as bars around
            the means; none where it is None.

    Raises:
        ValueError: if there are no curves or more than five, a curve or a dilation without values, values that are
            not finite, more than five marks, or dilations not above 0.

    Example:
        >>> figure = rf_curve({"fixed": {2: [0.69], 6: [0.72, 0.71]}}, "mIoU", {"best": 6}, field=(16, 212))
        >>> figure.axes[0].get_xscale(), figure.axes[0].get_ylabel()
        ('log', 'mIoU')
    """
    marked = marked or {}
    if not 1 <= len(curves) <= len(FIELD_COLOURS) or len(marked) > len(FIELD_COLOURS):
        raise ValueError(f"1 to {len(FIELD_COLOURS)} curves can be drawn and as many marks, got {len(curves)} curves")
    for name, curve in curves.items():
        if not curve or not all(len(values) and np.isfinite(values).all() for values in curve.values()):
            raise ValueError(f"every dilation of curve {name!r} must have finite values, got {dict(curve)}")
    dilations = sorted({float(dilation) for curve in curves.values() for dilation in curve})
    if not all(0 < dilation < np.inf for dilation in (*dilations, *marked.values())):
        raise ValueError(f"dilations must be above 0, got {dilations} and the marks {dict(marked)}")

    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.subplots()
    plain_axes(axes, label)
    axes.set_xscale("log")
    axes.set_xlabel("dilation [feature px]")
    for (name, curve), colour in zip(curves.items(), FIELD_COLOURS, strict=False):
        _draw_curve(axes, name, curve, colour, (errors or {}).get(name, {}))
    low, high = axes.get_ylim()
    rows = 0.075 * len(marked)  # above all values, so that no text stands on a line
    axes.set_ylim(low, high + (high - low) * rows / (1 - rows))
    _label_dilations(axes, dilations, field)
    middle = np.sqrt(np.prod(axes.get_xlim()))
    for place, (name, dilation) in enumerate(marked.items()):
        axes.axvline(dilation, color=INK, linewidth=1.3, linestyle=(3 * place, DASHES[1]), zorder=1.5)
        side, offset = ("left", 5) if dilation <= middle else ("right", -5)
        axes.annotate(
            f"{name}  {number(dilation)}",
            (dilation, 0.99 - 0.075 * place),
            (offset, 0),
            xycoords=axes.get_xaxis_transform(),
            textcoords="offset points",
            color=INK,
            va="top",
            ha=side,
            fontsize=9.5,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )
    if len(curves) > 1:
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), **LEGEND)
    return figure


def _draw_curve(
    axes: Axes,
    name: str,
    curve: Mapping[float, Sequence[float]],
    colour: str,
    errors: Mapping[float, float | None],
) -> None:
    """Draw the values of one curve, their means, their spread and their standard errors."""
    dilations = sorted(curve)
    means = np.array([np.mean(curve[dilation]) for dilation in dilations])
    if all(len(curve[dilation]) > 1 for dilation in dilations):
        spread = np.array([np.std(curve[dilation], ddof=1) for dilation in dilations])
        axes.fill_between(dilations, means - spread, means + spread, color=colour, alpha=0.15, linewidth=0)
    for dilation in dilations:
        values = curve[dilation]
        axes.plot([dilation] * len(values), values, "o", color=colour, markersize=3.5, alpha=0.55)
    axes.plot(dilations, means, "o-", color=colour, linewidth=2, markersize=6, label=name)
    bars = [errors.get(dilation) or 0.0 for dilation in dilations]
    if any(bars):
        axes.errorbar(dilations, means, bars, fmt="none", ecolor=colour, elinewidth=1.2, capsize=3)


def _label_dilations(axes: Axes, dilations: Sequence[float], field: tuple[float, float] | None) -> None:
    """Label the dilations below the axes and, with (slope, offset), the receptive fields above."""
    axes.xaxis.set_major_locator(NullLocator())
    axes.xaxis.set_minor_locator(NullLocator())
    ticks = _apart(dilations)
    axes.set_xticks(ticks, [number(tick) for tick in ticks])
    if field is not None:
        slope, offset = field
        top = axes.secondary_xaxis("top")
        top.set_xticks(ticks, [f"{slope * tick + offset:.0f}" for tick in ticks])
        top.xaxis.set_minor_formatter(NullFormatter())
        top.set_xlabel("receptive field [px]")
        soften(top)
        top.tick_params(which="minor", length=0)


def dilation_paths(
    paths: Mapping[str, Mapping[str, tuple[npt.ArrayLike, npt.ArrayLike]]],
    field: tuple[float, float],
    drawn_until: float | None = None,
) -> Figure:
    """Draw the dilations of several runs or paths over the steps: one axes for each group, one line for each of them.

    Args:
        paths: titles of the groups, each with one to five names to (step [N], dilation in feature px [N]); steps rise.
        field: (slope, offset) of the receptive field in input px over the dilation, for the axis on the right.
        drawn_until: step up to which the dilations were drawn at random, so that they are points and no line.

    Raises:
        ValueError: if there is nothing to draw, more than five lines in a group, arrays that are empty, differ in
            length or are not finite, steps that fall, or dilations not above 0.

    Example:
        >>> runs = {"from 436 px": ([1, 2], [14, 13]), "from 308 px": ([1, 2], [6, 6])}
        >>> figure = dilation_paths({"gradient": runs}, field=(16, 212))
        >>> [axes.get_title(loc="left") for axes in figure.axes]
        ['gradient']
    """
    if not paths or not all(1 <= len(runs) <= len(FIELD_COLOURS) for runs in paths.values()):
        raise ValueError(f"every group must have 1 to {len(FIELD_COLOURS)} runs, got {[*map(len, paths.values())]}")
    slope, offset = field
    figure = Figure(figsize=(8, 0.6 + 2.6 * len(paths)), layout="constrained")
    for axes, (title, runs) in zip(figure.subplots(len(paths), squeeze=False)[:, 0], paths.items(), strict=True):
        plain_axes(axes, "dilation [feature px]")
        axes.set_title(title, fontsize=10.5, color=INK, loc="left")
        axes.set_yscale("log")
        seen: list[float] = []
        for (name, (step, dilation)), colour in zip(runs.items(), FIELD_COLOURS, strict=False):
            steps, dilations = checked_series("step", step), checked_series("dilation", dilation)
            check_curves(steps, dilation=dilations)
            if not dilations.min() > 0:
                raise ValueError(f"dilations must be above 0, got {dilations.min()} in {name!r}")
            draw_steps(axes, steps, dilations, colour, drawn_until, label=name)
            seen += [float(dilations.min()), float(dilations.max()), float(dilations[-1])]
        low, high = min(seen) / 1.15, max(seen) * 1.15
        axes.set_ylim(low, high)
        axes.yaxis.set_minor_locator(NullLocator())
        ticks = sorted({float(round(tick)) if tick >= 1 else tick for tick in np.geomspace(min(seen), max(seen), 5)})
        axes.set_yticks(ticks, [number(tick) for tick in ticks])
        right = axes.secondary_yaxis("right")
        right.set_yticks(ticks, [f"{slope * tick + offset:.0f}" for tick in ticks])
        right.yaxis.set_minor_locator(NullLocator())
        right.set_ylabel("receptive field [px]")
        soften(right)
        step_axis(axes, checked_series("step", [0, max(float(np.max(step)) for step, _ in runs.values())]))
        axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=5, **LEGEND)
    return figure


def _apart(dilations: Sequence[float]) -> list[float]:
    """Return the dilations whose labels fit on a logarithmic axis."""
    span = np.log(dilations[-1] / dilations[0]) or 1.0
    kept = [dilations[0]]
    for dilation in dilations[1:]:
        if np.log(dilation / kept[-1]) / span >= _LEAST_GAP:
            kept.append(dilation)
    return kept
