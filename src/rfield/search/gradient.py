"""Search by the factors' exact gradient, the method of the paper (Wei et al., CVPR 2017)."""

import functools
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from rfield.search.base import LossFunction, Search

# After this many optimizer steps, refuse factors that no optimizer updates.
_STEPS_BEFORE_CHECK = 10


class GradientSearch(Search):
    """Search by the exact gradient of the factors, which the optimizer applies (Wei et al., CVPR 2017).

    A factor with a loss of its own needs one more backward pass. `step` raises ValueError for a factor that no
    optimizer updates, for example because `adapt` was called after the optimizer was made.

    Args:
        model, loss_fn, steps, seed: see `Search`.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFunction, steps: int, seed: int = 0) -> None:
        super().__init__(model, loss_fn, steps, seed)
        for group in self.groups:  # an unfinished search of another kind may have frozen them
            group[0].freeze_factor(False)
            for layer in group:
                layer.in_search = False
        self._optimized: set[int] = set()
        _watch_optimizers()
        _WATCHING.add(self)

    def loss(self, batch: Any) -> Tensor:
        loss, factor_losses = self._call_loss_fn(batch)
        total = loss
        for group, factor_loss in zip(self.groups, factor_losses, strict=True):
            factor = group[0].log_factor
            if factor.requires_grad and self._has_factor_losses:
                (correction,) = torch.autograd.grad(factor_loss - loss, factor, retain_graph=True, allow_unused=True)
                if correction is not None:  # None if this batch did not run the layer
                    # Zero in value, so that the loss does not change; its gradient is the correction.
                    term = (correction * factor).sum()
                    total = total + (term - term.detach())
        return total

    def _update_factors(self) -> None:
        for group in self.groups:
            if not bool(torch.isfinite(group[0].factor).all()):
                raise ValueError(
                    f"step {self.step_index + 1}: the factor of {self._layer_names(group)} is "
                    f"{group[0].factor.tolist()}: the training has diverged; lower the factor's learning rate"
                )
            # The layers clamp in their forward, too, but under FSDP2 that changes a temporary copy only.
            for layer in group:
                if layer.map_size is not None and layer.log_factor.requires_grad:
                    layer.clamp_factor_(layer.map_size)
        self._record()
        if self.step_index == min(_STEPS_BEFORE_CHECK, self.steps):
            self._check_optimizers()
        if self.step_index >= self.steps:
            self._finalize()

    def _check_optimizers(self) -> None:
        _WATCHING.discard(self)
        if not any(id(weight) in self._optimized for weight in self.model.parameters()):
            return  # the model is trained by something other than torch's optimizers
        for group in self.groups:
            if id(group[0].log_factor) not in self._optimized:
                raise ValueError(
                    f"no optimizer that has stepped holds the factor of {self._layer_names(group)}, so that its "
                    "receptive field is not learned: make the optimizer after adapt or regulate, of "
                    "rfield.parameter_groups"
                )
        self._optimized = set()


_WATCHING: "weakref.WeakSet[GradientSearch]" = weakref.WeakSet()


@functools.cache
def _watch_optimizers() -> None:
    """Record, for all searches in `_WATCHING`, which parameters the optimizers update."""

    def record(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for search in list(_WATCHING):
            search._optimized.update(id(weight) for group in optimizer.param_groups for weight in group["params"])

    register_optimizer_step_post_hook(record)
