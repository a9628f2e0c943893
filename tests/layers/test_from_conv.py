"""Which convolutions have an adaptive twin, and what it takes over; `adapt` has the same rules."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from rfield import adapt
from rfield.layers import AdaptiveConv2d


def plain() -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(4, 4, 3, padding=2, dilation=2)


class Standardised(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input - input.mean())


def hooked(conv: nn.Conv2d) -> nn.Conv2d:
    conv.register_full_backward_hook(lambda module, grad_input, grad_output: None)
    return conv


def with_own_forward(conv: nn.Conv2d) -> nn.Conv2d:
    conv.forward = torch.relu
    return conv


def with_buffer(conv: nn.Conv2d) -> nn.Conv2d:
    conv.register_buffer("mask", torch.ones(1))
    return conv


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (nn.Conv2d(4, 4, (3, 2), dilation=2), "kernel 3x2 is even"),
        (nn.Conv2d(4, 4, 3, padding=2, dilation=2, padding_mode="reflect"), "padding_mode='reflect'"),
        (nn.LazyConv2d(4, 3, padding=2, dilation=2), "no shape yet"),
        (hooked(plain()), "hooks"),
        (torch.nn.utils.spectral_norm(plain()), "hooks"),
        (prune.l1_unstructured(plain(), "weight", 0.5), "hooks"),
        (Standardised(4, 4, 3, padding=2, dilation=2), "Standardised has a forward of its own"),
        (with_own_forward(plain()), "forward of its own"),
        (with_buffer(plain()), "it holds mask beside weight and bias"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_from_conv_refuses_what_adapt_refuses(conv: nn.Conv2d, reason: str) -> None:
    with pytest.raises(ValueError, match=f"cannot be adapted: .*{reason}"):
        AdaptiveConv2d.from_conv(conv)
    model = nn.Sequential(conv)
    with pytest.raises(ValueError, match=f"cannot be adapted: .*{reason}"):
        adapt(model, "0")
    assert model[0] is conv


@pytest.mark.parametrize("other", [nn.ConvTranspose2d(4, 4, 3), nn.Linear(4, 4)])
def test_other_layers_are_refused(other: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"it is a \w+, and not an nn.Conv2d"):
        AdaptiveConv2d.from_conv(other)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        lambda conv: parametrizations.weight_norm(parametrizations.spectral_norm(conv, "bias"), "weight"),
    ],
)
def test_a_parametrization_is_taken_over(make: Callable[[nn.Conv2d], nn.Conv2d], training: bool) -> None:
    conv = make(plain()).train(training)
    before = copy.deepcopy(conv.state_dict())
    twin = AdaptiveConv2d.from_conv(conv)
    for key, value in conv.state_dict().items():  # In training a spectral norm takes a step when its weight is read.
        assert torch.equal(value, before[key]), key
    parameters = dict(twin.named_parameters())
    assert all(parameters[name] is parameter for name, parameter in conv.named_parameters())
    assert all(module.training is training for module in (*conv.modules(), *twin.modules()))
    input = torch.randn(2, 4, 9, 9)
    twin.freeze_factor()
    assert torch.equal(twin.eval()(input), conv.eval()(input))
    parameters[next(name for name in parameters if "original" in name)].data.mul_(2)
    assert torch.equal(twin(input), conv(input))
