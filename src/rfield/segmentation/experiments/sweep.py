"""Train every dilation with every seed, once: the baseline of every search."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

from rfield.search import Verdict, judge, standard_errors
from rfield.search.certainty import LEAST_IMAGES
from rfield.segmentation import plots
from rfield.segmentation.config.experiments import SweepConfig
from rfield.segmentation.conventions import Progress
from rfield.segmentation.experiments.study import Point, Trial
from rfield.segmentation.experiments.tables import (
    curve_of,
    field_of,
    own_dilation,
    runs_of,
    summarise,
    sweep_table,
    write_csv,
)
from rfield.segmentation.experiments.trials import run_trials
from rfield.segmentation.files.atomic import write_json, write_text
from rfield.segmentation.training.search_report import has_random_backbone
from rfield.segmentation.web.report import try_report
from rfield.text import counted

# Two differences do not show their own spread.
_LEAST_SEEDS = 3


def run_sweep(config: SweepConfig, progress: Progress | None = None) -> str:
    """Train once for every dilation and seed, and write the results into `out`.

    The results are those of all calls with the same `out`: `results.json`, `results.csv` (a row for each run),
    `table.md` (a row for each dilation) and `sweep.png`; each run has an ordinary run folder beside them. Call again to
    continue after an interruption, with more dilations or seeds, or with a search, which then starts at the dilations.

    Args:
        config: what to train.
        progress: as in `run_trials`.

    Returns:
        The table, and where the rest is.

    Raises:
        ValueError, OSError: as in `run_trials`.
    """
    out = Path(config.train.run.out)
    points = [
        Point(config.train.search.search, dilation, seed)
        for dilation in config.grid.dilations
        for seed in config.grid.seeds
    ]
    trials, unfinished = run_trials(config, points, progress)
    rows = summarise(trials)
    table = sweep_table(rows)
    runs = runs_of(trials)
    verdict, errors = judge_grid(config, trials)
    write_json(
        out / "results.json",
        {
            "config": config.plain(),
            "verdict": None if verdict is None else verdict.plain(),
            "runs": runs,
            "table": [dataclasses.asdict(row) for row in rows],
            "unfinished": [point.name for point in unfinished],
        },
    )
    write_csv(out / "results.csv", runs)
    lines = [table] if verdict is None else [table, "", str(verdict)]
    write_text(out / "table.md", "\n".join(lines) + "\n")
    if rows:
        fixed = [row for row in rows if row.search == "none"]
        marked = {"best": max(fixed, key=lambda row: row.miou).dilation} if fixed else {}
        figure = plots.rf_curve(curve_of(trials), "mIoU", marked, field_of(config), {"fixed": errors})
        plots.save(figure, out / "sweep.png")
        lines.append(f"the runs, results.json, results.csv, table.md and sweep.png are in {out}")
    if config.train.run.report != "none":
        try_report(out)
    if unfinished:
        names = ", ".join(point.name for point in unfinished)
        lines.append(f"not finished, another process has them: {names}; call again when it is done")
    return "\n".join(lines)


def judge_grid(config: SweepConfig, trials: Sequence[Trial]) -> tuple[Verdict | None, dict[float, float | None]]:
    """Return how sure the best fixed dilation is, and the standard errors of the differences in mIoU to it.

    The mIoU of a split is not a mean over its images. The errors are therefore over the seeds that all dilations have,
    in pairs of the same seed; 3 are needed. The verdict is None if nothing was trained at a fixed dilation.

    Args:
        config: the sweep's.
        trials: finished ones, of any search.
    """
    fixed = [trial for trial in trials if trial.point.search == "none"]
    if not fixed:
        return None, {}
    scores: dict[int, dict[int, float]] = {}
    for trial in fixed:
        scores.setdefault(trial.point.dilation, {})[trial.point.seed] = trial.metrics["miou"]
    seeds = sorted(set.intersection(*({*each} for each in scores.values())))
    if not seeds:
        return Verdict("not reliable", "the dilations have no seed in common"), {}
    losses = {float(dilation): [1 - each[seed] for seed in seeds] for dilation, each in scores.items()}
    own = own_dilation(config.train.model.model)
    present = min(scores, key=lambda dilation: (abs(math.log(dilation / own)), dilation))
    verdict = judge(
        [[losses]],
        present,
        random_backbone=has_random_backbone(config.train.model),
        least_images=_LEAST_SEEDS,
        unit="common seed",
    )
    best = [trial.metrics for trial in fixed if trial.point.dilation == verdict.dilation]
    reasons = []
    if len(scores) == 1:
        reasons.append("one dilation has nothing to be compared with")
    if all(sum(bool(iou) for iou in metrics["per_class"].values()) <= 1 for metrics in best):
        reasons.append("every run labels all pixels alike")
    images = min(trial.metrics["val_images"] for trial in fixed)
    if images < LEAST_IMAGES:
        reasons.append(f"{counted(images, 'validation image')}, where {LEAST_IMAGES} are needed")
    reason = verdict.reason
    if verdict.kind == "at the edge" and verdict.dilation != 1:
        side, missing = ("smallest", "smaller") if verdict.dilation == min(scores) else ("largest", "larger")
        reason = f"dilation {verdict.dilation:g} is the {side} of the grid: train {missing} ones too, by --dilations"
    elif present != own and verdict.kind != "at the edge":
        reason += f" (the model's own {own} is not in the grid)"
    if reasons:
        others = [reason] if verdict.kind == "not reliable" else []
        verdict, reason = dataclasses.replace(verdict, kind="not reliable"), "; ".join([*reasons, *others])
    errors = standard_errors([losses])
    return dataclasses.replace(verdict, reason=reason), {d: e if math.isfinite(e) else None for d, e in errors.items()}
