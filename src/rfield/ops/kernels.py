"""CPU kernels with a hand-written backward pass, under autograd."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from rfield.ops.values import is_transformed


class Kernel(ABC):
    """A function of tensors with a hand-written backward pass; its other arguments are attributes.

    The kernels call operations whose backward pass cannot be differentiated. Second derivatives therefore go through
    `plain`, for every kernel in the same way.
    """

    @abstractmethod
    def forward(self, *tensors: Any) -> Tensor:
        """Return the output, in memory of its own. Autograd does not record this call."""

    @abstractmethod
    def backward(
        self, grad_output: Tensor, tensors: tuple[Any, ...], needed: tuple[bool, ...]
    ) -> tuple[Tensor | None, ...]:
        """Return the gradient of each tensor, or None where it is not needed."""

    @abstractmethod
    def plain(self, *tensors: Any) -> Tensor:
        """Return the same as `forward`, by operations that autograd can differentiate twice."""

    def __call__(self, *tensors: Tensor | None) -> Tensor:
        output: Tensor = _Differentiable.apply(self, *tensors)
        return output


class _Differentiable(torch.autograd.Function):
    """A kernel as a node of the autograd graph. It keeps only the inputs: sampling once more is cheap."""

    @staticmethod
    def forward(ctx: Any, kernel: Kernel, *tensors: Tensor | None) -> Tensor:
        ctx.kernel = kernel
        ctx.save_for_backward(*tensors)
        return kernel.forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        kernel, tensors, needed = ctx.kernel, ctx.saved_tensors, ctx.needs_input_grad[1:]
        if not torch.is_grad_enabled():
            return None, *kernel.backward(grad_outputs[0], tensors, needed)
        wanted = [tensor for tensor, need in zip(tensors, needed, strict=True) if need]
        found = iter(torch.autograd.grad(kernel.plain(*tensors), wanted, grad_outputs, create_graph=True))
        return None, *(next(found) if need else None for need in needed)


def has_kernels(input: Tensor) -> bool:
    """Return whether kernels can run: on a CPU, in reverse mode, outside compiled and exported graphs."""
    return input.device.type == "cpu" and not (torch.compiler.is_compiling() or is_transformed())
