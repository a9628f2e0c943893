"""Draw label maps in colour: alone, over their image, side by side."""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from rfield.segmentation.conventions import IGNORE_INDEX
from rfield.segmentation.plots.style import INK, LEGEND, axes_at
from rfield.text import counted

_VOID_COLOUR = (200, 200, 200)


def colourise(mask: npt.NDArray[np.uint8], palette: npt.ArrayLike) -> npt.NDArray[np.uint8]:
    """Return a mask in the colours of its classes.

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
    colours[IGNORE_INDEX] = _VOID_COLOUR
    coloured: npt.NDArray[np.uint8] = colours[_checked_mask(mask)]
    return coloured


def overlay(
    image: npt.NDArray[np.uint8], mask: npt.NDArray[np.uint8], palette: npt.ArrayLike, opacity: float = 0.55
) -> npt.NDArray[np.uint8]:
    """Return an image under the translucent colours of its mask.

    Args:
        image: uint8 [H, W, 3].
        mask: uint8 [H, W], class indices; where it is 255 (no label) the image stays as it is.
        palette: [256, 3], RGB colours 0..255, one for every mask value.
        opacity: of the colours, 0 (the image alone) to 1 (the mask alone).

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
    image, mask = checked_image(image), _checked_mask(mask)
    if image.shape[:2] != mask.shape:
        raise ValueError(
            f"image and mask must have the same size, got {image.shape[0]}x{image.shape[1]} and "
            f"{mask.shape[0]}x{mask.shape[1]} px"
        )
    if not 0 <= opacity <= 1:
        raise ValueError(f"opacity must be from 0 to 1, got {opacity}")
    mixed = (1 - opacity) * image + opacity * colourise(mask, palette)
    return np.where(mask[..., None] == IGNORE_INDEX, image, mixed.round().astype(np.uint8))


def panel(
    columns: Mapping[str, Sequence[npt.NDArray[np.uint8] | None]],
    palette: npt.ArrayLike,
    class_names: Sequence[str] | None = None,
    truth: str = "ground truth",
) -> Figure:
    """Draw samples in rows, images and label maps in columns, and a legend of the classes that occur.

    Args:
        columns: title to one picture a sample: uint8 [H, W, 3] is drawn as it is, uint8 [H, W] as a mask in the
            colours of its classes (255, no label, in a neutral grey), None leaves its place empty. Sizes may differ.
        palette: [256, 3], RGB colours 0..255, one for every mask value.
        class_names: the names for the legend; without them the indices stand there.
        truth: title of the column of true labels, if there is one: pixels without a label have none in the other masks
            of the sample either.

    Raises:
        ValueError: if there is nothing to draw, if the columns differ in length, if a picture is neither image nor
            mask, if the palette has another shape or range, or if a mask holds a class without a name.

    Example:
        >>> images = [np.zeros((6, 8, 3), np.uint8), np.zeros((8, 6, 3), np.uint8)]
        >>> truths = [np.zeros((6, 8), np.uint8), None]
        >>> preds = [np.zeros((6, 8), np.uint8), np.ones((8, 6), np.uint8)]
        >>> columns = {"image": images, "ground truth": truths, "prediction": preds}
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
    rows = [_hide_unlabelled(row, dict(zip(columns, row, strict=True)).get(truth)) for row in rows]
    pictures = [picture for row in rows for picture in row if picture is not None]
    present = sorted({int(value) for mask in pictures if mask.ndim == 2 for value in np.unique(mask)})
    names = [_class_name(value, class_names) for value in present]

    cell, gap, margin, title_height = 2.6, 0.08, 0.12, 0.32  # inches
    width = len(columns) * (cell + gap) - gap + 2 * margin
    # A portrait is as high as its cell is wide; a landscape sets the height of its row.
    heights = [cell * max((min(p.shape[0] / p.shape[1], 1) for p in row if p is not None), default=0) for row in rows]
    per_line = max(1, int(width / (0.62 + 0.085 * max(map(len, names), default=0))))
    lines = -(-len(names) // per_line)
    legend_height = 0.24 * lines + 0.1 if names else 0
    height = title_height + sum(heights) + gap * (len(rows) - 1) + legend_height + margin
    figure = Figure(figsize=(width, height))
    top = height - title_height
    for column, title in enumerate(columns):
        centre = margin + column * (cell + gap) + cell / 2
        figure.text(centre / width, (top + 0.1) / height, title, ha="center", va="bottom", color=INK, fontsize=11)
    for row, row_height in zip(rows, heights, strict=True):
        for column, picture in enumerate(row):
            if picture is None:
                continue
            axes = axes_at(figure, margin + column * (cell + gap), top - row_height, cell, row_height)
            if picture.ndim == 2:
                axes.imshow(colourise(picture, colours), interpolation="nearest")
            else:
                axes.imshow(picture)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set(color="#8C8C8C", linewidth=0.6)
        top -= row_height + gap
    if names:
        below, per_line = (0.5, (top + gap - 0.14) / height), -(-len(names) // lines)
        shown = colourise(np.array([present], np.uint8), colours)[0]
        swatches = [Patch(facecolor=colour / 255, edgecolor="#8C8C8C", linewidth=0.6) for colour in shown]
        figure.legend(swatches, names, loc="upper center", bbox_to_anchor=below, ncols=per_line, **LEGEND)
    return figure


def _hide_unlabelled(
    row: Sequence[npt.NDArray[np.uint8] | None], truth: npt.NDArray[np.uint8] | None
) -> list[npt.NDArray[np.uint8] | None]:
    """Return the pictures of a sample, with no label in masks where the true mask has none."""
    if truth is None or truth.ndim != 2:
        return list(row)
    hidden = truth == IGNORE_INDEX
    return [
        np.where(hidden, np.uint8(IGNORE_INDEX), picture)
        if picture is not None and picture.shape == truth.shape
        else picture
        for picture in row
    ]


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
    return _checked_mask(picture) if np.ndim(picture) == 2 else checked_image(picture)


def checked_image(image: npt.ArrayLike) -> npt.NDArray[np.uint8]:
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
    if value == IGNORE_INDEX:
        return "no label"
    if class_names is None:
        return str(value)
    if value >= len(class_names):
        raise ValueError(f"a mask holds class {value}, but the list has {counted(len(class_names), 'class name')}")
    return class_names[value]
