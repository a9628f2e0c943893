"""Torch's operations by name: which rule of `positive_gradients` applies to each."""

from collections.abc import Sequence
from typing import Any


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Names are as `plain_name` returns them. Functions of single elements: the gradient is passed through unchanged.
ELEMENTWISE = _names(
    "relu relu6 hardtanh leaky_relu elu celu selu gelu silu hardswish mish softplus prelu rrelu logsigmoid softsign "
    "tanhshrink hardshrink softshrink threshold hardsigmoid sigmoid tanh logit erf exp expm1 log log1p log2 log10 sqrt "
    "rsqrt square reciprocal neg negative abs absolute positive sign round floor ceil trunc fix frac nan_to_num sin "
    "cos asin acos atan asinh acosh atanh sinh cosh tan arcsin arccos arctan erfinv dropout dropout1d dropout2d "
    "dropout3d feature_dropout alpha_dropout feature_alpha_dropout special_expit fake_quantize_per_tensor_affine "
    "fake_quantize_per_channel_affine log_sigmoid"
)
# Elementwise functions of several tensors, of one shape or of shapes that broadcast: replaced by a sum.
COMBINING = _names(
    "sub subtract rsub mul multiply rmul div divide true_divide truediv rdiv rtruediv floordiv floor_divide rfloordiv "
    "remainder mod fmod pow rpow float_power maximum minimum fmax fmin addcmul addcdiv lerp atan2 arctan2 hypot "
    "logaddexp logaddexp2 xlogy copysign clamp clip clamp_min clamp_max"
)
# Sums, copies and views: torch's own gradient, which has no negative terms.
NATIVE = _names(
    "get set add radd cat concat concatenate stack hstack vstack dstack column_stack row_stack sum nansum mean nanmean "
    "cumsum clone contiguous reshape reshape_as flatten ravel unflatten getitem repeat tile repeat_interleave roll "
    "flip fliplr flipud rot90 pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle gather index_select "
    "take take_along_dim masked_select masked_fill tril triu unfold fold diag diag_embed block_diag pad "
    "constant_pad_nd avg_pool1d avg_pool2d avg_pool3d setitem copy fill zero "
    "index_copy index_put index_fill scatter masked_scatter squeeze unsqueeze transpose t swapaxes swapdims detach "
    "requires_grad resize double cpu cuda where"
)
CASTS = frozenset(["float", "half", "bfloat16", "to", "type", "type_as"])
# Operations on the whole map, whatever their arguments.
GLOBAL = _names(
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool1d_with_indices "
    "adaptive_max_pool2d_with_indices group_norm instance_norm scaled_dot_product_attention "
    "multi_head_attention_forward"
)
# Operations on the whole map if they reduce its height and width, see `reduces_map`.
REDUCTIONS = _names(
    "mean sum amax amin max min median nanmean nansum norm vector_norm linalg_norm linalg_vector_norm frobenius_norm "
    "std var std_mean var_mean logsumexp prod"
)
# Operations that select elements depending on the image: (position of the argument `dim`, its default).
SELECTIONS: dict[str, tuple[int, int | None]] = {
    **dict.fromkeys(("max", "min", "amax", "amin", "median", "nanmedian", "aminmax"), (1, None)),
    **dict.fromkeys(("mode", "sort", "argsort", "cummax", "cummin"), (1, -1)),
    **dict.fromkeys(("kthvalue", "topk"), (2, -1)),
    **dict.fromkeys(("quantile", "nanquantile"), (2, None)),
    "msort": (1, 0),
}
# Operations that sample the map at positions given by an argument: the argument's position.
SAMPLERS = {"grid_sample": 1, "grid_sampler": 1, "grid_sampler_2d": 1, "deform_conv2d": 2}


def plain_name(name: str) -> tuple[str, bool]:
    """Return an operation's name without underscores and overload, and whether it writes into its first argument.

    Example:
        >>> plain_name("__isub__"), plain_name("sub_"), plain_name("__rsub__"), plain_name("sub.Tensor")
        (('sub', True), ('sub', True), ('rsub', False), ('sub', False))
    """
    name = name.partition(".")[0]
    if name.startswith("__") and name.endswith("__"):
        base = name[2:-2]
        in_place = base[:1] == "i" and base[1:] in COMBINING | {"add", "matmul"}
        return (base[1:], True) if in_place else (base, base == "setitem")
    return name.strip("_"), name.endswith("_")


def is_in_place(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether an elementwise function is called with `inplace=True`."""
    position = 4 if name == "rrelu" else 3 if "dropout" in name else len(args) - 1
    return bool(kwargs.get("inplace")) or (0 < position < len(args) and args[position] is True)


def reduces_map(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Return whether an operation of `REDUCTIONS` reduces a map along both its height and its width."""
    position = 2 if "norm" in name else 1
    axes = kwargs.get("dim", kwargs.get("axis", args[position] if len(args) > position else None))
    if args[0].dim() != 4 or axes is None:
        return bool(args[0].dim() == 4)
    reduced = {axis % 4 for axis in ((axes,) if isinstance(axes, int) else axes)}
    # (N, C, h, w), or the channels last: (N, h, w, C).
    return reduced >= {2, 3} or reduced >= {1, 2}
