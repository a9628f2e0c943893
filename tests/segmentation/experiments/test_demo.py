"""The known-answer test: a receptive field whose best value is known is found, and a grid of fixed ones agrees."""

from pathlib import Path

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


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A short demo from dilation 8: its run folder and what it says."""
    out = tmp_path_factory.mktemp("demo") / "run"
    return out, run_demo(DemoConfig(out=str(out), epochs=4))


def test_the_demo_learns_the_known_receptive_field(demo: tuple[Path, str]) -> None:
    network = load_run(demo[0]).network
    assert 10.5 < network.head.effective_dilation[0] < 13
    assert SyntheticCues("val").best_dilation(network.stride) == 12
    dilation = read_factor_csv(demo[0] / "factor.csv")["effective_dilation"]
    assert dilation[0] == pytest.approx(8, rel=0.1)
    assert abs(dilation[-20:] - 12).max() < abs(dilation[0] - 12) / 2


def test_the_demo_says_start_learned_and_known_best(demo: tuple[Path, str]) -> None:
    out, text = demo
    network = load_run(out).network
    learned, field = network.head.effective_dilation[0], receptive_field_px(network)[0]
    assert text.splitlines() == [
        "start: effective dilation 8.00, receptive field 79 px",
        f"learned: effective dilation {learned:.2f}, receptive field {field:.0f} px",
        "known best: effective dilation 12.00, receptive field 111 px",
        f"pictures: {out}/factor.png, {out}/panel.png, {out}/learned_field.png",
    ]


def test_the_demo_leaves_an_ordinary_run_with_pictures(demo: tuple[Path, str]) -> None:
    out, _ = demo
    for name in ("factor.png", "panel.png", "learned_field.png"):
        assert (out / name).stat().st_size > 10_000
    assert load_config(out / "config.yaml").data.data == "synthetic"
    main(["evaluate", str(out), "--split", "test"])
    assert (out / "evaluation-test.json").is_file()


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

    (tmp_path / "config.yaml").write_text("data: synthetic\nout: x\nmodel: small_cnn\n")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(StartedError):
        run_demo(DemoConfig(out=str(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_grid_of_fixed_dilations_is_best_at_the_known_one(tmp_path: Path) -> None:
    data = tmp_path / "data.yaml"
    data.write_text("format: synthetic\nlength: 64\n")
    losses, scores = {}, {}
    for dilation in (6, 12, 24):
        out = tmp_path / f"d{dilation}"
        metrics = train(
            TrainConfig(
                data=str(data),
                out=str(out),
                model="small_cnn",
                dilation=dilation,
                dropout=0.0,
                search="none",
                epochs=4,
                val_every=4,
                optimizer="adamw",
                lr=3e-3,
                head_lr_scale=1.0,
                head_channels=32,
                crop_size=(129, 129),
                scale_range=(1, 1),
                flip=False,
                colour_jitter=0,
                workers=0,
            )
        )
        losses[dilation] = float(np.mean(read_factor_csv(out / "factor.csv")["loss"][-8:]))
        scores[dilation] = metrics["miou"]
    assert min(losses, key=losses.__getitem__) == 12
    assert max(scores, key=scores.__getitem__) == 12
    assert losses[12] < 0.8 * min(losses[6], losses[24])


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
