"""Draw sets of paths: which path serves which class, and what each number of paths is worth."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from rfield.segmentation.plots.style import BLUE, INK, number


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
    figure = Figure(figsize=(2.4 + 0.9 * len(paths), 1.4 + 0.28 * len(classes)), layout="constrained")
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
    figure.suptitle("increase of a class's loss without the path", fontsize=10, color=INK)
    figure.colorbar(image, ax=axes)
    return figure


def set_sizes(sizes: Sequence[tuple[int, float, float, str]]) -> Figure:
    """Draw the held-out loss against the number of paths.

    Args:
        sizes: number of paths, loss, standard error of its difference to the best, and dilations as text.

    Example:
        >>> figure = set_sizes([(1, 0.5, 0.02, "6"), (2, 0.4, 0.0, "3, 12")])
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['6', '3, 12']
    """
    figure = Figure(figsize=(1.6 + 1.2 * len(sizes), 3.2), layout="constrained")
    axes = figure.subplots()
    counts, losses, errors, names = zip(*sizes, strict=True)
    axes.errorbar(counts, losses, errors, fmt="o-", color=BLUE, capsize=3)
    for count, loss, error, name in zip(counts, losses, errors, names, strict=True):
        axes.annotate(
            name, (count, loss + error), (0, 5), textcoords="offset points", ha="center", fontsize=8, color=INK
        )
    axes.margins(x=0.18, y=0.2)
    axes.set_xticks(counts)
    axes.set_xlabel("paths", color=INK)
    axes.set_ylabel("held-out loss", color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
