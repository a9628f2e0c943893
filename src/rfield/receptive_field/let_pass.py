"""Run a model so that gradients tell where it looks: no path from the image to an output can cancel another."""

import functools
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from rfield.receptive_field.absolute_gradient import UnknownFieldError, is_path, shares_memory, without_cancellation


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What follows is named after torch's functions; `_plain_name` has taken underscores and overloads away.
# One number in, one number out: the same path, whatever the derivative.
_PASSED = _names(
    "relu relu6 hardtanh leaky_relu elu celu selu gelu silu hardswish mish softplus prelu rrelu logsigmoid softsign "
    "tanhshrink hardshrink softshrink threshold hardsigmoid sigmoid tanh logit erf exp expm1 log log1p log2 log10 sqrt "
    "rsqrt square reciprocal neg negative abs absolute positive sign round floor ceil trunc fix frac nan_to_num sin "
    "cos asin acos atan asinh acosh atanh sinh cosh tan arcsin arccos arctan erfinv dropout dropout1d dropout2d "
    "dropout3d feature_dropout alpha_dropout feature_alpha_dropout special_expit fake_quantize_per_tensor_affine "
    "fake_quantize_per_channel_affine log_sigmoid"
)
# Number by number, of several maps of one shape or of shapes that broadcast.
_MIXED = _names(
    "sub subtract rsub mul multiply rmul div divide true_divide truediv rdiv rtruediv floordiv floor_divide rfloordiv "
    "remainder mod fmod pow rpow float_power maximum minimum fmax fmin addcmul addcdiv lerp atan2 arctan2 hypot "
    "logaddexp logaddexp2 xlogy copysign clamp clip clamp_min clamp_max"
)
# Sums, copies and views: torch's own gradient is of no negative number.
_NATIVE = _names(
    "get set add radd cat concat concatenate stack hstack vstack dstack column_stack row_stack sum nansum mean nanmean "
    "cumsum clone contiguous reshape reshape_as flatten ravel unflatten getitem repeat tile repeat_interleave roll "
    "flip fliplr flipud rot90 pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle gather index_select "
    "take take_along_dim masked_select masked_fill tril triu unfold fold diag diag_embed block_diag pad "
    "constant_pad_nd avg_pool1d avg_pool2d avg_pool3d setitem copy fill zero "
    "index_copy index_put index_fill scatter masked_scatter squeeze unsqueeze transpose t swapaxes swapdims detach "
    "requires_grad resize double cpu cuda where"
)
_CASTS = frozenset(["float", "half", "bfloat16", "to", "type", "type_as"])
_EVERYWHERE = _names(
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool1d_with_indices "
    "adaptive_max_pool2d_with_indices group_norm instance_norm scaled_dot_product_attention "
    "multi_head_attention_forward"
)
_REDUCTIONS = _names(
    "mean sum amax amin max min median nanmean nansum norm vector_norm linalg_norm linalg_vector_norm frobenius_norm "
    "std var std_mean var_mean logsumexp prod"
)
# One number of many is chosen, and which one is the image's affair: place of the dimension, and its default.
_CHOOSING: dict[str, tuple[int, int | None]] = {
    **dict.fromkeys(("max", "min", "amax", "amin", "median", "nanmedian", "aminmax"), (1, None)),
    **dict.fromkeys(("mode", "sort", "argsort", "cummax", "cummin"), (1, -1)),
    **dict.fromkeys(("kthvalue", "topk"), (2, -1)),
    **dict.fromkeys(("quantile", "nanquantile"), (2, None)),
    "msort": (1, 0),
}
# Where they read is one of their arguments: its place.
_READING = {"grid_sample": 1, "grid_sampler": 1, "grid_sampler_2d": 1, "deform_conv2d": 2}


class LetPass(TorchFunctionMode):
    """Runs a model of `rfield.receptive_field.theoretical.probe_copy` so that its gradients tell where it looks.

    The gradient of an output pixel is a sum over all paths from the image. Here no term of it is negative, so that
    none cancels another: activations let everything pass, differences and products are sums, max pools average, and
    any operation without a rule of its own has the absolute values of its gradient at random numbers
    (`rfield.receptive_field.absolute_gradient`). Softmax, norms, differences of branches, kernels of either sign are
    seen through so.
    """

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis
        """Along which the model is probed."""
        self.looks_everywhere = False
        self.looking: Callable[[], None] = lambda: None
        """Called when a layer that looks at the whole image runs."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Collection[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tuple(args), dict(kwargs or {})
        if not torch.is_grad_enabled():
            return func(*args, **kwargs)
        if not args:
            for key in ("input", "query"):
                if key in kwargs:
                    args = (kwargs.pop(key),)
        paths = [part for part in pytree.tree_leaves((args, kwargs)) if is_path(part)]
        if not paths:
            return _of_weights(func, args, kwargs)
        name, in_place = _plain_name(getattr(func, "__name__", ""))
        if not in_place:
            return self._run(name, func, args, kwargs, paths)
        if name in _NATIVE:
            return func(*args, **{key: value for key, value in kwargs.items() if name != "add" or key != "alpha"})
        if name in _PASSED:
            return args[0]
        outside = getattr(torch.Tensor, name, None) or getattr(torch, name, None) or getattr(F, name, None)
        if outside is None:
            return func(*args, **kwargs)
        return args[0].copy_(self._run(name, outside, args, kwargs, paths))

    def _run(
        self, name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], paths: list[Tensor]
    ) -> Any:
        """An operation on at least one tensor that depends on the image."""
        if name not in _CASTS:
            args, kwargs = pytree.tree_map(functools.partial(_as_precise, paths), (args, kwargs))
        first: Tensor = args[0] if args and isinstance(args[0], Tensor) else paths[0]
        if name in _PASSED:
            # Not the tensor itself: a model may change its activations in place, and go on with what was before.
            return first if _is_in_place(name, args, kwargs) else first.clone()
        if name in ("batch_norm", "layer_norm", "rms_norm"):
            return self._norm(name, first, args, kwargs)
        if name in ("conv1d", "conv2d", "conv3d", "linear") or name.startswith("conv_transpose"):
            return self._weighted(name, func, args, kwargs, paths)
        of_two = name in ("max", "min") and any(isinstance(part, Tensor) for part in (*args[1:], *kwargs.values()))
        if name in _MIXED or of_two or (name == "where" and len(paths) > 1):
            return _mixed(name, args, kwargs, paths)
        if name == "add":
            return torch.add(*args[:2], **{"other": kwargs["other"]} if "other" in kwargs else {})
        if name == "pad" and first.dim() == 4 and kwargs.get("mode", [*args, "constant"][2]) == "constant":
            return _pad(self.axis, first, kwargs.get("pad", [*args, None][1]))
        if name.startswith("max_pool"):
            return _max_pool(self.axis, name, func, args, kwargs)
        if name.startswith("max_unpool"):
            return _max_unpool(func, args, kwargs)
        _refuse(name, args, kwargs)
        if name in _EVERYWHERE or (name in _REDUCTIONS and _is_spatial(name, args, kwargs)):
            return self._everywhere(name, func, first if first.requires_grad else paths[0], args, kwargs)
        if name in _CHOOSING:
            return _average_choice(name, func, args, kwargs)
        result = func(*args, **kwargs)
        if name in _NATIVE or (name in ("interpolate", "upsample") and "bicubic" not in (*args, *kwargs.values())):
            return result
        if name in _CASTS:
            # Kept in float64: deep networks have gradients below float32's least number.
            lowered = first.requires_grad and result.is_floating_point() and result.dtype != first.dtype
            return first if lowered else result
        return without_cancellation(func, args, kwargs, result)

    def _norm(self, name: str, first: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if name == "batch_norm":
            statistics = kwargs.get("running_mean", [*args, None, None][1])
            trains = kwargs.get("training", [*args, *[False] * 6][5])
            if statistics is not None and not trains:
                return first.clone()
            return self._passing(first)
        shape = kwargs.get("normalized_shape", [*args, ()][1])
        dims = 1 if isinstance(shape, int) else len(shape)
        if first.dim() == 4 and dims > 1:
            return self._passing(first)
        return (first + first.mean(tuple(range(-dims, 0)), keepdim=True)) / 2

    def _passing(self, first: Tensor) -> Tensor:
        """A norm over the whole map."""
        self.looking()
        passed: Tensor = _Everywhere.apply(first, self, True)
        return passed

    def _weighted(
        self, name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], paths: list[Tensor]
    ) -> Any:
        weight: Tensor = kwargs["weight"] if "weight" in kwargs else args[1]
        if paths[0] is not args[0] or len(paths) > 1:  # a kernel that depends on the image
            return without_cancellation(func, args, kwargs, func(*args, **kwargs))
        if not _is_uniform(weight):
            weight = weight.detach().abs()
        args = (args[0], weight, None, *args[3:])
        kwargs = {key: value for key, value in kwargs.items() if key not in ("weight", "bias")}
        if name == "conv2d":
            return _convolve(self.axis, *args, **kwargs)
        if name == "linear" and _is_uniform(weight):
            mean = args[0].mean(-1, keepdim=True) * weight[0, 0] * args[0].shape[-1]
            return mean.expand(*args[0].shape[:-1], len(weight)).contiguous()
        return func(*args, **kwargs)

    def _everywhere(
        self, name: str, func: Callable[..., Any], first: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if name in ("group_norm", "instance_norm"):
            return self._passing(first)
        self.looking()

        # Held still, so that what is seen besides can be told.
        def hold(part: Any) -> Any:
            if part is first:
                return _Everywhere.apply(first, self, False)
            return part.detach() if isinstance(part, Tensor) else part

        return func(*pytree.tree_map(hold, args), **pytree.tree_map(hold, kwargs))


def _as_precise(paths: list[Tensor], part: Any) -> Any:
    """A fixed tensor in the precision of what depends on the image, which a model's casts do not lower."""
    if not isinstance(part, Tensor) or not part.is_floating_point() or any(part is path for path in paths):
        return part
    return part.to(paths[0].dtype)


def _plain_name(name: str) -> tuple[str, bool]:
    """The name of an operation in any spelling, and whether it writes into its first argument.

    >>> _plain_name("__isub__"), _plain_name("sub_"), _plain_name("__rsub__"), _plain_name("sub.Tensor")
    (('sub', True), ('sub', True), ('rsub', False), ('sub', False))
    """
    name = name.partition(".")[0]
    if name.startswith("__") and name.endswith("__"):
        base = name[2:-2]
        in_place = base[:1] == "i" and base[1:] in _MIXED | {"add", "matmul"}
        return (base[1:], True) if in_place else (base, base == "setitem")
    return name.strip("_"), name.endswith("_")


def _is_uniform(weight: Tensor) -> bool:
    """Whether a weight is one number of `probe_copy`."""
    return not any(weight.stride())


def _is_dense(weight: Tensor) -> bool:
    return _is_uniform(weight) or bool(weight.all())


def _of_weights(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operation on weights alone. Of equal numbers, a centred or standardised kernel would be 0: they are varied."""
    uniform = [
        part
        for part in pytree.tree_leaves((args, kwargs))
        if isinstance(part, Tensor) and part.is_floating_point() and part.numel() > 1 and _is_uniform(part)
    ]
    if not uniform or _plain_name(getattr(func, "__name__", ""))[0] in ("get", "set"):
        return func(*args, **kwargs)
    generator = torch.Generator().manual_seed(0)

    def vary(part: Any) -> Any:
        if not any(part is weight for weight in uniform):
            return part
        return part * (0.5 + torch.rand(part.shape, generator=generator, dtype=part.dtype))

    def varied() -> Any:
        return func(*pytree.tree_map(vary, args), **pytree.tree_map(vary, kwargs))

    try:
        result = func(*args, **kwargs)
    except RuntimeError:  # torch refuses to write into, or to reinterpret, what is expanded
        return varied()
    made = [part for part in pytree.tree_leaves(result) if isinstance(part, Tensor) and part.is_floating_point()]
    return varied() if made and not any(shares_memory(part, weight) for part in made for weight in uniform) else result


def _mixed(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], paths: list[Tensor]) -> Tensor:
    """A sum instead of a difference, a quotient, or a product, a chain of which would outgrow every number."""
    tensors = [part for part in pytree.tree_leaves((args, kwargs)) if isinstance(part, Tensor)]
    shape = torch.broadcast_shapes(*(part.shape for part in tensors))  # type: ignore[no-untyped-call]
    total: Tensor = sum(paths[1:], paths[0])
    if name in ("mul", "multiply", "rmul") and len(paths) == 1:
        (fixed,) = [part for part in (*args, *kwargs.values()) if part is not paths[0]] or [1]
        return total * (abs(fixed) if not isinstance(fixed, Tensor) or fixed.dtype != torch.bool else fixed)
    if name not in ("sub", "subtract", "rsub"):
        total = total / len(paths)
    return total.expand(shape).clone(memory_format=torch.contiguous_format)


def _is_in_place(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    place = 4 if name == "rrelu" else 3 if "dropout" in name else len(args) - 1
    return bool(kwargs.get("inplace")) or (0 < place < len(args) and args[place] is True)


def _refuse(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if name.startswith("fractional_max_pool"):
        raise UnknownFieldError(f"{name} reads places drawn at random: its receptive field cannot be probed")
    if name in _READING and is_path([*args, *kwargs.values()][_READING[name]]):
        raise UnknownFieldError(
            f"where {name} reads depends on the image: its receptive field is another for every image and cannot be "
            "probed"
        )


def _max_pool(
    axis: int, name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor | tuple[Tensor, Tensor]:
    """An average of what a max pool takes its maximum of, of the same size; the indices are the pool's own."""
    names = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode")
    given = {
        "stride": None,
        "padding": 0,
        "dilation": 1,
        "ceil_mode": False,
        **dict(zip(names, args, strict=False)),
        **kwargs,
    }
    with torch.no_grad():
        result = func(*args, **kwargs)
    real, indices = result if isinstance(result, tuple) else (result, None)
    input: Tensor = given["input"]
    dims = int(name[len("max_pool")])
    kernel, padding, dilation = (_each(given[key], dims) for key in ("kernel_size", "padding", "dilation"))
    stride = _each(given["stride"], dims) if given["stride"] not in (None, (), []) else kernel
    if max(dilation) == 1:
        average: Callable[..., Tensor] = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[dims - 1]
        pooled = average(input, kernel, stride, padding, bool(given["ceil_mode"]))
        return pooled if indices is None else (pooled, indices)
    window = [rate * (taps - 1) + 1 for rate, taps in zip(dilation, kernel, strict=True)]
    planes = input.reshape(-1, 1, *input.shape[-dims:])
    pads: list[int] = []
    for out, step, long, side, pad in zip(real.shape[-dims:], stride, window, planes.shape[2:], padding, strict=True):
        # With ceil_mode the last window may hang over the edge.
        pads = [pad, max(pad, (out - 1) * step + long - side - pad), *pads]
    # Taps that jump over an image's edge are seen to reach it.
    planes = _pad(axis, planes, pads) if dims == 2 else F.pad(planes, pads)
    ones = torch.ones(1, 1, *kernel, dtype=input.dtype) / math.prod(kernel)
    convolve: Callable[..., Tensor] = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    pooled = convolve(planes, ones, None, stride, 0, dilation)
    for place, out in enumerate(real.shape[-dims:]):
        pooled = pooled.narrow(2 + place, 0, out)
    pooled = pooled.reshape(real.shape)
    return pooled if indices is None else (pooled, indices)


def _max_unpool(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Every pixel of a window has what max unpooling puts at one of them."""
    names = ("input", "indices", "kernel_size", "stride", "padding")
    given = {"stride": None, "padding": 0, **dict(zip(names, args, strict=False)), **kwargs}
    with torch.no_grad():
        shape = func(*args, **kwargs).shape
    input: Tensor = given["input"]
    dims = int(func.__name__[len("max_unpool")])
    kernel, padding = _each(given["kernel_size"], dims), _each(given["padding"], dims)
    stride = _each(given["stride"], dims) if given["stride"] not in (None, (), []) else kernel
    planes = input.reshape(-1, 1, *input.shape[-dims:])
    spread: Callable[..., Tensor] = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1]
    whole = spread(planes, torch.ones(1, 1, *kernel, dtype=input.dtype), None, stride, padding)
    pads: list[int] = []
    for wanted, side in zip(shape[-dims:], whole.shape[2:], strict=True):
        pads = [0, wanted - side, *pads]  # negative: a crop
    return F.pad(whole, pads).reshape(shape)


def _each(value: Any, dims: int) -> list[int]:
    return [value] * dims if isinstance(value, int) else [*value] * (dims if len(value) == 1 else 1)


def _average_choice(name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The mean of what a maximum, a median or a sort chooses from."""
    first: Tensor = args[0]
    with torch.no_grad():
        result = func(*args, **kwargs)
    place, default = _CHOOSING[name]
    dim = kwargs.get("dim", kwargs.get("axis", args[place] if len(args) > place else default))
    mean, kept = (first.mean(dim, keepdim=keep) for keep in (False, True))

    def average(part: Any) -> Any:
        if not isinstance(part, Tensor) or not part.is_floating_point():
            return part
        return (kept if part.dim() == first.dim() else mean).expand(part.shape).contiguous()

    return pytree.tree_map(average, result)


def _convolve(
    axis: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """`F.conv2d`, in a thousandth of the time where no weight is 0: every channel sees the same; no bias."""
    rates, dense = _each(dilation, 2), _is_dense(weight)
    if dense:
        input = input.reshape(*input.shape[:-3], groups, -1, *input.shape[-2:]).mean(-3)
    if rates[axis] > 1 and padding != "valid":
        missing = [rate * (taps - 1) for rate, taps in zip(rates, weight.shape[2:], strict=True)]
        if padding == "same":
            pads = [missing[1] // 2, (missing[1] + 1) // 2, missing[0] // 2, (missing[0] + 1) // 2]
        else:
            sides = _each(padding, 2)
            pads = [sides[1]] * 2 + [sides[0]] * 2
        input, padding = _pad(axis, input, pads), 0
    if not dense:
        return F.conv2d(input, weight, None, stride, padding, dilation, groups)
    kernel = weight.reshape(groups, -1, *weight.shape[2:]).mean(1, keepdim=True) * weight.shape[1]
    output = F.conv2d(input, kernel, None, stride, padding, dilation, groups).unsqueeze(-3)
    output = output.expand(*output.shape[:-3], len(weight) // groups, *output.shape[-2:])
    return output.flatten(-4, -3).contiguous()  # Models add to their maps in place.


def _pad(axis: int, input: Tensor, pads: Sequence[int]) -> Tensor:
    """Padding by zeros that repeats the outermost pixels along an axis instead.

    So a dilated kernel whose taps jump over an image's edge is seen to reach it.
    """
    if len(pads) != 4 or min(pads) < 0:
        return F.pad(input, list(pads))
    across, along = [*pads[:2], 0, 0], [0, 0, *pads[2:]]
    if axis == 1:
        across, along = along, across
    return F.pad(F.pad(input, along, mode="replicate"), across)


class _Everywhere(torch.autograd.Function):
    """The identity; a gradient that comes by tells that the output looks at the whole image, and may end here."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, mode: LetPass, passes: bool) -> Tensor:
        ctx.mode, ctx.passes = mode, passes
        return input.view_as(input)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        ctx.mode.looks_everywhere = True
        return grads[0] if ctx.passes else None, None, None


def _is_spatial(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether a map is reduced along both its height and its width."""
    place = 2 if "norm" in name else 1
    axes = kwargs.get("dim", kwargs.get("axis", args[place] if len(args) > place else None))
    if args[0].dim() != 4 or axes is None:
        return bool(args[0].dim() == 4)
    reduced = {axis % 4 for axis in ((axes,) if isinstance(axes, int) else axes)}
    return reduced >= {2, 3} or reduced >= {1, 2}
