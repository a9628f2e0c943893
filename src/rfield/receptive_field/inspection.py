"""Inspect what a model sees at one size of its images: a table, advice, a figure, and HTML for notebooks."""

import dataclasses
import html
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from rfield.receptive_field.advice import Advice, field_advice, find_pyramids, outer_taps_on_map
from rfield.receptive_field.effective import (
    Measure,
    Square,
    contribution_squares,
    effective_receptive_field,
    random_images,
)
from rfield.receptive_field.per_layer import LayerField, layer_receptive_fields
from rfield.text import format_pair, format_size

_HEADER = ("layer", "kind", "kernel", "dilation", "stride", "RF, px", "RF / image", "outer taps on map")
_DRAWN = (0.5, 0.99)  # shares of contribution_squares that are drawn


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Inspection:
    """What a model sees of images of one size. `print` shows the table, the summary and the advice.

    Attributes:
        size: (height, width) of the images in px.
        layers: of `layer_receptive_fields`; the last one is the output.
        scores: the effective field, Tensor[H, W]; None if it was not measured.
        squares: of the effective field, see `contribution_squares`.
    """

    size: tuple[int, int]
    layers: list[LayerField]
    scores: Tensor | None = None
    squares: Sequence[Square] = ()

    @property
    def output(self) -> LayerField:
        return self.layers[-1]

    @property
    def advice(self) -> list[Advice]:
        """Return what does not suit images of this size, and what to do: see `field_advice`."""
        return field_advice(self.layers, self.size)

    @property
    def whole_image(self) -> list[LayerField]:
        """Return the layers through which the output sees the whole image, if it does."""
        if math.isfinite(max(self.output.field)):
            return []
        return [layer for layer in self.layers[:-1] if layer.kernel is None]

    def summary(self) -> list[str]:
        """Return sentences on what the output sees, on the positions of the coarsest map, and on pyramids."""
        local = self.output.local
        lines = []
        if math.isfinite(max(local)):
            shares = " x ".join(f"{extent / side:.2f}" for extent, side in zip(local, self.size, strict=True))
            lines.append(f"theoretical field {local[0]:.4g}x{local[1]:.4g} px, {shares} of the image's sides")
        if self.whole_image:
            names = [f"{layer.name} ({layer.kind})" for layer in self.whole_image]
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"the whole image is seen through {', '.join(names[:3])}{more}")
        maps = [layer for layer in self.layers if math.isfinite(max(*layer.local, *layer.stride))]
        coarsest = max(maps, key=lambda layer: max(layer.stride), default=None)
        if self.whole_image and coarsest is not None:
            field = [layer for layer in maps if layer.stride == coarsest.stride][-1].local
            count = [math.ceil(side / step) for side, step in zip(self.size, coarsest.stride, strict=True)]
            lines.append(
                f"without that, each of the {format_size(count)} positions of the coarsest map, one every "
                f"{format_pair(coarsest.stride)} px, sees {format_size(field)} px"
            )
        lines += [pyramid.describe(self.size) for pyramid in find_pyramids(self.layers)]
        return lines + [
            f"{100 * square.share:.0f} % of the contributions come from {square.side}x{square.side} px, "
            f"{100 * square.area_ratio:.3g} % of the image's area"
            for square in self.squares
        ]

    def table(self) -> str:
        """Return the layers as a table of plain text."""
        rows = [_HEADER, *self._rows()]
        widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
        lines = [
            "  ".join(cell.ljust(width) if column < 2 else cell.rjust(width) for column, (cell, width) in cells)
            for cells in (list(enumerate(zip(row, widths, strict=True))) for row in rows)
        ]
        return "\n".join(line.rstrip() for line in lines)

    def __str__(self) -> str:
        warnings = [f"warning: {each}" for each in self.advice]
        return "\n".join([self.table(), "", f"images of {format_size(self.size)} px", *self.summary(), *warnings])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """Return the same for a notebook."""
        head, *body = (
            "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
            for tag, row in [("th", _HEADER), *(("td", row) for row in self._rows())]
        )
        rows = "".join(f"<tr>{cells}</tr>" for cells in body)
        lines = [f"images of {format_size(self.size)} px", *self.summary()]
        summary = "".join(f"<p>{html.escape(line)}</p>" for line in lines)
        advice = "".join(
            f"<li>{html.escape(each.text)}<br><code>{html.escape(each.code)}</code></li>" for each in self.advice
        )
        return f"<table><tr>{head}</tr>{rows}</table>{summary}" + (f"<ul>{advice}</ul>" if advice else "")

    def plot(self) -> Any:
        """Return a matplotlib Figure: the effective field with boxes, or, if it was not measured, each layer's field.

        Raises:
            ImportError: without matplotlib.
        """
        try:
            from matplotlib.colors import LogNorm
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("plot needs the package matplotlib: pip install matplotlib") from error
        figure = Figure(figsize=(6, 5), layout="constrained")
        axes = figure.add_subplot()
        if self.scores is None:
            fields = [max(layer.local) if math.isfinite(max(layer.local)) else math.nan for layer in self.layers]
            axes.plot(fields, marker=".", label="receptive field, without layers that see the whole image")
            axes.axhline(min(self.size), color="0.3", linestyle="--", label="the image's shorter side")
            axes.set(xlabel="layer", ylabel="px")
        else:
            height, width = self.size
            relative = (self.scores / self.scores.max()).clamp(min=1e-4).cpu().numpy()
            shown = axes.imshow(relative, cmap="bone", norm=LogNorm(1e-4, 1), extent=(0, width, height, 0))
            figure.colorbar(shown, label="contribution, relative to the largest")
            for index, (name, (tall, wide)) in enumerate(self.boxes().items()):
                left, top = (width - wide) / 2, (height - tall) / 2
                corners = [left, left + wide, left + wide, left, left], [top, top, top + tall, top + tall, top]
                axes.plot(*corners, color=("#0072B2", "#D55E00", "#00795B")[index], label=name)
            axes.set(xlabel="px", ylabel="px")
        figure.legend(loc="outside lower center")
        return figure

    def boxes(self) -> dict[str, tuple[float, float]]:
        """Return (height, width) in px of the fields that a figure shows, by their names."""
        found = {}
        if math.isfinite(max(self.output.local)):
            found["theoretical field" + ", and the whole image" * bool(self.whole_image)] = self.output.local
        for square in self.squares:
            if square.share in _DRAWN:
                found[f"{100 * square.share:.0f} % of the contributions"] = (float(square.side),) * 2
        return found

    def _rows(self) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = []
        for layer in self.layers:
            field = _pair(layer.local)
            share = _pair([extent / side for extent, side in zip(layer.local, self.size, strict=True)], digits=3)
            if not math.isfinite(max(layer.field)):
                field, share = "whole image" + f" + {field}" * (field != "-"), "1"
            taps = outer_taps_on_map(layer, self.size)
            shape = (_pair(layer.kernel), _pair(layer.dilation), _pair(layer.stride))
            rows.append((layer.name, layer.kind, *shape, field, share, "" if taps is None else f"{100 * taps:.0f} %"))
        return rows


def inspect(
    model: nn.Module, size: int | tuple[int, int], images: Iterable[Tensor] | None = None, channels: int = 3
) -> Inspection:
    """Measure what a model sees of images of one size, and say what does not suit them.

    The receptive field of every layer is exact; the effective field is that of the model's own weights on the images.

    Args:
        model: maps Tensor[1, channels, H, W] to an output that `rfield.receptive_field.probe.output_map` accepts.
        size: side, or (height, width), of the images in px.
        images: Tensor[N, channels, H, W] of that size, or an iterable of Tensor[channels, H, W]; an empty list leaves
            the effective field out. Default: four images of noise.
        channels: number of image channels.

    Raises:
        ValueError: if the model cannot be run on images of that size, or its field cannot be measured.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=8, padding=1), nn.Conv2d(8, 8, 3, padding=9, dilation=9))
        >>> found = inspect(model, 100, images=[])
        >>> found.output.local, found.advice[0].code
        ((147.0, 147.0), "rfield.set_dilations(model, {'1': (5, 5)})")
    """
    side = (size, size) if isinstance(size, int) else (size[0], size[1])
    if min(side) < 1:
        raise ValueError(f"the size of the images must be at least 1x1 px, got {format_size(side)}")
    layers = layer_receptive_fields(model, channels, side)
    shown = random_images(side, 4, channels) if images is None else images
    scores, squares = measure_effective(model, shown, side)
    return Inspection(side, layers, scores, squares)


def measure_effective(
    model: nn.Module, images: Iterable[Tensor], size: tuple[int, int], measure: Measure = "luo"
) -> tuple[Tensor | None, list[Square]]:
    """Return the effective field, Tensor[H, W], and its squares; None and no squares without images.

    Raises:
        ValueError: as `effective_receptive_field`; or if an image has another size, or the model cannot be run on it.
    """
    remaining = iter(images)
    first = next(remaining, None)
    if first is None:
        return None, []
    if first.shape[-2:] != size:
        raise ValueError(f"the images have {format_size(first.shape[-2:])} px, but size is {format_size(size)} px")

    try:
        scores = effective_receptive_field(model, itertools.chain([first], remaining), measure)
    except ValueError:
        raise
    except Exception as error:  # each network has its own exceptions
        raise ValueError(f"the model cannot be run on images of {format_size(size)} px: {error}") from error
    return scores, contribution_squares(scores, compress=measure == "replknet")


def _pair(values: Sequence[float] | None, digits: int = 4) -> str:
    if values is None or not math.isfinite(max(values)):
        return "-"
    return format_pair(values, digits)
