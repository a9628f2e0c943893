"""What the searches share: the groups of layers, the step, the end, the state."""

import copy
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rfield.layers import LearnedFactor
from rfield.layers.factor import Pair
from rfield.search.factors import dilation_range, learned_layers, names_of, still_learned

LossFunction = Callable[[nn.Module, Any], Tensor | tuple[Tensor, Tensor]]


class _HoldInBackward(torch.autograd.Function):
    """A loss, whose backward pass holds the dilations that its forward pass ran at.

    Gradient checkpointing repeats parts of the forward pass in the backward one, and a search may have moved on.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, search: "Search") -> Tensor:
        ctx.search, ctx.held, ctx.step = search, search._held, search.step_index
        return loss.clone()  # A view could not be changed in place.

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        for layer, dilation in ctx.held:
            layer.held = dilation
        if ctx.step != ctx.search.step_index:  # A backward pass after its step leaves nothing held.
            torch.autograd.Variable._execution_engine.queue_callback(ctx.search._release)
        return grad_outputs[0], None


class Search:
    """What the three searches share: the groups of layers, the step, the end.

    Between `step` and the next `loss` the network is at the present best of the search, or at its start where there is
    none yet: that is what a validation sees, and what a checkpoint of the model holds.

    Args:
        model: holds the layers to learn; may be wrapped (DistributedDataParallel). Factors that are frozen, and layers
            that are snapped, stay as they are.
        loss_fn: `loss_fn(model, batch)` gives the scalar loss; or (loss, guides), where guides is Tensor[number of
            factors]: the weights train on the loss, and each factor is learned by its own guide.
        steps: optimizer steps of the search; at their end the factors are snapped.
        seed: of the draws.

    Attributes:
        groups: the layers that are learned, those that share a factor together.
        done: whether the receptive field is final.
        starts: for each factor the effective dilations that the search was started at, one or (height, width).
        trajectory: (step, the dilations along the height that it ran at, one a factor) of each step.
        unsnapped: the dilations that it ended with, one number or (height, width) a factor; empty until `done`.

    Raises:
        ValueError: if there is nothing to learn in the model, or no steps to learn it in; in `loss` and `step` if a
            layer to learn has not run, or its bounds hold no whole dilation.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFunction, steps: int, seed: int = 0) -> None:
        every = learned_layers(model)
        if not every:
            raise ValueError("the model has no learned factor: wrap layers in a regulator or an AdaptiveConv2d first")
        self.groups = [group for layers in every if (group := still_learned(layers))]
        if not self.groups:
            raise ValueError(
                "the model's learned factors are all frozen or snapped, which leaves none to search: call "
                "freeze_factor(False) on those to learn; to resume a search, make it before the model's state is loaded"
            )
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
        self._names = names_of(model)
        self._guided = self._checked = False
        self._set_starts([list(group[0].effective_dilation[: group[0].log_factor.numel()]) for group in self.groups])
        for group in self.groups:
            for layer in group:
                layer.map_size = None  # Until this search has seen it run.

    def loss(self, batch: Any) -> Tensor:
        """The loss to call `backward` on."""
        raise NotImplementedError

    def step(self) -> None:
        """Ends an optimizer step, and lets go of the dilations that it ran at."""
        if self.done:
            return
        self._check_layers()
        self._learn()
        self._release()

    def _learn(self) -> None:
        """A step's part of the search."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Plain types and tensors of its own, for a checkpoint beside the model's."""
        return copy.deepcopy(self._state())

    def _state(self) -> dict[str, Any]:
        return {
            "kind": type(self).__name__,
            "steps": self.steps,
            "seed": self.seed,
            "starts": self.starts,
            "step_index": self.step_index,
            "done": self.done,
            "trajectory": self.trajectory,
            "unsnapped": self.unsnapped,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken, as if it had never stopped; load the model's state first.

        Raises:
            ValueError: if the state is that of another search, or of a model with other learned layers.
        """
        axes = [len(start) for start in self.starts]
        if state["kind"] != type(self).__name__ or [len(start) for start in state["starts"]] != axes:
            raise ValueError(
                f"the state is that of a {state['kind']} that started at {state['starts']}, and cannot be loaded into "
                f"a {type(self).__name__} that started at {self.starts}"
            )
        self._load(copy.deepcopy(state))

    def _load(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        self.seed = state["seed"]
        self.step_index = state["step_index"]
        self.done = state["done"]
        self.trajectory = state["trajectory"]
        self.unsnapped = state["unsnapped"]
        self._set_starts(state["starts"])
        if self.done:
            for group in self.groups:
                group[0].freeze_factor()
                for layer in group:
                    layer.in_search = False

    def _set_starts(self, starts: list[list[float]]) -> None:
        self.starts = starts
        for group, start in zip(self.groups, starts, strict=True):
            factor = [base / dilation for base, dilation in zip(group[0].base_dilation, start, strict=False)]
            for layer in group:
                layer.widen_range(factor)

    def _take_factors(self) -> None:
        """Freezes the factors that the search sets by itself."""
        for group in self.groups:
            group[0].freeze_factor()
            for layer in group:
                layer.in_search = True

    def _losses(self, batch: Any) -> tuple[Tensor, Tensor]:
        """The loss for the weights, and the guides for the factors, Tensor[number of factors]."""
        try:
            value = self.loss_fn(self.model, batch)
        except BaseException:  # As of a lack of memory: who goes on from it finds the network as between steps.
            self._release()
            raise
        self._guided = not isinstance(value, Tensor)
        loss, guides = (value, value.expand(len(self.groups))) if isinstance(value, Tensor) else value
        if guides.shape != (len(self.groups),):
            raise ValueError(
                f"loss_fn gave guides of shape {tuple(guides.shape)}, but the model has {len(self.groups)} factors"
            )
        self._held = [(layer, layer.held) for group in self.groups for layer in group]
        return _HoldInBackward.apply(loss, self), guides

    def _check_layers(self) -> None:
        """Refuses layers that no forward pass reaches, and bounds that no whole dilation lies between."""
        if self._checked:
            return
        for group in self.groups:
            if all(layer.map_size is None for layer in group):
                raise ValueError(
                    f"the learned layer {self._name(group)} has not run in the forward pass, so that nothing can be "
                    "learned of it: freeze its factor by freeze_factor() before the search, or leave it out of adapt"
                )
            try:
                dilation_range(group)
            except ValueError as error:
                raise ValueError(f"the learned layer {self._name(group)}: {error}") from error
        self._checked = True

    def _name(self, group: list[LearnedFactor]) -> str:
        """The layers of a group by their names in the model."""
        return ", ".join(self._names[id(layer)] for layer in group)

    def _record(self) -> None:
        self.step_index += 1
        for layer, dilation in self._held:  # The backward pass may have changed it.
            layer.held = dilation
        self.trajectory.append((self.step_index, [group[0].realised_dilation[0] for group in self.groups]))

    def _release(self) -> None:
        """Puts the network at its present best, which its factors stand at."""
        for group in self.groups:
            for layer in group:
                layer.held = None

    def _finish(self) -> None:
        self._release()
        for group in self.groups:
            axes = group[0].log_factor.numel()
            self.unsnapped.append(list(group[0].effective_dilation[:axes]))
            for layer in group:
                layer.snap()
            group[0].settle_factor()
        self.done = True

    def _random(self, *key: object) -> random.Random:
        return random.Random(repr((self.seed, self.step_index, *key)))
