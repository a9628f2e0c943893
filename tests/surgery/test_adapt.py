"""`adapt` and `regulate`: selecting, sharing, refusing, and other libraries."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rfield
from rfield import adapt, regulate
from rfield.layers import AdaptiveConv2d, ReceptiveFieldRegulator
from rfield.search import learned_layers

IMAGE = torch.randn(2, 3, 24, 20, generator=torch.Generator().manual_seed(0))


def dilated(channels: int, dilation: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation, **options)


class Block(nn.Module):
    def __init__(self, dilation: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = dilated(4, dilation), dilated(4, dilation)

    def forward(self, input: Tensor) -> Tensor:
        return input + F.relu(self.conv2(F.relu(self.conv1(input))))


class Pyramid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            [nn.Sequential(nn.Conv2d(4, 4, 1)), *(nn.Sequential(dilated(4, rate)) for rate in (2, 4))]
        )

    def forward(self, input: Tensor) -> Tensor:
        return torch.stack([conv(input) for conv in self.convs]).sum(0)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    stages = {"stem": nn.Conv2d(3, 4, 3, padding=1), "layer3": nn.Sequential(Block(2), Block(2)), "head": Pyramid()}
    model = nn.Sequential()
    for name, stage in stages.items():
        model.add_module(name, stage)
    return model


CONVS = [f"layer3.{block}.conv{number}" for block in (0, 1) for number in (1, 2)]
BRANCHES = ["head.convs.1.0", "head.convs.2.0"]


def names_of(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, AdaptiveConv2d)]


class TestSelect:
    def test_default_is_every_dilated_convolution(self) -> None:
        model = network()
        layers = adapt(model)
        assert names_of(model) == CONVS + BRANCHES
        assert layers == [module for module in model.modules() if isinstance(module, AdaptiveConv2d)]

    @pytest.mark.parametrize(
        ("select", "expected"),
        [
            ("stem", ["stem"]),
            ("layer3", CONVS),
            ("*.conv2", CONVS[1::2]),
            (["layer3.0", "head.*"], CONVS[:2] + BRANCHES),
            (lambda name, conv: conv.dilation[0] == 4, BRANCHES[1:]),
        ],
    )
    def test_by_name_pattern_or_function(self, select: Any, expected: list[str]) -> None:
        model = network()
        adapt(model, select)
        assert names_of(model) == expected

    def test_changes_nothing_until_the_factor_moves(self) -> None:
        model = network()
        before, keys, weights = model(IMAGE), list(model.state_dict()), list(model.parameters())
        layers = adapt(model)
        assert torch.allclose(model(IMAGE), before, atol=1e-6)
        assert [key for key in model.state_dict() if not key.endswith(".log_factor")] == keys
        kept = {id(parameter) for parameter in model.parameters()}
        assert all(id(parameter) in kept for parameter in weights)
        layers[0].set_factor(0.5)
        assert not torch.allclose(model(IMAGE), before, atol=1e-3)

    def test_rectangular(self) -> None:
        assert adapt(network(), "head", axes=2)[0].log_factor.shape == (2,)

    def test_a_convolution_under_two_names(self) -> None:
        conv = dilated(3, 2)
        model = nn.Sequential(conv, nn.ReLU(), conv)
        (layer,) = adapt(model)
        assert model[0] is layer
        assert model[2] is layer

    def test_mode_and_frozen_weights_are_kept(self) -> None:
        model = network().eval().requires_grad_(False)
        layer = adapt(model)[0]
        assert not layer.training
        assert not layer.weight.requires_grad
        assert layer.log_factor.requires_grad


class TestShare:
    @pytest.mark.parametrize(
        ("share", "groups"),
        [
            (None, [[name] for name in CONVS + BRANCHES]),
            ("parallel", [[name] for name in CONVS] + [BRANCHES]),
            ("layer", [CONVS[:2], CONVS[2:], BRANCHES]),
            ("stage", [CONVS, *([name] for name in BRANCHES)]),
        ],
    )
    def test_who_shares(self, share: Any, groups: list[list[str]]) -> None:
        model = network()
        adapt(model, share=share)
        names = {module: name for name, module in model.named_modules()}
        assert [[names[layer] for layer in group] for group in learned_layers(model)] == groups

    def test_dilations_keep_their_ratio(self) -> None:
        model = network()
        first, second = adapt(model, "head", share="parallel")
        first.set_factor(0.5)
        assert (first.effective_dilation[0], second.effective_dilation[0]) == pytest.approx((4, 8))
        assert len(rfield.parameter_groups(model, 0.1, 0.01)[1]["params"]) == 1

    def test_is_saved_by_safetensors(self, tmp_path: Path) -> None:
        safetensors = pytest.importorskip("safetensors.torch")
        model, other = network(), network()
        adapt(model, "head", share="parallel")[0].set_factor(0.5)
        safetensors.save_file(model.state_dict(), tmp_path / "model.safetensors")
        adapt(other, "head", share="parallel")
        other.load_state_dict(safetensors.load_file(tmp_path / "model.safetensors"))
        assert [layer.factor.item() for (layer, *_) in learned_layers(other)] == [0.5]
        assert torch.equal(other(IMAGE), model(IMAGE))

    def test_a_flat_model_is_one_block(self) -> None:
        model = nn.Sequential(dilated(3, 2), nn.ReLU(), dilated(3, 4))
        adapt(model, share="layer")
        assert len(learned_layers(model)) == 1


class OwnForward(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def test_one_pixel_along_one_axis_is_enough_and_along_both_is_not() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, (1, 3), padding=(0, 2), dilation=(1, 2)), nn.Conv2d(3, 3, 1, dilation=2))
    for select in (None, "*", lambda name, conv: True):
        changed = copy.deepcopy(model)
        adapt(changed, select)
        assert names_of(changed) == ["0"]
    with pytest.raises(ValueError, match=r"those that can be: 0 \(kernel 1x3, dilation 2\)$"):
        adapt(model, lambda name, conv: False)


class TestRefused:
    def test_nothing_chosen(self) -> None:
        with pytest.raises(ValueError, match=r"nothing to adapt; .* those that can be: 0 \(kernel 3x3, dilation 1\)$"):
            adapt(nn.Sequential(nn.Conv2d(3, 3, 3)))
        for count, end in ((8, r"7 \(kernel 3x3, dilation 1\)$"), (10, r"7 \(kernel 3x3, dilation 1\) and 2 more$")):
            with pytest.raises(ValueError, match=end):
                adapt(nn.Sequential(*(nn.Conv2d(3, 3, 3) for _ in range(count))))
        with pytest.raises(ValueError, match=r"the model has no nn.Conv2d of more than one pixel"):
            adapt(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()))
        with pytest.raises(ValueError, match="nothing to adapt"):
            adapt(network(), lambda name, conv: False)

    def test_an_unknown_name_suggests_similar_ones(self) -> None:
        with pytest.raises(ValueError, match=r"'layer3.0.conv3' names no convolution .* layer3.0.conv"):
            adapt(network(), ["head", "layer3.0.conv3"])
        # Names with half of their letters in common are suggested, others are not.
        with pytest.raises(ValueError, match=r"'0.conv9.weight' names no convolution .* is it .*layer3.0.conv"):
            adapt(network(), "0.conv9.weight")
        with pytest.raises(ValueError, match=r"'weight' names no convolution .*; nothing to adapt; name convolutions"):
            adapt(network(), "weight")

    @pytest.mark.parametrize(
        ("conv", "reason"),
        [
            (nn.Conv2d(3, 3, 4, dilation=2), "is even along an axis"),
            (nn.Conv2d(3, 3, 3, padding=2, dilation=2, padding_mode="reflect"), "padding_mode='reflect'"),
            (OwnForward(3, 3, 3, padding=2, dilation=2), "OwnForward has a forward of its own"),
            (nn.LazyConv2d(3, 3, padding=2, dilation=2), "run the model once"),
        ],
    )
    def test_what_cannot_be_adapted(self, conv: nn.Conv2d, reason: str) -> None:
        model = nn.Sequential(dilated(3, 2), conv)
        with pytest.raises(ValueError, match=f"the convolution 1 cannot be adapted: .*{reason}"):
            adapt(model, "*")
        assert names_of(model) == []
        with pytest.warns(UserWarning, match=f"the convolution 1 is left as it is: .*{reason}"):
            adapt(model)
        assert names_of(model) == ["0"]
        assert model[1] is conv

    def test_hooks_and_replaced_forwards(self) -> None:
        hooked, patched = dilated(3, 2), dilated(3, 2)
        hooked.register_forward_pre_hook(lambda module, args: None)
        patched.forward = lambda map_: map_  # type: ignore[method-assign]
        for conv, reason in ((hooked, "hooks"), (patched, "forward of its own")):
            with pytest.raises(ValueError, match=reason):
                adapt(nn.Sequential(conv), "0")

    def test_timm_s_own_convolutions(self) -> None:
        timm = pytest.importorskip("timm")
        for kind in (timm.layers.Conv2dSame, timm.layers.StdConv2d, timm.layers.ScaledStdConv2d):
            with pytest.raises(ValueError, match="has a forward of its own"):
                adapt(nn.Sequential(kind(3, 3, 3, dilation=2)), "0")

    def test_values(self) -> None:
        with pytest.raises(ValueError, match="share must be None, 'parallel', 'layer' or 'stage', got 'all'"):
            adapt(network(), share="all")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="axes must be 1 or 2, got 3"):
            adapt(network(), axes=3)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"use AdaptiveConv2d\.from_conv"):
            adapt(dilated(3, 2))

    def test_a_regulated_convolution(self) -> None:
        model = network()
        regulate(model, "head")
        with pytest.raises(ValueError, match=r"head.module.convs.1.0 cannot be adapted: it is inside a regulator"):
            adapt(model, "head.*")


class TestRegulate:
    def test_wraps_one_part(self) -> None:
        model = network().eval()
        before, keys = model(IMAGE), set(model.state_dict())
        regulator = regulate(model, "layer3.1", axes=2)
        assert model.get_submodule("layer3.1") is regulator
        assert not regulator.training
        assert torch.allclose(model(IMAGE), before, atol=1e-5)
        others = {key for key in keys if not key.startswith("layer3.1.")}
        assert {key for key in model.state_dict() if not key.startswith("layer3.1.")} == others
        regulator.set_factor((0.8, 1.6))
        assert regulator.effective_dilation == pytest.approx((2.5, 1.25))

    @pytest.mark.parametrize(
        ("name", "error"),
        [
            ("layer3.2", r"has no part 'layer3.2'; is it 'layer3"),
            ("conv1", r"has no part 'conv1'; is it .*'layer3.1.conv1'"),
            ("decoder", r"has no part 'decoder'; is it 'stem' or 'layer3' or 'layer3.0'\?$"),
            ("", "has no part ''; is it 'stem' or"),
            ("head.convs", "'head.convs' is a ModuleList, which cannot be called"),
            ("layer3.0.module.conv1", "is inside a regulator already"),
            ("layer3", "holds a learned receptive field already"),
        ],
    )
    def test_refused(self, name: str, error: str) -> None:
        model = network()
        regulate(model, "layer3.0")
        with pytest.raises(ValueError, match=error):
            regulate(model, name)

    def test_a_part_that_sees_one_pixel(self) -> None:
        with pytest.warns(UserWarning, match=r"no convolution in 'head.convs.0' sees more than one pixel"):
            regulate(network(), "head.convs.0")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            regulate(nn.Sequential(nn.Conv2d(3, 3, (1, 3))), "0")
            regulate(network(), "head")

    def test_a_part_under_two_names(self) -> None:
        model = network()
        model.again = model.stem
        assert regulate(model, "again") is model.again is model.stem


def test_public_names_stay_functions_whatever_was_imported() -> None:
    import rfield.surgery.adapt
    import rfield.surgery.fuse

    model = nn.Sequential(dilated(3, 2))
    assert isinstance(rfield.adapt(model)[0], AdaptiveConv2d)
    assert isinstance(rfield.fuse(model), nn.Sequential)
    assert isinstance(rfield.regulate(nn.Sequential(dilated(3, 2)), "0"), ReceptiveFieldRegulator)
    assert copy.deepcopy(model)[0].effective_dilation == (2.0, 2.0)


class TestWhatAdaptSays:
    def test_convolutions_of_an_encoder_are_named(self) -> None:
        parts = {"encoder": 2, "decoder": 3, "head": 4}
        model = nn.ModuleDict({name: nn.Sequential(nn.Conv2d(1, 1, 3, dilation=rate)) for name, rate in parts.items()})
        wrapped = nn.Sequential(copy.deepcopy(model))
        with pytest.warns(UserWarning, match=r"1 convolution of 'encoder', .* is among the 3 .*\['decoder', 'he"):
            adapt(model)
        with pytest.warns(UserWarning, match=r"of '0\.encoder', .*out by select=\['0\.decoder', '0\.head'\]"):
            adapt(wrapped)
        alone = nn.ModuleDict({"backbone": nn.Sequential(*(nn.Conv2d(1, 1, 3, dilation=2) for _ in range(2)))})
        with pytest.warns(UserWarning, match="2 convolutions of 'backbone', .* are among the 2 .*; name others"):
            adapt(alone)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            adapt(nn.ModuleDict({"encoder": nn.Sequential(nn.Conv2d(1, 1, 3, dilation=2))}), "encoder")

    def test_wrapped_and_compiled_models_are_refused(self) -> None:
        def plain() -> nn.Module:
            return nn.Sequential(nn.Conv2d(1, 1, 3, dilation=2))

        in_place = plain()
        in_place.compile()
        for model, message in (
            (nn.DataParallel(plain()), "the model is wrapped in DataParallel: adapt the plain model"),
            (torch.compile(plain()), "the model is wrapped in OptimizedModule"),
            (nn.Sequential(torch.compile(plain())), "'0' is wrapped in OptimizedModule"),
            (in_place, "the model is compiled"),
        ):
            with pytest.raises(ValueError, match=message):
                adapt(model)
            with pytest.raises(ValueError, match=message):
                regulate(model, "0")
