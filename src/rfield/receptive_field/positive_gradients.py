"""Run a model so that its gradients show what an output sees: no path from the image cancels another."""

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from rfield.receptive_field import gradient_rules as rules
from rfield.receptive_field.absolute_gradient import UnknownFieldError, is_path, without_cancellation
from rfield.receptive_field.operations import (
    CASTS,
    COMBINING,
    ELEMENTWISE,
    GLOBAL,
    NATIVE,
    REDUCTIONS,
    SAMPLERS,
    SELECTIONS,
    is_in_place,
    plain_name,
    reduces_map,
)


class PositiveGradients(TorchFunctionMode):
    """Run a model of `rfield.receptive_field.probe.probe_copy` so that no term of its gradients is negative.

    The gradient of an output pixel is a sum over all paths from the image. Terms of both signs could cancel, and a
    pixel that is seen would have the gradient 0. In this mode no term is negative: activations pass the gradient
    through, differences and products become sums, max pools average, and any operation without a rule of its own gets
    the absolute values of its gradient at random numbers (`rfield.receptive_field.absolute_gradient`). So the probe
    sees through softmax, norms, differences of branches, and kernels of either sign.

    Attributes:
        axis: the axis along which the model is probed: 0 for the height, 1 for the width.
        sees_everything: whether a gradient has passed a layer that sees the whole image.
        on_global_layer: called when a layer that sees the whole image runs.
    """

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis
        self.sees_everything = False
        self.on_global_layer: Callable[[], None] = lambda: None

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
            return rules.of_weights(func, args, kwargs)
        name, in_place = plain_name(getattr(func, "__name__", ""))
        if not in_place:
            return self._run(name, func, args, kwargs, paths)
        if name in NATIVE:
            return func(*args, **{key: value for key, value in kwargs.items() if name != "add" or key != "alpha"})
        if name in ELEMENTWISE:
            return args[0]
        out_of_place = getattr(torch.Tensor, name, None) or getattr(torch, name, None) or getattr(F, name, None)
        if out_of_place is None:
            return func(*args, **kwargs)
        return args[0].copy_(self._run(name, out_of_place, args, kwargs, paths))

    def _run(
        self, name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], paths: list[Tensor]
    ) -> Any:
        """Run an operation on `paths`, the tensors that depend on the image, at least one."""
        if name not in CASTS:
            args, kwargs = pytree.tree_map(functools.partial(_as_precise, paths), (args, kwargs))
        first: Tensor = args[0] if args else paths[0]
        if name in ELEMENTWISE:
            # A copy, because a model may change the activations in place and also use the map before them.
            return first if is_in_place(name, args, kwargs) else first.clone()
        if name in ("batch_norm", "layer_norm", "rms_norm"):
            return self._norm(name, first, args, kwargs)
        if name in ("conv1d", "conv2d", "conv3d", "linear") or name.startswith("conv_transpose"):
            return rules.weighted(self.axis, name, func, args, kwargs, paths)
        of_two = name in ("max", "min") and any(isinstance(part, Tensor) for part in (*args[1:], *kwargs.values()))
        if name in COMBINING or of_two or (name == "where" and len(paths) > 1):
            return rules.combine(name, args, kwargs, paths)
        if name == "add":
            return torch.add(*args[:2], **{"other": kwargs["other"]} if "other" in kwargs else {})
        if name == "pad" and first.dim() == 4 and kwargs.get("mode", [*args, "constant"][2]) == "constant":
            return rules.pad(self.axis, first, kwargs.get("pad", [*args, None][1]))
        if name.startswith("max_pool"):
            return rules.max_pool(self.axis, name, func, args, kwargs)
        if name.startswith("max_unpool"):
            return rules.max_unpool(func, args, kwargs)
        _check_has_field(name, args, kwargs)
        if name in GLOBAL or (name in REDUCTIONS and reduces_map(name, args, kwargs)):
            return self._global(name, func, first if first.requires_grad else paths[0], args, kwargs)
        if name in SELECTIONS:
            return rules.mean_of_selection(name, func, args, kwargs)
        return _run_as_it_is(name, func, args, kwargs, first)

    def _norm(self, name: str, first: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if name == "batch_norm":
            statistics = kwargs.get("running_mean", [*args, None, None][1])
            trains = kwargs.get("training", [*args, *[False] * 6][5])
            if statistics is not None and not trains:
                return first.clone()
            return self._global_norm(first)
        shape = kwargs.get("normalized_shape", [*args, ()][1])
        dims = 1 if isinstance(shape, int) else len(shape)
        if first.dim() == 4 and dims > 1:
            return self._global_norm(first)
        return (first + first.mean(tuple(range(-dims, 0)), keepdim=True)) / 2

    def _global_norm(self, first: Tensor) -> Tensor:
        """Return a copy of the input of a norm over the whole map."""
        self.on_global_layer()
        passed: Tensor = _SeesEverything.apply(first, self, True)
        return passed

    def _global(
        self, name: str, func: Callable[..., Any], first: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if name in ("group_norm", "instance_norm"):
            return self._global_norm(first)
        self.on_global_layer()

        # The gradient ends here, so that only what the other paths see remains in the image's gradient.
        def detach(part: Any) -> Any:
            if part is first:
                return _SeesEverything.apply(first, self, False)
            return part.detach() if isinstance(part, Tensor) else part

        return func(*pytree.tree_map(detach, args), **pytree.tree_map(detach, kwargs))


class _SeesEverything(torch.autograd.Function):
    """The identity, which sets `sees_everything` when a gradient arrives, and passes it on or ends it."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, mode: PositiveGradients, passes: bool) -> Tensor:
        ctx.mode, ctx.passes = mode, passes
        return input.view_as(input)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        ctx.mode.sees_everything = True
        return grads[0] if ctx.passes else None, None, None


def _run_as_it_is(
    name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], first: Tensor
) -> Any:
    """Run an operation without a rule: with torch's gradient if that is positive, or else with absolute values."""
    result = func(*args, **kwargs)
    if name in NATIVE or (name in ("interpolate", "upsample") and "bicubic" not in (*args, *kwargs.values())):
        return result
    if name in CASTS:
        # Stay in float64: in deep networks gradients fall below the smallest float32.
        lowered = first.requires_grad and result.is_floating_point() and result.dtype != first.dtype
        return first if lowered else result
    return without_cancellation(func, args, kwargs, result)


def _as_precise(paths: list[Tensor], part: Any) -> Any:
    """Return a tensor that does not depend on the image in the dtype of those that do, which the mode keeps float64."""
    if not isinstance(part, Tensor) or not part.is_floating_point() or any(part is path for path in paths):
        return part
    return part.to(paths[0].dtype)


def _check_has_field(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise UnknownFieldError for operations that sample at random positions, or at positions the image decides."""
    if name.startswith("fractional_max_pool"):
        raise UnknownFieldError(f"{name} reads places drawn at random: its receptive field cannot be probed")
    if name in SAMPLERS and is_path([*args, *kwargs.values()][SAMPLERS[name]]):
        raise UnknownFieldError(
            f"where {name} reads depends on the image: its receptive field is different for every image and cannot be "
            "probed"
        )
