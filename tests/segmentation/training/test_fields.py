"""The receptive fields of a network, of each path and axis."""

from typing import Any

import pytest

from rfield.search import learned_layers
from rfield.search.factors import override_dilation
from rfield.segmentation.config.train import TrainConfig
from rfield.segmentation.runs import build_network
from rfield.segmentation.training.fields import present_fields


def config_of(**values: Any) -> TrainConfig:
    return TrainConfig(data="synthetic", out="x", model="small_cnn", head_channels=4, **values).resolved()


@pytest.mark.parametrize("rectangular", [False, True])
def test_fields_of_each_path_and_axis(rectangular: bool) -> None:
    network = build_network(config_of(paths=2, rectangular=rectangular, dilation=6, search="sampled"), 4)
    for path, factors in zip(network.head.heads(), ((1.5, 1.0), (2.0, 3.0)), strict=True):  # type: ignore[union-attr]
        layer = path.factor_layer
        assert layer is not None
        layer.set_factor(factors if rectangular else factors[0])
    found = [(field.path, field.axis, field.factor, field.effective_dilation) for field in present_fields(network)]
    if rectangular:
        assert found == [(0, 0, 1.5, 4.0), (0, 1, 1.0, 6.0), (1, 0, 2.0, 3.0), (1, 1, 3.0, 2.0)]
    else:
        assert found == [(0, 0, 1.5, 4.0), (1, 0, 2.0, 3.0)]
    for field in present_fields(network):
        assert field.receptive_field_px == pytest.approx(15 + 8 * field.effective_dilation)
    override_dilation(learned_layers(network)[1], [5.0])
    assert present_fields(network)[-1].effective_dilation == 5, "where a forward runs at now"


def test_fields_where_nothing_is_learned() -> None:
    (field,) = present_fields(build_network(config_of(search="none", dilation=5), 4))
    assert (field.factor, field.effective_dilation, field.receptive_field_px) == (1.0, 5.0, 15 + 8 * 5)
