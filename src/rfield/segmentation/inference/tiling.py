"""Label large images in overlapping tiles: the same logits in less memory."""

import dataclasses
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from rfield.layers import GatedConv2d, ReceptiveFieldRegulator
from rfield.receptive_field.effective import contribution_squares, effective_receptive_field, random_images
from rfield.receptive_field.theoretical import theoretical_receptive_field
from rfield.segmentation.models import ParsingNetwork
from rfield.segmentation.models.heads import SinglePathHead

Tile = tuple[int, int, Tensor]
"""The first row and column of a part of an image, and its logits Tensor[K, h, w]."""

DEFAULT_BUDGET = 2 * 2**30
"""Bytes that the maps of one image may take."""

# Copies of the largest layer's input and output exist at the same time, and a layer's working memory.
_COPIES = 2
# The share of the contributions that a tile's margin must hold if the network sees the whole image.
_SHARE = 0.99
# Maximum side in px of the images on which it is measured, and their number.
_MEASURED_SIDE, _MEASURED = 513, 2


@dataclasses.dataclass(frozen=True)
class _Span:
    """One tile along one axis, in px of the padded image: the computed range, and the kept range."""

    start: int
    stop: int
    kept_start: int
    kept_stop: int


class Tiler:
    """Compute the logits of an image at once, or in tiles if its maps would exceed a memory budget.

    Tiles overlap by half of the receptive field on each side, and start at multiples of the stride, so that their
    logits equal those of the whole image. If the network sees the whole image (global pooling, squeeze-excite,
    attention), they overlap by half of its effective receptive field, and a line on stderr says that the result is
    approximate.

    Args:
        network: in eval mode, on the device to compute on.
        frozen: round the features as the feature cache does.
        memory_budget: maximum number of bytes for the maps of one image, as estimated from its layers.

    Example:
        >>> from rfield.segmentation.models import small_cnn
        >>> tiler = Tiler(small_cnn(5, dilation=2).eval(), memory_budget=2**20)
        >>> [tuple(logits.shape) for _, _, logits in tiler(torch.randn(3, 70, 120))]
        [(5, 70, 40), (5, 70, 40), (5, 70, 40)]
    """

    def __init__(self, network: ParsingNetwork, frozen: bool = False, memory_budget: float = DEFAULT_BUDGET) -> None:
        self.network = network
        self.frozen = frozen
        self.memory_budget = memory_budget
        self._stride = network.stride
        # Bytes per px of the backbone's maps and of the others, and px of margin; computed when they are needed.
        self._cost: tuple[float, float] | None = None
        self._margin: int | None = None
        # The reasons why tiles differ from the whole image, and the notes that were printed.
        self._reasons: dict[str, None] = {}
        self._printed: set[str] = set()

    @torch.inference_mode()
    def __call__(self, image: Tensor) -> Iterator[Tile]:
        """Yield the tiles of a normalised image Tensor[3, H, W]; together they cover it once."""
        height, width = image.shape[1:]
        padded = self.network.pad(image[None])
        area = padded.shape[2] * padded.shape[3]
        backbone, rest = self._costs(padded)
        if max(backbone, rest) * area <= self.memory_budget:
            yield 0, 0, self._logits(padded)[0, :, :height, :width]
            return
        resizes = _resizes(self.network)
        if resizes and rest * area <= self.memory_budget:
            yield 0, 0, self._head_whole(padded, backbone)[0, :, :height, :width]
            return
        if resizes:
            self._reasons["the regulator's resizes depend on the image's size"] = None
        for rows, columns in self._tiles(padded, max(backbone, rest), self._network_margin(padded), (height, width)):
            logits = self._logits(padded[:, :, rows.start : rows.stop, columns.start : columns.stop])[0]
            kept = logits[
                :,
                rows.kept_start - rows.start : min(rows.kept_stop, height) - rows.start,
                columns.kept_start - columns.start : min(columns.kept_stop, width) - columns.start,
            ]
            yield rows.kept_start, columns.kept_start, kept

    def whole(self, image: Tensor) -> Tensor:
        """Return the logits Tensor[K, H, W] of a whole image."""
        return join_tiles(self(image), (image.shape[1], image.shape[2]))

    def _logits(self, padded: Tensor) -> Tensor:
        return self._logits_of(self._features(padded), (padded.shape[2], padded.shape[3]))

    def _features(self, padded: Tensor) -> tuple[Tensor, ...]:
        images = padded.to(next(self.network.parameters()).device).contiguous(memory_format=torch.channels_last)
        features = self.network.features(images)
        if not self.frozen:
            return features
        return tuple(each.half().float().contiguous(memory_format=torch.channels_last) for each in features)

    def _logits_of(self, features: tuple[Tensor, ...], size: tuple[int, int]) -> Tensor:
        return self.network.logits_of(features, size)

    def _head_whole(self, padded: Tensor, cost: float) -> Tensor:
        """Compute the features in tiles and the logits at once, for resizes that need the whole map."""
        margin = self._margin_of(self.network.backbone, self.network.backbone, padded)
        whole: list[Tensor] = []
        for rows, columns in self._tiles(padded, cost, margin, (padded.shape[2], padded.shape[3])):
            parts = self._features(padded[:, :, rows.start : rows.stop, columns.start : columns.stop])
            for index, part in enumerate(parts):
                step = self._stride if part is parts[-1] else self.network.logit_stride
                if len(whole) <= index:
                    sides = [(side - 1) // step + 1 for side in padded.shape[2:]]
                    whole.append(part.new_empty(1, part.shape[1], *sides))
                slices = [
                    (
                        slice(span.kept_start // step, (span.kept_stop - 1) // step + 1),
                        slice((span.kept_start - span.start) // step, (span.kept_stop - 1 - span.start) // step + 1),
                    )
                    for span in (rows, columns)
                ]
                whole[index][:, :, slices[0][0], slices[1][0]] = part[:, :, slices[0][1], slices[1][1]]
        features = tuple(each.contiguous(memory_format=torch.channels_last) for each in whole)
        return self._logits_of(features, (padded.shape[2], padded.shape[3]))

    def _tiles(self, padded: Tensor, cost: float, margin: int, size: tuple[int, int]) -> list[tuple[_Span, _Span]]:
        """Return the tiles that cover the first rows and columns of a padded image, row by row."""
        room = self.memory_budget / cost
        least = 2 * margin + max(margin, 4 * self._stride) + 1
        height = min(padded.shape[2], max(least, math.isqrt(int(room))))
        width = min(padded.shape[3], max(least, int(room / height)))
        height = min(padded.shape[2], max(height, int(room / width)))
        if height * width > room:
            takes, given = height * width * cost / 2**30, self.memory_budget / 2**30
            text = f"tiles of {height}x{width} px, the smallest for this receptive field, take about {takes:.2g} GiB"
            self._print_once(f"{text}, more than the memory budget of {given:.2g}")
        tiles = [
            (rows, columns)
            for rows in _spans(padded.shape[2], height, margin, self._stride, size[0])
            for columns in _spans(padded.shape[3], width, margin, self._stride, size[1])
        ]
        for reason in self._reasons if len(tiles) > 1 else ():
            self._print_once(
                f"{reason}: an image above the memory budget is labelled in tiles, and the result is approximate"
            )
        return tiles

    def _network_margin(self, padded: Tensor) -> int:
        if self._margin is None:
            self._margin = self._margin_of(self.network, _Unpadded(self.network), padded)
        return self._margin

    def _margin_of(self, part: nn.Module, runs: nn.Module, padded: Tensor) -> int:
        """Return the margin of a tile in px around its kept part, a multiple of the stride."""
        field = _field(part)
        if math.isinf(field):
            self._reasons["the network sees the whole image, through global pooling, squeeze-excite or attention"] = (
                None
            )
            field = _effective_field(runs, padded, self._stride)
        # Two strides more, for the neighbours that resizes and fractional dilations read.
        return (math.ceil(field / 2 / self._stride) + 2) * self._stride

    def _costs(self, padded: Tensor) -> tuple[float, float]:
        """Return the bytes per px of the image for the backbone, and for the rest with the logits."""
        if self._cost is None:
            side = 16 * self._stride + 1
            part = padded[:, :, :side, :side]
            pixels = part.shape[2] * part.shape[3]
            features, backbone = _peak(lambda: self._features(part), self.network.backbone)
            others = [module for module in self.network.children() if module is not self.network.backbone]
            logits, rest = _peak(lambda: self._logits_of(features, (part.shape[2], part.shape[3])), *others)
            held = _bytes(features)
            self._cost = backbone / pixels, (rest + held + _COPIES * _bytes(logits)) / pixels
        return self._cost

    def _print_once(self, text: str) -> None:
        """Print a note on stderr, once."""
        if text not in self._printed:
            self._printed.add(text)
            print(f"note: {text}", file=sys.stderr)


def join_tiles(tiles: Iterable[Tile], size: tuple[int, int]) -> Tensor:
    """Join the tiles of an image of size (H, W) to its logits Tensor[K, H, W]."""
    whole: Tensor | None = None
    for top, left, logits in tiles:
        if logits.shape[1:] == size:
            return logits
        whole = logits.new_empty(len(logits), *size) if whole is None else whole
        whole[:, top : top + logits.shape[1], left : left + logits.shape[2]] = logits
    if whole is None:
        raise ValueError("there are no tiles")
    return whole


class _Unpadded(nn.Module):
    """A network on images of k * stride + 1 px, without its padding."""

    def __init__(self, network: ParsingNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        return self.network.logits(image)


def _spans(length: int, tile: int, margin: int, stride: int, wanted: int) -> list[_Span]:
    """Return the tiles along an axis of `length` = k * stride + 1 px that keep each of the first `wanted` px once.

    >>> _spans(41, 29, 4, 4, 40)
    [_Span(start=0, stop=25, kept_start=0, kept_stop=20), _Span(start=16, stop=41, kept_start=20, kept_stop=40)]
    """
    if tile >= length:
        return [_Span(0, length, 0, wanted)]
    core = max(1, (tile - 1 - 2 * margin) // stride) * stride
    parts = math.ceil(wanted / core)
    core = math.ceil(wanted / parts / stride) * stride  # as equal as possible
    spans = []
    for start in range(0, wanted, core):
        stop = min(start + core, wanted)
        reach = min(start + core + margin + 1, length)
        spans.append(_Span(max(0, start - margin), reach, start, stop))
    return spans


def _resizes(network: ParsingNetwork) -> bool:
    """Return whether a map is resized by a factor that is not 1; its grid then depends on the map's size."""
    for module in network.modules():
        if isinstance(module, ReceptiveFieldRegulator) and not module.snapped:
            if module.realised_dilation != module.base_dilation:
                return True
        elif isinstance(module, fx.GraphModule) and "factor" in module.meta:
            return True
    return False


def _field(part: nn.Module) -> float:
    """Return the larger side of the receptive field in px; infinite for the whole image."""
    # Both are left out of the theoretical field.
    pooled = any(
        (isinstance(layer, GatedConv2d) and layer.gates == "image")
        or (isinstance(layer, SinglePathHead) and layer.branch == "pool")
        for layer in part.modules()
    )
    return math.inf if pooled else max(theoretical_receptive_field(part))


def _effective_field(runs: nn.Module, padded: Tensor, stride: int) -> float:
    """Measure on noise the side in px of the square that most contributions to an output come from."""
    sides = [min(side, (_MEASURED_SIDE - 1) // stride * stride + 1) for side in padded.shape[2:]]
    with torch.inference_mode(False):
        scores = effective_receptive_field(runs, random_images((sides[0], sides[1]), _MEASURED))
    return float(contribution_squares(scores, (_SHARE,))[0].side)


def _peak(run: Callable[[], Any], *parts: nn.Module) -> tuple[Any, float]:
    """Return the result of a call, and an estimate of the bytes that it holds at once."""
    most = 0.0

    def see(module: nn.Module, inputs: Any, output: Any) -> None:
        nonlocal most
        most = max(most, _bytes(inputs) + _bytes(output))

    layers = {module for part in parts for module in part.modules() if not list(module.children())}
    handles = [layer.register_forward_hook(see) for layer in layers]
    try:
        return run(), _COPIES * most
    finally:
        for handle in handles:
            handle.remove()


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(_bytes, value)) if isinstance(value, (tuple, list)) else 0
