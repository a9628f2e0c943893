import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rfield.layers import GatedConv2d
from rfield.layers.gated import Gates
from rfield.ops import reference
from rfield.receptive_field.per_layer import layer_receptive_fields
from rfield.receptive_field.probe import probe_receptive_field
from rfield.receptive_field.theoretical import theoretical_receptive_field

GATES: list[Gates] = ["image", "pixel"]


def features(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def shaken(layer: GatedConv2d) -> GatedConv2d:
    """The layer in float64 with weights, norms and gates that all differ from their start."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (*layer.parameters(), *(buffer for norm in layer.norms for buffer in norm.buffers())):
            if tensor.is_floating_point():
                tensor.add_(torch.rand(tensor.shape, generator=draw))
    return layer.double()


def gates_of(layer: GatedConv2d, input: Tensor) -> Tensor:
    """The gates by their definition, Tensor[N, R, H, W] or Tensor[N, R, 1, 1]."""
    first, last = (part for part in layer.gate if isinstance(part, nn.Conv2d))
    if layer.gates == "image":
        hidden = (input.mean((2, 3)) @ first.weight[:, :, 0, 0].t() + first.bias).clamp(min=0)[:, :, None, None]
    else:
        one = torch.ones(2, dtype=torch.float64)
        hidden = reference.fractional_conv2d(input, first.weight, first.bias, one, layer.stride, (1, 1)).clamp(min=0)
    exponents = (torch.einsum("nchw,kc->nkhw", hidden, last.weight[:, :, 0, 0]) + last.bias[:, None, None]).exp()
    return exponents / exponents.sum(1, keepdim=True)


def naive(layer: GatedConv2d, input: Tensor) -> Tensor:
    """The layer as a sum of slow convolutions, each in its own batch norm, weighted by the gates."""
    gates, total = gates_of(layer, input), torch.zeros((), dtype=input.dtype)
    for place, (rate, norm) in enumerate(zip(layer.rates, layer.norms, strict=True)):
        pair = torch.full((2,), float(rate), dtype=torch.float64)
        padding, base = layer.padding_at(rate), (rate, rate)
        at_rate = reference.fractional_conv2d(
            input, layer.weight, None, pair, layer.stride, padding, base, layer.groups
        )
        if isinstance(norm, nn.Identity):
            total = total + gates[:, place, None] * at_rate
            continue
        mean, variance = norm.running_mean, norm.running_var
        if layer.training:
            mean, variance = at_rate.mean((0, 2, 3)), at_rate.var((0, 2, 3), unbiased=False)
        normed = (at_rate - mean[:, None, None]) / (variance[:, None, None] + norm.eps).sqrt()
        total = total + gates[:, place, None] * (normed * norm.weight[:, None, None] + norm.bias[:, None, None])
    return total if layer.bias is None else total + layer.bias[:, None, None]


class TestOracle:
    @settings(max_examples=12, deadline=None)
    @given(
        gates=st.sampled_from(GATES),
        size=st.tuples(st.integers(2, 5), st.integers(2, 5)),
        stride=st.tuples(st.integers(1, 2), st.integers(1, 2)),
        options=st.fixed_dictionaries(
            {
                "kernel_size": st.sampled_from([1, 3, (1, 3)]),
                "groups": st.integers(1, 2),
                "bias": st.booleans(),
                "norm": st.booleans(),
                "rates": st.sampled_from([(1, 2), (3, 1, 2)]),
            }
        ),
        training=st.booleans(),
    )
    def test_output_and_gradients_are_those_of_the_naive_sum(
        self, gates: Gates, size: tuple[int, int], stride: tuple[int, int], options: dict[str, Any], training: bool
    ) -> None:
        layer = shaken(GatedConv2d(2, 2, stride=stride, gates=gates, **options).train(training))
        input = features(2, 2, *size).double().requires_grad_()
        leaves = [input, *layer.parameters()]
        results = [layer(input), naive(layer, input)]
        assert results[0].shape == (2, 2, -(-size[0] // stride[0]), -(-size[1] // stride[1]))
        weight = features(*results[0].shape).double()
        torch.testing.assert_close(results[0], results[1])
        gradients = [torch.autograd.grad((result * weight).sum(), leaves) for result in results]
        for ours, theirs in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)

    @pytest.mark.parametrize("norm", [True, False])
    @pytest.mark.parametrize("gates", GATES)
    def test_with_one_hot_gates_it_is_the_plain_convolution(self, gates: Gates, norm: bool) -> None:
        layer = shaken(GatedConv2d(3, 4, 3, rates=(1, 2, 5), gates=gates, norm=norm)).eval()
        last = layer.gate[-2]
        with torch.no_grad():
            last.weight.zero_()
            last.bias.copy_(torch.tensor([0.0, 500.0, 0.0]))
        weight, bias = layer.folded(1)
        plain = nn.functional.conv2d(features(1, 3, 9, 7).double(), weight, bias, 1, 2, 2)
        torch.testing.assert_close(layer(features(1, 3, 9, 7).double()), plain)


@pytest.mark.parametrize("gates", GATES)
class TestModule:
    def test_state_and_copies(self, gates: Gates) -> None:
        conv = nn.Conv2d(4, 6, 3, padding=6, dilation=6)
        layer = GatedConv2d.from_conv(conv, (2, 6), gates)
        assert layer.weight is conv.weight
        assert layer.bias is conv.bias
        keys = set(layer.state_dict())
        norms = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        assert {key for key in keys if not key.startswith("gate.")} == {
            *("weight", "bias", "mean_gates"),
            *(f"norms.{place}.{name}" for place in (0, 1) for name in norms),
        }
        layer(features(2, 4, 9, 7)).sum().backward()  # moves the running averages
        twin, other = copy.deepcopy(layer), GatedConv2d(4, 6, 3, rates=(2, 6), gates=gates)
        other.load_state_dict(layer.state_dict())
        expected = layer.eval()(features(1, 4, 9, 7))
        for each in (twin, other):
            assert torch.equal(each.eval()(features(1, 4, 9, 7)), expected)

    def test_all_rates_are_equal_at_the_start_and_learn(self, gates: Gates) -> None:
        """A target that is the convolution at rate 3 of a random kernel: the gates choose rate 3, and say so."""
        torch.manual_seed(0)
        teacher = nn.Conv2d(1, 8, 3, padding=3, dilation=3, bias=False)
        layer = GatedConv2d.from_conv(copy.deepcopy(teacher), (1, 3), gates)
        input = features(4, 1, 16, 16)
        assert torch.allclose(layer.gate(input), torch.tensor(0.5))
        target = nn.functional.batch_norm(teacher(input), None, None, training=True).detach()
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
        for _ in range(60):
            optimizer.zero_grad()
            (layer(input) - target).square().mean().backward()
            optimizer.step()
        assert layer.one_hot == 1
        assert float(layer.mean_gates.sum()) == pytest.approx(1)
        before = layer.mean_gates.clone()
        layer.eval()(input)
        assert torch.equal(layer.mean_gates, before)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_low_precision(self, gates: Gates, dtype: torch.dtype) -> None:
        layer, input = shaken(GatedConv2d(4, 4, 3, rates=(1, 2), gates=gates)).float(), features(2, 4, 9, 7)
        exact, autocast = layer(input), copy.deepcopy(layer)
        with torch.autocast("cpu", dtype):
            mixed = autocast(input)
        assert mixed.dtype == dtype
        low = layer.to(dtype)(input.to(dtype))
        assert low.dtype == dtype
        for output in (mixed, low):
            assert float((output.detach().float() - exact.detach()).abs().mean()) < 0.02 * float(
                exact.detach().abs().mean()
            )

    def test_receptive_field_is_that_of_the_largest_rate(self, gates: Gates) -> None:
        layer = GatedConv2d(3, 4, 3, rates=(5, 2), gates=gates)
        model = nn.Sequential(nn.Conv2d(3, 3, 3, stride=2, padding=1), layer)
        assert theoretical_receptive_field(model) == (23.0, 23.0)
        assert (probe_receptive_field(model) == (23.0, 23.0)) is (gates == "pixel")
        row = next(row for row in layer_receptive_fields(model) if row.kind == "GatedConv2d")
        assert (row.dilation, row.local) == ((5, 5), (23.0, 23.0))


BAD: dict[str, Callable[[], object]] = {
    "kernel 2x2 is even": lambda: GatedConv2d(1, 1, 2),
    "its padding is 0x0, and not": lambda: GatedConv2d.from_conv(nn.Conv2d(1, 1, 3)),
    r"two or more different whole numbers of at least 1, got \[1\]": lambda: GatedConv2d(1, 1, 3, rates=(1,)),
    r"got \[2, 2\]": lambda: GatedConv2d(1, 1, 3, rates=(2, 2)),
    r"got \[0, 2\]": lambda: GatedConv2d(1, 1, 3, rates=(0, 2)),
    r"got \[1, 2.5\]": lambda: GatedConv2d(1, 1, 3, rates=(1, 2.5)),  # type: ignore[arg-type]
    "gates must be image or pixel, got 'all'": lambda: GatedConv2d(1, 1, 3, gates="all"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BAD[message]()
