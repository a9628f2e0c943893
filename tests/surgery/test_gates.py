"""`adapt` puts gated convolutions into a model, `fuse` takes them out again."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rfield.layers import GatedConv2d
from rfield.layers.gated import Gates
from rfield.surgery.adapt import adapt, regulate
from rfield.surgery.fuse import dilations, fuse

GATES: list[Gates] = ["image", "pixel"]


def maps(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def network(**options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 4, 3, padding=6, dilation=6, **options)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), conv, nn.ReLU(), nn.Conv2d(4, 2, 1))


def trained(gates: Gates, choice: int | None) -> tuple[nn.Sequential, GatedConv2d]:
    """A network in eval mode after a few training steps whose gates choose a rate, or none."""
    model = network()
    (layer,) = adapt(model, gates=gates, rates=(2, 3, 6))
    with torch.no_grad():
        for parameter in layer.gate.parameters():
            parameter.normal_()
        if choice is not None:
            layer.gate[-2].bias[choice] += 100
    for _ in range(80):
        model(maps(2, 3, 9, 7))
    return model.eval(), layer


@pytest.mark.parametrize("gates", GATES)
class TestFuse:
    @pytest.mark.parametrize("choice", [0, 1])
    def test_one_rate_for_all_inputs_becomes_a_plain_convolution(self, gates: Gates, choice: int) -> None:
        model, _ = trained(gates, choice)
        plain = fuse(model)
        assert type(plain[1]) is nn.Conv2d
        assert dilations(plain)["1"] == ((2, 2), (3, 3))[choice]
        assert list(plain.state_dict()) == list(network().state_dict())
        torch.testing.assert_close(plain(maps(3, 3, 13, 10)), model(maps(3, 3, 13, 10)))

    def test_other_gates_stay_in_operations_of_torch_and_export_with_any_size(self, gates: Gates) -> None:
        model, layer = trained(gates, None)
        assert layer.one_hot is None
        plain = fuse(model)
        assert not any(type(module).__module__.startswith("rfield") for module in plain.modules())
        assert list(plain.state_dict()) == list(model.state_dict())
        auto = torch.export.Dim.AUTO
        program = torch.export.export(plain, (maps(2, 3, 19, 23),), dynamic_shapes=({0: auto, 2: auto, 3: auto},))
        for shape in ((3, 3, 13, 10), (1, 3, 31, 8)):
            torch.testing.assert_close(plain(maps(*shape)), model(maps(*shape)))
            torch.testing.assert_close(program.module()(maps(*shape)), model(maps(*shape)))


def test_adapt_keeps_keys_and_can_be_followed_by_other_layers() -> None:
    model = network()
    keys = set(model.state_dict())
    (layer,) = adapt(model, gates="pixel")
    assert model[1] is layer
    assert layer.rates == (1, 2, 4, 8)
    assert keys < set(model.state_dict())
    assert [each.kernel_size for each in adapt(model, "*")] == [(3, 3)]  # not the convolution that predicts gates
    with pytest.raises(ValueError, match="'1' holds a learned receptive field already"):
        regulate(model, "1")


BAD: dict[str, dict[str, Any]] = {
    "gates 'image' learn no factor: leave share and axes out, got share='layer', axes=1": {
        "gates": "image",
        "share": "layer",
    },
    "got share=None, axes=2": {"gates": "image", "axes": 2},
    "rates need gates: 'image' or 'pixel'": {"rates": (1, 2)},
    "gates must be image or pixel, got 'all'": {"gates": "all"},
    r"rates must be two or more different whole numbers of at least 1, got \[1, 1\]": {
        "gates": "image",
        "rates": (1, 1),
    },
}


@pytest.mark.parametrize("message", BAD)
def test_refused(message: str) -> None:
    model = network()
    with pytest.raises(ValueError, match=message):
        adapt(model, **BAD[message])
    assert type(model[1]) is nn.Conv2d
    shifted = nn.Sequential(nn.Conv2d(1, 1, 3, dilation=2))
    with pytest.raises(ValueError, match=r"0 cannot be adapted: its padding is 0x0, and not dilation"):
        adapt(shifted, "0", gates="image")
