"""Draw which path of a set serves which class."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from rfield.segmentation.plots.style import INK, number


def class_paths(costs: Sequence[Sequence[float | None]], classes: Sequence[str], paths: Sequence[str]) -> Figure:
    """Draw a matrix of classes and paths: by how much the loss of a class grows without a path.

    Args:
        costs: for each class one number for each path; None where it is not known.
        classes: the classes' names.
        paths: the paths' names.

    Raises:
        ValueError: the numbers do not fit the names.

    Example:
        >>> figure = class_paths([[0.2, 0.01], [None, None]], ["road", "sign"], ["rate 2", "rate 12"])
        >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
        ['road', 'sign']
    """
    if len(costs) != len(classes) or any(len(row) != len(paths) for row in costs) or not classes or not paths:
        raise ValueError(
            f"{len(classes)} classes and {len(paths)} paths need as many numbers, got {[len(row) for row in costs]}"
        )
    values = np.array([[np.nan if cost is None else cost for cost in row] for row in costs], dtype=float)
    bound = float(np.nanmax(np.abs(values))) if np.isfinite(values).any() else 1.0
    figure = Figure(figsize=(2.2 + 0.9 * len(paths), 1.1 + 0.28 * len(classes)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(np.ma.masked_invalid(values), cmap="PuOr_r", vmin=-bound or -1, vmax=bound or 1, aspect="auto")
    axes.set_xticks(range(len(paths)), paths)
    axes.set_yticks(range(len(classes)), classes)
    axes.tick_params(length=0, colors=INK)
    for row, column in np.ndindex(values.shape):
        value = values[row, column]
        dark = np.isfinite(value) and abs(value) > 0.6 * bound
        text = number(value) if np.isfinite(value) else "no pixels"
        axes.text(column, row, text, ha="center", va="center", fontsize=7, color="white" if dark else INK)
    figure.colorbar(image, ax=axes, label="loss of the class without the path, minus with it")
    return figure
