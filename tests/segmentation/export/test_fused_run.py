"""`rfield fuse`: a run folder becomes a plain one that predicts and scores the same."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rfield.layers import LearnedFactor
from rfield.segmentation.cli import main, parse
from rfield.segmentation.config.export import FuseConfig
from rfield.segmentation.config.train import TrainConfig
from rfield.segmentation.data import SyntheticCues
from rfield.segmentation.export.fused_run import fuse_run
from rfield.segmentation.models.saving import describe_network
from rfield.segmentation.runs import build_network, load_run
from rfield.surgery.fuse import dilations

IMAGE = torch.randn(1, 3, 61, 45, generator=torch.Generator().manual_seed(0))
MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """The folder of a run of a random network whose search has ended at other dilations than its start."""

    def make(factors: Any = ((4 / 7,),), snap: bool = True, **values: Any) -> Path:
        out = tmp_path / "run"
        (out / "checkpoints").mkdir(parents=True)
        given = {"model": "small_cnn", "dilation": 4, "head_channels": 8, "search": "sampled"}
        config = TrainConfig(data="synthetic", out=str(out), **given | values).resolved()
        torch.manual_seed(0)
        network = build_network(config, 4)
        layers = [module for module in network.modules() if isinstance(module, LearnedFactor)]
        for layer, factor in zip(layers, factors, strict=True):
            layer.set_factor(factor)
            if snap:
                layer.snap()
        (out / "config.yaml").write_text(yaml.safe_dump(config.plain()))
        classes = {"class_names": SyntheticCues.class_names, "palette": [(index, 0, 0) for index in range(4)]}
        (out / "classes.json").write_text(json.dumps(classes))
        state = {f"network.{key}": value for key, value in network.state_dict().items()}
        torch.save({"state_dict": state, "rfield": describe_network(network)}, out / "checkpoints/last.ckpt")
        return out

    return make


def assert_same(run: Path, plain: Path, close: bool = True) -> None:
    """Both folders' networks compute the same, and the second has no learned layer."""
    before, after = load_run(run), load_run(plain)
    assert not [module for module in after.network.modules() if isinstance(module, LearnedFactor)]
    assert after.config.search.search == "none"
    assert (after.class_names, after.palette) == (before.class_names, before.palette)
    with torch.no_grad():
        same = torch.allclose(before.network(IMAGE), after.network(IMAGE), rtol=0, atol=1e-5)
    assert same == close


def test_the_issue_s_commands() -> None:
    assert parse(shlex.split("fuse runs/msrc-from-24 --out plain")) == (
        "fuse",
        FuseConfig("runs/msrc-from-24", out="plain"),
    )
    words = "fuse runs/x --out plain --mode dilation --data voc:elsewhere --split test --checkpoint best"
    assert parse(shlex.split(words)) == (
        "fuse",
        FuseConfig("runs/x", out="plain", mode="dilation", data="voc:elsewhere", split="test", checkpoint="best"),
    )


PATHS = {"head.paths.0.layers.fc6": [2, 2]}


@pytest.mark.parametrize(
    ("factors", "values", "expected", "told"),
    [
        (((4 / 7,),), {}, {}, {"head.layers.fc6": "7"}),
        (((4 / 7,),), {"mechanism": "regulator", "search_share": 0.5, "factor": 2.0}, {}, {"head.layers": "7"}),
        (((2.0, 0.8),), {"rectangular": True}, {"head.layers.fc6": [2, 5]}, {"head.layers.fc6": "2x5"}),
        (((2.0,), (0.5,)), {"paths": 2}, PATHS, {f"head.paths.{n}.layers.fc6": str(2 + 6 * n) for n in (0, 1)}),
        (
            ((2.0,), (0.5,)),
            {"paths": 2, "mechanism": "regulator"},
            PATHS,
            {"head.paths.0.layers": "2", "head.paths.1.layers": "8"},
        ),
    ],
)
def test_a_search_that_has_ended(
    make_run: MakeRun,
    tmp_path: Path,
    factors: Any,
    values: dict[str, Any],
    expected: dict[str, list[int]],
    told: dict[str, str],
) -> None:
    run, plain = make_run(factors, **values), tmp_path / "plain"
    assert fuse_run(run, plain) == {name: f"dilation 4, learned {now}, now {now}" for name, now in told.items()}
    assert_same(run, plain)
    changed: dict[str, Any] = {"out": str(plain), "search": "none", "search_share": None, "factor": 1.0}
    largest = max(int(side) for now in told.values() for side in now.split("x"))
    config = load_run(run).config.replace(**changed, rectangular=False, dilation=largest)
    assert load_run(plain).config == config
    assert json.loads((plain / "fused.json").read_text())["fused"]["dilations"] == expected
    if not expected:
        assert load_run(plain).config.model.dilation == 7
        network = build_network(load_run(plain).config, 4)
        assert dilations(network)["head.layers.fc6"] == (7, 7)


@pytest.mark.parametrize("paths", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_regulator_that_is_not_snapped(make_run: MakeRun, tmp_path: Path, paths: int) -> None:
    run = make_run(((0.62,),) * paths, snap=False, mechanism="regulator", paths=paths)
    told = fuse_run(run, tmp_path / "exact", "resize")
    assert list(told.values()) == ["resized by 0.62"] * paths
    assert_same(run, tmp_path / "exact")
    fuse_run(run, tmp_path / "near", "dilation")
    assert_same(run, tmp_path / "near", close=False)
    assert load_run(tmp_path / "near").network.head.effective_dilation == (6.0, 6.0)
    fuse_run(tmp_path / "exact", tmp_path / "again")
    assert_same(run, tmp_path / "again")


@pytest.mark.parametrize("gates", ["image", "pixel"])
def test_gates(make_run: MakeRun, tmp_path: Path, gates: str) -> None:
    run, plain = make_run((), gates=gates, search="none", aspp=(3, 1)), tmp_path / "plain"
    assert fuse_run(run, plain) == {"head.layers.fc6": f"rates 3, 1, mixed for each {gates}"}
    assert_same(run, plain)
    assert load_run(plain).config.model.gates == gates
    saved = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    saved["state_dict"]["network.head.layers.fc6.gate." + ("3" if gates == "image" else "2") + ".bias"][1] += 100
    saved["state_dict"]["network.head.layers.fc6.mean_gates"].copy_(torch.tensor([0.0, 1.0]))
    torch.save(saved, run / "checkpoints/last.ckpt")
    assert fuse_run(run, plain) == {"head.layers.fc6": "one convolution of rate 1, which all images choose"}
    assert_same(run, plain)
    model = load_run(plain).config.model
    assert (model.gates, model.aspp, model.dilation, model.path_norm) == (None, None, 1, True)
    assert build_network(load_run(plain).config, 4).state_dict().keys() == load_run(plain).network.state_dict().keys()


@pytest.mark.slow
def test_command(make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, plain = make_run(), tmp_path / "plain"
    main(["fuse", str(run), "--out", str(plain)])
    assert capsys.readouterr().out == (
        f"head.layers.fc6: dilation 4, learned 7, now 7\nthe plain network is in {plain}\n"
    )
    main(["fuse", str(plain), "--out", str(plain)])
    assert capsys.readouterr().out == f"nothing was learned in this run\nthe plain network is in {plain}\n"
    main(["fuse", str(run), "--out", str(plain), "--data", "synthetic"])
    line = capsys.readouterr().out.splitlines()[1]
    assert line.startswith("mIoU 0.")
    assert line.endswith("+0.0000")
    main(["evaluate", str(plain)])
    assert "mIoU" in capsys.readouterr().out


def test_mistakes(make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run()
    for words, error in (
        ([str(run), "--out", str(run)], "holds a run that was trained: give another --out"),
        ([str(tmp_path / "no"), "--out", "plain"], "is not a run folder"),
        ([str(run), "--out", str(tmp_path / "plain"), "--data", "synthetic", "--split", "no"], "no"),
    ):
        with pytest.raises(SystemExit):
            main(["fuse", *words])
        assert error in capsys.readouterr().err
    assert not (tmp_path / "plain").exists()
    for name in ("checkpoints", "config.yaml"):
        (tmp_path / "half" / name).mkdir(parents=True)
        with pytest.raises(FileExistsError, match="half holds a run that was trained"):
            fuse_run(run, tmp_path / "half")
        (tmp_path / "half" / name).rmdir()
    fuse_run(run, tmp_path / "plain")
    fused = json.loads((tmp_path / "plain/fused.json").read_text())
    wrong = {"dilations": {"head.layers.fc9": [1, 1]}, "resizes": {}}
    (tmp_path / "plain/fused.json").write_text(json.dumps({**fused, "fused": wrong}))
    with pytest.raises(ValueError, match="describes no network that can be built: the model has no convolution"):
        load_run(tmp_path / "plain")
    (tmp_path / "plain/fused.json").write_text(json.dumps(wrong))
    with pytest.raises(ValueError, match=r"fused\.json was written by rfield 0\.1, "):
        load_run(tmp_path / "plain")
