"""When a training writes its report: at the end, after each validation, or never; and that it never fails a run."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rfield.segmentation.config.experiments import SweepConfig, TuneConfig
from rfield.segmentation.config.train import TrainConfig
from rfield.segmentation.files.checkpoints import read_checkpoint
from rfield.segmentation.training import train
from rfield.segmentation.web import report, report_page

Make = Callable[..., TrainConfig]


@pytest.mark.figures
@pytest.mark.slow
def test_a_live_report_changes_nothing_and_is_finished_at_the_end(
    make: Make, whole_run: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_page, "_chart_library", lambda vl_convert: "")
    seen: list[str] = []
    write = report.write_text

    def watched(path: Path, text: str) -> None:
        seen.append(text)
        write(path, text)

    monkeypatch.setattr(report, "write_text", watched)
    config = make(report="live", val_every=1)
    train(config)
    assert len(seen) == 3
    for text, done in zip(seen, ("1 of 3 epochs are", "2 of 3 epochs are", None), strict=True):
        assert ('http-equiv="refresh"' in text) == (f"not finished: {done} saved" in text) == (done is not None)
        assert "Over the training" in text
    assert "mIoU of the validations" in seen[2]
    assert (Path(config.run.out) / "report.html").read_text(encoding="utf-8") == seen[2]
    plain = whole_run(val_every=1)
    mine, other = (
        read_checkpoint(Path(each.run.out) / "checkpoints/last.ckpt")["state_dict"] for each in (config, plain)
    )
    assert all(torch.equal(value, other[name]) for name, value in mine.items())
    assert not (Path(plain.run.out) / "report.html").exists()


@pytest.mark.parametrize(
    ("error", "said"),
    [(ValueError("no\npackage"), "no package"), (MemoryError(), "MemoryError"), (OSError(5, "x"), "x")],
)
def test_a_report_that_cannot_be_written_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, said: str
) -> None:
    def fail(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr(report, "write_report", fail)
    report.try_report(tmp_path)
    found = capsys.readouterr().err
    assert found.startswith(f"note: {tmp_path}/report.html is not written: ")
    assert said in found
    assert found.count("\n") == 1


def test_a_missing_package_is_named_and_ctrl_c_is_not_swallowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "d01-seed0").mkdir()
    (tmp_path / "d01-seed0/config.yaml").touch()
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    report.try_report(tmp_path)
    assert "a report needs the package vl_convert: pip install 'rfield[web]'" in capsys.readouterr().err

    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "write_report", stop)
    with pytest.raises(KeyboardInterrupt):
        report.try_report(tmp_path)


def test_the_runs_of_an_experiment_write_no_report_of_their_own() -> None:
    for config_class in (SweepConfig, TuneConfig):
        config = config_class(data="synthetic", out="x")
        assert config.train.run.report == "end"
        assert config.run_config("x/d01", 1, 0, "none").run.report == "none"
        with pytest.raises(ValueError, match="report live is for train"):
            config_class(data="synthetic", out="x", report="live")
