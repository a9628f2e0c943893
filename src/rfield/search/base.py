"""What the searches share, and the paper's own: the exact gradient."""

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rfield.layers import LearnedFactor
from rfield.layers.factor import Pair
from rfield.search.factors import learned_layers

LossFunction = Callable[[nn.Module, Any], Tensor | tuple[Tensor, Tensor]]


class _HoldInBackward(torch.autograd.Function):
    """A loss, whose backward pass holds the dilations that its forward pass ran at.

    Gradient checkpointing repeats parts of the forward pass in the backward one, and a search may have moved on.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, held: list[tuple[LearnedFactor, Pair | None]]) -> Tensor:
        ctx.held = held
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        for layer, dilation in ctx.held:
            layer.held = dilation
        return grad_outputs[0], None


class Search:
    """What the three searches share: the groups of layers, the step, the end.

    Args:
        model: holds the layers to learn; may be wrapped (DistributedDataParallel).
        loss_fn: `loss_fn(model, batch)` gives the scalar loss; or (loss, guides), where guides is Tensor[number of
            factors]: the weights train on the loss, and each factor is learned by its own guide.
        steps: optimizer steps of the search; at their end the factors are snapped.
        seed: of the draws.

    Attributes:
        done: whether the receptive field is final.
        trajectory: (step, the dilations along the height that it ran at, one a factor) of each step.
        unsnapped: the dilations that it ended with, one number or (height, width) a factor; empty until `done`.

    Raises:
        ValueError: if there is nothing to learn in the model, or no steps to learn it in.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFunction, steps: int, seed: int = 0) -> None:
        self.groups = learned_layers(model)
        if not self.groups:
            raise ValueError("the model has no learned factor: wrap layers in a regulator or an AdaptiveConv2d first")
        if steps < 1:
            raise ValueError(f"a search needs at least 1 step, got {steps}")
        self.model = model
        self.loss_fn = loss_fn
        self.steps = steps
        self.seed = seed
        self.step_index = 0
        self.done = False
        self.trajectory: list[tuple[int, list[float]]] = []
        self.unsnapped: list[list[float]] = []
        self._held: list[tuple[LearnedFactor, Pair | None]] = []

    def loss(self, batch: Any) -> Tensor:
        """The loss to call `backward` on."""
        raise NotImplementedError

    def step(self) -> None:
        """Ends an optimizer step."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Plain types and tensors, for a checkpoint beside the model's."""
        return {
            "steps": self.steps,
            "step_index": self.step_index,
            "done": self.done,
            "trajectory": self.trajectory,
            "unsnapped": self.unsnapped,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken; load the model's state first."""
        self.step_index = state["step_index"]
        self.done = state["done"]
        if self.done:
            for group in self.groups:
                group[0].freeze_factor()
        self.trajectory = list(state["trajectory"])
        self.unsnapped = list(state["unsnapped"])

    def _losses(self, batch: Any) -> tuple[Tensor, Tensor]:
        """The loss for the weights, and the guides for the factors, Tensor[number of factors]."""
        value = self.loss_fn(self.model, batch)
        loss, guides = (value, value.expand(len(self.groups))) if isinstance(value, Tensor) else value
        if guides.shape != (len(self.groups),):
            raise ValueError(
                f"loss_fn gave guides of shape {tuple(guides.shape)}, but the model has {len(self.groups)} factors"
            )
        self._held = [(layer, layer.held) for group in self.groups for layer in group]
        return _HoldInBackward.apply(loss, self._held), guides

    def _record(self) -> None:
        self.step_index += 1
        for layer, dilation in self._held:  # The backward pass may have changed it.
            layer.held = dilation
        self.trajectory.append((self.step_index, [group[0].realised_dilation[0] for group in self.groups]))

    def _finish(self) -> None:
        for group in self.groups:
            axes = group[0].log_factor.numel()
            self.unsnapped.append(list(group[0].effective_dilation[:axes]))
            for layer in group:
                layer.held = None
                layer.snap()
        self.done = True

    def _random(self, *key: object) -> random.Random:
        return random.Random(repr((self.seed, self.step_index, *key)))


class GradientSearch(Search):
    """The paper's: the factors follow their exact gradient, which the optimizer applies (Wei et al., CVPR 2017).

    A factor with a guide of its own follows that one's gradient, which costs a further backward pass a factor.
    """

    def loss(self, batch: Any) -> Tensor:
        loss, guides = self._losses(batch)
        total = loss
        for group, guide in zip(self.groups, guides, strict=True):
            factor = group[0].log_factor
            # Without guides of their own, all factors' guide is the loss itself.
            if factor.requires_grad and guide.data_ptr() != loss.data_ptr():
                (correction,) = torch.autograd.grad(guide - loss, factor, retain_graph=True)
                term = (correction * factor).sum()
                total = total + (term - term.detach())
        return total

    def step(self) -> None:
        if self.done:
            return
        for group in self.groups:
            # The layers' own clamping, in the forward, is lost on what FSDP2 gathers.
            for layer in group:
                if layer.map_size is not None and layer.log_factor.requires_grad:
                    layer.clamp_factor_(layer.map_size)
        self._record()
        if self.step_index >= self.steps:
            self._finish()
