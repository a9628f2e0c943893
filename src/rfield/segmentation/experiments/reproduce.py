"""Repeat the experiments of Wei et al., CVPR 2017; the report names the papers."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rfield.search import curve_minimum
from rfield.segmentation import plots
from rfield.segmentation.config.experiments import ReproduceConfig
from rfield.segmentation.config.train import Search
from rfield.segmentation.conventions import Progress
from rfield.segmentation.data import evaluation_transform, load_dataset
from rfield.segmentation.experiments.study import Point, Trial
from rfield.segmentation.experiments.tables import (
    Row,
    curve_of,
    field_of,
    markdown,
    runs_of,
    summarise,
    sweep_table,
    write_csv,
)
from rfield.segmentation.experiments.trials import finish_trials
from rfield.segmentation.files.atomic import write_json, write_text
from rfield.segmentation.inference.predict import compute_device, predict_logits
from rfield.segmentation.runs import load_run
from rfield.segmentation.training import read_factor_csv
from rfield.segmentation.web.report import try_report
from rfield.text import counted

# The paper's bad starts on VOC, as dilations of fc6, and where its learned receptive fields ended, in px (nominal).
PAPER_BEST_PX = 404
PAPER_ENDS_PX = {14: 396, 6: 364}
_SEARCHES: tuple[Search, ...] = ("gradient", "spsa", "sampled")
_SHOWN = {"gradient": "exact gradient", "spsa": "SPSA", "sampled": "sampled"}


def run_reproduce(config: ReproduceConfig, progress: Progress | None = None) -> str:
    """Repeat the paper's experiments on any data in the layout of VOC, and write the results into `out`.

    The experiments are the grid of fixed dilations, and learning from bad starts at dilation 14 and 6 (436 and 308 px
    nominal) by the exact gradient and by the other searches. The files are `results.json`, `results.csv` (a row for
    each run), `report.md`, `grid.png`, `factor.png` (the dilation over the steps) and a `panel-SEARCH.png` for each
    search; the runs are beside them, and another call only adds what is missing.

    Args:
        config: what to train.
        progress: as in `run_trials`.

    Returns:
        The report, and where the rest is.

    Raises:
        ValueError, OSError: as in `finish_trials`.
    """
    out, seeds = Path(config.train.run.out), config.grid.seeds
    dilations = sorted({*config.grid.dilations, *PAPER_ENDS_PX})
    fixed = [Point("none", dilation, seed) for dilation in dilations for seed in seeds]
    learned = [Point(kind, dilation, seed) for kind in _SEARCHES for dilation in PAPER_ENDS_PX for seed in seeds]
    trials = finish_trials(config, [*fixed, *learned], progress)
    rows, runs = summarise(trials), runs_of(trials)
    best = max((row for row in rows if row.search == "none"), key=lambda row: row.miou)
    slope, offset = field_of(config)
    starts = {dilation: slope * dilation + offset for dilation in PAPER_ENDS_PX}
    # The paper's receptive fields are those before the dilation was snapped to an integer.
    ends: dict[tuple[str, int], list[float]] = {}
    for trial in trials:
        if trial.point.search != "none":
            field = slope * _dilation_before_snap(trial.metrics) + offset
            ends.setdefault((trial.point.search, trial.point.dilation), []).append(field)
    report = _report(config, rows, best, starts, ends)
    write_json(
        out / "results.json",
        {
            "config": config.plain(),
            "paper": {"best_px": PAPER_BEST_PX, "ends_px": {212 + 16 * d: end for d, end in PAPER_ENDS_PX.items()}},
            "best_dilation": best.dilation,
            "before_snapping_px": {f"{kind}, d={dilation}": fields for (kind, dilation), fields in ends.items()},
            "runs": runs,
            "table": [dataclasses.asdict(row) for row in rows],
        },
    )
    write_csv(out / "results.csv", runs)
    _draw(config, trials, rows, best.dilation, starts)
    write_text(out / "report.md", report)
    if config.train.run.report != "none":
        try_report(out)
    return report + f"\nthe runs, report.md, results.json, results.csv and the pictures are in {out}"


def _draw(
    config: ReproduceConfig, trials: Sequence[Trial], rows: Sequence[Row], best: int, starts: dict[int, float]
) -> None:
    """Draw the grid, the factors of the first seed, and a panel for each search."""
    out, seed = Path(config.train.run.out), config.grid.seeds[0]
    curve = curve_of([trial for trial in trials if trial.point.search == "none"])
    plots.save(plots.rf_curve(curve, "mIoU", {"best": best}, field_of(config)), out / "grid.png")
    paths: dict[str, dict[str, tuple[npt.ArrayLike, npt.ArrayLike]]] = {}
    for kind in _SEARCHES:
        for dilation, field in starts.items():
            columns = read_factor_csv(out / Point(kind, dilation, seed).name / "factor.csv")
            group = paths.setdefault(_SHOWN[kind], {})
            group[f"from {field:.0f} px"] = (columns["step"], columns["effective_dilation"])
    plots.save(plots.dilation_paths(paths, field_of(config)), out / "factor.png")
    improper = min(
        (row for row in rows if row.search == "none" and row.dilation in starts), key=lambda row: row.miou
    ).dilation
    for kind in _SEARCHES:
        pictured = {
            "best manual rf": Point("none", best, seed),
            "improper rf": Point("none", improper, seed),
            f"improper rf + learned ({kind})": Point(kind, improper, seed),
        }
        _save_panel(config, pictured, out / f"panel-{kind}.png")


def _dilation_before_snap(metrics: dict[str, Any]) -> float:
    """Return the dilation at which a run's search ended, in feature px; SPSA runs at integers, and ends at one."""
    search = metrics["search"]
    if search["kind"] == "sampled":
        return curve_minimum(dict(search["curve"]))
    return float(search["trajectory"][-1][1] if search["kind"] == "gradient" else metrics["effective_dilation"])


def _save_panel(config: ReproduceConfig, pictured: dict[str, Point], path: Path) -> None:
    """Evenly spaced validation images, their ground truth, and what the runs make of them."""
    dataset = load_dataset(config.train.data.data, config.train.data.val_split)
    count = min(config.grid.images, len(dataset))
    samples = [dataset[index] for index in np.linspace(0, len(dataset) - 1, count).round().astype(int).tolist()]
    columns: dict[str, Sequence[npt.NDArray[np.uint8]]] = {
        "image": [image.permute(1, 2, 0).numpy() for image, _ in samples],
        "ground truth": [mask.to(torch.uint8).numpy() for _, mask in samples],
    }
    transform = evaluation_transform()
    for title, point in pictured.items():
        run = load_run(Path(config.train.run.out) / point.name)
        network = run.network.to(compute_device())
        logits = (predict_logits(network, transform(image), config.train.model.freeze_backbone) for image, _ in samples)
        columns[title] = [each.argmax(0).to(torch.uint8).cpu().numpy() for each in logits]
    palette = np.array(dataset.palette, dtype=np.uint8)
    plots.save(plots.panel(columns, palette, dataset.class_names), path)


def _starts_table(
    rows: Sequence[Row], best: Row, starts: dict[int, float], ends: dict[tuple[str, int], list[float]]
) -> str:
    """Return the table of the bad starts: where each search ended, and its score."""

    def row_of(search: Search, dilation: int) -> Row:
        return next(row for row in rows if (row.search, row.dilation) == (search, dilation))

    def score(row: Row) -> str:
        return f"{row.miou:.4f}" + ("" if row.miou_spread is None else f" (spread {row.miou_spread:.4f})")

    table: list[Sequence[Any]] = []
    for dilation, start in starts.items():
        paper_start = 212 + 16 * dilation
        table.append((f"{start:.4g}", "fixed", "-", f"{start:.4g}", score(row_of("none", dilation)), f"{paper_start}"))
        for kind in _SEARCHES:
            row = row_of(kind, dilation)
            paper = f"{paper_start} -> {PAPER_ENDS_PX[dilation]}" if kind == "gradient" else "-"
            end = f"{np.mean(ends[kind, dilation]):.4g}"
            table.append((f"{start:.4g}", _SHOWN[kind], end, f"{row.receptive_field_px:.4g}", score(row), paper))
    table.append(("-", "best by hand", "-", f"{best.receptive_field_px:.4g}", score(best), f"{PAPER_BEST_PX}"))
    header = ("start RF [px]", "search", "end RF [px]", "snapped [px]", "mIoU", "the paper's RF [px]")
    return markdown(header, table)


def _report(
    config: ReproduceConfig,
    rows: Sequence[Row],
    best: Row,
    starts: dict[int, float],
    ends: dict[tuple[str, int], list[float]],
) -> str:
    trained = "the head alone, on frozen features" if config.train.model.freeze_backbone else "backbone and head"
    seeds = ", ".join(str(seed) for seed in config.grid.seeds)
    return f"""# The experiments of Wei et al., CVPR 2017

{config.train.model.model} on {config.train.data.data}; {counted(config.train.optim.epochs, "epoch")}, {trained};
head of {config.train.model.head_channels} channels; seeds {seeds}.
The paper trained backbone and head on PASCAL VOC, so its numbers are for another setting; its receptive fields are
nominal, 212 px + 16 px a dilation. Figures are means over the seeds; a spread is the standard deviation over them.

## From bad starts

{_starts_table(rows, best, starts, ends)}

`factor.png` shows the dilation of the first seed over training, of SPSA and the sampled search as it was drawn;
`panel-SEARCH.png`: image, ground truth, best manual rf, improper rf, improper rf + learned, on validation images that
are spaced evenly through the list.

## The grid, and all runs

{sweep_table(rows)}

## Source

Wei, Sun, Wang, Lai, Liu: Learning Adaptive Receptive Fields for Deep Image Parsing Network, CVPR 2017; Computational
Visual Media 4(3), 2018, doi 10.1007/s41095-018-0112-1.
"""
