"""`rfield inspect` from the command line: what it prints and writes."""

import csv
import json
import re
import sys
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
import yaml
from matplotlib.image import imread
from torch import Tensor, nn

from rfield.receptive_field.inspection import Inspection
from rfield.receptive_field.per_layer import LayerField
from rfield.segmentation.cli import main, parse
from rfield.segmentation.config.inspect import InspectConfig
from rfield.segmentation.config.train import TrainConfig
from rfield.segmentation.data import load_dataset
from rfield.segmentation.inspection.model_files import build_from_file
from rfield.segmentation.inspection.model_names import Source, _first_names, open_model
from rfield.segmentation.inspection.report import run_inspect
from rfield.segmentation.models import small_cnn
from rfield.segmentation.models.saving import describe_network
from rfield.segmentation.runs import build_network

NOTES = {"class_names": ["a", "b"], "palette": [[0, 0, 0], [1, 1, 1]], "size": None}


@pytest.fixture
def shared_run(tmp_path: Path) -> str:
    """A network of rfield with a field of 15 + 2 * 5 * 8 px, at stride 8."""
    torch.manual_seed(0)
    small_cnn(2, dilation=5, head_channels=16).save_pretrained(tmp_path / "model", config=NOTES)
    return str(tmp_path / "model")


def test_the_flags() -> None:
    assert parse(["inspect", "torchvision:deeplabv3_resnet50", "--size", "520x520", "--out", "inspect"]) == (
        "inspect",
        InspectConfig("torchvision:deeplabv3_resnet50", out="inspect", size=(520, 520)),
    )
    with pytest.raises(ValueError, match="count must not be negative"):
        InspectConfig("x", out="y", count=-1)
    with pytest.raises(ValueError, match="against_weights needs against"):
        InspectConfig("x", out="y", against_weights="default")


def test_what_is_printed_and_written(shared_run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep/out"
    main(["inspect", shared_run, "--size", "40x48", "--out", str(out), "--count", "2"])
    shown = capsys.readouterr().out
    content = json.loads((out / "inspect.json").read_text())
    assert (content["size"], content["images"], content["count"], content["measure"]) == ([40, 48], "random", 2, "luo")
    (network,) = content["networks"].values()
    field = network["layers"][-1]["field"]
    assert f"theoretical field {field[0]:g}x{field[1]:g} px, {field[0] / 40:.2f} x {field[1] / 48:.2f}" in shown
    assert [square["share"] for square in network["effective"]] == [0.2, 0.3, 0.5, 0.99]
    ratios = [square["area_ratio"] for square in network["effective"]]
    assert ratios == sorted(ratios)
    assert 0 < ratios[0] < ratios[3] <= 1
    assert f"20 % of the contributions come from {network['effective'][0]['side']}x" in shown
    assert network["advice"]
    for advice in network["advice"]:
        assert f"warning: {advice['text']}\n    {advice['code']}\n" in shown
    rows = list(csv.DictReader((out / "layers.csv").open()))
    assert [row["layer"] for row in rows] == [layer["name"] for layer in network["layers"]]
    assert float(rows[-1]["field_height"]) == field[0]
    assert float(rows[-1]["field_per_image_width"]) == pytest.approx(field[1] / 48, rel=1e-5)
    for row in rows:
        assert row["layer"] in shown
    assert imread(out / "effective.png").shape[2] == 4


def test_a_canvas_changes_no_stride(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = small_cnn(2, dilation=5, head_channels=4, min_size=400)
    monkeypatch.setattr(
        "rfield.segmentation.inspection.report.open_model", lambda *args, **options: Source("x", network, "w")
    )
    found = run_inspect(InspectConfig("x", out=str(tmp_path), count=0), lambda *step: None)["x"]
    assert {layer.stride[0] for layer in found.inspection.layers} == {1, 2, 4}
    assert network.min_size == (400, 400)


def test_before_and_after(shared_run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small_cnn(2, dilation=1, head_channels=16).save_pretrained(tmp_path / "narrow", config=NOTES)
    words = ["inspect", shared_run, "--size", "64", "--count", "2", "--against", str(tmp_path / "narrow")]
    main([*words, "--out", str(tmp_path / "out")])
    shown = capsys.readouterr().out
    assert f"before: {tmp_path / 'narrow'}, trained weights" in shown
    assert f"after: {shared_run}, trained weights" in shown
    networks = json.loads((tmp_path / "out/inspect.json").read_text())["networks"]
    assert list(networks) == ["before", "after"]
    before, after = (network["layers"][-1]["local"][0] for network in networks.values())
    assert after > before
    height, width, _ = imread(tmp_path / "out/effective.png").shape
    assert width > 1.3 * height


def test_weights_are_each_network_s_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []

    def opened(spec: str, weights: str | None, run_files: bool) -> Source:
        assert run_files
        asked.append((spec, weights))
        return Source(spec, nn.Conv2d(3, 1, 3), str(weights))

    monkeypatch.setattr("rfield.segmentation.inspection.report.open_model", opened)
    config = InspectConfig("smp:A", out=str(tmp_path), weights="a.pth", against="smp:A", count=0)
    assert {title: each.weights for title, each in run_inspect(config, lambda *step: None).items()} == {
        "before": "None",
        "after": "a.pth",
    }
    assert asked == [("smp:A", "a.pth"), ("smp:A", None)]


def test_a_run_is_compared_with_its_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wide, narrow = (nn.Conv2d(3, 2, 3, padding=d, dilation=d) for d in (8, 2))
    monkeypatch.setattr(
        "rfield.segmentation.inspection.report.open_model",
        lambda spec, weights, **options: Source(spec, narrow, "trained weights", start=wide),
    )
    found = run_inspect(InspectConfig("run", out=str(tmp_path), size=(33, 33), count=1), lambda done, total: None)
    assert {title: each.inspection.output.field for title, each in found.items()} == {
        "before": (17, 17),
        "after": (5, 5),
    }
    assert found["before"].name == "run, at its starting dilation"


def test_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    PIL.Image.new("RGB", (9, 7), (255, 0, 0)).save(tmp_path / "red.png")
    PIL.Image.new("L", (20, 30)).save(tmp_path / "grey.jpg")
    seen: list[Tensor] = []

    class Watched(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            seen.append(input.detach())
            return super().forward(input)

    monkeypatch.setattr(
        "rfield.segmentation.inspection.report.open_model",
        lambda *args, **options: Source("x", Watched(3, 1, 3, padding=1), "w"),
    )
    monkeypatch.setattr("rfield.segmentation.inspection.report.layer_receptive_fields", lambda model, size: _fields())
    steps: list[tuple[int, int]] = []
    config = InspectConfig("x", out=str(tmp_path / "out"), size=(12, 16), images=str(tmp_path))
    run_inspect(config, lambda *step: steps.append(step))
    assert [tuple(image.shape) for image in seen] == [(1, 3, 12, 16)] * 2
    assert seen[1][0, 0].min() > 2 > 0 > seen[1][0, 1].max()
    assert steps == [(0, 2), (1, 2), (2, 2)]
    (tmp_path / "red.png").write_text("no image")
    with pytest.raises(ValueError, match=r"red\.png cannot be read as an image"):
        run_inspect(config, lambda *step: None)


def _fields() -> list[Any]:
    from rfield.receptive_field.per_layer import layer_receptive_fields

    return layer_receptive_fields(nn.Conv2d(3, 1, 3))


def test_the_theoretical_field_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["inspect", "torchvision:squeezenet1_1", "--size", "65", "--count", "0", "--out", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "the whole image is seen through classifier.3 (AdaptiveAvgPool2d)" in shown
    assert "whole image" in shown
    assert "contributions" not in shown
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inspect.json", "layers.csv"]
    (network,) = json.loads((tmp_path / "inspect.json").read_text())["networks"].values()
    assert network["layers"][-1]["field"] == [None, None]
    assert network["whole_image_by"] == ["classifier.3"]


def test_without_a_folder_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["inspect", "torchvision:squeezenet1_1", "--size", "64", "--count", "1"])
    shown = capsys.readouterr().out
    assert "of the contributions come from" in shown
    assert "written" not in shown
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("torchvision:deeplab --out x", "torchvision:deeplab is not known; is it "),
        ("nowhere --out x", "nowhere is not a run folder: there is no such folder"),
        (
            "torchvision:squeezenet1_1 --out x --weights none.pth",
            'no weights file none.pth; give "default" or',
        ),
        ("torchvision:squeezenet1_1 --out x --images none.jpg", "no image found at none.jpg"),
        ("torchvision:squeezenet1_1 --out x --size 3", "cannot be run on images of 3x3 px"),
        ("torchvision:squeezenet1_1 --out x --size wide", "a size is HEIGHTxWIDTH"),
        ("torchvision:squeezenet1_1 --out x --measure mine", "measure"),
    ],
)
def test_mistakes_are_answered_in_one_line(
    words: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        main(["inspect", *words.split()])
    assert exit_.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    assert message in captured.err
    assert not list(tmp_path.iterdir())


def test_links_and_commands_of_the_page() -> None:
    page = Path(__file__).parents[3] / "docs/inspect.md"  # its blocks run in test_readme.py
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#]+)", text):
        assert link.startswith("https://") or (page.parent / link).exists(), link
    commands = [line.split()[1:] for line in text.splitlines() if line.startswith("rfield ")]
    assert [parse(words)[0] for words in commands] == ["inspect"] * 3


def test_up_to_three_layers_that_see_the_whole_image_are_named() -> None:
    inf = (float("inf"), float("inf"))
    pools = [LayerField(name, "Pool", None, None, inf, None, inf, inf, False, None) for name in "abcd"]
    conv = LayerField("conv", "Conv2d", (3, 3), (1, 1), (1, 1), (1, 1), (3, 3), (3, 3), True, None)
    for count, said in ((3, "a (Pool), b (Pool), c (Pool)"), (4, "a (Pool), b (Pool), c (Pool) and 1 more")):
        layers = [conv, *pools[:count], LayerField("output", "", None, None, inf, None, inf, (3, 3), False, None)]
        found = Inspection((6, 4), layers)
        assert found.whole_image == pools[:count]
        assert found.summary()[-2] == f"the whole image is seen through {said}"
        positions = "without that, each of the 6x4 positions of the coarsest map, one every 1 px, sees 3x3 px"
        assert found.summary()[-1] == positions
        assert "3x3 px, 0.50 x 0.75 of the image's sides" in found.summary()[0]
    assert Inspection((6, 4), [*pools, conv]).whole_image == []
    assert [_first_names(list("abcd"[:count])) for count in (3, 4)] == ["a, b, c", "a, b, c and 1 more"]


NET = """
import dataclasses
from pathlib import Path

from torch import nn

import blocks

Path("ran").write_text("")


@dataclasses.dataclass
class Needs:
    channels: int


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 2, 3, padding=40, dilation=40), blocks.last)


def build():
    return Net().train()


def broken():
    raise KeyError("channels")


number = 3
"""


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A user's file, beside a module that it imports; it leaves a file `ran` when it is run."""
    (tmp_path / "nets").mkdir()
    (tmp_path / "nets/net.py").write_text(NET)
    (tmp_path / "nets/blocks.py").write_text("from torch import nn\nlast = nn.Conv2d(2, 2, 1)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    monkeypatch.delitem(sys.modules, "blocks", raising=False)
    return "nets/net.py"


def test_models_in_a_file_of_one_s_own(net: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("Net", "build"):
        main(["inspect", f"{net}:{name}", "--size", "64", "--count", "1"])
        shown = capsys.readouterr().out
        assert f"{net}:{name}, its own weights\n" in shown
        assert "rfield.set_dilations(model, {'0': (" in shown
    state = build_from_file(net, "Net").state_dict()
    torch.save({key: torch.ones_like(value) for key, value in state.items()}, tmp_path / "weights.pth")
    source = open_model(f"{net}:build", "weights.pth", run_files=True)
    assert not source.model.training
    assert float(next(source.model.parameters()).detach().min()) == 1
    for name, message in {
        "Nett": "has no Nett; it has Net",
        "number": "is a int, and not a function, class or nn.Module",
        "Needs": r"needs channels: name a function that calls it, such as `def build\(\): return Needs",
        "broken": "cannot be called: KeyError: 'channels'",
        "blocks": "is a module, and not",
        "": "names no model: give nets/net.py:NAME",
    }.items():
        with pytest.raises(ValueError, match=message):
            build_from_file(net, name)
    with pytest.raises(ValueError, match="has no published weights"):
        open_model(f"{net}:Net", "default", run_files=True)
    (tmp_path / "nets/stops.py").write_text("import sys\nsys.exit('enough')")
    with pytest.raises(ValueError, match=r"stops\.py cannot be run: SystemExit: enough"):
        build_from_file("nets/stops.py", "Net")
    with pytest.raises(FileNotFoundError, match=r"there is no file nets/none\.py"):
        build_from_file("nets/none.py", "Net")


def test_only_the_command_line_runs_a_file(net: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = f"{net}:Net"
    configs = {"inspect": f"model: {spec}\n", "inspect torchvision:resnet18": f"against: {spec}\n"}
    for words, text in configs.items():
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(SystemExit):
            main([*words.split(), "--config", "config.yaml"])
        assert "would run that Python file: give it on the command line itself" in capsys.readouterr().err
    # The same words, typed, are accepted.
    assert parse(["inspect", spec, "--config", "config.yaml", "--against", spec])[1].against == spec
    with pytest.raises(ValueError, match="which only the command line itself may name"):
        open_model(spec)

    # A recipe of the Hub, and a run folder, name rfield's own networks alone.
    small_cnn(2, dilation=3, head_channels=4).save_pretrained(tmp_path / "shared", config=NOTES)
    recipe = json.loads((tmp_path / "shared/config.json").read_text())
    assert recipe["network"]["model"] == "small_cnn"
    recipe["network"]["model"] = spec
    (tmp_path / "shared/config.json").write_text(json.dumps(recipe))
    for name in ("hf:shared", "shared"):
        with pytest.raises(ValueError, match=r"net\.py:Net"):
            open_model(name, run_files=True)
    config = TrainConfig(data="synthetic", out="x", model="small_cnn", dilation=3, head_channels=2, search="none")
    network = build_network(config, 2)
    state = {f"network.{key}": value for key, value in network.state_dict().items()}
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(config.resolved().plain() | {"model": spec}))
    (tmp_path / "run/classes.json").write_text('{"class_names": ["a", "b"], "palette": [[0, 0, 0], [9, 9, 9]]}')
    description = describe_network(network)
    description["network"]["model"] = spec
    torch.save({"state_dict": state, "rfield": description}, tmp_path / "run/checkpoints/last.ckpt")
    with pytest.raises(ValueError, match=r"net\.py:Net"):
        open_model("run", run_files=True)
    assert not (tmp_path / "ran").exists()


def test_sizes_and_images_of_a_data_set(net: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["inspect", f"{net}:Net", "--data", "scenes", "--split", "val", "--count", "2", "--out", "out"])
    dataset = load_dataset("scenes", "val")
    size = [sorted(sides)[len(dataset) // 2] for sides in zip(*dataset.sizes(), strict=True)]
    content = json.loads(Path("out/inspect.json").read_text())
    assert (content["size"], content["images"], content["count"]) == (size, "scenes", 2)
    assert f"images of {size[0]}x{size[1]} px" in capsys.readouterr().out
    with pytest.raises(ValueError, match="data and images both name images"):
        InspectConfig("x", data="scenes", images="a.png")
