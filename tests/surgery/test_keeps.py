"""`adapt`, `regulate`, `fuse` and the probes do not change flags, hooks, buffers, precision or devices."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import rfield
from rfield import adapt, fuse, regulate
from rfield.layers import AdaptiveConv2d, ReceptiveFieldRegulator, WeightedGradient
from rfield.layers.adaptive_conv import has_hooks

MAP = torch.randn(2, 4, 11, 12, generator=torch.Generator().manual_seed(0))


def dilated(**options: Any) -> nn.Conv2d:
    return nn.Conv2d(4, 4, 3, **({"padding": 4, "dilation": 4} | options))


class Counted(nn.Module):
    """A parametrization that changes at each run, also in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("runs", torch.tensor(0))

    def forward(self, weight: Tensor) -> Tensor:
        self.runs += 1
        return weight

    def right_inverse(self, weight: Tensor) -> Tensor:
        self.runs += 1
        return weight


def counted(conv: nn.Conv2d) -> nn.Conv2d:
    parametrize.register_parametrization(conv, "weight", Counted())
    return conv


def mixed_model(conv: nn.Conv2d) -> nn.Sequential:
    """Return a model with all kinds of flags, gradients and precisions."""
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), conv, nn.Sequential(nn.BatchNorm2d(4), nn.Dropout()))
    model[1].eval()
    model[3][1].eval()
    model[0].requires_grad_(False)
    conv.bias.requires_grad_(False)
    model[3][0].weight.requires_grad_(False)
    return model.to(torch.float64)


def flags(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def assert_same(model: nn.Module, before: dict[str, Tensor], grads: dict[str, bool]) -> None:
    now = tensors(model)
    for name, value in before.items():
        assert torch.equal(now[name], value), name
        assert now[name].dtype == value.dtype, name
        assert now[name].requires_grad == grads[name], name


PARAMETRIZATIONS: list[Callable[[nn.Conv2d], nn.Module]] = [
    lambda conv: conv,
    parametrizations.weight_norm,
    parametrizations.spectral_norm,
    parametrizations.orthogonal,
    counted,
]


@pytest.mark.parametrize(
    "make", PARAMETRIZATIONS, ids=["plain", "weight_norm", "spectral_norm", "orthogonal", "counted"]
)
@pytest.mark.parametrize("training", [True, False])
def test_adapt_and_fuse_change_no_flag_and_no_number(make: Callable[[nn.Conv2d], nn.Module], training: bool) -> None:
    model = mixed_model(make(dilated()))
    model[2].train(training)
    before, grads = copy.deepcopy(tensors(model)), {name: value.requires_grad for name, value in tensors(model).items()}
    state, modes = list(model.state_dict()), flags(model)
    (layer,) = adapt(model, "2")
    assert_same(model, before, grads)
    assert flags(model) == modes
    assert layer.log_factor.dtype == torch.float32
    plain = fuse(model)
    assert type(plain[2].forward) is type(model[0].forward)
    assert_same(model, before, grads)
    assert_same(plain, before, grads)
    assert flags(model) == flags(plain) == modes
    assert list(plain.state_dict()) == state


@pytest.mark.parametrize("name", ["2", "3"])
@pytest.mark.parametrize("mode", ["resize", "dilation"])
@pytest.mark.parametrize("training", [True, False])
def test_regulate_and_fuse_change_no_flag_and_no_number(name: str, mode: Any, training: bool) -> None:
    model = mixed_model(parametrizations.spectral_norm(dilated()))
    model[3].append(dilated().double())
    model.get_submodule(name).training = training
    before, grads = copy.deepcopy(tensors(model)), {key: value.requires_grad for key, value in tensors(model).items()}
    modes = flags(model)
    regulator = regulate(model, name, factor=1.3)
    inside = {key.replace(f"{name}.module", name, 1): value for key, value in flags(model).items()}
    assert {key: inside[key] for key in modes} == modes
    assert regulator.training == regulator.inflation.training == regulator.interpolation.training == training
    plain = fuse(model, mode)
    assert_same(plain, before, grads)
    assert flags(plain) == modes


def test_regulate_goes_where_the_part_is() -> None:
    with torch.device("meta"):
        norm, conv = nn.BatchNorm2d(4, affine=False), dilated()
    model = nn.Sequential(nn.Sequential(norm, nn.ReLU()), conv)
    with pytest.warns(UserWarning, match="sees more than one pixel"):
        regulator = regulate(model, "0")
    assert regulator.log_factor.device.type == regulator.snapped_dilation.device.type == "meta"
    (layer,) = adapt(model, "1")
    assert layer.log_factor.device.type == layer.snapped_dilation.device.type == "meta"


def test_probes_change_nothing() -> None:
    model = mixed_model(counted(dilated()))
    before, grads = copy.deepcopy(tensors(model)), {name: value.requires_grad for name, value in tensors(model).items()}
    modes = flags(model)
    assert rfield.layer_receptive_fields(model, channels=4)[-1].field == (9, 9)
    assert rfield.probe_receptive_field(model, channels=4) == (9, 9)
    rfield.effective_receptive_field(model, MAP)
    assert_same(model, before, grads)
    assert flags(model) == modes


def test_an_adapted_weight_norm_reads_its_older_keys() -> None:
    model = nn.Sequential(parametrizations.weight_norm(dilated()))
    state = model.state_dict()
    older = {
        "0.bias": state["0.bias"],
        "0.weight_g": state["0.parametrizations.weight.original0"] * 2,
        "0.weight_v": state["0.parametrizations.weight.original1"],
    }
    (layer,) = adapt(model)
    model.load_state_dict(older)
    assert torch.equal(layer.parametrizations.weight.original0, older["0.weight_g"])
    plain = fuse(model)
    plain.load_state_dict(older)
    assert torch.equal(plain[0].weight, layer.weight)
    # Inside a regulator, which becomes a graph module.
    regulated = nn.Sequential(parametrizations.weight_norm(dilated()))
    regulate(regulated, "0", factor=1.3)
    graph = fuse(regulated)
    assert not isinstance(graph[0], nn.Conv2d)
    graph.load_state_dict(older)
    assert torch.equal(graph.state_dict()["0.parametrizations.weight.original0"], older["0.weight_g"])


HOOKS = ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]
HOOKS += ["register_full_backward_pre_hook"]


@pytest.mark.parametrize("register", HOOKS)
@pytest.mark.parametrize("mode", ["resize", "dilation"])
def test_fuse_refuses_hooks_that_would_be_lost(register: str, mode: Any) -> None:
    layers: list[nn.Module] = [
        AdaptiveConv2d(4, 4, 3),
        ReceptiveFieldRegulator(dilated(), 1.4),
        WeightedGradient([0], 2.0),
    ]
    for layer in layers:
        handle = getattr(layer, register)(lambda *args: None)
        assert has_hooks(layer)
        with pytest.raises(ValueError, match=f"^1.0: the {type(layer).__name__} has hooks, which the plain layer"):
            fuse(nn.Sequential(nn.ReLU(), nn.Sequential(layer)), mode)
        handle.remove()
        fuse(nn.Sequential(nn.ReLU(), nn.Sequential(layer)), mode)


@pytest.mark.parametrize("register", HOOKS)
def test_hooks_of_a_regulated_part(register: str) -> None:
    part, conv = nn.Sequential(nn.ReLU(), dilated()), dilated()
    calls: list[str] = []
    model = nn.Sequential(ReceptiveFieldRegulator(part, 1.4), conv)
    getattr(part[1], register)(lambda *args: calls.append("inside"))
    getattr(conv, register)(lambda *args: calls.append("beside"))
    fuse(model)(MAP).sum().backward()
    assert sorted(calls) == ["beside", "inside"]
    getattr(part, register)(lambda *args: calls.append("part"))
    with pytest.raises(ValueError, match=r"^0: the regulated part has hooks"):
        fuse(model)
    fuse(model, "dilation")(MAP).sum().backward()
    assert sorted(calls[2:]) == ["beside", "inside", "part"]


class OwnFlag(nn.Module):
    """Applies dropout by its own flag, and has a buffer outside its state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = dilated()
        self.register_buffer("scale", torch.tensor(2.0), persistent=False)
        self.register_buffer("shift", torch.tensor(1.0))

    def forward(self, input: Tensor) -> Tensor:
        return F.dropout(self.conv(input), 0.5, self.training) * self.scale + self.shift


def test_a_fused_forward_is_that_of_eval_mode_and_keeps_what_is_not_saved() -> None:
    model = nn.Sequential(ReceptiveFieldRegulator(OwnFlag(), 1.3)).train()
    plain = fuse(model)
    assert plain[0].training
    assert model[0].module.training
    torch.testing.assert_close(plain(MAP), model.eval()(MAP), rtol=0, atol=1e-5)
    assert sorted(plain.state_dict()) == ["0.conv.bias", "0.conv.weight", "0.shift"]
    assert "0.scale" in dict(plain.named_buffers())


def test_from_the_inside_out() -> None:
    inner = AdaptiveConv2d.from_conv(dilated(), factor=2.0)
    model = nn.Sequential(
        ReceptiveFieldRegulator(nn.Sequential(inner, nn.ReLU(), WeightedGradient([0], 2.0)), 1.3)
    ).eval()
    inner.freeze_factor()
    plain = fuse(model)
    assert not any(type(module).__module__.startswith("rfield") for module in plain.modules())
    torch.testing.assert_close(plain(MAP), model(MAP), rtol=0, atol=1e-5)


def test_stages_without_a_number_are_the_model_s_children() -> None:
    class Stages(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.early = nn.ModuleDict({"left": dilated(), "right": dilated()})
            self.late = nn.ModuleDict({"left": dilated()})

    first, second, third = adapt(Stages(), share="stage")
    assert first.log_factor is second.log_factor
    assert third.log_factor is not first.log_factor


def test_parametrised_convolutions_are_dilated() -> None:
    part = nn.Sequential(parametrizations.weight_norm(dilated()), nn.CELU(), nn.Softmax(1))
    plain = fuse(nn.Sequential(ReceptiveFieldRegulator(part, 2.0)), mode="dilation")
    assert plain[0][0].dilation == (2, 2)
