"""Draw the receptive fields that a network with gates chooses over its images."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from rfield.segmentation.plots.masks import checked_image
from rfield.segmentation.plots.style import INK, axes_at, soften


def gate_maps(
    images: Sequence[npt.NDArray[np.uint8]], fields: Sequence[npt.ArrayLike], rate_fields: Sequence[float]
) -> Figure:
    """Draw images in rows: alone, and under a map of the chosen receptive field, with a scale in px.

    Args:
        images: uint8 [H, W, 3], at least one.
        fields: the receptive field in px at each pixel of each image, [H, W].
        rate_fields: the receptive fields in px of the single rates; the scale goes from the smallest to the largest.

    Raises:
        ValueError: if there is no image, or a map has another size than its image.

    Example:
        >>> figure = gate_maps([np.zeros((6, 8, 3), np.uint8)], [np.full((6, 8), 31.0)], [23, 47])
        >>> figure.axes[-1].get_ylabel()
        'chosen receptive field [px]'
    """
    pixels = [checked_image(image) for image in images]
    maps = [np.asarray(field, dtype=np.float64) for field in fields]
    if not pixels or [image.shape[:2] for image in pixels] != [field.shape for field in maps]:
        raise ValueError(
            f"each image needs a map of its own size, got {len(pixels)} images and maps of "
            f"{', '.join(str(list(field.shape)) for field in maps)}"
        )
    cell, gap, margin, title = 3.0, 0.1, 0.15, 0.3  # inches
    heights = [cell * image.shape[0] / image.shape[1] for image in pixels]
    figure = Figure(figsize=(2 * cell + gap + 2 * margin + 0.9, sum(heights) + len(pixels) * title + margin))
    top = float(figure.get_size_inches()[1])
    low, high = min(rate_fields), max(rate_fields)
    for image, field, height in zip(pixels, maps, heights, strict=True):
        top -= title
        for column in (0, 1):
            axes = axes_at(figure, margin + column * (cell + gap), top - height, cell, height)
            # Grey, so that colours are those of the scale.
            axes.imshow(image if column == 0 else image.mean(2), cmap="gray", vmin=0, vmax=255)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set(color="#8C8C8C", linewidth=0.6)
        axes.imshow(field, cmap="viridis", vmin=low, vmax=high, alpha=0.65, interpolation="nearest")
        axes.set_title(_range(field), fontsize=9.5, color=INK, loc="left", pad=3)
        top -= height
    height = float(figure.get_size_inches()[1])
    bar = axes_at(figure, margin + 2 * (cell + gap), margin, 0.14, height - title - margin)
    figure.colorbar(ScalarMappable(Normalize(low, high), "viridis"), cax=bar, ticks=sorted(rate_fields))
    bar.set_yticklabels([f"{field:.0f}" for field in sorted(rate_fields)])
    bar.set_ylabel("chosen receptive field [px]", fontsize=9, color=INK)
    soften(bar)
    return figure


def _range(field: npt.NDArray[np.float64]) -> str:
    low, high = (f"{each:.0f}" for each in np.percentile(field, (5, 95)))
    return f"{low} px" if low == high else f"{low} to {high} px, mean {field.mean():.0f}"
