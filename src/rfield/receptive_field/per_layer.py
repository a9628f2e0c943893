"""How far every layer of a network sees, probed by gradients, and what is worth a warning in that."""

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

from rfield.layers import AdaptiveConv2d, ReceptiveFieldRegulator
from rfield.receptive_field.absolute_gradient import UnknownFieldError
from rfield.receptive_field.let_pass import LetPass
from rfield.receptive_field.theoretical import CHECKPOINTS, NO_GRADIENT, extent, output_map, probe_copy

Pair = tuple[float, float]

# (short side, long sides) in px of the strips that are probed: of k * 2^n + 1 px, and for networks that insist on it
# of k * 2^n px.
_STRIPS = ((65, (257, 513, 1025, 2049, 4097)), (64, (256, 512, 1024, 2048, 4096)))
# The key of what the model returns; the model may have a layer that is called `output`.
_OUTPUT = "#output"
# So many layers in a row that see past the strip, and the rest is left to a longer one.
_MISSES = 3


@dataclasses.dataclass(frozen=True)
class LayerField:
    """What one pixel in the middle of a layer's output sees. Pairs are (height, width), px are the image's."""

    name: str
    """As in `model.named_modules()`, with `#2` for its second call; `output`, the last, for what the model returns."""
    kind: str
    """The class of the layer."""
    kernel: tuple[int, int] | None
    """Taps, or None for what has no kernel."""
    dilation: Pair | None
    """Between taps, in px of the layer's input map; inside a regulator, in px of the regulator's."""
    stride: Pair
    """px between neighbouring outputs; infinite if there is one for the whole image."""
    tap_spacing: Pair | None
    """px between taps."""
    field: Pair
    """Receptive field in px; infinite for the whole image."""
    local: Pair
    """The same without what looks at the whole image at once: global pooling, attention, norms over the map."""
    pads: bool
    """Whether zeros are around the layer's input."""
    parallel: str | None
    """The list of layers side by side that it is in, such as an atrous spatial pyramid's."""


@dataclasses.dataclass(frozen=True)
class _Call:
    module: nn.Module | None
    counts: tuple[tuple[int, int] | None, tuple[int, int] | None]
    """(height, width) of the input and of the output in map px."""
    pixel: Tensor


def layer_receptive_fields(
    model: nn.Module, channels: int = 3, size: tuple[int, int] | None = None
) -> list[LayerField]:
    """Measures what every convolution and pool of any module sees, and the module's output, in order of execution.

    Other layers are listed where they look at the whole image. It runs `rfield.receptive_field.theoretical.probe_copy`
    on strips, as long as the fields need (see `probe_window`), and takes the gradient of each layer's central output
    pixel, so that branches and functional calls count as they are executed.

    Args:
        model: maps Tensor[N, channels, H, W] to what `output_map` understands.
        channels: of the image.
        size: (height, width) of the image in px for models that take images of one size only; their fields are
            infinite where they reach the image's edge.

    Raises:
        ValueError: the model runs neither on strips nor on an image of that size, no gradient reaches the image, or a
            layer reads places that depend on the image or on chance; says why.

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
    fault = ""
    for shapes in tries:
        try:
            axes = [_probe_axis(probe, channels, shapes[axis], axis) for axis in (0, 1)]
        except UnknownFieldError:
            raise
        except CheckpointError as error:
            raise ValueError(CHECKPOINTS) from error
        except Exception as error:  # A network of fixed or of even sizes says so in its own way.
            fault = fault or str(error)
            continue
        return [
            _layer_field(model, name, module, measured, axes[1][name][1])
            for name, (module, measured) in axes[0].items()
            if name in axes[1]
        ]
    tried = "" if size is None else f" or {size[0]}x{size[1]} px"
    raise ValueError(f"the model cannot be run on images of 65x257, 64x256{tried}: {fault}")


@dataclasses.dataclass(frozen=True)
class _Measured:
    """One layer along one axis."""

    field: float
    local: float
    stride: float
    input_stride: float


def _probe_axis(
    probe: nn.Module, channels: int, shapes: Sequence[tuple[int, int]], axis: int
) -> dict[str, tuple[nn.Module | None, _Measured]]:
    counts: dict[str, list[tuple[int | None, int | None]]] = {}
    modules: dict[str, nn.Module | None] = {}
    fields: dict[str, tuple[float, float]] = {}
    for index, shape in enumerate(shapes):
        if index >= 2 and len(fields) == len(modules):
            break
        image = torch.ones(1, channels, *shape, dtype=torch.float64, requires_grad=True)
        with LetPass(axis) as mode, torch.enable_grad(), _recorded(probe, mode) as calls:
            output = output_map(probe(image))
            calls[_OUTPUT] = _Call(None, (None, _sides(output)), _central(output))
        if not calls[_OUTPUT].pixel.requires_grad:
            raise UnknownFieldError(NO_GRADIENT)
        calls = {name: call for name, call in calls.items() if call.pixel.requires_grad}
        if index < 2:
            modules = {name: call.module for name, call in calls.items() if not index or name in modules}
            for name, call in calls.items():
                counts.setdefault(name, []).append(tuple(sides and sides[axis] for sides in call.counts))  # type: ignore[arg-type]
        missed = 0
        for name in modules:
            if name in fields or name not in calls:
                continue
            mode.looks_everywhere = False
            (grad,) = torch.autograd.grad(calls[name].pixel, image, retain_graph=True, allow_unused=True)
            local = 0.0 if grad is None else extent(grad[0].abs().sum((0, 2 - axis)))
            if local == 0 and not mode.looks_everywhere and name == _OUTPUT:
                raise UnknownFieldError(NO_GRADIENT)
            if math.isfinite(local):
                fields[name] = (math.inf if mode.looks_everywhere else local, local or math.inf)
            else:
                missed += 1
            if missed == _MISSES:
                break
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
        if fields.get(name) != (0.0, math.inf)  # no path leads there from the image
    }


def _step(lengths: Sequence[int], counts: Sequence[int | None]) -> float:
    """px of the image between neighbours of a map, from the map's sides for images of two lengths, or of one."""
    if None in counts or len(counts) != len(lengths):
        return math.inf
    first, last = counts[0] or 0, counts[-1] or 0
    if len(lengths) == 1:
        return lengths[0] / first if first > 1 else math.inf
    return math.inf if last == first else (lengths[1] - lengths[0]) / (last - first)


@contextmanager
def _recorded(model: nn.Module, mode: LetPass) -> Iterator[dict[str, _Call]]:
    """While it runs, the calls of layers with a kernel and of those that look at the whole image."""
    calls: dict[str, _Call] = {}
    running: list[str] = []
    looking: set[str] = set()
    times: Counter[str] = Counter()
    mode.looking = lambda: looking.add(running[-1]) if running else None

    def enter(name: str, module: nn.Module, inputs: Any) -> None:
        running.append(name)

    def leave(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        running.pop()
        while isinstance(output, (tuple, list)) and output:
            output = output[0]
        if not isinstance(output, Tensor) or not (_has_kernel(module) or name in looking):
            return
        looking.discard(name)
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
    if isinstance(module, (nn.modules.conv._ConvNd, AdaptiveConv2d)):
        return True  # also with parametrized weights, or an activation of its own, inside
    return hasattr(module, "kernel_size") and not list(module.children())


def _central(output: Tensor) -> Tensor:
    # Taken at once: the map may be changed in place.
    return output[0, :, output.shape[2] // 2, output.shape[3] // 2].sum()


def _sides(map: Any) -> tuple[int, int] | None:
    return (map.shape[2], map.shape[3]) if isinstance(map, Tensor) and map.dim() == 4 else None


def _layer_field(
    model: nn.Module, name: str, module: nn.Module | None, height: _Measured, width: _Measured
) -> LayerField:
    kernel = dilation = spacing = parallel = None
    pads = False
    if module is not None and _has_kernel(module):
        kernel = _pair(module.kernel_size)
        own: Pair = _pair(getattr(module, "dilation", 1))
        if isinstance(module, AdaptiveConv2d):
            own = module.realised_dilation
        inputs = (height.input_stride, width.input_stride)
        spacing = (own[0] * inputs[0], own[1] * inputs[1])
        regulated = _regulated(model, name)
        dilation = (own[0] * regulated[0], own[1] * regulated[1])
        padding: Any = getattr(module, "padding", 0)
        pads = padding == "same" or (not isinstance(padding, str) and max(_pair(padding)) > 0)
    for above, part in model.named_modules() if module is not None else ():
        if type(part) in (nn.ModuleList, nn.ModuleDict) and name.startswith(f"{above}."):
            parallel = above  # the nearest comes last
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
    """By how much the regulators around a layer change its dilation."""
    height = width = 1.0
    for above, part in model.named_modules():
        inside = isinstance(part, ReceptiveFieldRegulator) and name.startswith(f"{above}." if above else "")
        if inside and not part.snapped:
            height *= part.realised_dilation[0] / part.base_dilation[0]
            width *= part.realised_dilation[1] / part.base_dilation[1]
    return height, width


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def field_warnings(layers: Sequence[LayerField], size: tuple[int, int]) -> list[str]:
    """What in the fields of `layer_receptive_fields` does not suit images of a size.

    Dilated layers that see more than the image, dilated layers most of whose taps read zeros, and an output that sees
    less than a tenth of the image's area.

    Args:
        layers: the last is the output.
        size: (height, width) in px.

    Example:
        >>> layers = nn.Sequential(nn.Conv2d(3, 8, 3, stride=8, padding=1), nn.Conv2d(8, 8, 3, padding=9, dilation=9))
        >>> print(*field_warnings(layer_receptive_fields(layers), (100, 100)), sep="\\n")
        1: rate 9 at output stride 8 sees 1.5 x the image (147 of 100 px)
        1: rate 9 on a map of 13x13 px reads padding with 71 % of its taps
    """
    dilated = [layer for layer in layers if layer.kernel and max(layer.kernel) > 1 and max(layer.dilation or (1,)) > 1]
    groups: dict[tuple[Any, ...], list[LayerField]] = {}
    for layer in dilated:
        groups.setdefault((layer.parallel,) if layer.parallel else (layer.dilation, layer.stride), []).append(layer)
    found = []
    for group in groups.values():
        axis = max((0, 1), key=lambda axis: max(layer.local[axis] for layer in group) / size[axis])
        wide = [layer for layer in group if size[axis] < layer.local[axis] < math.inf]
        if wide:
            found.append(_width_warning(group, wide, axis, size[axis]))
    for layer in dilated:
        found += _padding_warning(layer, size)
    local = layers[-1].local
    seen = math.prod(min(extent / side, 1.0) for extent, side in zip(local, size, strict=True))
    if seen < 0.1 and math.isfinite(max(layers[-1].field)):
        of = f"{_number(local[0])}x{_number(local[1])} of {size[0]}x{size[1]} px"
        found.append(f"the output sees {100 * seen:.2g} % of the image ({of})")
    return found


def _width_warning(group: Sequence[LayerField], wide: Sequence[LayerField], axis: int, side: int) -> str:
    rates = sorted({max(layer.dilation or (1,)) for layer in group})
    names = group[0].parallel or " to ".join(dict.fromkeys((wide[0].name, wide[-1].name)))
    widest = max(wide, key=lambda layer: layer.local[axis])
    field = widest.local[axis]
    see = "rates {} at output stride {} see" if len(rates) > 1 else "rate {} at output stride {} sees"
    seeing = see.format("/".join(map(_number, rates)), _number(widest.stride[axis]))
    return f"{names}: {seeing} {field / side:.1f} x the image ({_number(field)} of {side} px)"


def _padding_warning(layer: LayerField, size: tuple[int, int]) -> list[str]:
    kernel, spacing, dilation = layer.kernel or (1, 1), layer.tap_spacing or (1, 1), layer.dilation or (1, 1)
    if not layer.pads or not math.isfinite(max(spacing)):
        return []
    map_size = [math.ceil(side * rate / step) for side, rate, step in zip(size, dilation, spacing, strict=True)]
    inside, idle = 1.0, True
    for taps, rate, side in zip(kernel, dilation, map_size, strict=True):
        # A tap that is away by a of the map's side reads the map from 1 - a of the places.
        reads = [max(0.0, 1 - abs(tap - (taps - 1) / 2) * rate / side) for tap in range(taps)]
        inside *= sum(reads) / taps
        idle = idle and sum(read > 0 for read in reads) <= 1
    which = f"{layer.name}: rate {_number(max(dilation))} on a map of {map_size[0]}x{map_size[1]} px"
    if idle:
        return [f"{which} acts as a 1x1 convolution, its outer taps never reach the map"]
    return [f"{which} reads padding with {100 * (1 - inside):.0f} % of its taps"] if inside < 0.5 else []


def _number(value: float) -> str:
    return f"{value:.4g}"
