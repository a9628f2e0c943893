"""The exponential moving average of a model's weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from rfield.search.factors import names_by_id

# Decay of the exponential moving average (EMA), which covers about the last 33 steps.
DECAY = 0.97


class AveragedWeights:
    """The EMA of a model's trained weights, which are noisy after a single step.

    It has float32 precision at least: in bfloat16 most updates of 3 % would be rounded away.

    Attributes:
        weights: the averages by the weights' names; empty before the first update.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._known: list[tuple[str, nn.Parameter]] = []
        self.weights: dict[str, Tensor] = {}

    def _named(self) -> list[tuple[str, nn.Parameter]]:
        """Return (name, weight) pairs; wrappers, which may be added during a search, do not change the names."""
        weights = list(self._model.parameters())
        if [id(weight) for weight in weights] != [id(weight) for _, weight in self._known]:
            names = names_by_id(self._model)  # which takes longer than the update of a small head
            self._known = [(names[id(weight)], weight) for weight in weights]
        return self._known

    @torch.no_grad()
    def update(self) -> None:
        """Add the present weights."""
        averages, values = [], []
        for name, weight in self._named():
            if weight.requires_grad:
                value = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
                averages.append(self.weights.setdefault(name, value.clone()))
                values.append(value)
        if values:
            get_ema_multi_avg_fn(DECAY)(averages, values, 0)  # type: ignore[no-untyped-call]

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Put the averages into the model and switch it to eval mode; restore both when the block ends."""
        modes = [(module, module.training) for module in self._model.modules()]
        averaged = [(weight, self.weights[name]) for name, weight in self._named() if name in self.weights]
        own = [weight.detach().clone() for weight, _ in averaged]
        self._model.eval()
        try:
            with torch.no_grad():
                for weight, average in averaged:
                    weight.copy_(average)
            yield
        finally:
            with torch.no_grad():
                for (weight, _), value in zip(averaged, own, strict=True):
                    weight.copy_(value)
            for module, training in modes:
                module.training = training

    def load(self, averages: Mapping[str, Tensor]) -> None:
        """Continue from saved averages.

        Raises:
            ValueError: the model has no weight of a name.
        """
        weights = dict(self._named())
        if unknown := [name for name in averages if name not in weights]:
            raise ValueError(f"the state averages weights that the model does not have: {', '.join(unknown[:3])}")
        self.weights = {name: average.to(weights[name].device) for name, average in averages.items()}
