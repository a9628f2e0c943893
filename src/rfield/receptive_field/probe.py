"""Measure the receptive field of any module by the gradient of an output pixel."""

import copy
import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from rfield.layers import AdaptiveConv2d, LearnedFactor
from rfield.receptive_field.positive_gradients import PositiveGradients


@dataclasses.dataclass(frozen=True)
class Window:
    """The part of an image that the central output pixel sees along one axis.

    Attributes:
        size: receptive field in px; infinite if it is the whole image, however large.
        local: the same without layers that see the whole image at once: global pooling, attention, group norm.
        centre: centre of gravity of the gradient, in px from the image's first; NaN if `local` sees nothing.
        position: index of the output pixel, from 0.
        count: number of output pixels along the axis.
    """

    size: float
    local: float
    centre: float
    position: int
    count: int


NO_GRADIENT = (
    "no gradient reaches the image: the receptive field of this model cannot be probed (it may run under "
    "torch.no_grad(), or in another library)"
)
CHECKPOINTS = (
    "the model runs parts of its forward again in the backward pass, which a probe cannot follow: turn its gradient "
    "checkpointing off"
)
# Lengths of the strips in px; the longest contains the fields of the deepest networks.
_LENGTHS = (257, 513, 1025, 2049, 4097)


def probe_receptive_field(model: nn.Module, channels: int = 3) -> tuple[float, float]:
    """Measure the receptive field of any module by the gradient of an output pixel: (height, width), in input px.

    Use it for modules that `theoretical_receptive_field` does not know. The result is infinite if the output sees the
    whole image, by global pooling, squeeze-excite, attention or a norm over the whole map, or more than 4097 px.

    Args:
        model: maps Tensor[N, channels, H, W] to Tensor[N, C, h, w] for images of 65x257 px and larger.
        channels: number of image channels.

    Raises:
        ValueError: if no gradient reaches the image, or a layer samples its input at positions that are random or
            depend on the image.

    Example:
        >>> layers = nn.Sequential(nn.Conv2d(3, 8, (5, 3), stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
        >>> probe_receptive_field(layers)
        (7.0, 5.0)
        >>> probe_receptive_field(nn.Sequential(layers, nn.AdaptiveAvgPool2d(1)))
        (inf, inf)
    """
    return probe_window(model, 0, channels).size, probe_window(model, 1, channels).size


def probe_window(
    model: nn.Module, axis: int, channels: int = 3, thickness: int = 65, lengths: Sequence[int] = _LENGTHS
) -> Window:
    """Measure which part of an image the central output pixel sees along one axis.

    A copy of the model runs in float64 and with positive gradients (see
    `rfield.receptive_field.positive_gradients.PositiveGradients`), so that no pixel that is seen has the gradient 0.
    The images are strips, as long as the field needs.

    Args:
        model: maps Tensor[N, channels, H, W] to Tensor[N, C, h, w].
        axis: 0 for the height, 1 for the width.
        channels: number of image channels.
        thickness: short side of the strips in px.
        lengths: long sides of the strips in px, tried in order until one contains the field.

    Raises:
        ValueError: if no gradient reaches the image, or a layer samples its input at positions that are random or
            depend on the image.

    Example:
        >>> probe_window(nn.Conv2d(1, 1, 2, stride=2), axis=1, channels=1, lengths=[9])
        Window(size=2.0, local=2.0, centre=4.5, position=2, count=4)
    """
    probe = probe_copy(model)
    for length in lengths:
        shape = (length, thickness) if axis == 0 else (thickness, length)
        image = torch.ones(1, channels, *shape, dtype=torch.float64, requires_grad=True)
        with PositiveGradients(axis) as mode, torch.enable_grad():
            output = output_map(probe(image)).movedim(2 + axis, 3)
        position = output.shape[3] // 2
        if output.requires_grad:
            try:
                output[0, :, output.shape[2] // 2, position].sum().backward()  # type: ignore[no-untyped-call]
            except CheckpointError as error:
                raise ValueError(CHECKPOINTS) from error
        weight = torch.zeros(length) if image.grad is None else image.grad[0].abs().sum((0, 2 - axis))
        local = extent(weight)
        if local == 0 and not mode.sees_everything:
            raise ValueError(NO_GRADIENT)
        if math.isfinite(local):
            break
    local = local or math.inf
    centre = float((weight * torch.arange(length)).sum() / weight.sum())
    return Window(math.inf if mode.sees_everything else local, local, centre, position, output.shape[3])


def extent(weight: Tensor) -> float:
    """Return the distance in px from the first to the last non-zero weight of Tensor[L], both included.

    It is infinite if the first or the last px of all has a weight, because the field may be larger than the image, and
    0 if there is no weight.

    Raises:
        ValueError: if a weight is not finite.

    Example:
        >>> extent(torch.tensor([0.0, 0.5, 0.0, 0.1, 0.0])), extent(torch.tensor([0.0, 0.1])), extent(torch.zeros(3))
        (3.0, inf, 0.0)
    """
    if not weight.isfinite().all():
        raise ValueError("the gradient at the image is not finite: the receptive field of this model cannot be probed")
    seen = weight.nonzero().flatten()
    if not len(seen):
        return 0.0
    return float(seen[-1] - seen[0] + 1) if seen[0] > 0 and seen[-1] < len(weight) - 1 else math.inf


def output_map(output: Any) -> Tensor:
    """Return the map in a model's output, Tensor[N, C, h, w].

    Args:
        output: the map itself; a dict or an output class with the map as `out` or `logits`, or else as its first entry;
            a tuple with the map first; a list of feature maps, of which the last is taken. Tensor[N, C] is taken as a
            map of one pixel.

    Raises:
        ValueError: if there is no such map.

    Example:
        >>> output_map({"aux": None, "out": torch.zeros(1, 4, 2, 3)}).shape, output_map(torch.zeros(1, 4)).shape
        (torch.Size([1, 4, 2, 3]), torch.Size([1, 4, 1, 1]))
    """
    found = output
    while not isinstance(found, Tensor):
        if isinstance(found, Mapping) and found:
            found = found.get("out", found.get("logits", next(iter(found.values()))))
        elif isinstance(found, (tuple, list)) and found:
            found = found[0 if isinstance(found, tuple) else -1]
        elif isinstance(getattr(found, "logits", None), Tensor):
            found = found.logits
        else:
            raise ValueError(f"the model returns no map but a {type(output).__name__}: wrap it so that it returns one")
    if found.dim() == 2:
        found = found[..., None, None]
    if found.dim() != 4:
        raise ValueError(f"the model returns no map (N, C, h, w) but a tensor of shape {tuple(found.shape)}")
    return found


def copy_model(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """Return a deep copy, also of a model that stores computed weights, as torch's old weight norm does.

    Args:
        model: any module.
        memo: objects of the copy by the ids of the originals, as in `copy.deepcopy`.
    """
    memo = {} if memo is None else memo
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)


def probe_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a model for probing: in float64 and eval mode, with weights that average their inputs.

    Each weight is a single number, expanded to its shape, and takes no memory.

    Raises:
        ValueError: if a parameter has no shape yet.
    """
    factors = {id(module.log_factor) for module in model.modules() if isinstance(module, LearnedFactor)}
    memo: dict[int, Any] = {}
    for name, weight in model.named_parameters():
        if nn.parameter.is_lazy(weight):
            raise ValueError(f"the parameter {name} has no shape yet: run the model once")
        if id(weight) not in factors:
            inputs = max(1, weight[:1].numel()) if weight.dim() > 1 else 1
            value = torch.tensor(1 / inputs, dtype=torch.float64)
            memo[id(weight)] = nn.Parameter(value.expand(weight.shape))
    probe = copy_model(model, memo).double().eval().requires_grad_(False)
    for module in probe.modules():
        if isinstance(module, AdaptiveConv2d):
            # As far as the outer taps reach, or farther; a multiple of the stride.
            margin = [
                stride * int(dilation * taps)
                for dilation, taps, stride in zip(
                    module.realised_dilation, module.kernel_size, module.stride, strict=True
                )
            ]
            module.register_forward_pre_hook(functools.partial(_add_margin, margin))
            module.register_forward_hook(functools.partial(_remove_margin, margin))
    return probe


def _add_margin(margin: Sequence[int], module: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    """Pad the input of a layer that pads by itself; `PositiveGradients` repeats the outermost pixels."""
    return F.pad(inputs[0], [margin[1], margin[1], margin[0], margin[0]])


def _remove_margin(margin: Sequence[int], module: AdaptiveConv2d, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    height, width = margin[0] // module.stride[0], margin[1] // module.stride[1]
    return output[:, :, height : output.shape[2] - height, width : output.shape[3] - width]
