"""Output of the command line: help, hints for typos, and text on consoles of any encoding."""

import io
import os
import platform
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import rfield
from rfield.segmentation import doctor
from rfield.segmentation.cli import COMMANDS, main
from rfield.segmentation.config.experiments import DemoConfig
from rfield.segmentation.console import print_scores, show_progress
from rfield.segmentation.experiments import trials
from rfield.segmentation.training.callbacks import BarProgress, LineProgress

SCORES = {"miou": 0.5, "per_class": {"Straße": 0.5, "дом": None, "家": 1.0}, "pixel_accuracy": 0.9}


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_is_for_readers(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([*command, "--help"])
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    of_python = r"<|\b0x|None|object at|Literal|Optional|\bnull\b|: (str|bool|int|float|False)\b"
    assert not re.search(of_python, shown), shown


@pytest.mark.parametrize(
    ("words", "end"),
    [
        ("trian", r"; did you mean train\? \(see rfield --help\)"),
        ("Check_Data x", r"; did you mean check-data\? \(see rfield --help\)"),
        ("", r"rfield: give a command: demo, .*, check-data \(see rfield --help\)"),
        ("train --config nope.yaml", r"train: there is no config file \S*nope\.yaml \(see rfield train --help\)"),
        ("dance", r"'check-data'\) \(see rfield --help\)"),
        ("--verison", r"; did you mean --version\? \(see rfield --help\)"),
        ("train --data x --out y --epoch 3", r"--epoch 3; did you mean --epochs\? \(see rfield train --help\)"),
        ("train --dta=x --otu y", r"; did you mean --data and --out\? \(see rfield train --help\)"),
        ("train --data x --out y --crop_size 3", r"; did you mean --crop-size\? \(see rfield train --help\)"),
        ("train --data x --out y --no-flp", r"; did you mean --no-flip\? \(see rfield train --help\)"),
        ("predict x y --ouput z", r"; did you mean --out\? \(see rfield predict --help\)"),
        ("evaluate", r"required: run \(see rfield evaluate --help\)"),
        ("train --config config.yaml", r"'epoch'; did you mean --epochs\? \(see rfield train --help\)"),
        (
            "train --data x --out y --epochs many",
            r"train: epochs: expected a whole number, got many \(see rfield train --help\)",
        ),
        ("train --data x --out y --lr many", r"train: lr: expected a number, got many \(see rfield train --help\)"),
        ("train --data x --out y --epochs 0", r"epochs must be positive, got 0 \(see rfield train --help\)"),
        ("export x --out y.pt", r"got y\.pt \(see rfield export --help\)"),
        ("evaluate x --checkpoint first", r"expected one of 'last', 'best', got first \(see rfield evaluate --help\)"),
    ],
)
def test_mistakes_name_what_was_meant_and_the_right_help(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: str, end: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text("data: synthetic\nout: x\nepoch: 3\n")
    with pytest.raises(SystemExit) as exit_:
        main(shlex.split(words))
    assert exit_.value.code == 2
    assert re.search(end + "\n$", shown := capsys.readouterr().err), shown
    assert shown.count("\n") == 1


def test_the_system_s_errors_name_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "file"
    path.touch()
    with pytest.raises(SystemExit):
        main(["demo", "--out", str(path / "run")])
    assert capsys.readouterr().err == f"rfield demo: {path / 'run' / 'before'}: not a directory\n"


def test_a_path_that_the_locale_cannot_read_has_a_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(COMMANDS, "demo", (DemoConfig, lambda config: config.out.encode()))
    with pytest.raises(SystemExit):
        main(["demo", "--out", "runs/\udcd0"])
    assert capsys.readouterr().err.endswith(": set PYTHONUTF8=1\n")


def console(monkeypatch: pytest.MonkeyPatch, encoding: str) -> tuple[io.BytesIO, io.BytesIO]:
    """The bytes of stdout and stderr of a console of that encoding."""
    streams = io.BytesIO(), io.BytesIO()
    for name, stream in zip(("stdout", "stderr"), streams, strict=True):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(stream, encoding, write_through=True))
    return streams


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_names_that_the_console_cannot_show_fail_nothing(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    def show(config: DemoConfig) -> None:
        print_scores(SCORES)
        print("дом")
        with show_progress("дом") as progress:
            progress(1, 2)
        raise ValueError("дом \udcff is no folder")

    out, err = console(monkeypatch, encoding)
    monkeypatch.setitem(COMMANDS, "demo", (DemoConfig, show))
    with pytest.raises(SystemExit) as exit_:
        main(["demo"])
    assert exit_.value.code == 2
    shown = out.getvalue().decode(encoding)
    house = "дом" if encoding == "utf-8" else r"\u0434\u043e\u043c"
    assert f"{house} " in shown
    assert f"\n{house}\n" in shown
    assert ("Straße" if encoding != "ascii" else r"Stra\xdfe") in shown
    assert "mIoU 0.5000" in shown
    assert err.getvalue().decode(encoding) == f"rfield demo: {house} \\udcff is no folder\n"


def test_workers_of_a_sweep_show_such_names_too(monkeypatch: pytest.MonkeyPatch) -> None:
    out, _ = console(monkeypatch, "ascii")
    monkeypatch.setattr(trials, "_work", lambda config: print("see runs/дом/train.log"))
    config: Any = None
    trials._worker(config, 1)
    assert out.getvalue() == rb"see runs/\u0434\u043e\u043c/train.log" + b"\n"


def test_a_mistyped_word_that_the_console_cannot_show(monkeypatch: pytest.MonkeyPatch) -> None:
    _, err = console(monkeypatch, "cp1252")
    with pytest.raises(SystemExit) as exit_:
        main(["дом"])
    assert exit_.value.code == 2
    assert rb"invalid choice: '\u0434\u043e\u043c'" in err.getvalue()


def test_an_epoch_without_validation_shows_no_score(capsys: pytest.CaptureFixture[str]) -> None:
    trainer: Any = SimpleNamespace(current_epoch=0, max_epochs=2, callback_metrics={"loss": 1.0, "miou": 0.5})
    module: Any = None
    progress = LineProgress()
    progress.on_validation_end(trainer, module)
    progress.on_train_epoch_end(trainer, module)
    trainer.current_epoch = 1
    progress.on_train_epoch_end(trainer, module)
    assert capsys.readouterr().out == "epoch 1/2: loss 1, miou 0.5\nepoch 2/2: loss 1\n"


def test_the_bar_shows_no_old_score(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer: Any = SimpleNamespace(current_epoch=0, progress_bar_metrics={"loss": 1.0, "miou": 0.5}, loggers=[])
    module: Any = None
    bar = BarProgress()
    monkeypatch.setattr("lightning.pytorch.callbacks.RichProgressBar.on_validation_end", lambda *args: None)
    bar.on_validation_end(trainer, module)
    assert set(bar.get_metrics(trainer, module)) == {"loss", "miou"}
    trainer.current_epoch = 1
    assert set(bar.get_metrics(trainer, module)) == {"loss"}


def test_doctor_describes_processors_and_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_file(*args: Any, **options: Any) -> None:
        raise OSError

    cpus = "processor : 0\nmodel name\t: Fast: 3 GHz \nmodel name\t: Slow\n"
    monkeypatch.setattr(doctor, "open", lambda *args, **options: io.StringIO(cpus), raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 4, 7})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU{index}")
    memory = lambda index: SimpleNamespace(total_memory=(index + 1) * 2**33)  # noqa: E731
    monkeypatch.setattr(torch.cuda, "get_device_properties", memory)
    monkeypatch.setattr(torch.version, "cuda", "12.1")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    monkeypatch.setattr(doctor, "_OPTIONAL", ("a-package-that-nobody-has", "numpy"))
    lines = doctor.environment_report().splitlines()
    assert lines[0] == f"{'rfield':<25}  {rfield.__version__}"
    assert f"{'a-package-that-nobody-has':<25}  not installed" in lines
    found = dict(line.split(maxsplit=1) for line in lines)
    assert found["processor"].startswith("Fast: 3 GHz, 3 cores, ")
    assert found["GPU"] == "GPU0, 8 GiB, CUDA 12.1; GPU1, 16 GiB, CUDA 12.1; Apple MPS"
    assert "MKL_NUM_THREADS" not in found
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "open", no_file, raising=False)
    for name, said in (("x86", "x86"), ("", "unknown")):
        monkeypatch.setattr(platform, "processor", lambda name=name: name)
        found = dict(line.split(maxsplit=1) for line in doctor.environment_report().splitlines())
        assert (found["processor"].split(",")[0], found["GPU"]) == (said, "none")
