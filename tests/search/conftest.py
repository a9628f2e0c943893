"""A cue at a known distance, which every search is to find."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfield.layers import AdaptiveConv2d, ReceptiveFieldRegulator
from rfield.search import Search, parameter_groups


class Cues:
    """A pixel's class lies `best` px to its right; see `batches`."""

    best = 6

    @staticmethod
    def batches(count: int, seed: int = 0, best: int = 6) -> list[tuple[Tensor, Tensor]]:
        """A pixel's class is the sign of a smooth field `best` px to its right; the field is about half as wide."""
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


@pytest.fixture
def cues() -> type[Cues]:
    """The cue's batches, model, loss and training loop."""
    return Cues
