"""Measure the receptive field of every layer of a network by gradients."""

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import CheckpointError

from rfield.layers import AdaptiveConv2d, GatedConv2d, ReceptiveFieldRegulator
from rfield.layers.dilation import Pair, as_pair
from rfield.receptive_field.absolute_gradient import UnknownFieldError
from rfield.receptive_field.positive_gradients import PositiveGradients
from rfield.receptive_field.probe import CHECKPOINTS, NO_GRADIENT, extent, output_map, probe_copy
from rfield.text import format_size

# (short side, long sides) in px of the strips that are probed: k * 2^n + 1 px, or k * 2^n px for networks that accept
# only such sizes.
_STRIPS = ((65, (257, 513, 1025, 2049, 4097)), (64, (256, 512, 1024, 2048, 4096)))
# Key of the model's output, which no layer can have: a layer may be called `output`.
_OUTPUT = "#output"
# After this many layers whose fields are larger than the strip, try a longer one.
_MAX_MISSES = 3


@dataclasses.dataclass(frozen=True)
class LayerField:
    """The receptive field of the central pixel of a layer's output. Pairs are (height, width).

    Attributes:
        name: as in `model.named_modules()`, with `#2` for the second call; the last one, `output`, is the model's
            output.
        kind: class of the layer.
        kernel: taps; None for a layer without a kernel.
        dilation: distance between taps in px of the layer's input map; inside a regulator, in px of the regulator's
            input map.
        stride: input px between neighbouring outputs; infinite if there is only one.
        tap_spacing: input px between taps.
        field: receptive field in input px; infinite for the whole image.
        local: the same without layers that see the whole image at once: global pooling, attention, norms over the map.
        pads: whether the layer pads its input with zeros.
        parallel: name of the list of parallel layers that contains it, such as those of an atrous spatial pyramid.
    """

    name: str
    kind: str
    kernel: tuple[int, int] | None
    dilation: Pair | None
    stride: Pair
    tap_spacing: Pair | None
    field: Pair
    local: Pair
    pads: bool
    parallel: str | None


@dataclasses.dataclass(frozen=True)
class _Call:
    """One call of a layer.

    Attributes:
        module: the layer; None for the model's output.
        counts: sizes (height, width) of the input map and of the output map.
        pixel: sum over the channels of the central output pixel.
    """

    module: nn.Module | None
    counts: tuple[tuple[int, int] | None, tuple[int, int] | None]
    pixel: Tensor


def layer_receptive_fields(
    model: nn.Module, channels: int = 3, size: tuple[int, int] | None = None
) -> list[LayerField]:
    """Measure the receptive fields of all convolutions and pools of a model, and of its output, in execution order.

    Other layers are listed if they see the whole image. A copy of the model (`rfield.receptive_field.probe.probe_copy`)
    runs on strips, as long as the fields need (see `probe_window`). The gradient of each layer's central output pixel
    shows its field, so that branches and functional calls count as they are executed.

    Args:
        model: maps Tensor[N, channels, H, W] to an output that `rfield.receptive_field.probe.output_map` accepts.
        channels: number of image channels.
        size: (height, width) of the image in px, for models that accept only one size; fields that reach the image's
            edge are then infinite.

    Raises:
        ValueError: if the model runs neither on strips nor on an image of that size, no gradient reaches the image, or
            a layer samples its input at positions that are random or depend on the image.

    Example:
        >>> layers = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 3, padding=4, dilation=4))
        >>> [(layer.name, layer.stride, layer.local) for layer in layer_receptive_fields(layers)]
        [('0', (2.0, 2.0), (3.0, 3.0)), ('1', (2.0, 2.0), (19.0, 19.0)), ('output', (2.0, 2.0), (19.0, 19.0))]
    """
    probe = probe_copy(model)
    tries: list[list[list[tuple[int, int]]]] = [
        [[(long, short) for long in lengths], [(short, long) for long in lengths]] for short, lengths in _STRIPS
    ]
    if size is not None:
        tries.append([[size], [size]])
    reason = ""
    for shapes in tries:
        try:
            axes = [_probe_axis(probe, channels, shapes[axis], axis) for axis in (0, 1)]
        except UnknownFieldError:
            raise
        except CheckpointError as error:
            raise ValueError(CHECKPOINTS) from error
        except Exception as error:  # models report sizes that they do not accept by errors of any class
            reason = reason or str(error)
            continue
        return [
            _layer_field(model, name, module, measured, axes[1][name][1])
            for name, (module, measured) in axes[0].items()
            if name in axes[1]
        ]
    tried = "" if size is None else f" or {format_size(size)} px"
    raise ValueError(f"the model cannot be run on images of 65x257, 64x256{tried}: {reason}")


@dataclasses.dataclass(frozen=True)
class _Measured:
    """A layer's field along one axis, and px of the image between neighbours of its output and input maps."""

    field: float
    local: float
    stride: float
    input_stride: float


def _probe_axis(
    probe: nn.Module, channels: int, shapes: Sequence[tuple[int, int]], axis: int
) -> dict[str, tuple[nn.Module | None, _Measured]]:
    """Measure all layers along one axis, on images of ascending sizes until every field has been found."""
    counts: dict[str, list[tuple[int | None, int | None]]] = {}
    modules: dict[str, nn.Module | None] = {}
    fields: dict[str, tuple[float, float]] = {}
    for index, shape in enumerate(shapes):
        if index >= 2 and len(fields) == len(modules):
            break
        image = torch.ones(1, channels, *shape, dtype=torch.float64, requires_grad=True)
        with PositiveGradients(axis) as mode, torch.enable_grad(), _recorded(probe, mode) as calls:
            output = output_map(probe(image))
            calls[_OUTPUT] = _Call(None, (None, _sides(output)), _central(output))
        if not calls[_OUTPUT].pixel.requires_grad:
            raise UnknownFieldError(NO_GRADIENT)
        calls = {name: call for name, call in calls.items() if call.pixel.requires_grad}
        if index < 2:  # two sizes give the strides
            modules = {name: call.module for name, call in calls.items() if not index or name in modules}
            for name, call in calls.items():
                counts.setdefault(name, []).append(tuple(sides and sides[axis] for sides in call.counts))  # type: ignore[arg-type]
        missing = {name: calls[name] for name in modules if name not in fields and name in calls}
        fields |= _fields(missing, image, mode)
    lengths = [shape[axis] for shape in shapes[:2]]
    return {
        name: (
            module,
            _Measured(
                *fields.get(name, (math.inf, math.inf)),
                _step(lengths, [outer for _, outer in counts[name]]),
                _step(lengths, [inner for inner, _ in counts[name]]),
            ),
        )
        for name, module in modules.items()
        if fields.get(name) != (0.0, math.inf)  # the layer does not depend on the image
    }


def _fields(calls: dict[str, _Call], image: Tensor, mode: PositiveGradients) -> dict[str, tuple[float, float]]:
    """Return the fields (whole, local) of the layers whose local field the image contains."""
    fields: dict[str, tuple[float, float]] = {}
    misses = 0
    for name, call in calls.items():
        mode.sees_everything = False
        (grad,) = torch.autograd.grad(call.pixel, image, retain_graph=True, allow_unused=True)
        local = 0.0 if grad is None else extent(grad[0].abs().sum((0, 2 - mode.axis)))
        if local == 0 and not mode.sees_everything and name == _OUTPUT:
            raise UnknownFieldError(NO_GRADIENT)
        if math.isfinite(local):
            fields[name] = (math.inf if mode.sees_everything else local, local or math.inf)
        else:
            misses += 1
        if misses == _MAX_MISSES:
            break
    return fields


def _step(lengths: Sequence[int], counts: Sequence[int | None]) -> float:
    """Return the px of the image between neighbours of a map, from the map's sides for images of one or two lengths."""
    if None in counts or len(counts) != len(lengths):
        return math.inf
    first, last = counts[0] or 0, counts[-1] or 0
    if len(lengths) == 1:
        return lengths[0] / first if first > 1 else math.inf
    return math.inf if last == first else (lengths[1] - lengths[0]) / (last - first)


@contextmanager
def _recorded(model: nn.Module, mode: PositiveGradients) -> Iterator[dict[str, _Call]]:
    """Record, within the block, the calls of layers that have a kernel or see the whole image, by their names."""
    calls: dict[str, _Call] = {}
    running: list[str] = []
    global_layers: set[str] = set()
    times: Counter[str] = Counter()
    mode.on_global_layer = lambda: global_layers.add(running[-1]) if running else None

    def enter(name: str, module: nn.Module, inputs: Any) -> None:
        running.append(name)

    def leave(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        running.pop()
        while isinstance(output, (tuple, list)) and output:
            output = output[0]
        if not isinstance(output, Tensor) or not (_has_kernel(module) or name in global_layers):
            return
        global_layers.discard(name)
        times[name] += 1
        key = name if times[name] == 1 else f"{name}#{times[name]}"
        pixel = _central(output) if output.dim() == 4 else output.sum()
        calls[key] = _Call(module, (_sides(inputs[0] if inputs else None), _sides(output)), pixel)

    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(functools.partial(enter, name)))
        handles.append(module.register_forward_hook(functools.partial(leave, name)))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _has_kernel(module: nn.Module) -> bool:
    """Return whether a module is a convolution or a pool."""
    if isinstance(module, (nn.modules.conv._ConvNd, AdaptiveConv2d, GatedConv2d)):
        return True  # may have children: parametrizations, an activation, or gates
    return hasattr(module, "kernel_size") and not list(module.children())


def _central(output: Tensor) -> Tensor:
    """Return the sum over the channels of the central pixel, which later changes of the map in place do not affect."""
    return output[0, :, output.shape[2] // 2, output.shape[3] // 2].sum()


def _sides(map: Any) -> tuple[int, int] | None:
    """Return (height, width) of a map, or None for anything else."""
    return (map.shape[2], map.shape[3]) if isinstance(map, Tensor) and map.dim() == 4 else None


def _layer_field(
    model: nn.Module, name: str, module: nn.Module | None, height: _Measured, width: _Measured
) -> LayerField:
    """Return a layer's row of the result from its measurements along both axes."""
    kernel = dilation = spacing = parallel = None
    pads = False
    if module is not None and _has_kernel(module):
        kernel = as_pair(module.kernel_size)
        own: Pair = as_pair(getattr(module, "dilation", 1))
        if isinstance(module, AdaptiveConv2d):
            own = module.realised_dilation
        inputs = (height.input_stride, width.input_stride)
        spacing = (own[0] * inputs[0], own[1] * inputs[1])
        regulated = _regulated(model, name)
        dilation = (own[0] * regulated[0], own[1] * regulated[1])
        padding: Any = getattr(module, "padding", 0)
        pads = padding == "same" or (not isinstance(padding, str) and max(as_pair(padding)) > 0)
    for ancestor, part in model.named_modules() if module is not None else ():
        if type(part) in (nn.ModuleList, nn.ModuleDict) and name.startswith(f"{ancestor}."):
            parallel = ancestor  # the innermost list comes last
    return LayerField(
        "output" if module is None else name,
        "" if module is None else parametrize.type_before_parametrizations(module).__name__,
        kernel,
        dilation,
        (height.stride, width.stride),
        spacing,
        (height.field, width.field),
        (height.local, width.local),
        pads,
        parallel,
    )


def _regulated(model: nn.Module, name: str) -> Pair:
    """Return the factor (height, width) by which the regulators around a layer change its dilation."""
    height = width = 1.0
    for ancestor, part in model.named_modules():
        inside = isinstance(part, ReceptiveFieldRegulator) and name.startswith(f"{ancestor}." if ancestor else "")
        if inside and not part.snapped:
            height *= part.realised_dilation[0] / part.base_dilation[0]
            width *= part.realised_dilation[1] / part.base_dilation[1]
    return height, width
