"""The paper's own search: the factors follow their exact gradient (Wei et al., CVPR 2017)."""

import functools
import warnings
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from rfield.search.base import LossFunction, Search

# Optimizer steps after which a factor that no optimizer holds is named.
_PATIENCE = 10


class GradientSearch(Search):
    """The paper's: the factors follow their exact gradient, which the optimizer applies (Wei et al., CVPR 2017).

    A factor with a guide of its own follows that one's gradient, which costs a further backward pass a factor. A
    factor that no optimizer holds, as after an `adapt` that came too late, is named in a warning.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFunction, steps: int, seed: int = 0) -> None:
        super().__init__(model, loss_fn, steps, seed)
        for group in self.groups:  # A search that has not ended may have had them.
            group[0].freeze_factor(False)
            for layer in group:
                layer.in_search = False
        self._optimized: set[int] = set()
        _watch_optimizers()
        _WATCHING.add(self)

    def loss(self, batch: Any) -> Tensor:
        loss, guides = self._losses(batch)
        total = loss
        for group, guide in zip(self.groups, guides, strict=True):
            factor = group[0].log_factor
            # Without guides of their own, all factors' guide is the loss itself.
            if factor.requires_grad and self._guided:
                (correction,) = torch.autograd.grad(guide - loss, factor, retain_graph=True, allow_unused=True)
                if correction is not None:  # else this batch has not passed the layer
                    term = (correction * factor).sum()
                    total = total + (term - term.detach())
        return total

    def _learn(self) -> None:
        for group in self.groups:
            if not bool(torch.isfinite(group[0].factor).all()):
                raise ValueError(
                    f"step {self.step_index + 1}: the factor of {self._name(group)} is {group[0].factor.tolist()}: the "
                    "training has diverged; lower the factor's learning rate"
                )
            # The layers' own clamping, in the forward, is lost on what FSDP2 gathers.
            for layer in group:
                if layer.map_size is not None and layer.log_factor.requires_grad:
                    layer.clamp_factor_(layer.map_size)
        self._record()
        if self.step_index == min(_PATIENCE, self.steps):
            self._name_what_no_optimizer_holds()
        if self.step_index >= self.steps:
            self._finish()

    def _name_what_no_optimizer_holds(self) -> None:
        _WATCHING.discard(self)
        if not any(id(weight) in self._optimized for weight in self.model.parameters()):
            return  # Of none of torch's.
        for group in self.groups:
            if id(group[0].log_factor) not in self._optimized:
                warnings.warn(
                    f"no optimizer that has stepped holds the factor of {self._name(group)}, so that its receptive "
                    "field is not learned: make the optimizer after adapt or regulate, of rfield.parameter_groups",
                    stacklevel=4,
                )
        self._optimized = set()


_WATCHING: "weakref.WeakSet[GradientSearch]" = weakref.WeakSet()


@functools.cache
def _watch_optimizers() -> None:
    """Has each step of any optimizer tell the searches of their first steps which parameters it holds."""

    def note(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for search in list(_WATCHING):
            search._optimized.update(id(weight) for group in optimizer.param_groups for weight in group["params"])

    register_optimizer_step_post_hook(note)
