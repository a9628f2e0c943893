"""The gradient of an operation, in absolute values: what it depends on, where its own gradients would cancel."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


class UnknownFieldError(ValueError):
    """A layer whose receptive field cannot be measured by gradients."""


def is_path(part: Any) -> bool:
    """Whether something is a tensor that depends on the image."""
    return isinstance(part, Tensor) and part.requires_grad


def shares_memory(one: Tensor, other: Tensor) -> bool:
    """Whether one tensor is a view of the other, or both are of a third."""
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def without_cancellation(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
    """What `func` gave, with the gradient of `_Absolute` instead of its own."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    outputs = [part for part in pytree.tree_leaves(result) if is_path(part)]
    paths = [part for part in leaves if is_path(part)]
    if not outputs or any(shares_memory(output, path) for output in outputs for path in paths):
        return result  # no gradient, or a view, into which a model may write
    spots = [_Spot(part.shape, part.dtype) if is_path(part) else part for part in leaves]
    absolute = iter(_Absolute.apply(func, spec, spots, [part.detach() for part in outputs], *paths))
    return pytree.tree_map(lambda part: next(absolute) if is_path(part) else part, result)


@dataclasses.dataclass(frozen=True)
class _Spot:
    """Stands for a tensor that depends on the image."""

    shape: torch.Size
    dtype: torch.dtype


# (middle, half width) of the random numbers that an operation is differentiated at; the first that it is defined for.
_RANGES = ((0.5, 0.005), (0.5, 0.25), (1.5, 0.25))


class _Absolute(torch.autograd.Function):
    """Gives the absolute values of an operation's gradient at random numbers.

    Numbers of no pattern leave no gradient 0 but where there is no path, such as that of a softmax's sum.
    """

    @staticmethod
    def forward(
        ctx: Any, func: Callable[..., Any], spec: Any, spots: list[Any], outputs: list[Tensor], *paths: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.call = func, spec, spots
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        func, spec, spots = ctx.call
        for middle, half in _RANGES:
            generator = torch.Generator().manual_seed(0)

            def near(spot: Any, middle: float, half: float, generator: torch.Generator = generator) -> Tensor:
                return middle + half * (2 * torch.rand(spot.shape, dtype=spot.dtype, generator=generator) - 1)

            inputs = [near(spot, middle, half).requires_grad_() for spot in spots if isinstance(spot, _Spot)]
            given = iter(inputs)
            leaves = [next(given) if isinstance(spot, _Spot) else spot for spot in spots]
            args, kwargs = pytree.tree_unflatten(leaves, spec)
            with torch.enable_grad():
                outputs = [part for part in pytree.tree_leaves(func(*args, **kwargs)) if is_path(part)]
            scaled = [grad * near(grad, 1.0, 0.005) for grad in grads]
            found = torch.autograd.grad(outputs, inputs, scaled, allow_unused=True)
            if all(grad is None or bool(grad.isfinite().all()) for grad in found):
                return (None,) * 4 + tuple(
                    None if grad is None else grad.abs().to(leaf.dtype)
                    for grad, leaf in zip(found, inputs, strict=True)
                )
        name = getattr(func, "__name__", repr(func))
        raise UnknownFieldError(f"{name} has no finite gradient: its receptive field cannot be probed")
