"""Draw heat maps of effective receptive fields, with boxes to compare."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from rfield.segmentation.plots.style import FIELD_COLOURS, INK, LEGEND, PAPER, axes_at, soften

_DECADES = 4


def effective_fields(
    fields: Mapping[str, tuple[npt.ArrayLike, Mapping[str, tuple[float, float]]]],
) -> Figure:
    """Draw effective receptive fields side by side, each divided by its maximum, on one logarithmic scale.

    Args:
        fields: one to three titles, such as "before" and "after", to what each pixel of an image contributes, [H, W],
            and to boxes around the image's centre, up to five names to (height, width) in px; they may be larger than
            the image. A name has one colour in all of them.

    Raises:
        ValueError: if there are no fields or more than three, too many boxes, or if contributions are not [H, W],
            negative, not finite or all 0.

    Example:
        >>> figure = effective_fields({"after": (np.eye(8), {"theoretical": (5, 7), "99 %": (3, 3)})})
        >>> [patch.get_width() for patch in figure.axes[0].patches]
        [7, 3]
    """
    if not 1 <= len(fields) <= 3:
        raise ValueError(f"1 to 3 effective fields can be drawn, got {len(fields)}")
    names = list(dict.fromkeys(name for _, boxes in fields.values() for name in boxes))
    if len(names) > len(FIELD_COLOURS):
        raise ValueError(f"up to {len(FIELD_COLOURS)} boxes can be drawn, got {', '.join(names)}")
    colours = dict(zip(names, FIELD_COLOURS, strict=False))
    maps = {title: _relative(title, scores) for title, (scores, _) in fields.items()}
    height_px, width_px = (
        max(size[axis] for scores, boxes in fields.values() for size in (np.shape(scores), *_wider(boxes)))
        for axis in (0, 1)
    )

    width = 4.2  # inches
    height = width * height_px / width_px
    below = 0.15 + 0.21 * max(len(boxes) for _, boxes in fields.values())
    figure = Figure(figsize=(len(fields) * (width + 0.2) + 0.95, height + below + 0.4))
    image: Any = None
    for place, (title, (_, boxes)) in enumerate(fields.items()):
        axes = axes_at(figure, 0.15 + place * (width + 0.2), below, width, height)
        rows, columns = maps[title].shape
        image = axes.imshow(
            np.maximum(maps[title], 10.0**-_DECADES),
            cmap="bone",
            norm=LogNorm(10.0**-_DECADES, 1),
            extent=(-columns / 2, columns / 2, rows / 2, -rows / 2),
            interpolation="nearest",
        )
        axes.set(xlim=(-width_px / 2, width_px / 2), ylim=(height_px / 2, -height_px / 2))
        axes.set(facecolor=PAPER, xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        axes.set_title(title, fontsize=10.5, color=INK, loc="left")
        handles = []
        for name, (tall, wide) in boxes.items():
            stroke = [withStroke(linewidth=3.6, foreground="white")]
            corner = (-wide / 2, -tall / 2)
            options: dict[str, Any] = {"edgecolor": colours[name], "linewidth": 2.0, "path_effects": stroke}
            axes.add_patch(Rectangle(corner, wide, tall, fill=False, **options))
            text = f"{name}  {tall:.0f} px" if tall == wide else f"{name}  {tall:.0f}x{wide:.0f} px"
            handles.append(Line2D([], [], color=colours[name], linewidth=2.4, label=text))
        axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(0, -0.02), ncols=1, **LEGEND)
    bar = axes_at(figure, 0.15 + len(fields) * (width + 0.2), below, 0.14, height)
    figure.colorbar(image, cax=bar)
    bar.set_ylabel("contribution, relative to the largest", fontsize=9, color=INK)
    soften(bar)
    return figure


def _wider(boxes: Mapping[str, tuple[float, float]]) -> list[tuple[float, float]]:
    return [(1.04 * height, 1.04 * width) for height, width in boxes.values()]


def _relative(title: str, scores: npt.ArrayLike) -> npt.NDArray[np.float64]:
    field = np.asarray(scores, dtype=np.float64)
    if field.ndim != 2 or not field.size or not np.isfinite(field).all() or field.min() < 0 or not field.any():
        raise ValueError(f"the contributions of {title!r} must be [H, W], finite, not below 0 and not all 0")
    relative: npt.NDArray[np.float64] = field / field.max()
    return relative
