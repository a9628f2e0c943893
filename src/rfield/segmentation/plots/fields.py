"""Draw how one receptive field was learned, over the steps and to scale."""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from rfield.segmentation.plots.masks import checked_image
from rfield.segmentation.plots.style import (
    BLUE,
    DASHES,
    FIELD_COLOURS,
    INK,
    LABEL,
    LABEL_HEIGHT,
    LEGEND,
    ORANGE,
    PAPER,
    axes_at,
    check_curves,
    checked_series,
    draw_steps,
    number,
    padded,
    plain_axes,
    soften,
    step_axis,
)


def factor_curve(
    step: npt.ArrayLike,
    effective_dilation: npt.ArrayLike,
    receptive_field_px: npt.ArrayLike,
    loss: npt.ArrayLike,
    known_best: float | None = None,
    drawn_until: float | None = None,
) -> Figure:
    """Draw how a receptive field was learned: effective dilation, receptive field and loss over the steps.

    Args:
        step: [N], rising.
        effective_dilation: [N], in feature px.
        receptive_field_px: [N], in input px: an affine function of the effective dilation.
        loss: [N]; what is not finite leaves a gap.
        known_best: effective dilation to mark, in feature px.
        drawn_until: step up to which a search drew the dilations at random, so that they are points and no line.

    Raises:
        ValueError: if the arrays are empty, differ in length or (other than the loss) are not finite, if the steps
            fall, if the receptive field is no affine function of the effective dilation, or if `known_best` is not
            above 0.

    Example:
        >>> figure = factor_curve([0, 1, 2], [14, 8, 6], [436, 340, 308], [2.0, 1.2, 1.0], known_best=5)
        >>> [axes.get_ylabel() for axes in figure.axes]
        ['effective dilation [feature px]', 'loss']
    """
    steps, dilation = checked_series("step", step), checked_series("effective_dilation", effective_dilation)
    field, losses = checked_series("receptive_field_px", receptive_field_px), checked_series("loss", loss)
    check_curves(steps, effective_dilation=dilation, receptive_field_px=field, loss=losses)
    if known_best is not None and not 0 < known_best < np.inf:
        raise ValueError(f"known_best must be an effective dilation above 0, got {known_best}")
    slope, offset = _affine(dilation, field)

    figure = Figure(figsize=(8, 5.2), layout="constrained")
    upper, lower = figure.subplots(2, sharex=True, height_ratios=(3, 2))
    for axes, label in ((upper, "effective dilation [feature px]"), (lower, "loss")):
        plain_axes(axes, label)
    step_axis(lower, steps)
    upper.set_ylim(*padded([*dilation, *([] if known_best is None else [known_best])], 0.17, least=0.1 * dilation[0]))

    draw_steps(upper, steps, dilation, BLUE, drawn_until, label="learned")
    upper.plot(steps[[0, -1]], dilation[[0, -1]], "o", color=BLUE, markersize=6, clip_on=False, zorder=5)
    # Above the axes, so that no text stands on a line.
    for index, name, place in ((0, "first step", 0.0), (-1, "end", 1.0))[: steps.size]:
        text = f"{name}  {number(dilation[index])}  ({field[index]:.0f} px)"
        upper.text(place, 1.02, text, transform=upper.transAxes, color=BLUE, ha="right" if place else "left")
    if known_best is not None:
        upper.axhline(known_best, color=ORANGE, linewidth=1.6, linestyle=DASHES, zorder=1.5)
        text = f"known best  {number(known_best)}"
        upper.text(0.5, 1.02, text, transform=upper.transAxes, color=ORANGE, ha="center")
    if slope > 0:
        right = upper.secondary_yaxis("right", functions=(lambda d: slope * d + offset, lambda r: (r - offset) / slope))
    else:
        right = upper.secondary_yaxis("right")
        right.set_yticks([dilation[0]], [f"{field[0]:.0f}"])
    right.set_ylabel("receptive field [px]")
    soften(right)

    smooth, window = _moving_mean(losses)
    colour, marker = ("#B9B9B9" if window > 1 else INK), ("o" if steps.size == 1 else None)
    lower.plot(steps, losses, color=colour, linewidth=1, marker=marker, label="as recorded")
    if window > 1:
        lower.plot(steps, smooth, color=INK, linewidth=1.8, label=f"mean of {window} records")
        lower.legend(loc="lower right", bbox_to_anchor=(1, 1.03), ncols=2, **LEGEND)
    return figure


def learned_field(
    image: npt.NDArray[np.uint8], fields: Mapping[str, float], step: npt.ArrayLike, receptive_field_px: npt.ArrayLike
) -> Figure:
    """Draw receptive fields to scale on an image, beside the curve of the learned one.

    Args:
        image: uint8 [H, W, 3]; the squares are centred on it, and it is drawn smaller where one is larger.
        fields: one to five names, such as "start", "learned", "known best", to a receptive field's side in px.
        step: [N], rising.
        receptive_field_px: [N], in input px.

    Raises:
        ValueError: if the image has another shape or type, if there are no fields or more than five, if a side is
            not above 0, if the curve's arrays are empty, differ in length or are not finite, or if the steps fall.

    Example:
        >>> image = np.zeros((48, 64, 3), np.uint8)
        >>> figure = learned_field(image, {"start": 52, "learned": 31}, [0, 1, 2], [52, 36, 31])
        >>> [patch.get_width() for patch in figure.axes[0].patches]
        [52.0, 31.0]
    """
    image = checked_image(image)
    steps, curve = checked_series("step", step), checked_series("receptive_field_px", receptive_field_px)
    check_curves(steps, receptive_field_px=curve)
    if not 1 <= len(fields) <= len(FIELD_COLOURS):
        raise ValueError(f"fields must name 1 to {len(FIELD_COLOURS)} receptive fields, got {len(fields)}")
    for name, side in fields.items():
        if not 0 < side < np.inf:
            raise ValueError(f"the side of field {name!r} must be above 0 px, got {side}")
    sides = {name: float(side) for name, side in fields.items()}
    colours = dict(zip(sides, FIELD_COLOURS, strict=False))
    texts = {name: f"{name}  {side:.0f} px" for name, side in sides.items()}

    height, width = image.shape[:2]
    largest = max(sides.values())
    canvas_width = max(width, 1.04 * largest)
    left_width = min(4.2, 4.2 * canvas_width / max(height, largest))  # inches
    label_px = LABEL_HEIGHT * canvas_width / left_width
    labels_at = _label_edges(list(sides.values()), label_px)
    canvas_height = max(height, *(2.04 * (abs(edge) + label_px) for edge in labels_at), 1.04 * largest)
    left_height = left_width * canvas_height / canvas_width
    right_width, right_height = 3.9, max(left_height, 2.8)
    figure = Figure(figsize=(left_width + right_width + 2.65, right_height + 0.75))

    left = axes_at(figure, 0.15, 0.6 + (right_height - left_height) / 2, left_width, left_height)
    left.imshow(image, extent=(-width / 2, width / 2, height / 2, -height / 2))
    left.set(xlim=(-canvas_width / 2, canvas_width / 2), ylim=(canvas_height / 2, -canvas_height / 2))
    left.set(facecolor=PAPER, xticks=[], yticks=[])
    left.spines[:].set_visible(False)
    for (name, side), edge in zip(sides.items(), labels_at, strict=True):
        x, y = side / 2 * np.array([(-1, 1, 1, -1, -1), (-1, -1, 1, 1, -1)])
        left.plot(x, y, color="white", linewidth=4.5, zorder=2)  # below every square, so that none hides its neighbour
        square = Rectangle((x[0], y[0]), side, side, fill=False, edgecolor=colours[name], linewidth=2.4, zorder=3)
        left.add_patch(square)
        pill = {"boxstyle": "square,pad=0.22", "facecolor": colours[name], "edgecolor": "none"}
        va = "bottom" if edge < 0 else "top"
        left.text(0, edge, texts[name], ha="center", va=va, color="white", bbox=pill, zorder=4, **LABEL)

    right = axes_at(figure, left_width + 0.95, 0.6, right_width, right_height)
    _draw_learning(right, steps, curve, sides, colours, texts, right_height)
    return figure


def _draw_learning(
    axes: Axes,
    steps: npt.NDArray[np.float64],
    curve: npt.NDArray[np.float64],
    sides: Mapping[str, float],
    colours: Mapping[str, str],
    texts: Mapping[str, str],
    height: float,
) -> None:
    """Draw the receptive field over the steps, with lines at the sides of the squares; `height` is in inches."""
    plain_axes(axes, "receptive field [px]")
    step_axis(axes, steps)
    low, high = padded([*curve, *sides.values()], 0.07, least=0.1 * max(sides.values()))
    axes.set_ylim(low, high)
    spread = _spread(list(sides.values()), LABEL_HEIGHT * (high - low) / height)
    for (name, side), label_y in zip(sides.items(), spread, strict=True):
        axes.axhline(side, color=colours[name], linewidth=1.6, linestyle=DASHES, zorder=1.5)
        beside = axes.get_yaxis_transform()
        axes.text(1.02, label_y, texts[name], transform=beside, va="center", color=colours[name], **LABEL)
    axes.plot(steps, curve, color=INK, linewidth=2.2)
    axes.plot(steps[-1:], curve[-1:], "o", color=INK, markersize=6, clip_on=False, zorder=5)


def _affine(dilation: npt.NDArray[np.float64], field: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Return (slope, offset) of the receptive field over the dilation; a constant dilation has slope 0."""
    low, high = dilation.argmin(), dilation.argmax()
    span = dilation[high] - dilation[low]
    slope = (field[high] - field[low]) / span if span > 1e-6 * abs(dilation[high]) else 0.0
    offset = field[low] - slope * dilation[low]
    error = np.abs(slope * dilation + offset - field).max()
    if error > 1 + 0.01 * np.ptp(field) or slope < 0:
        raise ValueError(
            "receptive_field_px must be an affine function of effective_dilation and rise with it, but its slope is "
            f"{slope:.3g} and it leaves the straight line by up to {error:.1f} px; are they from the same run?"
        )
    return float(slope), float(offset)


def _moving_mean(values: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], int]:
    """Return the centred mean of the finite values in an odd window of a twentieth of the series, and the window."""
    window = 2 * (values.size // 40) + 1
    finite = np.isfinite(values)
    ones = np.ones(window)
    counts = np.convolve(finite, ones, "same")
    sums = np.convolve(np.where(finite, values, 0), ones, "same")
    return np.divide(sums, counts, out=np.full(values.size, np.nan), where=counts > 0), window


def _label_edges(sides: Sequence[float], label_px: float) -> list[float]:
    """Return where the squares' labels begin, in px from the centre, in turn above (negative) and below."""
    edges = [0.0] * len(sides)
    for sign, first in ((-1, 0), (1, 1)):
        reach = 0.0
        for index in sorted(range(first, len(sides), 2), key=lambda index: sides[index]):
            reach = max(reach, sides[index] / 2 + 0.15 * label_px)
            edges[index] = sign * reach
            reach += label_px
    return edges


def _spread(positions: Sequence[float], gap: float) -> list[float]:
    """Move positions as little as possible so that neighbours are `gap` apart, in their order."""
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    groups: list[list[float]] = []  # positions minus the space of those below them
    for rank, index in enumerate(order):
        groups.append([positions[index] - rank * gap])
        while len(groups) > 1 and np.mean(groups[-2]) > np.mean(groups[-1]):
            groups[-2:] = [groups[-2] + groups[-1]]
    placed = [float(np.mean(group)) for group in groups for _ in group]
    spread = [0.0] * len(positions)
    for rank, index in enumerate(order):
        spread[index] = placed[rank] + rank * gap
    return spread
