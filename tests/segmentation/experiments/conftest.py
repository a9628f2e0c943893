"""Tiny settings, with which a run takes a fraction of a second."""

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def _no_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the chart library out of reports; its script takes seconds to make."""
    monkeypatch.setattr("rfield.segmentation.web.report_page._chart_library", lambda vl_convert: "")


@pytest.fixture
def tiny(tmp_path: Path, undrawn: None) -> dict[str, Any]:
    """The fields of any config of an experiment, without `out`."""
    data = tmp_path / "data.yaml"
    data.write_text("format: synthetic\nsize: [36, 41]\ndistance: 12\nlength: 6\n")
    return {
        "data": str(data),
        "model": "small_cnn",
        "head_channels": 8,
        "freeze_backbone": True,
        "epochs": 2,
        "batch_size": 2,
        "workers": 0,
        "cache": str(tmp_path / "cache"),
        "report": "none",
    }
