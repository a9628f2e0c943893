"""`fuse` returns plain torch modules that compute the same and fit the library's own model."""

import copy
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rfield
from rfield.layers import AdaptiveConv2d, ReceptiveFieldRegulator, WeightedGradient
from rfield.ops import resized_size
from rfield.receptive_field.theoretical import theoretical_receptive_field
from rfield.segmentation.models import HeadSpec, MultiPathHead, ParsingNetwork, SinglePathHead, small_cnn
from rfield.segmentation.models.backbones import small_cnn_backbone
from rfield.surgery.fuse import dilations, fixed_resize, set_dilations, traceable_resized_size

MAP = torch.randn(2, 4, 19, 23, generator=torch.Generator().manual_seed(0))


def is_plain(model: nn.Module) -> bool:
    return not any(type(module).__module__.startswith("rfield") for module in model.modules())


def moved(model: nn.Module) -> nn.Module:
    """Return the model in eval mode, with factors changed, and batch norms that are not the identity."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, AdaptiveConv2d | ReceptiveFieldRegulator):
            module.set_factor([0.81, 1.27][: module.log_factor.numel()])
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = torch.randn(module.num_features, generator=generator)
    return model.eval()


class Pyramid(nn.Module):
    """Parallel branches, a parameter of the module itself, and an unused one."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=rate, dilation=rate) for rate in (2, 4))
        self.norm = nn.BatchNorm2d(8)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.unused = nn.Conv2d(4, 4, 1)

    def forward(self, input: Tensor) -> Tensor:
        return self.norm(F.relu(torch.cat([conv(input) for conv in self.convs], 1))) * self.scale


def dilated(**options: Any) -> nn.Conv2d:
    return nn.Conv2d(4, 4, **({"kernel_size": 3, "padding": 5, "dilation": 5} | options))


class TestAdaptiveConv:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"stride": 2, "groups": 2, "bias": False},
            {"padding": "same"},
            {"padding": 0},
            {"padding": (1, 5)},
            {"padding": (0, 7)},
            {"kernel_size": (5, 3), "padding": (10, 0)},
        ],
        ids=str,
    )
    @pytest.mark.parametrize("nearest", [(3, 3), (2, 8)])
    def test_is_what_the_snapped_layer_was(self, options: dict[str, Any], nearest: tuple[int, int]) -> None:
        conv = dilated(**options)
        layer = AdaptiveConv2d.from_conv(conv, [5 / value for value in nearest])
        layer.snap()
        plain = rfield.fuse(nn.Sequential(layer))
        assert is_plain(plain)
        assert set(plain.state_dict()) == {f"0.{key}" for key in conv.state_dict()}
        torch.testing.assert_close(plain(MAP), layer(MAP)[:], rtol=0, atol=1e-5)
        assert not list(layer.modules())[1:]

    def test_a_factor_in_between_is_rounded_per_axis(self) -> None:
        layer = AdaptiveConv2d.from_conv(dilated(), (5 / 2.6, 5 / 7.4))
        layer.dilation_override = (9.0, 9.0)
        assert rfield.fuse(layer).dilation == (3, 7)

    def test_the_model_does_not_change(self) -> None:
        model = nn.Sequential(dilated())
        rfield.adapt(model)
        plain = rfield.fuse(model)
        assert isinstance(model[0], AdaptiveConv2d)
        with torch.no_grad():
            plain[0].weight.zero_()
        assert model[0].weight.abs().sum() > 0


class TestResize:
    PARTS: tuple[tuple[str, Callable[[], nn.Module]], ...] = (
        ("convolution", dilated),
        ("pointwise", lambda: nn.Conv2d(4, 3, 1)),
        ("sequence", lambda: nn.Sequential(dilated(), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1))),
        ("pyramid", Pyramid),
        ("reflecting", lambda: dilated(padding_mode="reflect")),
        ("double", lambda: dilated().double()),
    )

    @pytest.mark.parametrize("build", [build for _, build in PARTS], ids=[name for name, _ in PARTS])
    @pytest.mark.parametrize("factor", [0.37, 1.0, 1.7, (0.63, 1.9)], ids=str)
    @pytest.mark.parametrize("size", [(19, 23), (20, 12), (9, 1)], ids=str)
    def test_is_exact(self, build: Callable[[], nn.Module], factor: Any, size: tuple[int, int]) -> None:
        torch.manual_seed(0)
        part = build().eval()
        keys = list(part.state_dict())
        dtype = next(part.parameters()).dtype
        model = nn.Sequential(nn.Identity(), ReceptiveFieldRegulator(part, factor)).eval()
        image = torch.randn(2, 4, *size, dtype=dtype, generator=torch.Generator().manual_seed(1))
        plain = rfield.fuse(model)
        if getattr(part, "padding_mode", "") == "reflect" and min(size) == 1:
            for each in (model, plain):  # torch cannot reflect a map of one pixel
                with pytest.raises(RuntimeError, match=r"adding size should be less than"):
                    each(image)
            return
        assert is_plain(plain)
        assert set(plain.state_dict()) == {f"1.{key}" for key in keys}
        torch.testing.assert_close(plain(image), model(image), rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-12)
        assert isinstance(model[1], ReceptiveFieldRegulator)

    def test_to_an_output_size(self) -> None:
        regulator = ReceptiveFieldRegulator(dilated(), (0.7, 1.3))
        plain = fixed_resize(copy.deepcopy(regulator.module), tuple(regulator.factor.tolist()))
        assert plain.graph._tracer_cls is torch.fx.Tracer, "pickled with the graph"
        for map_ in (MAP, MAP[:, :, :1], MAP[:, :, :2, :1]):  # An axis of one px may become longer.
            for size in ((73, 1), (1, 9), (2, 5)):
                expected = regulator(map_, output_size=size)
                torch.testing.assert_close(plain(map_, size), expected, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
    def test_any_layout_and_precision(self, memory_format: torch.memory_format) -> None:
        model = nn.Sequential(ReceptiveFieldRegulator(dilated(), 1.4))
        image = MAP.contiguous(memory_format=memory_format)
        torch.testing.assert_close(rfield.fuse(model)(image), model(image), rtol=0, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            # Neighbouring bfloat16 numbers near 1 differ by 2^-8 = 0.004; a sum and an interpolation each round once.
            torch.testing.assert_close(rfield.fuse(model)(image), model(image), rtol=0, atol=0.01)

    def test_places_on_long_maps_of_low_precision(self) -> None:
        """Above 256 bfloat16 has no odd numbers."""
        regulator = ReceptiveFieldRegulator(nn.Conv2d(1, 1, 1).bfloat16(), 1.3)
        plain = fixed_resize(copy.deepcopy(regulator.module), tuple(regulator.factor.tolist() * 2))
        map_ = torch.randn(1, 1, 2, 400, generator=torch.Generator().manual_seed(0)).bfloat16()
        torch.testing.assert_close(plain(map_), regulator(map_), rtol=0, atol=0.05)

    def test_sizes_are_those_of_the_operator(self) -> None:
        for factor in [*(torch.rand(60).exp() * 2 - 1.9).tolist(), 0.5, 1.0, 2.0, 1 / 3, 5 / 7]:
            for size in (1, 2, 9, 41, 321):
                assert traceable_resized_size(size, factor) == resized_size(size, factor)
        # Rounding errors of up to 1e-4 px do not add a pixel to 10 px.
        assert [traceable_resized_size(11, factor) for factor in (1.0000099, 1.0000101, 0.99999)] == [11, 12, 11]

    def test_untraceable_part(self) -> None:
        class OwnFlag(nn.Conv2d):
            def forward(self, input: Tensor) -> Tensor:
                return super().forward(input if input.mean() > 0 else -input)

        model = nn.Sequential(ReceptiveFieldRegulator(OwnFlag(4, 4, 3, padding=1), 1.4))
        with pytest.raises(ValueError, match=r"^0: the forward of OwnFlag cannot be traced \(.*mode='dilation'"):
            rfield.fuse(model)

    def test_training_goes_on(self) -> None:
        model = nn.Sequential(ReceptiveFieldRegulator(nn.Sequential(dilated(), nn.Dropout(0.5)), 1.4))
        plain = rfield.fuse(model)
        assert plain[0].training
        assert not torch.equal(plain(MAP), plain(MAP))
        plain(MAP).sum().backward()
        assert all(parameter.grad is not None for parameter in plain.parameters())


class TestDilation:
    def test_nearest_dilations(self) -> None:
        part = nn.Sequential(dilated(), nn.BatchNorm2d(4), nn.PReLU(), nn.Dropout(), nn.Conv2d(4, 3, 1))
        model = nn.Sequential(ReceptiveFieldRegulator(part, (5 / 2.9, 5 / 7.2))).eval()
        plain = rfield.fuse(model, mode="dilation")
        assert is_plain(plain)
        assert dilations(plain) == {"0.0": (3, 7)}
        assert plain[0][0].padding == (3, 7)
        assert set(plain.state_dict()) == {f"0.{key}" for key in part.state_dict()}
        assert plain(MAP).shape == model(MAP).shape

    def test_a_larger_field_from_a_plain_convolution(self) -> None:
        part = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1))
        model = nn.Sequential(ReceptiveFieldRegulator(part, 0.34))
        assert dilations(rfield.fuse(model, mode="dilation")) == {"0.0": (3, 3)}
        assert part[1].dilation == rfield.fuse(model, mode="dilation")[0][1].dilation == (1, 1)
        model = nn.Sequential(ReceptiveFieldRegulator(nn.Conv2d(4, 4, (1, 2), padding=(0, 2), dilation=4), 2.0))
        assert dilations(rfield.fuse(model, mode="dilation")) == {"0": (2, 2)}

    def test_reflecting(self) -> None:
        model = nn.Sequential(ReceptiveFieldRegulator(dilated(padding_mode="reflect"), 2.5))
        stock = nn.Conv2d(4, 4, 3, padding=2, dilation=2, padding_mode="reflect")
        stock.load_state_dict(model[0].module.state_dict())
        assert torch.equal(rfield.fuse(model, mode="dilation")(MAP), stock(MAP))

    def test_other_layers_cannot_be_dilated(self) -> None:
        part = nn.Sequential(dilated(), nn.AvgPool2d(3, 1, 1))
        with pytest.raises(ValueError, match=r"^1 is a AvgPool2d|^0: 1 is a AvgPool2d, and only convolutions"):
            rfield.fuse(nn.Sequential(ReceptiveFieldRegulator(part, 1.4)), mode="dilation")

    @pytest.mark.parametrize("mode", ["resize", "dilation"])
    def test_a_snapped_regulator_is_its_convolutions(self, mode: Any) -> None:
        model = nn.Sequential(ReceptiveFieldRegulator(nn.Sequential(dilated(), nn.Conv2d(4, 3, 1)), 1.6))
        model[0].snap()
        plain = rfield.fuse(model, mode)
        assert isinstance(plain[0], nn.Sequential)
        assert torch.equal(plain(MAP), model(MAP))


class TestAnyModel:
    def test_idempotent(self) -> None:
        model = nn.Sequential(dilated(), Pyramid(), nn.Conv2d(8, 4, 1))
        rfield.adapt(model, "0")
        rfield.regulate(model, "1", factor=1.3)
        once = rfield.fuse(model.eval())
        twice = rfield.fuse(once)
        assert torch.equal(twice(MAP), once(MAP))
        assert list(twice.state_dict()) == list(once.state_dict())
        assert rfield.fuse(nn.Conv2d(4, 4, 3)).kernel_size == (3, 3)

    def test_mode(self) -> None:
        with pytest.raises(ValueError, match="mode must be 'resize' or 'dilation', got 'exact'"):
            rfield.fuse(nn.Conv2d(4, 4, 3), mode="exact")  # type: ignore[arg-type]

    def test_one_layer_under_two_names(self) -> None:
        conv = dilated()
        model = nn.Sequential(conv, nn.ReLU(), conv)
        rfield.adapt(model)
        plain = rfield.fuse(model)
        assert plain[0] is plain[2]

    @pytest.mark.slow
    def test_is_saved_and_loaded_without_rfield(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        model = nn.Sequential(dilated(padding=0), dilated(padding=5), nn.Sequential(dilated(), nn.BatchNorm2d(4)))
        model.append(nn.Sequential(WeightedGradient([1], 5.0)))
        model.append(dilated())
        rfield.adapt(model, "4", gates="pixel", rates=(1, 3))
        rfield.adapt(model, ["0", "1"], axes=2)[0].set_factor((5 / 2, 5 / 3))
        regulator = rfield.regulate(model, "2")
        regulator.set_factor(1.37)
        model.eval()
        torch.save(rfield.fuse(model), tmp_path / "plain.pt")
        expected = model(MAP)
        for name in [name for name in sys.modules if name.partition(".")[0] == "rfield"]:
            monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ImportError):
            importlib.import_module("rfield.surgery.fuse")
        plain = torch.load(tmp_path / "plain.pt", weights_only=False)
        torch.testing.assert_close(plain(MAP), expected, rtol=0, atol=1e-5)
        copy.deepcopy(plain)(MAP)
        assert "2.0.weight" in plain.state_dict()

    def test_is_exported(self) -> None:
        model = nn.Sequential(ReceptiveFieldRegulator(nn.Sequential(dilated(), nn.ReLU()), 1.3)).eval()
        exported = torch.export.export(rfield.fuse(model), (MAP,))
        torch.testing.assert_close(exported.module()(MAP), model(MAP), rtol=0, atol=1e-5)

    def test_set_dilations(self) -> None:
        with pytest.raises(ValueError, match="has no convolution '1' to dilate by"):
            set_dilations(nn.Sequential(dilated(), nn.ReLU()), {"1": (2, 2)})
        with pytest.raises(ValueError, match="too small to follow"):
            set_dilations(nn.Sequential(dilated(padding=0)), {"0": (2, 2)})
        with pytest.raises(ValueError, match="at least 1"):
            set_dilations(nn.Sequential(dilated()), {"0": (0, 2)})


class TestParsingNetwork:
    IMAGE = torch.randn(1, 3, 61, 45, generator=torch.Generator().manual_seed(0))

    @pytest.mark.parametrize("mechanism", ["regulator", "dilation"])
    @pytest.mark.parametrize("paths", [1, 2])
    def test_same_logits_and_the_keys_of_a_plain_network(self, mechanism: Any, paths: int) -> None:
        torch.manual_seed(0)

        def build(regulate: bool) -> ParsingNetwork:
            if paths == 1:
                return small_cnn(3, regulate=regulate, mechanism=mechanism)
            guidance = {"class_groups": ((0,), (1,)), "gradient_weight": 5.0}
            head = MultiPathHead(32, 3, HeadSpec(4, 16, regulate=regulate, mechanism=mechanism, paths=2, **guidance))
            return ParsingNetwork(small_cnn_backbone(), head)

        network = moved(build(True))
        if mechanism == "dilation":
            for module in network.modules():
                if isinstance(module, AdaptiveConv2d):
                    module.snap()
        plain = rfield.fuse(network)
        assert not [m for m in plain.modules() if type(m).__module__.startswith("rfield.layers")]
        torch.testing.assert_close(plain(self.IMAGE), network(self.IMAGE), rtol=0, atol=1e-5)
        stock = build(False).eval()
        stock.load_state_dict(plain.state_dict())
        if mechanism == "dilation":
            set_dilations(stock, dilations(plain))
            torch.testing.assert_close(stock(self.IMAGE), network(self.IMAGE), rtol=0, atol=1e-5)
            assert plain.head.effective_dilation == stock.head.effective_dilation == pytest.approx((5.0, 5.0))
        features = plain.backbone(plain.pad(self.IMAGE))
        torch.testing.assert_close(plain.head(features), network.head(features), rtol=0, atol=1e-5)
        if paths == 2:  # the weighted gradient is an identity
            mask = torch.zeros(1, 61, 45, dtype=torch.long)
            assert plain.train().head(features, (61, 45), mask).shape == (1, 3, 61, 45)

    def test_single_path_head(self) -> None:
        head = SinglePathHead(4, 3, HeadSpec(6, 8, rectangular=True, mechanism="dilation")).eval()
        layer = head.factor_layer
        assert layer is not None
        layer.set_factor((2.0, 3.0))
        assert rfield.fuse(head).effective_dilation == (3.0, 2.0)

    @pytest.mark.parametrize("mode", ["resize", "dilation"])
    def test_a_fused_head_knows_its_field(self, mode: Any) -> None:
        head = SinglePathHead(4, 3, HeadSpec(6, 8, rectangular=True))
        head.factor_layer.set_factor((2.5, 0.8))
        plain = rfield.fuse(head, mode)
        expected = (2.4, 7.5) if mode == "resize" else (2, 8)
        assert plain.effective_dilation == plain.realised_dilation == pytest.approx(expected)
        assert theoretical_receptive_field(plain) == pytest.approx([1 + 2 * dilation for dilation in expected])
        assert head.effective_dilation == pytest.approx((2.4, 7.5))
