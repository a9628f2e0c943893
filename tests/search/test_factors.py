"""Find and group the learned factors of a model."""

from typing import Any

import pytest
import torch
from torch import nn

from rfield.layers import AdaptiveConv2d, ReceptiveFieldRegulator
from rfield.search import factor_parameters, learned_layers, parameter_groups
from rfield.search.factors import dilation_range, searchable_layers


class TestParameterGroups:
    def test_factors_are_apart_and_out_of_weight_decay(self) -> None:
        first, second = (ReceptiveFieldRegulator(nn.Conv2d(2, 2, 3, padding=1)) for _ in range(2))
        second.share_factor(first)
        model = nn.Sequential(nn.Conv2d(3, 2, 1), first, second)
        groups = parameter_groups(model, lr=0.1, factor_lr=0.01)
        assert [(len(group["params"]), group["lr"]) for group in groups] == [(6, 0.1), (1, 0.01)]
        assert groups[1]["weight_decay"] == 0.0
        optimizer = torch.optim.SGD(groups, lr=0.1, weight_decay=0.5)
        grouped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert grouped == {id(p) for p in model.parameters()}
        assert [len(group) for group in learned_layers(model)] == [2]

    def test_frozen_parameters_are_left_out(self) -> None:
        model = nn.Sequential(nn.Conv2d(3, 2, 1).requires_grad_(False), ReceptiveFieldRegulator(nn.Conv2d(2, 2, 1)))
        model[1].freeze_factor()
        assert len(factor_parameters(model)) == 1
        assert [len(group["params"]) for group in parameter_groups(model, lr=0.1, factor_lr=0.01)] == [2]


def test_one_frozen_layer_freezes_its_group_in_the_middle_of_a_search() -> None:
    layers = [AdaptiveConv2d(1, 1, 3) for _ in range(2)]
    layers[1].share_factor(layers[0])
    assert searchable_layers(layers) == layers
    for layer in layers:
        layer.freeze_factor()
        layer.in_search = True  # as a search that sets the factors itself leaves them
    assert searchable_layers(layers) == layers
    layers[0].freeze_factor()
    assert searchable_layers(layers) == []


class TestDilationRange:
    """The range of one factor for both axes of a map of 12 x 24 px is that of the tighter axis."""

    @pytest.mark.parametrize(
        ("dilation", "options", "expected"),
        [
            ((4, 4), {}, (1, 12)),
            ((2, 6), {"max_factor": 2.0}, (3, 12)),
            ((2, 6), {"min_factor": 0.5}, (1, 4)),
            ((4, 4), {"factor": 8.0}, (0.5, 12)),
            ((4, 4), {"factor": 0.2}, (1, 20)),
        ],
    )
    def test_of_a_layer(self, dilation: tuple[int, int], options: dict[str, float], expected: Any) -> None:
        layer = AdaptiveConv2d(1, 1, 3, padding=dilation, dilation=dilation, **options)
        assert dilation_range([layer]) == (1.0, 32.0)
        assert dilation_range([AdaptiveConv2d(1, 1, 3, padding=40, dilation=40)]) == (1.0, 40.0)
        layer(torch.zeros(1, 1, 12, 24))
        assert dilation_range([layer]) == pytest.approx(expected)
