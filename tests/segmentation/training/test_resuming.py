"""Runs that are the same: repeated, resumed after any end, in two processes; and runs that are no continuation."""

import csv
import json
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rfield.segmentation.cli import main
from rfield.segmentation.config.train import TrainConfig
from rfield.segmentation.files.lock import only_writer
from rfield.segmentation.runs import build_network, load_config
from rfield.segmentation.training import ParsingModule, train

pytestmark = pytest.mark.slow

STEPS_AN_EPOCH = 3
Make = Callable[..., TrainConfig]
Forked = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(autouse=True)
def _restored_signals() -> Iterator[None]:
    """Lightning ignores SIGINT for good after a KeyboardInterrupt."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


def rows_of(config: TrainConfig) -> list[list[str]]:
    with (Path(config.run.out) / "factor.csv").open(newline="") as file:
        return list(csv.reader(file))


def checkpoint_of(config: TrainConfig, name: str = "last") -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(Path(config.run.out) / f"checkpoints/{name}.ckpt", weights_only=True)
    return checkpoint


def metrics_of(config: TrainConfig) -> dict[str, Any]:
    metrics: dict[str, Any] = json.loads((Path(config.run.out) / "metrics.json").read_text())
    assert metrics.pop("train_seconds") > 0
    assert metrics.get("search", {"seconds": 0}).pop("seconds") >= 0
    return metrics


def assert_same_run(one: TrainConfig, other: TrainConfig) -> None:
    """The same numbers everywhere."""
    assert rows_of(one) == rows_of(other)
    assert metrics_of(one) == metrics_of(other)
    for name in ("last", "best"):
        weights, other_weights = (checkpoint_of(config, name)["state_dict"] for config in (one, other))
        assert weights.keys() == other_weights.keys()
        for key, weight in weights.items():
            assert torch.equal(weight, other_weights[key]), key


def stop_at(patch: pytest.MonkeyPatch, step: int, error: type[BaseException]) -> None:
    """Has the training step raise an error after so many steps."""
    real = ParsingModule.training_step

    def failing(self: ParsingModule, batch: Any, batch_index: int) -> Any:
        if self.global_step == step:
            raise error
        return real(self, batch, batch_index)

    patch.setattr(ParsingModule, "training_step", failing)


def test_the_written_config_gives_the_same_run(make: Make) -> None:
    config = make(epochs=1, freeze_backbone=True)
    train(config)
    other = config.replace(out=f"{config.run.out}-again")
    main(["train", "--config", f"{config.run.out}/config.yaml", "--out", other.run.out])
    assert_same_run(config, other)


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"workers": 1}, RuntimeError),
        ({"freeze_backbone": True}, KeyboardInterrupt),
        ({"val_every": 2, "optimizer": "adamw", "loss_resolution": "image", "factor_start": 2}, RuntimeError),
        ({"search": "spsa", "freeze_backbone": True}, RuntimeError),
        ({"search": "spsa", "search_share": 0.4, "mechanism": "regulator"}, RuntimeError),
        ({"search": "sampled", "search_share": 0.6, "freeze_backbone": True}, RuntimeError),
        ({"search": "sampled", "search_share": 0.3, "workers": 1, "paths": "auto"}, RuntimeError),
    ],
)
def test_an_interrupted_run_goes_on_exactly(
    make: Make, whole_run: Make, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], error: type[BaseException]
) -> None:
    whole, cut = whole_run(dropout=0.5, **values), make("cut", dropout=0.5, **values)
    with monkeypatch.context() as patch:
        stop_at(patch, STEPS_AN_EPOCH + 2, error)
        with pytest.raises(error):
            train(cut)
    assert not (Path(cut.run.out) / "metrics.json").exists()
    # What a kill in the midst of writing leaves: steps of the unfinished epoch, and half a row.
    with (Path(cut.run.out) / "factor.csv").open("a") as file:
        file.write("4,1,3,39,0,0,1\n5,1,3,39,0,0,1\n1,1,3")
    train(cut.replace(resume=True))
    assert_same_run(whole, cut)


KILLED = """
import os, signal, sys
from rfield.segmentation.cli import main
from rfield.segmentation.training import ParsingModule

real = ParsingModule.training_step

def training_step(self, batch, batch_index):
    if self.global_step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, batch, batch_index)

ParsingModule.training_step = training_step
main(sys.argv[1:])
"""


def test_a_killed_run_goes_on_exactly(make: Make, whole_run: Make, forked: Forked) -> None:
    whole, cut = whole_run(dropout=0.5), make("cut", dropout=0.5, workers=1)
    config = Path(cut.run.out).with_suffix(".yaml")
    config.write_text(yaml.safe_dump(cut.plain()))
    assert forked(KILLED, "train", "--config", str(config)).returncode == -signal.SIGKILL
    main(["train", "--config", str(config), "--resume"])
    assert_same_run(whole, cut)


def test_a_run_that_never_ended_an_epoch_begins_anew(
    make: Make, whole_run: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = whole_run(epochs=1), make("cut", epochs=1)
    with monkeypatch.context() as patch:
        stop_at(patch, 1, RuntimeError)
        with pytest.raises(RuntimeError):
            train(cut)
    train(cut.replace(resume=True))
    assert_same_run(whole, cut)


def test_resuming_a_finished_run_just_finishes(make: Make) -> None:
    for config in (make("a", epochs=1), make("b", max_steps=STEPS_AN_EPOCH + 1)):
        first = train(config)
        rows = rows_of(config)
        again = train(config.replace(resume=True))
        assert rows_of(config) == rows
        for metrics in (first, again):
            metrics.pop("train_seconds")
            metrics["search"].pop("seconds")
        assert again == first


def test_resuming_where_there_is_no_run_begins_one(make: Make) -> None:
    config = make(epochs=1)
    train(config.replace(resume=True))
    assert len(rows_of(config)) == 1 + STEPS_AN_EPOCH


def test_other_settings_are_no_continuation(make: Make) -> None:
    config = make(epochs=1)
    train(config)
    changed = config.replace(resume=True, seed=1, crop_size=(17, 17), workers=1, cache=None)
    message = r"other settings: crop_size: \[33, 33\] -> \[17, 17\]; seed: 0 -> 1$"
    with pytest.raises(ValueError, match=message):
        train(changed)
    assert load_config(Path(config.run.out) / "config.yaml") == config.resolved()


def test_a_run_is_never_overwritten(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    config = make(epochs=1)
    train(config)
    before = {path: path.read_bytes() for path in Path(config.run.out).rglob("*") if path.is_file()}
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main(["train", "--config", f"{config.run.out}/config.yaml"])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert (
        error == f"rfield train: {config.run.out} holds a run already: give --resume to continue it, or another --out\n"
    )
    assert {path: path.read_bytes() for path in Path(config.run.out).rglob("*") if path.is_file()} == before
    with only_writer(Path(config.run.out)), pytest.raises(SystemExit) as exit_:
        main(["train", "--config", f"{config.run.out}/config.yaml", "--resume"])
    assert exit_.value.code == 2
    error = capsys.readouterr().err.splitlines()
    assert re.fullmatch(rf"rfield train: {config.run.out} is being written by process {os.getpid()}: .*", error[-1])
    assert {path: path.read_bytes() for path in Path(config.run.out).rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("damage", ["cut", "garbage", "other"])
def test_a_damaged_checkpoint_is_answered_with_one_line(
    make: Make, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    config = make(epochs=1)
    train(config)
    path = Path(config.run.out) / "checkpoints/last.ckpt"
    if damage == "cut":
        os.truncate(path, path.stat().st_size // 2)
    elif damage == "garbage":
        path.write_bytes(b"garbage" * 99)
    else:
        saved = torch.load(path, weights_only=True)
        torch.save({**saved, "state_dict": {"network.head.nonsense": torch.zeros(1)}}, path)
    capsys.readouterr()
    for words in (["evaluate", config.run.out], ["train", "--config", f"{config.run.out}/config.yaml", "--resume"]):
        with pytest.raises(SystemExit) as exit_:
            main(words)
        assert exit_.value.code == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "last.ckpt is damaged or not a checkpoint of this run" in error


def test_runs_repeat_themselves_and_seeds_differ(make: Make) -> None:
    one, same, other = make("one", epochs=1), make("same", epochs=1, workers=1), make("other", epochs=1, seed=1)
    for config in (one, same, other):
        train(config)
    assert_same_run(one, same)
    assert rows_of(one) != rows_of(other)


def test_two_processes_are_one_run(make: Make, forked: Forked) -> None:
    """Lightning starts the second, as the command line has started the first."""
    values: dict[str, Any] = {
        "dropout": 0.0,
        "scale_range": (1, 1),
        "crop_size": (36, 41),
        "epochs": 2,
        "lr": 0.1,
        "head_lr_scale": 1.0,
    }
    alone, both = make("alone", **values), make("both", devices=2, **values)
    train(alone)
    config = Path(both.run.out).with_suffix(".yaml")
    config.write_text(yaml.safe_dump(both.plain()))
    code = "import runpy; runpy.run_module('rfield', run_name='__main__', alter_sys=True)"
    done = forked(code, "train", "--config", str(config))
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.count("mIoU") == 1, "the first process alone reports"
    assert len(rows_of(both)) == 1 + 2 * STEPS_AN_EPOCH
    torch.manual_seed(alone.run.seed)
    start = build_network(alone.resolved(), 4).state_dict()
    ends = [checkpoint_of(config)["state_dict"] for config in (alone, both)]
    for key in (key for key, weight in start.items() if weight.dim() == 4):
        one, two = (end[f"network.{key}"] - start[key] for end in ends)
        assert (one - two).norm() < 0.01 * one.norm(), key
    assert metrics_of(both)["miou"] == pytest.approx(metrics_of(alone)["miou"], abs=1e-3)
