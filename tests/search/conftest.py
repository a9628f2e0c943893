"""Models and data with a known best dilation, which every search must find."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfield.layers import AdaptiveConv2d, ReceptiveFieldRegulator
from rfield.search import Search, learned_layers, parameter_groups


class Cues:
    """Data in which a pixel's class depends on the pixel `best` px to its right; see `batches`."""

    best = 6

    @staticmethod
    def batches(count: int, seed: int = 0, best: int = 6) -> list[tuple[Tensor, Tensor]]:
        """Return batches in which a pixel's class is the sign of a smooth field `best` px to its right."""
        generator = torch.Generator().manual_seed(seed)
        batches = []
        for _ in range(count):
            noise = torch.randn(4, 1, 40, 40, generator=generator)
            smooth = F.avg_pool2d(F.avg_pool2d(noise, 3, 1, 1), 3, 1, 1)
            target = torch.zeros(4, 40, 40, dtype=torch.long)
            target[:, :, :-best] = (smooth[:, 0, :, best:] > 0).long()
            target[:, :, -best:] = 255
            batches.append((smooth * 5, target))
        return batches

    @staticmethod
    def model(dilation: int, mechanism: str = "dilation") -> nn.Sequential:
        torch.manual_seed(0)
        conv = nn.Conv2d(1, 8, 3, padding=dilation, dilation=dilation)
        tail = (nn.ReLU(), nn.Conv2d(8, 2, 1))
        if mechanism == "dilation":
            return nn.Sequential(AdaptiveConv2d.from_conv(conv), *tail)
        return nn.Sequential(ReceptiveFieldRegulator(nn.Sequential(conv, *tail)))

    @staticmethod
    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], ignore_index=255)

    @staticmethod
    def run(search: Search, model: nn.Module, batches: list[Any], start: int = 0, end: int | None = None) -> None:
        optimizer = torch.optim.Adam(parameter_groups(model, lr=0.02, factor_lr=0.02), lr=0.02)
        for batch in batches[start:end]:
            loss = search.loss(batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            search.step()


class Toy:
    """Convolutions whose loss is the squared distance of their log dilation from a known one; fast."""

    image = torch.randn(1, 1, 12, 24, generator=torch.Generator().manual_seed(0))

    @staticmethod
    def layer(dilation: int, **options: Any) -> AdaptiveConv2d:
        return AdaptiveConv2d(1, 1, 3, padding=dilation, dilation=dilation, **options)

    @classmethod
    def model(cls, *dilations: int, **options: Any) -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(*(cls.layer(dilation, **options) for dilation in dilations))

    @staticmethod
    def loss(*best: float) -> Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]:
        """Return a loss function with a loss for each factor: the squared distances of both axes, added."""

        def loss_fn(model: nn.Module, image: Tensor) -> tuple[Tensor, Tensor]:
            output = model(image)
            realised = [group[0].realised_dilation for group in learned_layers(model)]
            factor_losses = [
                sum(math.log(dilation / at) ** 2 for dilation in pair) for pair, at in zip(realised, best, strict=True)
            ]
            return output.square().mean(), torch.tensor(factor_losses)

        return loss_fn

    @classmethod
    def run(cls, search: Search, steps: int) -> None:
        """Run the search's steps without an optimizer."""
        for _ in range(steps):
            search.loss(cls.image)
            search.step()


@pytest.fixture
def toy() -> type[Toy]:
    """Return layers whose best dilation is known without training."""
    return Toy


@pytest.fixture
def cues() -> type[Cues]:
    """Return data with a known best dilation, its model, loss and training loop."""
    return Cues
