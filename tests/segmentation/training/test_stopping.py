"""Trainings that end early: by a signal, by a loss that is no number, by a full disk."""

import csv
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rfield.segmentation.cli import main
from rfield.segmentation.config.train import TrainConfig
from rfield.segmentation.data import AugmentedDataset
from rfield.segmentation.runs import load_run
from rfield.segmentation.training import Interrupted, ParsingModule, train
from rfield.segmentation.training.stopping import leave_signals

pytestmark = pytest.mark.slow

Make = Callable[..., TrainConfig]


OWN = {"dropout": 0.5, "val_every": 1}


@pytest.fixture
def make(make: Make) -> Make:
    """Those of conftest.py with dropout, also where the backbone is frozen."""
    return lambda out="run", **values: make(out, **OWN | values)


@pytest.fixture
def whole_run(whole_run: Make) -> Make:
    return lambda **values: whole_run(**OWN | values)


def results(config: TrainConfig) -> tuple[Any, ...]:
    """Everything that a run says, but for the time it took."""
    out = Path(config.run.out)
    metrics = json.loads((out / "metrics.json").read_text())
    del metrics["train_seconds"]
    metrics.get("search", {"seconds": 0}).pop("seconds")
    rows = list(csv.reader((out / "factor.csv").open(newline="")))
    weights = [
        {key: value.numpy().tobytes() for key, value in torch.load(path, weights_only=True)["state_dict"].items()}
        for path in (out / "checkpoints/last.ckpt", out / "checkpoints/best.ckpt")
    ]
    return metrics, rows, weights


def logged(config: TrainConfig) -> dict[int, float]:
    """The scores in a run's logs, by the step that these count; a resumed run goes on in another file."""
    scores = {}
    for log in sorted((Path(config.run.out) / "logs/csv").glob("*/metrics.csv")):
        with log.open(newline="") as file:
            scores |= {int(row["step"]): float(row["miou"]) for row in csv.DictReader(file) if row.get("miou")}
    return scores


def before_step(patch: pytest.MonkeyPatch, step: int, act: Callable[[ParsingModule], Any]) -> None:
    """Has something happen once in a step, counted from 1."""
    real = ParsingModule.training_step
    done = []

    def training_step(self: ParsingModule, batch: Any, batch_index: int) -> Any:
        loss = real(self, batch, batch_index)
        if self.global_step == step - 1 and not done:
            done.append(step)
            changed = act(self)
            loss = loss if changed is None else loss * changed
            self.step_loss = loss.detach()
        return loss

    patch.setattr(ParsingModule, "training_step", training_step)


@pytest.mark.parametrize(
    ("step", "signum", "values"),
    [
        (1, signal.SIGTERM, {"search": "none"}),
        (3, signal.SIGINT, {}),
        (4, signal.SIGINT, {"freeze_backbone": True}),
        (5, signal.SIGTERM, {"workers": 1, "search": "spsa", "val_every": 2}),
        (5, signal.SIGTERM, {"search": "sampled", "search_share": 0.55, "freeze_backbone": True}),
        (7, signal.SIGTERM, {"search": "sampled", "search_share": 0.55}),
        (8, signal.SIGTERM, {"freeze_backbone": True, "val_every": 2}),
        (5, signal.SIGTERM, {"model": "timm:lcnet_035", "output_stride": 32, "epochs": 2}),
    ],
)
def test_a_signal_saves_the_step_and_the_run_goes_on_exactly(
    make: Make, whole_run: Make, step: int, signum: int, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = whole_run(**values), make("cut", **values)
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        before_step(patch, step, lambda module: os.kill(os.getpid(), signum))
        with pytest.raises(Interrupted, match=f"SIG.*; {step} steps? (is|are) saved") as stopped:
            train(cut)
    assert stopped.value.signum == signum
    assert handlers == [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    assert not (Path(cut.run.out) / "metrics.json").exists()
    assert load_run(cut.run.out).network is not None
    train(cut.replace(resume=True))
    assert logged(cut) == logged(whole)
    assert results(cut) == results(whole)


def test_a_run_stopped_at_every_step_goes_on_exactly(
    make: Make, whole_run: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = whole_run(search="spsa", epochs=2), make("cut", search="spsa", epochs=2, resume=True)
    for step in range(1, 7):
        with monkeypatch.context() as patch:
            before_step(patch, step, lambda module: os.kill(os.getpid(), signal.SIGTERM))
            with pytest.raises(Interrupted, match=f"{step} steps? (is|are) saved"):
                train(cut)
    train(cut)
    assert results(cut) == results(whole)


def test_a_signal_at_a_step_limit_and_a_second_one(
    make: Make, whole_run: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = whole_run(max_steps=4), make("cut", max_steps=4)
    with monkeypatch.context() as patch:
        before_step(patch, 4, lambda module: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Interrupted, match="4 steps are saved"):
            train(cut)
    assert logged(cut) == logged(whole) != {}, "what ends the run comes first"
    train(cut.replace(resume=True))
    assert results(cut) == results(whole)
    assert logged(cut) == logged(whole)

    def twice(module: ParsingModule) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    def again(module: ParsingModule) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)

    patient, impatient = make("patient", search="none", epochs=1), make("impatient")
    with monkeypatch.context() as patch:
        before_step(patch, 2, again)
        with pytest.raises(Interrupted, match="stopped by SIGTERM; 2 steps are saved"):
            train(patient)
    before_step(monkeypatch, 2, twice)
    with pytest.raises(KeyboardInterrupt) as stopped:
        train(impatient)
    assert type(stopped.value) is KeyboardInterrupt


def load_for_ever(ready: Event) -> None:
    leave_signals(0)
    ready.set()
    while True:
        time.sleep(1)


def test_a_worker_ends_when_its_parent_says_so_and_not_before() -> None:
    fork = multiprocessing.get_context("fork")
    ready = fork.Event()
    worker = fork.Process(target=load_for_ever, args=(ready,), daemon=True)
    worker.start()
    assert ready.wait(30)
    for signum in (signal.SIGTERM, signal.SIGINT):  # from another process
        subprocess.run([sys.executable, "-c", f"import os; os.kill({worker.pid}, {int(signum)})"], check=True)
    worker.join(0.5)
    assert worker.is_alive()
    worker.terminate()
    worker.join(30)
    assert worker.exitcode == 0


STOPPED = """
import os, signal, sys
from rfield.segmentation.cli import main
from rfield.segmentation.training import ParsingModule

real = ParsingModule.training_step

def training_step(self, batch, batch_index):
    if self.global_step == 4:
        os.kill(os.getpid(), signal.SIGTERM)
    return real(self, batch, batch_index)

ParsingModule.training_step = training_step
main(sys.argv[1:])
"""


def test_the_command_ends_with_one_line(
    make: Make, forked: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make()
    path = Path(config.run.out).with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config.plain()))
    done = forked(STOPPED, "train", "--config", str(path))
    assert done.returncode == 143
    said = "rfield train: stopped by {}; {} steps are saved, --resume continues from there\n"
    assert done.stderr == said.format("SIGTERM", 5)
    before_step(monkeypatch, 8, lambda module: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--config", str(path), "--resume"])
    assert stopped.value.code == 130
    assert capsys.readouterr().err == said.format("SIGINT", 8)


@pytest.mark.parametrize(("value", "step"), [(float("nan"), 1), (float("inf"), 5), (float("nan"), 6)])
def test_a_loss_that_is_no_number_ends_the_run(
    make: Make,
    whole_run: Make,
    value: float,
    step: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole, bad = whole_run(), make("bad")
    capsys.readouterr()
    path = Path(bad.run.out).with_suffix(".yaml")
    path.write_text(yaml.safe_dump(bad.plain()))
    with monkeypatch.context() as patch:
        before_step(patch, step, lambda module: value)
        with pytest.raises(SystemExit) as stopped:
            main(["train", "--config", str(path)])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"step {step}: the loss is {value}, with factor " in error
    assert f"The state before this step is in {bad.run.out}/checkpoints/last.ckpt" in error
    # What it says of the files is what it trained on.
    seen = sorted(name for name in error.replace(",", " ").replace(".", " ").split() if name.startswith("train_0"))
    assert len(set(seen)) == 2
    # Where the cause is gone, the run goes on as if nothing had been.
    train(bad.replace(resume=True))
    assert results(bad) == results(whole)
    assert list(logged(bad)) == [2, 5, 8]
    assert logged(bad) == logged(whole)


def test_the_files_of_a_bad_batch_are_its_own(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    real = AugmentedDataset.__getitem__

    def poisoned(self: AugmentedDataset, key: tuple[int, int]) -> Any:
        image, mask = real(self, key)
        return (image * float("nan") if key == (1, 4) else image), mask

    monkeypatch.setattr(AugmentedDataset, "__getitem__", poisoned)
    config = make(batch_size=1, search="none", head_channels=4)
    with pytest.raises(ValueError, match=r"on train_00004\. The state before"):
        train(config)
    # Also where the run has been resumed inside the epoch.
    with pytest.raises(ValueError, match=r"on train_00004\. The state before"):
        train(config.replace(resume=True))


def test_a_gradient_that_is_no_number_does_not_reach_the_weights(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    real = ParsingModule.training_step

    def training_step(self: ParsingModule, batch: Any, batch_index: int) -> Any:
        loss = real(self, batch, batch_index)
        if self.global_step == 4:
            loss.register_hook(lambda grad: grad * float("nan"))
        return loss

    monkeypatch.setattr(ParsingModule, "training_step", training_step)
    config = make()
    with pytest.raises(ValueError, match=r"step 5: the gradient of the loss [\d.]+ is not finite.*The state before"):
        train(config)
    assert all(weight.isfinite().all() for weight in load_run(config.run.out).network.parameters())


@pytest.mark.parametrize("step", [2, 5])
def test_weights_that_are_no_numbers_are_not_saved(make: Make, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(module: ParsingModule) -> float:
        next(module.network.backbone.parameters()).data.fill_(float("nan"))
        return float("nan")

    before_step(monkeypatch, step, spoil)
    config = make()
    kept = "nothing was saved before" if step == 2 else "the last good state is that of .*last.ckpt"
    with pytest.raises(ValueError, match=f"The weights were not finite before it.*{kept}"):
        train(config)
    if step == 5:
        assert torch.load(Path(config.run.out) / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 3


def test_a_torn_last_checkpoint_and_the_one_before(
    make: Make, whole_run: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, cut = whole_run(), make("cut")
    with monkeypatch.context() as patch:
        before_step(patch, 8, lambda module: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Interrupted):
            train(cut)
    last = Path(cut.run.out) / "checkpoints/last.ckpt"
    os.truncate(last, last.stat().st_size - 100)
    capsys.readouterr()
    load_run(cut.run.out)
    assert "last.ckpt cannot be used" in capsys.readouterr().err
    train(cut.replace(resume=True))
    assert capsys.readouterr().err.count("the checkpoint before it is used") == 1
    assert results(cut) == results(whole)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            f"checkpoints/.last.{os.getpid()}.partial.ckpt",
            "last.ckpt cannot be written: No space left on device; the file that was there is untouched: make room",
        ),
        ("factor.csv", "factor.csv cannot be written: No space left on device; the checkpoints are untouched: make"),
    ],
    ids=["checkpoint", "log"],
)
def test_a_full_disk_is_one_line_and_costs_no_checkpoint(
    make: Make,
    whole_run: Make,
    name: str,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole, cut = whole_run(), make("cut")

    def fill(module: ParsingModule) -> None:
        place = Path(cut.run.out) / name
        if place.exists():
            place.rename(place.with_name("aside"))
        place.symlink_to("/dev/full")

    path = Path(cut.run.out).with_suffix(".yaml")
    path.write_text(yaml.safe_dump(cut.plain()))
    capsys.readouterr()
    with monkeypatch.context() as patch:
        before_step(patch, 5, fill)
        with pytest.raises(SystemExit) as stopped:
            main(["train", "--config", str(path)])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert words in error
    if (Path(cut.run.out) / "aside").exists():
        (Path(cut.run.out) / "aside").replace(Path(cut.run.out) / name)
    train(cut.replace(resume=True))
    assert results(cut) == results(whole)
