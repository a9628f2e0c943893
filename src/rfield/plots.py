"""Pictures of learned receptive fields and of labelled images: arrays in, matplotlib Figures out."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

_IGNORE_INDEX = 255
_VOID_COLOUR = (200, 200, 200)
# Told apart by the colour-blind, and dark enough for white letters.
_FIELD_COLOURS = ("#0072B2", "#D55E00", "#00795B", "#AA3377", "#5B5B5B")
_BLUE, _ORANGE, *_ = _FIELD_COLOURS
_INK, _GRID, _PAPER = "#262626", "#E3E3E3", "#F1F1F1"
_DASHES = (0, (5, 3))
_LEGEND: dict[str, Any] = {
    "frameon": False,
    "fontsize": 9.5,
    "labelcolor": _INK,
    "borderpad": 0,
    "borderaxespad": 0,
    "handlelength": 1.3,
    "handleheight": 1.0,
    "handletextpad": 0.5,
    "columnspacing": 1.4,
}
_LABEL: dict[str, Any] = {"fontsize": 9.5, "fontweight": "bold"}
_LABEL_HEIGHT = 0.24  # inches


def colourise(mask: npt.NDArray[np.uint8], palette: npt.ArrayLike) -> npt.NDArray[np.uint8]:
    """A mask in the colours of its classes.

    Args:
        mask: uint8 [H, W], class indices; 255 (no label) becomes a neutral grey.
        palette: [256, 3], RGB colours 0..255, one for every mask value.

    Returns:
        uint8 [H, W, 3].

    Raises:
        ValueError: if an argument has another shape, type or range.

    Example:
        >>> palette = np.zeros((256, 3), np.uint8)
        >>> palette[1] = 255, 0, 0
        >>> colourise(np.array([[0, 1, 255]], np.uint8), palette).tolist()
        [[[0, 0, 0], [255, 0, 0], [200, 200, 200]]]
    """
    colours = _checked_palette(palette).copy()
    colours[_IGNORE_INDEX] = _VOID_COLOUR
    coloured: npt.NDArray[np.uint8] = colours[_checked_mask(mask)]
    return coloured


def overlay(
    image: npt.NDArray[np.uint8], mask: npt.NDArray[np.uint8], palette: npt.ArrayLike, opacity: float = 0.55
) -> npt.NDArray[np.uint8]:
    """A photograph under the translucent colours of its mask.

    Args:
        image: uint8 [H, W, 3].
        mask: uint8 [H, W], class indices; where it is 255 (no label) the photograph stays as it is.
        palette: [256, 3], RGB colours 0..255, one for every mask value.
        opacity: of the colours, 0 (the photograph alone) to 1 (the mask alone).

    Returns:
        uint8 [H, W, 3].

    Raises:
        ValueError: if an argument has another shape, type or range, or if image and mask differ in size.

    Example:
        >>> image = np.full((1, 2, 3), 100, np.uint8)
        >>> palette = np.zeros((256, 3), np.uint8)
        >>> overlay(image, np.array([[0, 255]], np.uint8), palette, opacity=0.75).tolist()
        [[[25, 25, 25], [100, 100, 100]]]
    """
    image, mask = _checked_image(image), _checked_mask(mask)
    if image.shape[:2] != mask.shape:
        raise ValueError(
            f"image and mask must have one size, got {image.shape[0]}x{image.shape[1]} and "
            f"{mask.shape[0]}x{mask.shape[1]} px"
        )
    if not 0 <= opacity <= 1:
        raise ValueError(f"opacity must be from 0 to 1, got {opacity}")
    mixed = (1 - opacity) * image + opacity * colourise(mask, palette)
    return np.where(mask[..., None] == _IGNORE_INDEX, image, mixed.round().astype(np.uint8))


def panel(
    columns: Mapping[str, Sequence[npt.NDArray[np.uint8] | None]],
    palette: npt.ArrayLike,
    class_names: Sequence[str] | None = None,
) -> Figure:
    """Samples in rows, photographs and label maps in columns, and a legend of the classes that occur.

    Args:
        columns: title to one picture a sample: uint8 [H, W, 3] is drawn as it is, uint8 [H, W] as a mask in the
            colours of its classes (255, no label, in a neutral grey), None leaves its place empty. Sizes may differ.
        palette: [256, 3], RGB colours 0..255, one for every mask value.
        class_names: the names for the legend; without them the indices stand there.

    Raises:
        ValueError: if there is nothing to draw, if the columns differ in length, if a picture is neither image nor
            mask, if the palette has another shape or range, or if a mask holds a class without a name.

    Example:
        >>> photographs = [np.zeros((6, 8, 3), np.uint8), np.zeros((8, 6, 3), np.uint8)]
        >>> truths = [np.zeros((6, 8), np.uint8), None]
        >>> preds = [np.zeros((6, 8), np.uint8), np.ones((8, 6), np.uint8)]
        >>> columns = {"image": photographs, "ground truth": truths, "prediction": preds}
        >>> figure = panel(columns, np.zeros((256, 3), np.uint8), ["road", "car"])
        >>> [text.get_text() for text in figure.legends[0].get_texts()]
        ['road', 'car']
    """
    lengths = {title: len(pictures) for title, pictures in columns.items()}
    if not any(lengths.values()):
        raise ValueError("columns must hold at least one picture")
    if len(set(lengths.values())) > 1:
        raise ValueError(f"every column must have one picture (or None) a sample, but their lengths are {lengths}")
    colours = _checked_palette(palette)
    rows = [[_checked_picture(picture) for picture in row] for row in zip(*columns.values(), strict=True)]
    pictures = [picture for row in rows for picture in row if picture is not None]
    present = sorted({int(value) for mask in pictures if mask.ndim == 2 for value in np.unique(mask)})
    names = [_class_name(value, class_names) for value in present]

    cell, gap, margin, title_height = 2.6, 0.08, 0.12, 0.32  # inches
    width = len(columns) * (cell + gap) - gap + 2 * margin
    # A portrait is as high as its cell is wide, and narrower; a landscape gives its row the height that it needs.
    heights = [cell * max((min(p.shape[0] / p.shape[1], 1) for p in row if p is not None), default=0) for row in rows]
    per_line = max(1, int(width / (0.62 + 0.085 * max(map(len, names), default=0))))
    lines = -(-len(names) // per_line)
    legend_height = 0.24 * lines + 0.1 if names else 0
    height = title_height + sum(heights) + gap * (len(rows) - 1) + legend_height + margin
    figure = Figure(figsize=(width, height))
    top = height - title_height
    for column, title in enumerate(columns):
        centre = margin + column * (cell + gap) + cell / 2
        figure.text(centre / width, (top + 0.1) / height, title, ha="center", va="bottom", color=_INK, fontsize=11)
    for row, row_height in zip(rows, heights, strict=True):
        for column, picture in enumerate(row):
            if picture is None:
                continue
            axes = _axes_at(figure, margin + column * (cell + gap), top - row_height, cell, row_height)
            if picture.ndim == 2:
                axes.imshow(colourise(picture, colours), interpolation="nearest")
            else:
                axes.imshow(picture)
            axes.set_axis_off()
        top -= row_height + gap
    if names:
        swatches = [
            Patch(facecolor=colour / 255, edgecolor="#8C8C8C", linewidth=0.6)
            for colour in colourise(np.array([present], np.uint8), colours)[0]
        ]
        below, per_line = (0.5, (top + gap - 0.14) / height), -(-len(names) // lines)
        figure.legend(swatches, names, loc="upper center", bbox_to_anchor=below, ncols=per_line, **_LEGEND)
    return figure


def factor_curve(
    step: npt.ArrayLike,
    effective_dilation: npt.ArrayLike,
    receptive_field_px: npt.ArrayLike,
    loss: npt.ArrayLike,
    known_best: float | None = None,
) -> Figure:
    """How the receptive field was learned: effective dilation and receptive field over the steps, and the loss.

    Args:
        step: [N], rising.
        effective_dilation: [N], in feature px.
        receptive_field_px: [N], in input px: an affine function of the effective dilation.
        loss: [N]; what is not finite leaves a gap.
        known_best: effective dilation to mark, in feature px.

    Raises:
        ValueError: if the arrays are empty, differ in length or (other than the loss) are not finite, if the steps
            fall, if the receptive field is no affine function of the effective dilation, or if `known_best` is not
            above 0.

    Example:
        >>> figure = factor_curve([0, 1, 2], [14, 8, 6], [436, 340, 308], [2.0, 1.2, 1.0], known_best=5)
        >>> [axes.get_ylabel() for axes in figure.axes]
        ['effective dilation [feature px]', 'loss']
    """
    steps, dilation = _checked_series("step", step), _checked_series("effective_dilation", effective_dilation)
    field, losses = _checked_series("receptive_field_px", receptive_field_px), _checked_series("loss", loss)
    _check_curves(steps, effective_dilation=dilation, receptive_field_px=field, loss=losses)
    if known_best is not None and not 0 < known_best < np.inf:
        raise ValueError(f"known_best must be an effective dilation above 0, got {known_best}")
    slope, offset = _affine(dilation, field)

    figure = Figure(figsize=(8, 5.2), layout="constrained")
    upper, lower = figure.subplots(2, sharex=True, height_ratios=(3, 2))
    for axes, label in ((upper, "effective dilation [feature px]"), (lower, "loss")):
        _plain(axes, label)
    _step_axis(lower, steps)
    upper.set_ylim(*_padded([*dilation, *([] if known_best is None else [known_best])], 0.17, least=0.1 * dilation[0]))

    upper.plot(steps, dilation, color=_BLUE, linewidth=2, label="learned")
    upper.plot(steps[[0, -1]], dilation[[0, -1]], "o", color=_BLUE, markersize=6, clip_on=False, zorder=5)
    # Labels stand on the side that the curve leaves free.
    side = 1 if dilation[-1] <= dilation[0] else -1
    for index, name, across in ((0, "start", 6), (-1, "end", -2))[: steps.size]:
        text = f"{name}  {_number(dilation[index])}  ({field[index]:.0f} px)"
        _note(upper, text, (steps[index], dilation[index]), (across, 9 * side), _BLUE)
    if known_best is not None:
        upper.axhline(known_best, color=_ORANGE, linewidth=1.6, linestyle=_DASHES, zorder=1.5)
        at = (upper.get_xlim()[0], known_best)
        _note(upper, f"known best  {_number(known_best)}", at, (6, -4 * side), _ORANGE)
    if slope > 0:
        right = upper.secondary_yaxis("right", functions=(lambda d: slope * d + offset, lambda r: (r - offset) / slope))
    else:
        right = upper.secondary_yaxis("right")
        right.set_yticks([dilation[0]], [f"{field[0]:.0f}"])
    right.set_ylabel("receptive field [px]")
    _soften(right)

    smooth, window = _moving_mean(losses)
    colour, marker = ("#B9B9B9" if window > 1 else _INK), ("o" if steps.size == 1 else None)
    lower.plot(steps, losses, color=colour, linewidth=1, marker=marker, label="as recorded")
    if window > 1:
        lower.plot(steps, smooth, color=_INK, linewidth=1.8, label=f"mean of {window} records")
        lower.legend(loc="lower right", bbox_to_anchor=(1, 1.03), ncols=2, **_LEGEND)
    return figure


def learned_field(
    image: npt.NDArray[np.uint8], fields: Mapping[str, float], step: npt.ArrayLike, receptive_field_px: npt.ArrayLike
) -> Figure:
    """Receptive fields to scale on an image, beside the curve along which they were learned.

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
    image = _checked_image(image)
    steps, curve = _checked_series("step", step), _checked_series("receptive_field_px", receptive_field_px)
    _check_curves(steps, receptive_field_px=curve)
    if not 1 <= len(fields) <= len(_FIELD_COLOURS):
        raise ValueError(f"fields must name 1 to {len(_FIELD_COLOURS)} receptive fields, got {len(fields)}")
    for name, side in fields.items():
        if not 0 < side < np.inf:
            raise ValueError(f"the side of field {name!r} must be above 0 px, got {side}")
    sides = {name: float(side) for name, side in fields.items()}
    colours = dict(zip(sides, _FIELD_COLOURS, strict=False))
    texts = {name: f"{name}  {side:.0f} px" for name, side in sides.items()}

    height, width = image.shape[:2]
    largest = max(sides.values())
    canvas_width = max(width, 1.04 * largest)
    left_width = min(4.2, 4.2 * canvas_width / max(height, largest))  # inches
    label_px = _LABEL_HEIGHT * canvas_width / left_width
    labels_at = _label_edges(list(sides.values()), label_px)
    canvas_height = max(height, *(2.04 * (abs(edge) + label_px) for edge in labels_at), 1.04 * largest)
    left_height = left_width * canvas_height / canvas_width
    right_width, right_height = 3.9, max(left_height, 2.8)
    figure = Figure(figsize=(left_width + right_width + 2.65, right_height + 0.75))

    left = _axes_at(figure, 0.15, 0.6 + (right_height - left_height) / 2, left_width, left_height)
    left.imshow(image, extent=(-width / 2, width / 2, height / 2, -height / 2))
    left.set(xlim=(-canvas_width / 2, canvas_width / 2), ylim=(canvas_height / 2, -canvas_height / 2))
    left.set(facecolor=_PAPER, xticks=[], yticks=[])
    left.spines[:].set_visible(False)
    for (name, side), edge in zip(sides.items(), labels_at, strict=True):
        x, y = side / 2 * np.array([(-1, 1, 1, -1, -1), (-1, -1, 1, 1, -1)])
        left.plot(x, y, color="white", linewidth=4.5, zorder=2)  # below every square: none hides its neighbour
        square = Rectangle((x[0], y[0]), side, side, fill=False, edgecolor=colours[name], linewidth=2.4, zorder=3)
        left.add_patch(square)
        pill = {"boxstyle": "square,pad=0.22", "facecolor": colours[name], "edgecolor": "none"}
        va = "bottom" if edge < 0 else "top"
        left.text(0, edge, texts[name], ha="center", va=va, color="white", bbox=pill, zorder=4, **_LABEL)

    right = _axes_at(figure, left_width + 0.95, 0.6, right_width, right_height)
    _plain(right, "receptive field [px]")
    _step_axis(right, steps)
    low, high = _padded([*curve, *sides.values()], 0.07, least=0.1 * largest)
    right.set_ylim(low, high)
    spread = _spread(list(sides.values()), _LABEL_HEIGHT * (high - low) / right_height)
    for (name, side), label_y in zip(sides.items(), spread, strict=True):
        right.axhline(side, color=colours[name], linewidth=1.6, linestyle=_DASHES, zorder=1.5)
        beside = right.get_yaxis_transform()
        right.text(1.02, label_y, texts[name], transform=beside, va="center", color=colours[name], **_LABEL)
    right.plot(steps, curve, color=_INK, linewidth=2.2)
    right.plot(steps[-1:], curve[-1:], "o", color=_INK, markersize=6, clip_on=False, zorder=5)
    return figure


def save(figure: Figure, path: str | Path) -> None:
    """Writes a PNG of 150 dots an inch, whole or not at all: a reader never finds half a file.

    Args:
        figure: to draw.
        path: ends in .png; its folder must exist. A file that is there is replaced.

    Raises:
        ValueError: if the path does not end in .png.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(Figure(), Path(folder) / "empty.png")
        ...     [file.name for file in Path(folder).iterdir()]
        ['empty.png']
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"figures are saved as PNG: the path must end in .png, got {path}")
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        figure.savefig(partial, format="png", dpi=150)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _checked_palette(palette: npt.ArrayLike) -> npt.NDArray[np.uint8]:
    colours = np.asarray(palette)
    if colours.shape != (256, 3):
        raise ValueError(f"palette must be [256, 3], one RGB colour for every mask value; got {list(colours.shape)}")
    if colours.dtype.kind not in "iu" or colours.min() < 0 or colours.max() > 255:
        raise ValueError(f"palette must hold whole numbers from 0 to 255, got {colours.dtype}")
    return colours.astype(np.uint8)


def _checked_picture(picture: npt.NDArray[np.uint8] | None) -> npt.NDArray[np.uint8] | None:
    if picture is None:
        return None
    return _checked_mask(picture) if np.ndim(picture) == 2 else _checked_image(picture)


def _checked_image(image: npt.ArrayLike) -> npt.NDArray[np.uint8]:
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        raise ValueError(
            f"an image must be uint8 [H, W, 3], got {pixels.dtype} {list(pixels.shape)}; a tensor [3, H, W] needs "
            "permute(1, 2, 0)"
        )
    return pixels


def _checked_mask(mask: npt.ArrayLike) -> npt.NDArray[np.uint8]:
    labels = np.asarray(mask)
    if labels.dtype != np.uint8 or labels.ndim != 2 or not labels.size:
        raise ValueError(f"a mask must be uint8 [H, W], got {labels.dtype} {list(labels.shape)}")
    return labels


def _class_name(value: int, class_names: Sequence[str] | None) -> str:
    if value == _IGNORE_INDEX:
        return "no label"
    if class_names is None:
        return str(value)
    if value >= len(class_names):
        raise ValueError(f"a mask holds class {value}, but there are {len(class_names)} class names")
    return class_names[value]


def _checked_series(name: str, values: npt.ArrayLike) -> npt.NDArray[np.float64]:
    series = np.asarray(values, dtype=np.float64)
    if series.ndim != 1 or not series.size:
        raise ValueError(f"{name} must be a list of at least one number, got shape {list(series.shape)}")
    finite = np.isfinite(series)
    if name != "loss" and not finite.all():
        raise ValueError(f"{name} must be finite, but {(~finite).sum()} of {series.size} values are not")
    return np.where(finite, series, np.nan)


def _check_curves(steps: npt.NDArray[np.float64], **curves: npt.NDArray[np.float64]) -> None:
    for name, curve in curves.items():
        if curve.shape != steps.shape:
            raise ValueError(f"step and {name} must have one length, got {steps.size} and {curve.size}")
    if (np.diff(steps) < 0).any():
        raise ValueError(f"step must rise, but it falls after {steps[:-1][np.diff(steps) < 0][0]:.0f}")


def _affine(dilation: npt.NDArray[np.float64], field: npt.NDArray[np.float64]) -> tuple[float, float]:
    """(slope, offset) of the receptive field over the dilation; a constant dilation has slope 0."""
    low, high = dilation.argmin(), dilation.argmax()
    span = dilation[high] - dilation[low]
    slope = (field[high] - field[low]) / span if span > 1e-6 * abs(dilation[high]) else 0.0
    offset = field[low] - slope * dilation[low]
    error = np.abs(slope * dilation + offset - field).max()
    if error > 1 + 0.01 * np.ptp(field) or slope < 0:
        raise ValueError(
            "receptive_field_px must be an affine function of effective_dilation and rise with it, but its slope is "
            f"{slope:.3g} and it leaves the straight line by up to {error:.1f} px; are they of one run?"
        )
    return float(slope), float(offset)


def _moving_mean(values: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], int]:
    """The centred mean of the finite values in an odd window of a twentieth of the series, and that window."""
    window = 2 * (values.size // 40) + 1
    finite = np.isfinite(values)
    ones = np.ones(window)
    counts = np.convolve(finite, ones, "same")
    sums = np.convolve(np.where(finite, values, 0), ones, "same")
    return np.divide(sums, counts, out=np.full(values.size, np.nan), where=counts > 0), window


def _label_edges(sides: Sequence[float], label_px: float) -> list[float]:
    """Where the squares' labels begin, in px from the centre: in turn above (negative) and below, pushed outward."""
    edges = [0.0] * len(sides)
    for sign, first in ((-1, 0), (1, 1)):
        reach = 0.0
        for index in sorted(range(first, len(sides), 2), key=lambda index: sides[index]):
            reach = max(reach, sides[index] / 2 + 0.15 * label_px)
            edges[index] = sign * reach
            reach += label_px
    return edges


def _spread(positions: Sequence[float], gap: float) -> list[float]:
    """The positions, moved as little as keeps each `gap` from the next, in their order."""
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    groups: list[list[float]] = []  # of positions less the room that those below them need
    for rank, index in enumerate(order):
        groups.append([positions[index] - rank * gap])
        while len(groups) > 1 and np.mean(groups[-2]) > np.mean(groups[-1]):
            groups[-2:] = [groups[-2] + groups[-1]]
    placed = [float(np.mean(group)) for group in groups for _ in group]
    spread = [0.0] * len(positions)
    for rank, index in enumerate(order):
        spread[index] = placed[rank] + rank * gap
    return spread


def _padded(values: Iterable[float], share: float, least: float) -> tuple[float, float]:
    """The range of the values and a share of it more at both ends, `least` on either side at the least."""
    series = np.asarray(list(values))
    pad = max(share * float(np.ptp(series)), float(least))
    return float(series.min()) - pad, float(series.max()) + pad


def _number(value: float) -> str:
    return f"{value:.1f}" if value >= 100 else f"{value:.3g}"


def _axes_at(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Axes at a place in inches."""
    across, up = figure.get_size_inches()
    return figure.add_axes((left / across, bottom / up, width / across, height / up))


def _note(axes: Axes, text: str, at: tuple[float, float], offset: tuple[float, float], colour: str) -> None:
    """Text beside a point of the data, on the side to which `offset` (typographic points) leads."""
    ha, va = "left" if offset[0] > 0 else "right", "bottom" if offset[1] > 0 else "top"
    halo = [withStroke(linewidth=3, foreground="white")]
    axes.annotate(text, at, offset, textcoords="offset points", ha=ha, va=va, color=colour, path_effects=halo)


def _step_axis(axes: Axes, steps: npt.NDArray[np.float64]) -> None:
    axes.set_xlabel("step")
    axes.set_xlim(*_padded([steps[0], steps[-1]], 0.02, least=0.5))
    axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 2.5, 5, 10], integer=True, min_n_ticks=1))


def _plain(axes: Axes, label: str) -> None:
    axes.set_ylabel(label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    _soften(axes)


def _soften(axes: Axes) -> None:
    axes.tick_params(color="#8C8C8C", labelcolor=_INK, labelsize=9)
    axes.spines[:].set_color("#8C8C8C")
