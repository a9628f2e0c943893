"""`rfield export`: files match the network, and are not kept otherwise."""

import contextlib
import functools
import json
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import PIL.Image
import pytest
import torch
import yaml

from rfield.layers import LearnedFactor
from rfield.segmentation.cli import main, parse
from rfield.segmentation.config.export import ExportConfig
from rfield.segmentation.config.train import TrainConfig
from rfield.segmentation.data import SyntheticCues, evaluation_transform
from rfield.segmentation.export import int8
from rfield.segmentation.export import onnx as exporting
from rfield.segmentation.export.int8 import quantise
from rfield.segmentation.export.onnx import compare, export_run, read_exported
from rfield.segmentation.inference.onnx import load_onnx
from rfield.segmentation.models import small_cnn
from rfield.segmentation.models.saving import describe_network
from rfield.segmentation.runs import Run, build_network, load_run

MakeRun = Callable[..., Path]


@pytest.fixture(scope="module")
def _one_registry() -> Iterator[None]:
    """Read torch's table of translations once: its exporter does so for each file, which takes a second."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(functools.cache(ONNXRegistry.from_torchlib)))
        yield


@pytest.fixture(scope="module")
def make_run(tmp_path_factory: pytest.TempPathFactory, _one_registry: None) -> MakeRun:
    """The folder of a run of a random network with learned dilations or, not snapped, resizes."""

    def make(factors: Any = ((4 / 7,),), snap: bool = True, seed: int = 0, **values: Any) -> Path:
        out = tmp_path_factory.mktemp("run")
        (out / "checkpoints").mkdir()
        given = {"model": "small_cnn", "dilation": 4, "head_channels": 8, "search": "sampled"}
        config = TrainConfig(data="synthetic", out=str(out), **given | values).resolved()
        torch.manual_seed(seed)
        network = build_network(config, 4)
        layers = [module for module in network.modules() if isinstance(module, LearnedFactor)]
        for layer, factor in zip(layers, factors, strict=True):
            layer.set_factor(factor)
            if snap:
                layer.snap()
        (out / "config.yaml").write_text(yaml.safe_dump(config.plain()))
        classes = {
            "class_names": SyntheticCues.class_names,
            "palette": [list(colour) for colour in SyntheticCues("val").palette],
        }
        (out / "classes.json").write_text(json.dumps(classes))
        state = {f"network.{key}": value for key, value in network.state_dict().items()}
        torch.save({"state_dict": state, "rfield": describe_network(network)}, out / "checkpoints/last.ckpt")
        return out

    return make


@pytest.fixture(scope="module")
def any_size(make_run: MakeRun) -> tuple[Path, Path]:
    """A run with a canvas, and its ONNX file for any size."""
    folder = make_run(canvas=(80, 90))
    made = export_run(load_run(folder), folder / "model.onnx")
    assert made.size is None
    assert made.difference < 1e-5
    return folder, made.path


@pytest.fixture(scope="module")
def one_size(make_run: MakeRun) -> tuple[Path, Path]:
    """A run whose regulator is not snapped, and its ONNX file for one size."""
    folder = make_run(((0.62,),), snap=False, mechanism="regulator")
    made = export_run(load_run(folder), folder / "model.onnx", (61, 45))
    assert made.size == (61, 45)
    return folder, made.path


def assert_same(run: Run, path: Path, *shapes: tuple[int, int, int]) -> None:
    batches = [torch.randn(count, 3, height, width) for count, height, width in shapes]
    difference, agreement = compare(run.network, read_exported(path), batches)
    assert difference < 1e-5
    assert agreement == 1


def test_commands() -> None:
    assert parse(["export", "runs/msrc-from-24", "--out", "model.onnx"]) == (
        "export",
        ExportConfig("runs/msrc-from-24", out="model.onnx"),
    )
    words = ["export", "r", "--out", "m.onnx", "--size", "48x64", "--int8", "--data", "synthetic"]
    assert parse(words)[1] == ExportConfig("r", out="m.onnx", size=(48, 64), int8=True, data="synthetic")


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--out", "model.tflite"], "out must end in .onnx or .pt2"),
        (["--out", "m.onnx", "--int8"], "int8 needs data"),
        (["--out", "m.pt2", "--int8", "--data", "synthetic"], "int8 needs data to be calibrated on, and an .onnx"),
        (["--out", "m.onnx", "--size", "no"], "a size is HEIGHTxWIDTH"),
        (["--out", "m.onnx"], "is not a run folder"),
    ],
)
def test_mistakes(words: list[str], error: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["export", str(tmp_path / "no"), *words])
    assert caught.value.code == 2
    assert error in capsys.readouterr().err


@pytest.mark.slow
def test_any_size(any_size: tuple[Path, Path]) -> None:
    # Below the canvas and above it, at the corners of the padding and off them.
    assert_same(load_run(any_size[0]), any_size[1], (1, 80, 90), (2, 81, 93), (3, 61, 45), (1, 96, 128), (2, 107, 59))


@pytest.mark.slow
def test_metadata(any_size: tuple[Path, Path]) -> None:
    notes = {prop.key: json.loads(prop.value) for prop in onnx.load(any_size[1]).metadata_props}
    assert notes["class_names"] == list(SyntheticCues.class_names)
    assert notes["palette"] == [list(colour) for colour in SyntheticCues("val").palette]
    assert notes["mean"] == [0.485, 0.456, 0.406]
    assert notes["size"] is None
    model = load_onnx(any_size[1])
    assert (model.class_names, model.fixed_size, model.size) == (SyntheticCues.class_names, None, None)


@pytest.mark.slow
def test_fixed_resizes_take_the_size_of_the_run(make_run: MakeRun) -> None:
    folder = make_run(((0.62,),), snap=False, mechanism="regulator", canvas=(45, 61))
    assert export_run(load_run(folder), folder / "model.onnx").size == (45, 61)


@pytest.mark.slow
def test_one_size(one_size: tuple[Path, Path]) -> None:
    folder, path = one_size
    assert_same(load_run(folder), path, (1, 61, 45), (4, 61, 45))
    model = load_onnx(path)
    assert model.fixed_size == (61, 45)
    with pytest.raises(ValueError, match=r"60x45 px, but .*model.onnx accepts only 61x45 px: .* --size 60x45"):
        model(torch.randn(1, 3, 60, 45))
    with pytest.raises(ValueError, match="give --size HEIGHTxWIDTH, or --mode dilation"):
        export_run(load_run(folder), folder / "other.onnx")


@pytest.mark.slow
def test_several_paths_and_a_decoder(make_run: MakeRun) -> None:
    folder = make_run(((2.0,), (0.5,)), paths=2, decoder=True)
    made = export_run(load_run(folder), folder / "model.pt2")  # As ONNX: see test_real_networks.
    assert_same(load_run(folder), made.path, (1, 50, 39), (2, 64, 64))


@pytest.mark.slow
@pytest.mark.parametrize("gates", ["image", "pixel"])
def test_gates(make_run: MakeRun, gates: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for size, sides in {"_TRACED": (34, 43), "_OTHER": (26, 29), "_WHOLE": (33, 49)}.items():
        monkeypatch.setattr(exporting, size, sides)
    folder = make_run((), gates=gates, search="none", aspp=(1, 3))
    saved = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    for name, tensor in saved["state_dict"].items():
        if ".gate." in name:
            tensor.normal_(generator=torch.Generator().manual_seed(1))
    torch.save(saved, folder / "checkpoints/last.ckpt")
    made = export_run(load_run(folder), folder / "model.onnx")
    assert made.size is None
    assert_same(load_run(folder), made.path, (1, 40, 71), (3, 57, 33))


@pytest.mark.slow
def test_torch_export(make_run: MakeRun) -> None:
    folder = make_run()
    main(["export", str(folder), "--out", str(folder / "model.pt2")])
    assert_same(load_run(folder), folder / "model.pt2", (1, 50, 39), (2, 64, 64))
    extra = {"rfield.json": ""}
    torch.export.load(folder / "model.pt2", extra_files=extra)
    assert json.loads(json.loads(extra["rfield.json"])["class_names"]) == list(SyntheticCues.class_names)


REAL = {
    "vgg16": ({"model": "largefov_vgg16", "dilation": 12, "mechanism": "dilation"}, ((3.0,),)),
    "efficientnet": (
        {"model": "efficientnet_lite0", "output_stride": 16, "paths": 2, "decoder": True, "mechanism": "dilation"},
        ((2.0,), (0.5,)),
    ),
    "resnet18": (
        {"model": "timm:resnet18", "output_stride": 16, "mechanism": "dilation", "rectangular": True},
        ((2, 4),),
    ),
    "resnet": ({"model": "timm:test_resnet", "output_stride": 16, "mechanism": "dilation"}, ((2,),)),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "suffix"),
    [("vgg16", ".onnx"), ("vgg16", ".pt2"), ("efficientnet", ".onnx"), ("resnet", ".onnx"), ("resnet18", ".pt2")],
)
def test_real_networks(name: str, suffix: str, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    # Export compares at three sizes, alone and in a batch, before it keeps a file; smaller ones here, for speed.
    for size, sides in {"_TRACED": (34, 43), "_OTHER": (26, 29), "_WHOLE": (33, 49)}.items():
        monkeypatch.setattr(exporting, size, sides)
    values, factors = REAL[name]
    folder = make_run(factors, weights="random", head_channels=16, **values)
    made = export_run(load_run(folder), folder / f"model{suffix}")
    assert made.size is None
    assert_same(load_run(folder), made.path, (1, 40, 71), (3, 57, 33))


@pytest.mark.slow
def test_sizes_that_pt2_cannot_hold(make_run: MakeRun) -> None:
    # Its pooling rounds sizes up by math.ceil, which torch.export's files cannot express.
    folder = make_run(model="timm:test_resnet", output_stride=16, weights="random")
    with pytest.raises(ValueError, match=r"cannot be saved as .pt2 \(.*ceil.*\); try .onnx or --size"):
        export_run(load_run(folder), folder / "model.pt2")
    assert not list(folder.glob("*model*"))


@pytest.mark.slow
def test_what_differs_is_not_kept(
    any_size: tuple[Path, Path],
    make_run: MakeRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = make_run(canvas=(80, 90), seed=1)
    monkeypatch.setattr(exporting, "write_onnx", lambda program, notes, path: shutil.copy(any_size[1], path))
    (tmp_path / "model.onnx").write_text("an earlier one")
    with pytest.raises(SystemExit) as caught:
        main(["export", str(other), "--out", str(tmp_path / "model.onnx")])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert "model.onnx was not kept: its logits differ from the network's by" in error
    assert error.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_text() == "an earlier one"


def test_nan_differs() -> None:
    images = [torch.zeros(1, 3, 2, 2)]
    assert compare(lambda x: x, lambda x: x * torch.nan, images)[0] == float("inf")
    assert compare(lambda x: x, lambda x: x[..., :1], images) == (float("inf"), 0.0)
    # A difference is one of the logits' range, the largest of any batch, and over 1 where there is no range.
    ramp = torch.arange(4.0).reshape(1, 2, 1, 2)
    assert compare(lambda x: x, lambda x: x + 0.75, [ramp, ramp * 2]) == (0.25, 1.0)
    assert compare(lambda x: x, lambda x: x + 0.75, [torch.zeros(1, 2, 1, 2)]) == (0.75, 1.0)
    assert compare(lambda x: x, lambda x: x.flip(1), [ramp, ramp]) == (pytest.approx(2 / 3), 0.0)


def test_the_exporters_are_silent(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    def speak() -> None:
        print("printed")
        logging.getLogger("torch.onnx").warning("logged")
        logging.getLogger("torch.onnx").error("an error")
        warnings.warn("warned", stacklevel=1)

    logging.disable(logging.DEBUG)
    try:
        with warnings.catch_warnings(record=True) as told, contextlib.suppress(KeyError):
            warnings.simplefilter("always")
            with exporting.quiet_exporters():
                speak()
                raise KeyError
        assert (capsys.readouterr().out, told, caplog.messages) == ("", [], ["an error"])
        assert logging.root.manager.disable == logging.DEBUG, "as before"
    finally:
        logging.disable(logging.NOTSET)


def test_what_is_compared_and_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    network = small_cnn(2, head_channels=4, regulate=False)
    shapes = lambda *given: [tuple(batch.shape) for batch in exporting._batches(*given)]  # noqa: E731
    assert shapes(network, None) == [(2, 3, 98, 131), (1, 3, 70, 61), (2, 3, 97, 129)]
    assert shapes(network, (5, 6)) == [(2, 3, 5, 6), (1, 3, 5, 6)]
    for least, other in (((61, 9), (70, 61)), ((62, 9), (71, 15)), ((9, 80), (18, 86))):
        network.min_size = least
        assert shapes(network, None)[1] == (1, 3, *other), "below the size that is padded to, and above"
    assert torch.equal(exporting._batches(network, None)[0], exporting._batches(network, None)[0])
    exporting._judge(Path("x"), 0.00099, 0.9991)
    for difference, agreement in ((0.001, 1.0), (0.0, 0.999), (torch.nan, 1.0)):
        with pytest.raises(ValueError, match=r"x was not kept: .* \(at most 0.001\), and .* \(more than 99.9%\)"):
            exporting._judge(Path("x"), difference, agreement)
    for text, dynamic, message in (("a\nb", True, "a); try --size HEIGHTxWIDTH"), ("", False, "RuntimeError)")):

        def export(*args: Any, text: str = text, **options: Any) -> None:
            raise RuntimeError(text)

        monkeypatch.setattr(torch.export, "export", export)
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            exporting._trace(network, torch.zeros(1), dynamic)
        assert str(caught.value) == f"the network cannot be traced by torch.export ({message}"


def test_images_for_calibration_are_spread_over_the_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "load_onnx", lambda source: SimpleNamespace(check_size=lambda image: None))
    data = SyntheticCues("val", size=(9, 7), distance=2, length=6)
    images = [evaluation_transform()(*data[index])[0].numpy()[None] for index in range(6)]
    for count, places in ((3, [0, 2, 5]), (9, [0, 1, 2, 3, 4, 5]), (1, [0])):
        chosen = list(int8._calibration(Path("model.onnx"), data, count))
        assert [next(i for i in range(6) if (images[i] == each).all()) for each in chosen] == places


@pytest.mark.slow
def test_predict_and_evaluate(any_size: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, path = any_size
    (tmp_path / "images").mkdir()
    for name, size in (("a", (70, 50)), ("b", (33, 101))):
        PIL.Image.effect_noise(size, 80).convert("RGB").save(tmp_path / f"images/{name}.png")
    for model, out in ((path, "deployed"), (folder, "eager")):
        main(["predict", str(model), str(tmp_path / "images"), "--out", str(tmp_path / out)])
    for name in ("a.png", "b.png", "a_overlay.jpg"):
        assert (tmp_path / "deployed" / name).read_bytes() == (tmp_path / "eager" / name).read_bytes()
    scores = []
    for model in (path, folder):
        main(["evaluate", str(model), "--data", "synthetic", "--json", str(tmp_path / "scores.json")])
        scores.append(json.loads((tmp_path / "scores.json").read_text())["miou"])
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["evaluate", str(path)])
    assert "give --data" in capsys.readouterr().err


@pytest.mark.slow
def test_refusals(one_size: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    PIL.Image.new("RGB", (45, 60)).save(tmp_path / "image.png")
    (tmp_path / "broken.onnx").write_text("no model")
    foreign = onnx.load(one_size[1])
    del foreign.metadata_props[:]
    onnx.save(foreign, tmp_path / "foreign.onnx")
    for model, error in (
        (one_size[1], "image.png: an image of 60x45 px, but"),
        (tmp_path / "broken.onnx", "cannot be read as an ONNX model"),
        (tmp_path / "foreign.onnx", "is not a file of rfield export"),
        (tmp_path / "no.onnx", "there is no model"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(["predict", str(model), str(tmp_path / "image.png"), "--out", str(tmp_path / "out")])
        assert caught.value.code == 2
        message = capsys.readouterr().err
        assert error in message
        assert message.count("\n") == 1


@pytest.mark.slow
def test_int8(any_size: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = any_size[0] / "data.yaml"
    data.write_text("format: synthetic\nlength: 8\n")
    words = ["--int8", "--data", str(data), "--calibration-images", "4"]
    main(["export", str(any_size[0]), "--out", str(tmp_path / "model.onnx"), *words])
    lines = capsys.readouterr().out.splitlines()
    assert "model.onnx takes images of any size; its logits before int8 differ" in lines[0]
    assert lines[1].startswith("mIoU 0.")
    assert "before int8" in lines[1]
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    nodes = {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= nodes
    network, model = load_run(any_size[0]).network, load_onnx(tmp_path / "model.onnx")
    assert model.class_names == SyntheticCues.class_names
    difference, agreement = compare(network, model, [torch.randn(2, 3, 97, 97), torch.randn(1, 3, 60, 50)])
    assert 1e-5 < difference < 0.2
    assert agreement > 0.8


@pytest.mark.slow
def test_int8_of_another_size(one_size: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"an image of 129x129 px, but .* accepts only 61x45 px"):
        quantise(one_size[1], tmp_path / "model.onnx", SyntheticCues("train"), 4)
    assert not list(tmp_path.iterdir())
