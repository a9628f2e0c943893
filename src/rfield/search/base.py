"""The base class of all searches: groups of layers, steps, the final result, and the saved state."""

import copy
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rfield.layers import LearnedFactor
from rfield.layers.dilation import Pair
from rfield.search.factors import dilation_range, learned_layers, names_by_id, searchable_layers

LossFunction = Callable[[nn.Module, Any], Tensor | tuple[Tensor, Tensor]]


class _OverrideInBackward(torch.autograd.Function):
    """Return the loss; its backward pass runs at the dilations that its forward pass ran at.

    Gradient checkpointing repeats parts of the forward pass during the backward pass, and by then the search may have
    set other dilations.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, search: "Search") -> Tensor:
        ctx.search, ctx.overrides, ctx.step = search, search._overrides, search.step_index
        return loss.clone()  # autograd forbids changing a view in place

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        for layer, dilation in ctx.overrides:
            layer.dilation_override = dilation
        if ctx.step != ctx.search.step_index:  # `step` has already cleared the overrides: clear them again afterwards
            torch.autograd.Variable._execution_engine.queue_callback(ctx.search._clear_overrides)
        return grad_outputs[0], None


class Search:
    """Base class of the searches, which learn the factors of a model during its training.

    Between `step` and the next `loss` the network runs at the best dilations found so far, or at its start where there
    are none yet. A validation measures the network there, and a checkpoint of the model saves it there.

    Args:
        model: contains the layers to learn; may be wrapped (DistributedDataParallel). Frozen factors and snapped layers
            do not change.
        loss_fn: `loss_fn(model, batch)` returns the scalar loss, or `(loss, factor_losses)` with `factor_losses`,
            Tensor[number of factors]. The weights are trained on `loss`, and each factor on its own entry of
            `factor_losses`.
        steps: number of optimizer steps of the search; after the last one the factors are snapped.
        seed: seed of the random draws.

    Attributes:
        groups: the layers to learn; layers that share a factor form one group.
        done: whether the receptive field is final.
        starts: for each factor the effective dilation at the start of the search, one number or (height, width).
        trajectory: for each step (step, dilations): the dilations along the height that the step ran at, one per
            factor.
        unsnapped: for each factor the final dilation before it was snapped, one number or (height, width); empty until
            `done`.

    Raises:
        ValueError: if the model has nothing to learn, or `steps` is below 1. `loss` and `step` raise it if a layer to
            learn has not run, or no integer dilation lies within its bounds.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFunction, steps: int, seed: int = 0) -> None:
        all_groups = learned_layers(model)
        if not all_groups:
            raise ValueError("the model has no learned factor: wrap layers in a regulator or an AdaptiveConv2d first")
        self.groups = [group for layers in all_groups if (group := searchable_layers(layers))]
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
        self._overrides: list[tuple[LearnedFactor, Pair | None]] = []
        self._names = names_by_id(model)
        self._has_factor_losses = self._checked = False
        self._set_starts([list(group[0].effective_dilation[: group[0].log_factor.numel()]) for group in self.groups])
        for group in self.groups:
            for layer in group:
                layer.map_size = None  # unknown until the layer runs in this search

    def loss(self, batch: Any) -> Tensor:
        """Return the loss to call `backward` on."""
        raise NotImplementedError

    def step(self) -> None:
        """End an optimizer step: update the factors and remove the dilations that the step tried."""
        if self.done:
            return
        self._check_layers()
        self._update_factors()
        self._clear_overrides()

    def _update_factors(self) -> None:
        """Do the search method's part of a step."""
        raise NotImplementedError

    def report(self) -> str:
        """Return what has been found so far, a line for each factor and axis: the dilations at the start and now.

        A sampled search adds how sure they are, see `rfield.search.judge`.
        """
        lines = []
        for index, (group, names) in enumerate(zip(self.groups, self.group_names(), strict=True)):
            for axis, start in enumerate(self.starts[index]):
                side = f", {('height', 'width')[axis]}" if len(self.starts[index]) > 1 else ""
                scales = [layer.base_dilation[axis] / group[0].base_dilation[axis] for layer in group]
                before = ", ".join(f"{start * scale:.3g}" for scale in scales)
                now = ", ".join(f"{layer.effective_dilation[axis]:.3g}" for layer in group)
                lines.append(f"{names}{side}: dilation {before} -> {now}{self._certainty(index, axis)}")
        return "\n".join(lines)

    def group_names(self) -> list[str]:
        """Return the names of each factor's layers in the model."""
        return [self._layer_names(group) for group in self.groups]

    def _certainty(self, index: int, axis: int) -> str:
        """Return how sure the dilation of a factor and axis is, as the end of its line in the report."""
        return ""

    def state_dict(self) -> dict[str, Any]:
        """Return plain types and copied tensors, to be saved beside the model's state."""
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
        """Continue a search exactly where `state_dict` was called; load the model's state first.

        Raises:
            ValueError: if the state belongs to another kind of search, or to a model with other learned layers.
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
                layer.extend_range(factor)

    def _freeze_factors(self) -> None:
        """Freeze the factors, for a search that sets them itself."""
        for group in self.groups:
            group[0].freeze_factor()
            for layer in group:
                layer.in_search = True

    def _call_loss_fn(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return the loss for the weights and the losses for the factors, Tensor[number of factors]."""
        try:
            value = self.loss_fn(self.model, batch)
        except BaseException:  # a caller may catch an out-of-memory error and continue
            self._clear_overrides()
            raise
        self._has_factor_losses = not isinstance(value, Tensor)
        loss, factor_losses = (value, value.expand(len(self.groups))) if isinstance(value, Tensor) else value
        if factor_losses.shape != (len(self.groups),):
            raise ValueError(
                f"loss_fn returned factor_losses of shape {tuple(factor_losses.shape)}, but the model has "
                f"{len(self.groups)} factors"
            )
        self._keep_overrides()
        return _OverrideInBackward.apply(loss, self), factor_losses

    def _keep_overrides(self) -> None:
        """Remember the dilations of this step's forward pass."""
        self._overrides = [(layer, layer.dilation_override) for group in self.groups for layer in group]

    def _check_layers(self) -> None:
        """Raise ValueError for a layer that no forward pass runs, or whose bounds contain no integer dilation."""
        if self._checked:
            return
        for group in self.groups:
            if all(layer.map_size is None for layer in group):
                raise ValueError(
                    f"the learned layer {self._layer_names(group)} has not run in the forward pass, so that nothing "
                    "can be learned of it: freeze its factor by freeze_factor() before the search, or leave it out of "
                    "adapt"
                )
            try:
                dilation_range(group)
            except ValueError as error:
                raise ValueError(f"the learned layer {self._layer_names(group)}: {error}") from error
        self._checked = True

    def _layer_names(self, group: list[LearnedFactor]) -> str:
        """Return the names that a group's layers have in the model."""
        return ", ".join(self._names[id(layer)] for layer in group)

    def _record(self) -> None:
        """Count the step, and add the dilations of its last forward pass to the trajectory."""
        self.step_index += 1
        for layer, dilation in self._overrides:  # the backward pass may have set those of another forward pass
            layer.dilation_override = dilation
        self.trajectory.append((self.step_index, [group[0].realised_dilation[0] for group in self.groups]))

    def _clear_overrides(self) -> None:
        """Make all layers run at their own factors, which hold the best dilations found so far."""
        for group in self.groups:
            for layer in group:
                layer.dilation_override = None

    def _finalize(self) -> None:
        """End the search: record the final dilations, then snap every layer."""
        self._clear_overrides()
        for group in self.groups:
            axes = group[0].log_factor.numel()
            self.unsnapped.append(list(group[0].effective_dilation[:axes]))
            for layer in group:
                layer.snap()
            group[0].copy_snap_to_factor()
        self.done = True

    def _random(self, *key: object) -> random.Random:
        """Return a generator that depends on the seed, the step and `key` only."""
        return random.Random(repr((self.seed, self.step_index, *key)))
