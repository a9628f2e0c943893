"""Operations that replace torch's own in `positive_gradients`: the same shapes, and gradients of no negative number."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from rfield.receptive_field.absolute_gradient import shares_memory, without_cancellation
from rfield.receptive_field.operations import SELECTIONS, plain_name


def is_uniform(weight: Tensor) -> bool:
    """Return whether a weight is a single number, expanded by `probe_copy`."""
    return not any(weight.stride())


def is_dense(weight: Tensor) -> bool:
    """Return whether no element of a weight is 0."""
    return is_uniform(weight) or bool(weight.all())


def of_weights(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation on weights only, with uniform weights varied at random.

    A kernel that the model centres or standardises would be 0 if all its numbers were equal.
    """
    uniform = [
        part
        for part in pytree.tree_leaves((args, kwargs))
        if isinstance(part, Tensor) and part.is_floating_point() and part.numel() > 1 and is_uniform(part)
    ]
    if not uniform or plain_name(getattr(func, "__name__", ""))[0] in ("get", "set"):
        return func(*args, **kwargs)
    generator = torch.Generator().manual_seed(0)

    def vary(part: Any) -> Any:
        if not any(part is weight for weight in uniform):
            return part
        return part * torch.rand(part.shape, generator=generator, dtype=part.dtype)

    def varied() -> Any:
        return func(*pytree.tree_map(vary, args), **pytree.tree_map(vary, kwargs))

    try:
        result = func(*args, **kwargs)
    except RuntimeError:  # torch does not write into expanded tensors, nor reinterpret them
        return varied()
    made = [part for part in pytree.tree_leaves(result) if isinstance(part, Tensor) and part.is_floating_point()]
    # A view of a uniform weight is uniform, too, and is varied by the operation that computes with it.
    return varied() if made and not any(shares_memory(part, weight) for part in made for weight in uniform) else result


def combine(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], paths: list[Tensor]) -> Tensor:
    """Return a sum or mean of `paths` in place of a difference, a quotient or a product.

    A chain of products would overflow.
    """
    tensors = [part for part in pytree.tree_leaves((args, kwargs)) if isinstance(part, Tensor)]
    shape = torch.broadcast_shapes(*(part.shape for part in tensors))  # type: ignore[no-untyped-call]
    total: Tensor = sum(paths[1:], paths[0])
    if name in ("mul", "multiply", "rmul") and len(paths) == 1:
        (fixed,) = [part for part in (*args, *kwargs.values()) if part is not paths[0]] or [1]
        return total * (abs(fixed) if not isinstance(fixed, Tensor) or fixed.dtype != torch.bool else fixed)
    if name not in ("sub", "subtract", "rsub"):
        total = total / len(paths)
    return total.expand(shape).clone(memory_format=torch.contiguous_format)


def weighted(
    axis: int,
    name: str,
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    paths: list[Tensor],
) -> Any:
    """Run a convolution or linear layer with the absolute values of its weight and without bias."""
    weight: Tensor = kwargs["weight"] if "weight" in kwargs else args[1]
    if paths[0] is not args[0] or len(paths) > 1:  # the weight depends on the image
        return without_cancellation(func, args, kwargs, func(*args, **kwargs))
    if not is_uniform(weight):
        weight = weight.detach().abs()
    args = (args[0], weight, None, *args[3:])
    kwargs = {key: value for key, value in kwargs.items() if key not in ("weight", "bias")}
    if name == "conv2d":
        return convolve(axis, *args, **kwargs)
    if name == "linear" and is_uniform(weight):
        mean = args[0].mean(-1, keepdim=True) * weight[0, 0] * args[0].shape[-1]
        return mean.expand(*args[0].shape[:-1], len(weight)).contiguous()
    return func(*args, **kwargs)


def convolve(
    axis: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """Return `F.conv2d` without bias; if no weight is 0, all channels see the same, and one convolution serves all.

    This takes a thousandth of the time.
    """
    rates, dense = _per_dim(dilation, 2), is_dense(weight)
    if dense:
        input = input.reshape(*input.shape[:-3], groups, -1, *input.shape[-2:]).mean(-3)
    if rates[axis] > 1 and padding != "valid":
        missing = [rate * (taps - 1) for rate, taps in zip(rates, weight.shape[2:], strict=True)]
        if padding == "same":
            pads = [missing[1] // 2, (missing[1] + 1) // 2, missing[0] // 2, (missing[0] + 1) // 2]
        else:
            sides = _per_dim(padding, 2)
            pads = [sides[1]] * 2 + [sides[0]] * 2
        input, padding = pad(axis, input, pads), 0
    if not dense:
        return F.conv2d(input, weight, None, stride, padding, dilation, groups)
    kernel = weight.reshape(groups, -1, *weight.shape[2:]).mean(1, keepdim=True) * weight.shape[1]
    output = F.conv2d(input, kernel, None, stride, padding, dilation, groups).unsqueeze(-3)
    output = output.expand(*output.shape[:-3], len(weight) // groups, *output.shape[-2:])
    return output.flatten(-4, -3).contiguous()  # models add to their maps in place, and cannot to an expanded one


def pad(axis: int, input: Tensor, pads: Sequence[int]) -> Tensor:
    """Pad with zeros, but along `axis` with copies of the outermost pixels.

    So a dilated kernel whose taps reach over the image's edge has a gradient at the edge.
    """
    if len(pads) != 4 or min(pads) < 0:
        return F.pad(input, list(pads))
    across, along = [*pads[:2], 0, 0], [0, 0, *pads[2:]]
    if axis == 1:
        across, along = along, across
    return F.pad(F.pad(input, along, mode="replicate"), across)


def max_pool(
    axis: int, name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the average over the windows of a max pool, in its shape, and its own indices if it returns them."""
    names = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode")
    defaults = {"stride": None, "padding": 0, "dilation": 1, "ceil_mode": False}
    given = {**defaults, **dict(zip(names, args, strict=False)), **kwargs}
    result = func(*args, **kwargs)
    real, indices = result if isinstance(result, tuple) else (result, None)
    input: Tensor = given["input"]
    dims = int(name[len("max_pool")])
    kernel, padding, dilation = (_per_dim(given[key], dims) for key in ("kernel_size", "padding", "dilation"))
    stride = _per_dim(given["stride"], dims) if given["stride"] not in (None, (), []) else kernel
    if max(dilation) == 1:
        average: Callable[..., Tensor] = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[dims - 1]
        pooled = average(input, kernel, stride, padding, bool(given["ceil_mode"]))
        return pooled if indices is None else (pooled, indices)
    window = [rate * (taps - 1) + 1 for rate, taps in zip(dilation, kernel, strict=True)]
    planes = input.reshape(-1, 1, *input.shape[-dims:])
    pads: list[int] = []
    for out, step, long, side, each in zip(real.shape[-dims:], stride, window, planes.shape[2:], padding, strict=True):
        # With ceil_mode the last window may extend over the edge.
        pads = [each, max(each, (out - 1) * step + long - side - each), *pads]
    planes = pad(axis, planes, pads) if dims == 2 else F.pad(planes, pads)
    ones = torch.ones(1, 1, *kernel, dtype=input.dtype) / math.prod(kernel)
    conv: Callable[..., Tensor] = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    pooled = conv(planes, ones, None, stride, 0, dilation)
    for dim, out in enumerate(real.shape[-dims:]):
        pooled = pooled.narrow(2 + dim, 0, out)
    pooled = pooled.reshape(real.shape)
    return pooled if indices is None else (pooled, indices)


def max_unpool(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the value that max unpooling writes to one pixel of a window at every pixel of the window."""
    names = ("input", "indices", "kernel_size", "stride", "padding")
    given = {"stride": None, "padding": 0, **dict(zip(names, args, strict=False)), **kwargs}
    shape = func(*args, **kwargs).shape
    input: Tensor = given["input"]
    dims = int(func.__name__[len("max_unpool")])
    kernel, padding = _per_dim(given["kernel_size"], dims), _per_dim(given["padding"], dims)
    stride = _per_dim(given["stride"], dims) if given["stride"] not in (None, (), []) else kernel
    planes = input.reshape(-1, 1, *input.shape[-dims:])
    spread: Callable[..., Tensor] = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1]
    unpooled = spread(planes, torch.ones(1, 1, *kernel, dtype=input.dtype), None, stride, padding)
    pads: list[int] = []
    for wanted, side in zip(shape[-dims:], unpooled.shape[2:], strict=True):
        pads = [0, wanted - side, *pads]  # a negative number crops
    return F.pad(unpooled, pads).reshape(shape)


def _per_dim(value: Any, dims: int) -> list[int]:
    """Return a number, or a sequence of one, as one number per dimension."""
    return [value] * dims if isinstance(value, int) else [*value] * (dims if len(value) == 1 else 1)


def mean_of_selection(name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the mean of all elements from which a maximum, a median or a sort selects, in the result's shape."""
    first: Tensor = args[0]
    result = func(*args, **kwargs)
    position, default = SELECTIONS[name]
    dim = kwargs.get("dim", kwargs.get("axis", args[position] if len(args) > position else default))
    reduced, kept = (first.mean(dim, keepdim=keep) for keep in (False, True))

    def average(part: Any) -> Any:
        if not isinstance(part, Tensor) or not part.is_floating_point():
            return part
        return (kept if part.dim() == first.dim() else reduced).expand(part.shape).contiguous()

    return pytree.tree_map(average, result)
