"""A factor that is cast, moved, loaded or made on the meta device: its precision, its value, and who shares it."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rfield import adapt
from rfield.layers import AdaptiveConv2d, ReceptiveFieldRegulator
from rfield.layers.dilation import remove_rounding_error
from rfield.layers.factor import LearnedFactor


def adaptive(dilation: int = 2, **options: object) -> AdaptiveConv2d:
    torch.manual_seed(0)
    return AdaptiveConv2d(2, 2, 3, padding=dilation, dilation=dilation, **options)


def regulator(dilation: int = 2, **options: object) -> ReceptiveFieldRegulator:
    torch.manual_seed(0)
    return ReceptiveFieldRegulator(nn.Conv2d(2, 2, 3, padding=dilation, dilation=dilation), **options)


def image() -> Tensor:
    return torch.randn(1, 2, 15, 13, generator=torch.Generator().manual_seed(1))


def pair(make: type) -> nn.Sequential:
    """Two layers with one factor, which is neither a power of two nor exact in a short float."""
    first, second = make(3, factor=1.7), make(4, factor=1.7)
    second.share_factor(first)
    return nn.Sequential(first, second)


BOTH = pytest.mark.parametrize("make", [adaptive, regulator])
CASTS = {
    "half": lambda module: module.half(),
    "bfloat16": lambda module: module.bfloat16(),
    "to(bfloat16)": lambda module: module.to(torch.bfloat16),
    "to(cpu, half)": lambda module: module.to("cpu", torch.float16),
    "type": lambda module: module.type(torch.bfloat16),
    "there and back": lambda module: module.bfloat16().float(),
    "double and half": lambda module: module.double().half(),
}


class TestPrecision:
    @BOTH
    @pytest.mark.parametrize("cast", CASTS)
    def test_is_not_lowered(self, make: type, cast: str) -> None:
        model = pair(make)
        model(image()).sum().backward()
        factor, value = model[0].log_factor, model[0].log_factor.detach().clone()
        gradient, weight = factor.grad.clone(), next(p for p in model.parameters() if p.dim() == 4)
        CASTS[cast](model)
        assert factor.dtype == factor.grad.dtype == torch.float32
        assert torch.equal(factor, value)
        assert torch.equal(factor.grad, gradient)
        assert model[0].log_factor is model[1].log_factor is factor
        assert (weight.dtype == torch.float32) == (cast == "there and back")
        output = model(image().to(weight.dtype))
        assert output.dtype == weight.dtype
        output.float().square().sum().backward()
        assert factor.grad.isfinite().all()

    @BOTH
    def test_double_raises_it(self, make: type) -> None:
        layer = make(factor=1.7).double()
        assert layer.log_factor.dtype == torch.float64
        assert layer.float().log_factor.dtype == torch.float32

    @BOTH
    @pytest.mark.parametrize("assign", [False, True])
    def test_of_a_state_dict_is_not_lowered(self, make: type, assign: bool) -> None:
        layer, state = make(factor=1.7), {k: v.bfloat16() for k, v in make(factor=0.6).state_dict().items()}
        layer.load_state_dict(state, assign=assign)
        assert layer.log_factor.dtype == torch.float32
        assert layer.factor.item() == pytest.approx(0.6, rel=0.01)


class TestSharing:
    @BOTH
    @pytest.mark.parametrize("made_on", ["cpu", "meta"])
    @pytest.mark.parametrize("keep_vars", [False, True])
    def test_survives_an_assigned_state_dict(self, make: type, made_on: str, keep_vars: bool) -> None:
        source = pair(make)
        source[0].set_factor(1.3)
        with torch.device(made_on):
            model = pair(make)
        factor = model[0].log_factor
        given = source.state_dict(keep_vars=keep_vars)
        model.load_state_dict(given, assign=True)
        assert model[0].log_factor is model[1].log_factor is factor
        assert isinstance(factor, nn.Parameter)
        assert factor.requires_grad
        assert torch.equal(model.eval()(image()), source.eval()(image()))
        model[1].set_factor(0.9)
        assert model[0].factor.item() == pytest.approx(0.9)
        assert source[0].factor.item() == pytest.approx(1.3)
        assert not source[0].log_factor.is_meta
        model(image()).sum().backward()
        assert factor.grad is not None

    @BOTH
    def test_survives_to_empty(self, make: type) -> None:
        """Which leaves weights without a value, but knows where a factor starts."""
        with torch.device("meta"):
            model = pair(make)
        model.to_empty(device="cpu")
        assert model[0].log_factor is model[1].log_factor
        assert model[0].factor.item() == model[1].factor.item() == pytest.approx(1.7)
        assert not any(layer.snapped for layer in model)

    @BOTH
    def test_is_kept_with_an_optimizer(self, make: type) -> None:
        model = pair(make)
        optimizer = torch.optim.SGD([model[0].log_factor], lr=0.1)
        loss = model(image()).square().mean()  # A graph that is alive refers to the parameter.
        model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
        before = model[1].factor.item()
        loss.backward()
        optimizer.step()
        assert model[1].factor.item() != before


class TestMetaDevice:
    @BOTH
    def test_gives_sizes_and_a_name(self, make: type) -> None:
        with torch.device("meta"):
            layer = make(factor=1.7)
        assert "factor=(?)" in repr(layer)
        assert layer(image().to("meta")).shape == image().shape
        with pytest.raises(ValueError, match="factor must have values that can be read: a tensor on the meta device"):
            _ = layer.effective_dilation

    def test_regulator_to_another_size(self) -> None:
        layer = regulator().to("meta")
        assert layer(image().to("meta"), (30, 20)).shape == (1, 2, 30, 20)

    @BOTH
    def test_snap_is_loaded(self, make: type) -> None:
        source = make(5, factor=2.0)
        source.snap()
        with torch.device("meta"):
            layer = make(5)
        layer.load_state_dict(source.state_dict(), assign=True)
        assert layer.snapped
        assert layer.snapped_dilation.dtype == source.snapped_dilation.dtype == torch.int64
        assert torch.equal(layer(image()), source(image()))

    def test_a_plain_convolutions_state_leaves_the_start(self) -> None:
        with torch.device("meta"):
            layer = adaptive(factor=1.7)
        layer.load_state_dict(nn.Conv2d(2, 2, 3).state_dict(), assign=True)
        assert layer.factor.item() == pytest.approx(1.7)
        assert layer(image()).shape == image().shape


class TestWholeDilations:
    @pytest.mark.parametrize(
        ("base", "factor", "whole"), [(14, 2.8, 5), (11, 1.1, 10), (7, 0.7, 10), (13, 1.3, 10), (3, 0.03, 100)]
    )
    def test_starts_that_miss_one_by_the_last_bit(self, base: int, factor: float, whole: int) -> None:
        """The values, and the slope: on pixels it is the mean of both sides."""
        layer, plain = adaptive(base, factor=factor), nn.Conv2d(2, 2, 3, padding=whole, dilation=whole)
        plain.load_state_dict(layer.state_dict(), strict=False)
        assert layer.effective_dilation == (whole, whole)
        assert layer._current_dilation().detach().eq(whole).all()
        with torch.no_grad():
            assert torch.equal(layer(image()), plain(image()))
        exact = adaptive(whole)
        gradients = []
        for each in (layer, exact):
            each(image()).square().sum().backward()
            gradients.append(each.log_factor.grad)
        torch.testing.assert_close(*gradients)

    @BOTH
    @pytest.mark.parametrize("base", [3, 7, 12, 24])
    def test_are_read_after_a_snap(self, make: type, base: int) -> None:
        for factor in torch.linspace(0.1, base, 40).tolist():
            layer: LearnedFactor = make(base, factor=factor)
            layer.snap()
            assert all(dilation.is_integer() for dilation in layer.effective_dilation)
            layer.freeze_factor(False)  # It learns from there on.
            assert all(dilation.is_integer() for dilation in layer.effective_dilation)

    def test_noise_is_a_millionth(self) -> None:
        assert [remove_rounding_error(value) for value in (4.9999997, 5.00002, 0.9999999, 0.4)] == [
            5.0,
            5.00002,
            1.0,
            0.4,
        ]


def test_an_adapted_model_of_half_precision_learns() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 3, padding=2, dilation=2)).bfloat16()
    (layer,) = adapt(model)
    model.to(torch.bfloat16)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    before = layer.factor.item()
    model(image().bfloat16()).square().mean().backward()
    optimizer.step()
    # A step of 0.001 is below bfloat16's at 1.
    assert layer.factor.item() == pytest.approx(before, abs=2e-3)
    assert layer.factor.item() != before


class TestFilledByHand:
    """As transformers fills a model that it has made on the meta device: it sets each tensor that it knows."""

    @staticmethod
    def filled(layer: LearnedFactor, state: dict[str, Tensor]) -> LearnedFactor:
        for name, value in state.items():
            owner, _, tensor = name.rpartition(".")
            setattr(layer.get_submodule(owner), tensor, nn.Parameter(value))
        layer.snapped_dilation = torch.tensor([7, 93868438416816])
        return layer

    @pytest.mark.parametrize("make", [adaptive, regulator])
    @pytest.mark.parametrize("moved", [False, True])
    def test_is_an_error_that_says_what_to_do(self, make: Callable[[], LearnedFactor], moved: bool) -> None:
        source = make()
        if moved:
            layer = make().to("meta")
        else:
            with torch.device("meta"):
                layer = make()
        layer = copy.deepcopy(self.filled(layer, source.state_dict()).float())
        for use in (lambda: layer(image()), lambda: layer.effective_dilation, layer.state_dict):
            with pytest.raises(ValueError, match=r"filled without load_state_dict.*its dilation is not known"):
                use()
        layer.set_factor(1.3)
        source.set_factor(1.3)
        torch.testing.assert_close(layer(image()), source(image()), rtol=0, atol=0)

    @pytest.mark.parametrize("make", [adaptive, regulator])
    @pytest.mark.parametrize("snaps", [False, True])
    def test_a_state_dict_mends_it(self, make: Callable[[], LearnedFactor], snaps: bool) -> None:
        source = make(factor=0.8)
        if snaps:
            source.snap()
        state = source.state_dict()
        with torch.device("meta"):
            layer = make()
        self.filled(layer, {name: value for name, value in state.items() if name != "snapped"}).load_state_dict(state)
        assert layer.effective_dilation == source.effective_dilation
        torch.testing.assert_close(layer(image()), source(image()), rtol=0, atol=0)

    def test_weights_of_a_plain_convolution_mend_it_at_the_start(self) -> None:
        source = nn.Conv2d(2, 2, 3)
        with torch.device("meta"):
            layer = adaptive(factor=0.8)
        self.filled(layer, {**source.state_dict(), "log_factor": torch.tensor([9.0])})
        layer.load_state_dict(source.state_dict())
        assert layer.effective_dilation == pytest.approx((2.5, 2.5))


@pytest.mark.parametrize("make", [adaptive, regulator])
def test_a_replica_of_data_parallel_tells_its_layer_the_map_size(make: Callable[[], LearnedFactor]) -> None:
    layer = make()
    replica = layer._replicate_for_data_parallel()
    replica._parameters = dict(layer._parameters)
    replica(image())
    assert layer.map_size == (15, 13)
    assert set(dict(replica.named_modules())) == set(dict(layer.named_modules()))
