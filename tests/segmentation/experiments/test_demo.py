"""The demo; and the known-answer test: a known best receptive field is found, and a grid of fixed ones agrees."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rfield.receptive_field.theoretical import receptive_field_px
from rfield.segmentation.cli import main
from rfield.segmentation.config.experiments import DemoConfig
from rfield.segmentation.config.train import TrainConfig
from rfield.segmentation.data import SyntheticCues
from rfield.segmentation.experiments import demo as demo_module
from rfield.segmentation.experiments import run_demo
from rfield.segmentation.runs import load_config, load_run
from rfield.segmentation.training import Interrupted, read_factor_csv, train

pytestmark = pytest.mark.slow


def synthetic(out: Path, length: int, **values: Any) -> TrainConfig:
    """A short run on images whose best dilation is known: 6."""
    data = out.parent / "data.yaml"
    data.write_text(f"format: synthetic\nsize: [65, 65]\ndistance: 24\nlength: {length}\n")
    shared: dict[str, Any] = {
        "data": str(data),
        "out": str(out),
        "model": "small_cnn",
        "dropout": 0.0,
        "epochs": 4,
        "optimizer": "adamw",
        "lr": 3e-3,
        "head_lr_scale": 1.0,
        "head_channels": 32,
        "crop_size": (65, 65),
        "scale_range": (1, 1),
        "flip": False,
        "colour_jitter": 0,
        "workers": 0,
        "report": "none",
    }
    return TrainConfig(**shared | values)


def test_the_gradient_learns_the_known_receptive_field(tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(synthetic(out, 128, dilation=4, search="gradient", factor_lr=0.05, factor_start=0, batch_size=8))
    network = load_run(out).network
    assert 5.25 < network.head.effective_dilation[0] < 6.5
    assert SyntheticCues("val", (65, 65), distance=24).best_dilation(network.stride) == 6
    dilation = read_factor_csv(out / "factor.csv")["effective_dilation"]
    assert dilation[0] == pytest.approx(4, rel=0.1)
    assert abs(dilation[-20:] - 6).max() < abs(dilation[0] - 6) / 2


def test_the_demo_trains_before_and_after_and_says_so(tmp_path: Path) -> None:
    text = run_demo(DemoConfig(out=str(tmp_path), epochs=4))
    report = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "fixed at dilation 1, %" in report
    assert not (tmp_path / "before/report.html").exists()
    lines = []
    for name, folder in (("before", tmp_path / "before"), ("after", tmp_path)):
        network, scores = load_run(folder).network, json.loads((folder / "metrics.json").read_text())
        dilation, field = network.head.effective_dilation[0], receptive_field_px(network)[0]
        lines.append(f"{name}: dilation {dilation:.3g}, receptive field {field:.0f} px, mIoU {scores['miou']:.3f}")
    verdict = scores["search"]["verdict"]
    assert text.splitlines() == [
        *lines,
        f"the search's verdict: {verdict['kind']}: {verdict['reason']}",
        f"pictures: {tmp_path}/factor.png, {tmp_path}/panel.png, {tmp_path}/learned_field.png",
        f"all of it on one page: {tmp_path}/report.html",
    ]
    assert lines[0].startswith("before: dilation 1, receptive field 23 px, ")
    assert (scores["search"]["kind"], verdict["kind"]) == ("sampled", "not reliable")  # 4 epochs are too short.
    for name in ("factor.png", "panel.png", "learned_field.png"):
        assert (tmp_path / name).stat().st_size > 10_000
    assert load_config(tmp_path / "config.yaml").data.data == "scenes"
    main(["evaluate", str(tmp_path)])
    assert (tmp_path / "evaluation-val.json").is_file()


def test_an_earlier_demo_is_replaced_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class StartedError(Exception):
        pass

    def start(config: TrainConfig, progress: object) -> None:
        raise StartedError

    monkeypatch.setattr("rfield.segmentation.experiments.demo.train", start)
    (tmp_path / "checkpoints").mkdir()
    mine = [tmp_path / "checkpoints/mine.ckpt", tmp_path / "factor.png"]
    for path in mine:
        path.touch()
    with pytest.raises(StartedError):
        run_demo(DemoConfig(out=str(tmp_path)))
    assert all(path.exists() for path in mine), "a folder that holds no run keeps its files"

    (tmp_path / "config.yaml").write_text("data: voc:images\nout: x\n")
    with pytest.raises(FileExistsError, match="holds a run that is not a demo: give another --out"):
        run_demo(DemoConfig(out=str(tmp_path)))
    assert all(path.exists() for path in mine)

    (tmp_path / "config.yaml").write_text("data: scenes\nout: x\nmodel: small_cnn\n")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(StartedError):
        run_demo(DemoConfig(out=str(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_grid_of_fixed_dilations_is_best_at_the_known_one(tmp_path: Path) -> None:
    losses, scores = {}, {}
    for dilation in (3, 6, 12):
        out = tmp_path / f"d{dilation}"
        metrics = train(synthetic(out, 64, dilation=dilation, search="none", val_every=4))
        losses[dilation] = float(np.mean(read_factor_csv(out / "factor.csv")["loss"][-8:]))
        scores[dilation] = metrics["miou"]
    assert min(losses, key=losses.__getitem__) == 6
    assert max(scores, key=scores.__getitem__) == 6
    assert losses[6] < 0.8 * min(losses[3], losses[12])


def test_a_stop_says_that_the_next_demo_starts_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo has no --resume."""

    def stopped(config: TrainConfig, progress: object) -> None:
        raise Interrupted(2, "stopped by SIGINT; 5 steps are saved")

    monkeypatch.setattr(demo_module, "train", stopped)
    with pytest.raises(
        Interrupted, match=r"^stopped by SIGINT; 5 steps are saved, run the command again to start over$"
    ) as error:
        run_demo(DemoConfig(out=str(tmp_path)))
    assert error.value.signum == 2
