"""Search by simultaneous perturbation (SPSA): compare the loss at a larger and at a smaller dilation."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from rfield.search.base import LossFunction, Search
from rfield.search.factors import (
    dilation_range,
    log_dilation,
    mean_over_processes,
    override_dilation,
    set_effective_dilation,
)


class SpsaSearch(Search):
    """Simultaneous perturbation (Spall 1992) of the logarithm of every effective dilation; local and online.

    Each step runs the same batch at `r e^eps` and at `r e^-eps`. The weights are trained on the mean of both losses,
    and Adam receives `(L+ - L-) / (2 eps)` as the gradient of log r. Each factor draws its own eps: half-normal with
    scale sigma and a random sign, clipped to [0.05, 2 sigma]. Sigma falls linearly from `scale` to 0. Dilated
    convolutions run at an integer drawn by stochastic rounding.

    Args:
        model, loss_fn, steps, seed: see `Search`.
        scale: sigma at the start.
        lr: Adam's learning rate for the logarithm of the dilation.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        steps: int,
        seed: int = 0,
        scale: float = 0.6,
        lr: float = 0.03,
    ) -> None:
        super().__init__(model, loss_fn, steps, seed)
        self.scale = scale
        self._freeze_factors()
        self._log_dilation = [log_dilation(group[0]) for group in self.groups]
        self._optimizer = torch.optim.Adam(self._log_dilation, lr=lr, betas=(0.9, 0.99))
        self._loss_pairs: list[Tensor] = []

    def loss(self, batch: Any) -> Tensor:
        if self.done:
            return self._call_loss_fn(batch)[0]
        losses, loss_pair = [], []
        for sign in (1.0, -1.0):
            for index, (group, center) in enumerate(zip(self.groups, self._log_dilation, strict=True)):
                dilation = (center + sign * self._epsilon(index, center)).exp().tolist()
                override_dilation(group, dilation, self._random("round", index, sign))
            loss, factor_losses = self._call_loss_fn(batch)
            losses.append(loss)
            loss_pair.append(factor_losses)
        self._loss_pairs.append(torch.stack(loss_pair).detach().float())
        return (losses[0] + losses[1]) / 2

    def _update_factors(self) -> None:
        if self._loss_pairs:
            above, below = mean_over_processes(torch.stack(self._loss_pairs).mean(0))
            self._loss_pairs = []
            self._check_finite(above, below)
            difference = above - below
            for index, center in enumerate(self._log_dilation):
                center.grad = difference[index].to(center) / (2 * self._epsilon(index, center))
            self._optimizer.step()
            for group, center in zip(self.groups, self._log_dilation, strict=True):
                low, high = dilation_range(group)
                center.data.clamp_(math.log(low), math.log(high))
                set_effective_dilation(group, center.exp().tolist())
        self._record()
        if self.step_index >= self.steps:
            self._finalize()

    def _check_finite(self, above: Tensor, below: Tensor) -> None:
        for group, center, *losses in zip(self.groups, self._log_dilation, above.tolist(), below.tolist(), strict=True):
            if not all(math.isfinite(loss) for loss in losses):
                around = ", ".join(f"{value:.4g}" for value in center.exp().tolist())
                raise ValueError(
                    f"step {self.step_index + 1}: the losses above and below the dilation {around} of "
                    f"{self._layer_names(group)} are {losses[0]:.4g} and {losses[1]:.4g}, which cannot be compared: "
                    "the training has diverged, or the batch has no labels; lower the learning rate or look at the "
                    "batch"
                )

    def _sigma(self) -> float:
        return self.scale * (1 - self.step_index / self.steps)

    def _epsilon(self, index: int, center: Tensor) -> Tensor:
        """Draw the perturbation of one factor, Tensor[1] or Tensor[2]; all calls of a step return the same."""
        sigma = self._sigma()
        draw = self._random("epsilon", index)
        values = []
        for _ in range(center.numel()):
            size = min(max(abs(draw.gauss(0, sigma)), 0.05), max(2 * sigma, 0.05))
            values.append(size * draw.choice((-1, 1)))
        return center.new_tensor(values)

    def _state(self) -> dict[str, Any]:
        return {
            **super()._state(),
            "log_dilation": [center.detach() for center in self._log_dilation],
            "optimizer": self._optimizer.state_dict(),
        }

    def _load(self, state: dict[str, Any]) -> None:
        super()._load(state)
        for center, saved in zip(self._log_dilation, state["log_dilation"], strict=True):
            center.data.copy_(saved)
        self._optimizer.load_state_dict(state["optimizer"])
