"""Common colours, axes, labels and checks of the figures, and how a figure is saved."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rfield.segmentation.files.atomic import atomic_write

# Distinct for the colour-blind, and dark enough for white letters.
FIELD_COLOURS = ("#0072B2", "#D55E00", "#00795B", "#AA3377", "#5B5B5B")
BLUE, ORANGE, *_ = FIELD_COLOURS
INK, GRID, PAPER = "#262626", "#E3E3E3", "#F1F1F1"
DASHES = (0, (5, 3))
LEGEND: dict[str, Any] = {
    "frameon": False,
    "fontsize": 9.5,
    "labelcolor": INK,
    "borderpad": 0,
    "borderaxespad": 0,
    "handlelength": 1.3,
    "handleheight": 1.0,
    "handletextpad": 0.5,
    "columnspacing": 1.4,
}
LABEL: dict[str, Any] = {"fontsize": 9.5, "fontweight": "bold"}
LABEL_HEIGHT = 0.24  # inches


def save(figure: Figure, path: str | Path) -> None:
    """Write a PNG of 150 dots per inch, atomically: a reader never finds half a file.

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
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=150)


def checked_series(name: str, values: npt.ArrayLike) -> npt.NDArray[np.float64]:
    series = np.asarray(values, dtype=np.float64)
    if series.ndim != 1 or not series.size:
        raise ValueError(f"{name} must be a list of at least one number, got shape {list(series.shape)}")
    finite = np.isfinite(series)
    if name != "loss" and not finite.all():
        raise ValueError(f"{name} must be finite, but {(~finite).sum()} of {series.size} values are not")
    return np.where(finite, series, np.nan)


def check_curves(steps: npt.NDArray[np.float64], **curves: npt.NDArray[np.float64]) -> None:
    for name, curve in curves.items():
        if curve.shape != steps.shape:
            raise ValueError(f"step and {name} must have the same length, got {steps.size} and {curve.size}")
    if (np.diff(steps) < 0).any():
        raise ValueError(f"step must rise, but it falls after {steps[:-1][np.diff(steps) < 0][0]:.0f}")


def padded(values: Iterable[float], share: float, least: float) -> tuple[float, float]:
    """Return the range of the values, extended at both ends by a share of it, at least by `least`."""
    series = np.asarray(list(values))
    pad = max(share * float(np.ptp(series)), float(least))
    return float(series.min()) - pad, float(series.max()) + pad


def number(value: float) -> str:
    return f"{value:.1f}" if value >= 100 else f"{value:.3g}"


def axes_at(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Return axes at a place in inches."""
    across, up = figure.get_size_inches()
    return figure.add_axes((left / across, bottom / up, width / across, height / up))


def draw_steps(
    axes: Axes,
    steps: npt.NDArray[np.float64],
    values: npt.NDArray[np.float64],
    colour: str,
    drawn_until: float | None,
    **options: Any,
) -> None:
    """Draw values over the steps: as points up to a step, since they were drawn at random, and as a line from there."""
    drawn = steps <= (-np.inf if drawn_until is None else drawn_until)
    if drawn.any():
        axes.plot(steps[drawn], values[drawn], ".", color=colour, markersize=3, alpha=0.55)
    axes.plot(steps[~drawn], values[~drawn], color=colour, linewidth=2, **options)


def step_axis(axes: Axes, steps: npt.NDArray[np.float64]) -> None:
    axes.set_xlabel("step")
    axes.set_xlim(*padded([steps[0], steps[-1]], 0.02, least=0.5))
    axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 2.5, 5, 10], integer=True, min_n_ticks=1))


def plain_axes(axes: Axes, label: str) -> None:
    axes.set_ylabel(label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    soften(axes)


def soften(axes: Any) -> None:
    axes.tick_params(color="#8C8C8C", labelcolor=INK, labelsize=9)
    axes.spines[:].set_color("#8C8C8C")
