"""Advice on receptive fields: what does not suit the images, and that its code mends it."""

import ast
import dataclasses
import json
import math
import runpy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import rfield
from rfield.receptive_field.advice import field_advice, find_pyramids, outer_taps_on_map
from rfield.receptive_field.per_layer import LayerField, layer_receptive_fields

INF = (math.inf, math.inf)


def texts(layers: list[LayerField], size: tuple[int, int]) -> list[str]:
    return [advice.text for advice in field_advice(layers, size)]


def pyramid(*rates: int, side: int = 3) -> nn.Module:
    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 3, 1, stride=8)
            self.convs = nn.ModuleList([nn.Conv2d(3, 3, side, padding="same", dilation=rate) for rate in rates])

        def forward(self, image: Tensor) -> Tensor:
            stem = self.stem(image)
            return torch.stack([conv(stem) for conv in self.convs]).sum(0)

    return Pyramid()


def test_warnings_of_a_pyramid() -> None:
    layers = layer_receptive_fields(pyramid(12, 24, 36))
    # 1 + 2 * 36 * 8 px.
    assert texts(layers, (800, 640)) == []
    assert texts(layers, (410, 520)) == [
        "convs: rates 12/24/36 at output stride 8 see 1.4 x the image (577 of 410 px)",
        # (1 + 2 * 16 / 52) / 3 * (1 + 2 * 29 / 65) / 3 = 0.34 of them are on the map.
        "convs.2: rate 36 on a map of 52x65 px reads padding with 66 % of its taps",
    ]
    assert texts(layers, (250, 250))[-1] == (
        "convs.2: rate 36 on a map of 32x32 px acts as a 1x1 convolution, its outer taps never reach the map"
    )


def test_one_warning_for_layers_of_one_rate_in_a_row() -> None:
    stages = nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=4, dilation=4) for _ in range(4)))
    assert texts(layer_receptive_fields(stages), (20, 20)) == [
        "2 to 3: rate 4 at output stride 1 sees 1.6 x the image (33 of 20 px)"
    ]


def test_warnings_of_a_small_field() -> None:
    layers = layer_receptive_fields(nn.Sequential(nn.Conv2d(3, 3, 9), nn.Conv2d(3, 3, 3, dilation=2)))
    assert texts(layers, (41, 41)) == []
    assert texts(layers, (13, 10)) == ["1: rate 2 at output stride 1 sees 1.3 x the image (13 of 10 px)"]
    assert texts(layers, (130, 52)) == ["the output sees 2.5 % of the image (13x13 of 130x52 px)"]


def test_warnings_of_layers_that_differ_along_the_axes() -> None:
    near, far, output = (dataclasses.replace(layer, pads=False) for layer in layer_receptive_fields(pyramid(2, 9))[1:])
    near, far = dataclasses.replace(near, local=(50.0, 10.0)), dataclasses.replace(far, local=(60.0, 200.0))
    assert texts([near, far, output], (100, 150)) == [
        "convs: rates 2/9 at output stride 8 see 1.3 x the image (200 of 150 px)"
    ]
    thin = dataclasses.replace(far, kernel=(1, 3), local=(1.0, 200.0))
    assert texts([near, thin, output], (100, 8))[0] == (
        "convs: rates 2/9 at output stride 8 see 25.0 x the image (200 of 8 px)"
    )
    # Where one axis has been pooled to a pixel, the other one has padding alone.
    padded = dataclasses.replace(far, pads=True, tap_spacing=(math.inf, 72.0))
    assert texts([padded, output], (400, 400)) == []
    # Short sight beside a look at the whole image is none.
    assert texts([dataclasses.replace(output, field=INF, local=(3.0, 3.0))], (400, 400)) == []
    plain = dataclasses.replace(near, dilation=(1.0, 1.0))
    assert texts([plain, dataclasses.replace(output, field=INF, local=(3.0, 3.0))], (400, 400)) == []


def test_pyramids_without_a_list() -> None:
    class Added(nn.Module):
        """Branches that a forward pass calls by name, after a stage of dilated layers in a row."""

        def __init__(self) -> None:
            super().__init__()
            self.stage = nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=2, dilation=2) for _ in range(3)))
            self.near, self.far = (nn.Conv2d(3, 3, 3, padding=d, dilation=d) for d in (4, 9))

        def forward(self, image: Tensor) -> Tensor:
            features = self.stage(image)
            return torch.cat([self.far(features), self.near(features)], dim=1)

    (found,) = find_pyramids(layer_receptive_fields(Added()))
    assert (found.name, found.rates) == ("far, near", [4, 9])
    in_a_row = nn.ModuleList([nn.Conv2d(3, 3, 3, padding=d, dilation=d) for d in (2, 4)])
    assert find_pyramids(layer_receptive_fields(Row(in_a_row))) == []


class Row(nn.Module):
    """Run the modules of a list one after the other."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        super().__init__()
        self.blocks = blocks

    def forward(self, image: Tensor) -> Tensor:
        for block in self.blocks:
            image = block(image)
        return image


def test_shares_of_outer_taps_are_those_of_an_enumeration() -> None:
    conv = nn.Conv2d(1, 1, (3, 5), padding=(4, 6), dilation=(4, 3))
    nn.init.ones_(conv.weight)
    inside = nn.functional.conv2d(torch.ones(1, 1, 11, 13), conv.weight, padding=(4, 6), dilation=(4, 3))
    layer, _ = layer_receptive_fields(conv, channels=1)
    assert outer_taps_on_map(layer, (11, 13)) == pytest.approx((float(inside.detach().mean()) - 1) / 14)
    for unknown in (dataclasses.replace(layer, pads=False), dataclasses.replace(layer, dilation=(1.0, 1.0))):
        assert outer_taps_on_map(unknown, (11, 13)) is None


def mended(model: nn.Module, size: tuple[int, int], rounds: int = 3) -> list[str]:
    """The warnings that are left after the code of each has run, on the model that it is about."""
    for _ in range(rounds):
        for advice in field_advice(layer_receptive_fields(model), size):
            exec(advice.code, {"model": model, "rfield": rfield, "torch": torch, "images": torch.zeros(1, 3, *size)})
    return texts(layer_receptive_fields(model), size)


def test_code_mends_what_the_text_says() -> None:
    aspp = pyramid(12, 24, 36)
    assert mended(aspp, (410, 520)) == []
    assert [conv.dilation for conv in aspp.convs] == [(10, 10), (19, 19), (29, 29)]
    single = nn.Sequential(nn.Conv2d(3, 8, 3, stride=8, padding=1), nn.Conv2d(8, 8, 3, padding=9, dilation=9))
    assert mended(single, (100, 100)) == []
    assert single[1].dilation == (5, 5)
    stage = nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=4, dilation=4) for _ in range(5)))
    assert mended(stage, (20, 20)) == []
    # Those that pad by themselves have no padding that could follow.
    own_padding = nn.Sequential(nn.ZeroPad2d(30), nn.Conv2d(3, 3, 3, dilation=30))
    assert mended(own_padding, (50, 50)) == []
    learned = nn.Sequential(rfield.AdaptiveConv2d(3, 3, 3, padding=9, dilation=9))
    (advice, _) = field_advice(layer_receptive_fields(learned), (9, 9))
    assert advice.code.startswith("search = rfield.SampledSearch(model, ")


def test_maps_of_one_pixel_and_short_sight() -> None:
    stem = nn.Sequential(nn.Conv2d(3, 4, 3, stride=16, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1))
    (advice,) = field_advice(layer_receptive_fields(stem), (16, 12))
    assert advice.text == (
        "1: kernel 3 on a map of 1x1 px acts as a 1x1 convolution, the images are too small for stride 16"
    )
    assert advice.code == "images = torch.nn.functional.interpolate(images, size=(48, 48))"
    assert texts(layer_receptive_fields(stem), (48, 48)) == []
    (advice,) = field_advice(layer_receptive_fields(stem), (480, 480))
    assert advice.code == "rfield.adapt(model, '1')"
    (advice,) = field_advice(layer_receptive_fields(nn.Conv2d(3, 3, 1)), (9, 9))
    assert advice.code == "images = torch.nn.functional.interpolate(images, scale_factor=0.5)"


STUDY = Path(__file__).parents[2] / "studies/advice"
FOUND = json.loads((STUDY / "advice.json").read_text())
ILL_SET = {  # whose pyramids have larger rates than DeepLabv3 at their stride and these sizes
    "torchvision deeplabv3_mobilenet_v3_large": ("96x96", "256x256", "513x513"),
    "smp DeepLabV3Plus, resnet18": ("96x96", "256x256", "513x513"),
    "torchvision deeplabv3_resnet50": ("96x96", "256x256"),
    "smp DeepLabV3, resnet18": ("96x96", "256x256"),
    "transformers MobileViT, DeepLabV3": ("96x96", "256x256"),
}


def test_models_of_four_libraries() -> None:
    """The layers were measured once (studies/advice); the advice on them is made again here."""
    study = runpy.run_path(str(STUDY / "advice.py"))
    assert len(FOUND) == 17
    for name, found in FOUND.items():
        again = study["advise"]([study["restored"](values) for values in found["layers"]])
        assert json.loads(json.dumps(again)) == {key: found[key] for key in again}, name
        assert bool(found["pyramids"]) == (name in ILL_SET), name
        for size, advice in found["advice"].items():
            for text, code in advice:
                ast.parse(code)
                assert "\n" not in text + code
            warned = any(text.startswith(pyramid) for pyramid in found["pyramids"] for text, _ in advice)
            assert warned == (size in ILL_SET.get(name, ())), (name, size)
    (first, *_) = [text for text, _ in FOUND["smp DeepLabV3Plus, resnet18"]["advice"]["96x96"] if "decoder" in text]
    assert first == "decoder.aspp.0.convs: rates 12/24/36 at output stride 16 see 16.9 x the image (1619 of 96 px)"


@pytest.mark.slow
def test_a_known_ill_set_model_is_mended() -> None:
    smp = pytest.importorskip("segmentation_models_pytorch")
    model = smp.DeepLabV3Plus("resnet18", encoder_weights=None)
    layers = layer_receptive_fields(model)
    advice = [each for each in field_advice(layers, (513, 513)) if each.text.startswith("decoder.aspp")]
    for each in advice:
        exec(each.code, {"model": model, "rfield": rfield})
    rates = [rate for name, rate in rfield.dilations(model).items() if "aspp" in name and max(rate) > 1]
    assert rates == [(6, 6), (12, 12), (18, 18)]
    assert model.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 1, 64, 64)
