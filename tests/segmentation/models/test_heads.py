import dataclasses
import json
from typing import Any

import pytest
import torch
from torch import nn

from rfield import fuse
from rfield.layers import ReceptiveFieldRegulator
from rfield.receptive_field.theoretical import theoretical_receptive_field
from rfield.search import learned_layers
from rfield.search.factors import override_dilation
from rfield.segmentation.models import HeadSpec, SinglePathHead


def heads(dilation: int = 3) -> tuple[SinglePathHead, SinglePathHead]:
    """A plain and a regulated head of equal weights."""
    plain = SinglePathHead(8, 5, HeadSpec(dilation, head_channels=16, regulate=False)).eval()
    regulated = SinglePathHead(8, 5, HeadSpec(dilation, head_channels=16)).eval()
    assert isinstance(regulated.layers, ReceptiveFieldRegulator)
    regulated.layers.module.load_state_dict(plain.layers.state_dict())
    return plain, regulated


@pytest.mark.parametrize("grid", [(9, 6), (1, 7), (1, 1)])
@pytest.mark.parametrize("output_size", [None, (65, 41), (1, 50), (4, 3)])
def test_regulated_at_factor_1_equals_plain(grid: tuple[int, int], output_size: tuple[int, int] | None) -> None:
    plain, regulated = heads()
    features = torch.randn(2, 8, *grid)
    expected, actual = plain(features, output_size), regulated(features, output_size)
    assert actual.shape == (2, 5, *(output_size or grid))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_several_learned_paths_start_with_a_norm_unless_it_is_said() -> None:
    for values, expected in (
        ({}, False),
        ({"paths": 2}, True),
        ({"rates": (1, 2)}, False),
        ({"norm": True}, True),
        ({"paths": 2, "norm": False}, False),
    ):
        spec = HeadSpec(3, head_channels=4, **values)  # type: ignore[arg-type]
        assert spec.has_norm == expected
        assert isinstance(SinglePathHead(8, 5, spec).norm, torch.nn.BatchNorm2d) == expected


def test_upsampling_keeps_the_logits_at_the_features() -> None:
    plain, _ = heads()
    features = torch.randn(1, 8, 5, 3)
    torch.testing.assert_close(plain(features, (33, 17))[..., ::8, ::8], plain(features))


def test_effective_dilation() -> None:
    plain, regulated = heads(dilation=6)
    assert plain.effective_dilation == regulated.effective_dilation == (6.0, 6.0)
    assert isinstance(regulated.layers, ReceptiveFieldRegulator)
    regulated.layers.set_factor(1.5)
    assert regulated.effective_dilation == pytest.approx((4.0, 4.0))
    regulated.layers = ReceptiveFieldRegulator(regulated.layers.module, factor=(2.0, 3.0))
    assert regulated.effective_dilation == pytest.approx((3.0, 2.0))


@pytest.mark.parametrize("mechanism", ["regulator", "dilation"])
def test_a_held_dilation_is_realised_and_not_effective(mechanism: Any) -> None:
    head = SinglePathHead(8, 5, HeadSpec(6, head_channels=4, mechanism=mechanism, rectangular=True))
    override_dilation(learned_layers(head)[0], [3.0, 4.0])
    assert (head.effective_dilation, head.realised_dilation) == ((6.0, 6.0), (3.0, 4.0))
    plain = SinglePathHead(8, 5, HeadSpec(6, head_channels=4, regulate=False))
    plain.layers.fc6.dilation = (2, 5)  # type: ignore[union-attr]
    assert plain.effective_dilation == plain.realised_dilation == (2.0, 5.0)


def test_effective_dilation_of_a_fused_rectangle() -> None:
    head = SinglePathHead(8, 5, HeadSpec(4, head_channels=4, mechanism="dilation", rectangular=True)).eval()
    head.factor_layer.set_factor((2.0, 1.0))
    fused = fuse(head)
    assert fused.layers.fc6.dilation == (2, 4)
    assert fused.effective_dilation == fused.realised_dilation == (2.0, 4.0)


@pytest.mark.parametrize("gates", ["image", "pixel"])
def test_gates_choose_among_rates(gates: Any) -> None:
    head = SinglePathHead(8, 3, HeadSpec(head_channels=4, gates=gates)).eval()
    assert isinstance(head.norm, nn.BatchNorm2d)
    assert head.effective_dilation == (8.0, 8.0)  # the largest of the default
    assert head(torch.randn(2, 8, 9, 7), output_size=(33, 25)).shape == (2, 3, 33, 25)
    assert theoretical_receptive_field(head) == (17.0, 17.0)
    fused = fuse(head)
    assert fused.effective_dilation == (8.0, 8.0)
    assert theoretical_receptive_field(fused) == (17.0, 17.0)
    with pytest.raises(ValueError, match="gates need one path, got 2"):
        HeadSpec(gates=gates, paths=2)
    with pytest.raises(ValueError, match="gates must be image or pixel, got 'all'"):
        HeadSpec(gates="all")  # type: ignore[arg-type]


def test_initialisation() -> None:
    torch.manual_seed(0)
    state = SinglePathHead(64, 50, HeadSpec(1, head_channels=64, regulate=False)).layers.state_dict()
    assert not any(state[f"{name}.bias"].any() for name in ("fc6", "fc7", "fc8"))
    assert state["fc6.weight"].std().item() == pytest.approx((1 / (3 * 64 * 9)) ** 0.5, rel=0.05)
    assert state["fc7.weight"].std().item() == pytest.approx((1 / (3 * 64)) ** 0.5, rel=0.05)
    assert state["fc8.weight"].std().item() == pytest.approx(0.01, rel=0.05)


def test_wrong_sizes_are_refused() -> None:
    for wrong in (0, -1, 1.5):
        for name in ("dilation", "head_channels", "paths"):
            with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 1, got {wrong}"):
                HeadSpec(**{name: wrong})  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=f"rates must be a whole number of at least 1, got {wrong}"):
            HeadSpec(rates=(2, wrong))  # type: ignore[arg-type]
    for channels, classes in ((0, 2), (8, 0)):
        with pytest.raises(ValueError, match="in_channels" if channels == 0 else "num_classes"):
            SinglePathHead(channels, classes, HeadSpec(1))
    with pytest.raises(ValueError, match=r"dropout must be a probability from 0 to 1, got 1\.5"):
        HeadSpec(dropout=1.5)
    with pytest.raises(ValueError, match="mechanism must be regulator or dilation, got 'sum'"):
        HeadSpec(mechanism="sum")  # type: ignore[arg-type]


def test_a_spec_survives_json() -> None:
    spec = HeadSpec(3, paths=2, class_groups=((2, 1), (0,)), gradient_weight=5.0)
    assert spec.class_groups == ((1, 2), (0,))
    assert HeadSpec(**json.loads(json.dumps(dataclasses.asdict(spec)))) == spec
    assert HeadSpec(rates=[1, 3]) == HeadSpec(rates=(1, 3))  # type: ignore[arg-type]
