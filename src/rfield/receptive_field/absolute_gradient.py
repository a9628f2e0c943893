"""Replace an operation's gradient by absolute values, so that it shows all dependencies and none cancels another."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


class UnknownFieldError(ValueError):
    """Raised for a model whose receptive field cannot be measured by gradients."""


def is_path(part: Any) -> bool:
    """Return whether an argument is a tensor that depends on the image."""
    return isinstance(part, Tensor) and part.requires_grad


def shares_memory(one: Tensor, other: Tensor) -> bool:
    """Return whether one tensor is a view of the other, or both are views of a third."""
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def without_cancellation(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
    """Return `result`, which `func` returned, with the gradient of `_Absolute` in place of its own."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    outputs = [part for part in pytree.tree_leaves(result) if is_path(part)]
    paths = [part for part in leaves if is_path(part)]
    if not outputs or any(shares_memory(output, path) for output in outputs for path in paths):
        return result  # a view must stay a view, because a model may write into it
    inputs = [_Placeholder(part.shape, part.dtype) if is_path(part) else part for part in leaves]
    absolute = iter(_Absolute.apply(func, spec, inputs, [part.detach() for part in outputs], *paths))
    return pytree.tree_map(lambda part: next(absolute) if is_path(part) else part, result)


@dataclasses.dataclass(frozen=True)
class _Placeholder:
    """Stand for a tensor that depends on the image, without keeping it in memory."""

    shape: torch.Size
    dtype: torch.dtype


# (least, width) of the random numbers at which an operation is differentiated; the first range at which its gradient is
# finite is used.
_RANGES = ((0.495, 0.01), (0.25, 0.5), (1.25, 0.5))


def _random_like(part: Any, least: float, width: float, generator: torch.Generator) -> Tensor:
    """Return uniform random numbers from `least` up in the shape and dtype of a tensor or placeholder."""
    return least + width * torch.rand(part.shape, dtype=part.dtype, generator=generator)


class _Absolute(torch.autograd.Function):
    """Return an operation's outputs; the backward uses the absolute values of its gradient at random numbers.

    At random numbers a gradient is 0 only where there is no dependency; at equal ones that of a softmax, for example,
    is 0 for the sum of its outputs.
    """

    @staticmethod
    def forward(
        ctx: Any, func: Callable[..., Any], spec: Any, inputs: list[Any], outputs: list[Tensor], *paths: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.call = func, spec, inputs
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        func, spec, inputs = ctx.call
        for least, width in _RANGES:
            generator = torch.Generator().manual_seed(0)
            tensors = [
                _random_like(part, least, width, generator).requires_grad_()
                for part in inputs
                if isinstance(part, _Placeholder)
            ]
            remaining = iter(tensors)
            leaves = [next(remaining) if isinstance(part, _Placeholder) else part for part in inputs]
            args, kwargs = pytree.tree_unflatten(leaves, spec)
            with torch.enable_grad():
                outputs = [part for part in pytree.tree_leaves(func(*args, **kwargs)) if is_path(part)]
            scaled = [grad * _random_like(grad, 1.0, 0.01, generator) for grad in grads]
            found = torch.autograd.grad(outputs, tensors, scaled, allow_unused=True)
            if all(grad is None or bool(grad.isfinite().all()) for grad in found):
                return (None,) * 4 + tuple(
                    None if grad is None else grad.abs().to(tensor.dtype)
                    for grad, tensor in zip(found, tensors, strict=True)
                )
        name = getattr(func, "__name__", repr(func))
        raise UnknownFieldError(f"{name} has no finite gradient: its receptive field cannot be probed")
