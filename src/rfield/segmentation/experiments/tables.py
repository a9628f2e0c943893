"""Write finished runs as tables."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rfield.receptive_field.theoretical import receptive_field_px
from rfield.segmentation.config.experiments import SweepConfig
from rfield.segmentation.config.train import Search
from rfield.segmentation.experiments.study import Trial
from rfield.segmentation.files import atomic
from rfield.segmentation.models import find_model
from rfield.segmentation.runs import build_network

RUN_COLUMNS = ("miou", "pixel_accuracy", "effective_dilation", "receptive_field_px", "train_seconds")


@dataclasses.dataclass(frozen=True)
class Row:
    """The runs of one dilation and search, over their seeds.

    `miou_spread` is the standard deviation over the seeds, None for one seed. The effective dilation (in feature px)
    and the receptive field (in input px) are those delivered; they and the seconds are means.
    """

    search: Search
    dilation: int
    seeds: list[int]
    miou: float
    miou_spread: float | None
    effective_dilation: float
    receptive_field_px: float
    train_seconds: float


def summarise(trials: Sequence[Trial]) -> list[Row]:
    """Return one row for each (search, dilation), in the order in which they occur."""
    rows = []
    for search, dilation in dict.fromkeys((trial.point.search, trial.point.dilation) for trial in trials):
        same = [trial for trial in trials if (trial.point.search, trial.point.dilation) == (search, dilation)]
        means = {name: float(np.mean([trial.metrics[name] for trial in same])) for name in RUN_COLUMNS}
        del means["pixel_accuracy"]
        spread = deviation([trial.metrics["miou"] for trial in same])
        seeds = [trial.point.seed for trial in same]
        rows.append(Row(search=search, dilation=dilation, seeds=seeds, miou_spread=spread, **means))
    return rows


def deviation(values: Sequence[float]) -> float | None:
    """Return the standard deviation of a sample; None for one value.

    >>> deviation([1.0, 3.0]), deviation([1.0])
    (1.4142135623730951, None)
    """
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def sweep_table(rows: Sequence[Row]) -> str:
    """Format rows as a Markdown table; the best mean mIoU is bold."""
    best = max((row.miou for row in rows), default=0.0)
    header = ("search", "dilation", "mIoU", "spread", "seeds", "effective dilation", "RF [px]", "seconds")
    return markdown(
        header,
        [
            (
                row.search,
                str(row.dilation),
                f"**{row.miou:.4f}**" if row.miou == best else f"{row.miou:.4f}",
                "-" if row.miou_spread is None else f"{row.miou_spread:.4f}",
                str(len(row.seeds)),
                f"{row.effective_dilation:.3g}",
                f"{row.receptive_field_px:.4g}",
                f"{row.train_seconds:.1f}",
            )
            for row in rows
        ],
    )


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table with aligned columns.

    >>> print(markdown(["d", "mIoU"], [["2", "0.69"], ["14", "0.7"]]))
    | d  | mIoU |
    | -- | ---- |
    | 2  | 0.69 |
    | 14 | 0.7  |
    """
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def runs_of(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """Return one flat row for each run: its name, point, figures (exactly as in `metrics.json`) and verdict.

    The verdict is the certainty of the run's search; a run without a search has none.
    """
    return [
        {
            "name": trial.point.name,
            **dataclasses.asdict(trial.point),
            **{name: trial.metrics[name] for name in RUN_COLUMNS},
            "verdict": trial.metrics["search"]["verdict"]["kind"] if "search" in trial.metrics else None,
        }
        for trial in trials
    ]


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows of named values; the first row's keys are the columns."""
    columns = list(rows[0]) if rows else []
    atomic.write_csv(path, [columns, *([row[name] for name in columns] for row in rows)])


def curve_of(trials: Sequence[Trial]) -> dict[str, dict[float, list[float]]]:
    """Return the mIoU for `plots.rf_curve`: {search: {dilation: one value for each seed}}."""
    curves: dict[str, dict[float, list[float]]] = {}
    for trial in trials:
        name = "fixed" if trial.point.search == "none" else trial.point.search
        curves.setdefault(name, {}).setdefault(trial.point.dilation, []).append(trial.metrics["miou"])
    return curves


def own_dilation(model: str) -> int:
    """Return the dilation that a model has by default."""
    return find_model(model).head.dilation


def field_of(config: SweepConfig) -> tuple[float, float]:
    """Return (slope, offset) of a network's receptive field in input px over its dilation in feature px."""
    with torch.device("meta"):
        one, two = (
            receptive_field_px(build_network(config.run_config("", dilation, 0, "none"), num_classes=2))[0]
            for dilation in (1, 2)
        )
    return two - one, 2 * one - two
