"""`rfield tune --model FILE.py:NAME`: the page and the file that it writes, and what it refuses."""

import json
import sys
from pathlib import Path

import pytest

from rfield.segmentation.cli import main

NET = """
from torch import nn


def build(classes=4):
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=4, padding=9, dilation=9), nn.ReLU(), nn.Conv2d(8, classes, 1))


def other():
    return build(7)
"""
WORDS = ["tune", "--data", "synthetic", "--out", "tuned", "--model", "net.py:build", "--crop-size", "64"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "net.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])


def answered(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit):
        main([*WORDS, *words])
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


@pytest.mark.slow
def test_the_answer(capsys: pytest.CaptureFixture[str]) -> None:
    main([*WORDS, "--max-steps", "4", "--seeds", "1,0", "--select", "0", "--workers", "0", "--lr", "0.001"])
    shown = capsys.readouterr().out
    assert Path("tuned/answer.md").read_text() in shown
    assert "net.py:build on synthetic, 4 steps, 2 seeds." in shown
    assert "\n- 0: 9 -> " in shown
    assert "nothing is recommended" in shown
    answer = json.loads(Path("tuned/answer.json").read_text())
    (factor,) = answer["factors"]
    assert factor["layers"]["0"]["now"] == 9
    assert factor["verdict"]["kind"] == "not reliable"
    assert "the search has 4 steps, where 100 are needed" in factor["verdict"]["reason"]
    assert answer["recommended_dilations"] == {}
    assert (answer["steps"], answer["config"]["model"]) == (4, "net.py:build")
    assert len(factor["curve"]) >= 5


@pytest.mark.slow
def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = answered(capsys, "--verify", "--head-channels", "3")
    assert "head_channels, verify are for rfield's own networks, and not for net.py:build" in message
    message = answered(capsys, "--model", "net.py:other", "--workers", "0")
    assert "net.py:other returns 7 channels, but synthetic has 4 classes" in message
    assert not Path("tuned").exists()
    (tmp_path / "config.yaml").write_text("model: net.py:build\n")
    with pytest.raises(SystemExit):
        main(["tune", "--data", "synthetic", "--out", "x", "--config", "config.yaml"])
    assert "would run that Python file" in capsys.readouterr().err
