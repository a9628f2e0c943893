"""The honest baseline: every dilation with every seed, once."""

import dataclasses
from pathlib import Path

from rfield import plots
from rfield.config import SweepConfig
from rfield.experiments.tables import curve_of, field_of, runs_of, summarise, sweep_table, write_csv
from rfield.experiments.trials import Point, run_trials
from rfield.inference import Progress
from rfield.training import write_json, write_text


def run_sweep(config: SweepConfig, progress: Progress | None = None) -> str:
    """Trains once for every dilation and seed, and writes the results into `out`.

    The results are those of all calls with one `out`: `results.json`, `results.csv` (a row a run), `table.md` (a row a
    dilation) and `sweep.png`; each run has an ordinary run folder beside them. Call again to go on after an
    interruption, or with more dilations or seeds, or with a search, whose starts the dilations then are.

    Args:
        config: what to train.
        progress: as in `run_trials`.

    Returns:
        The table, and where the rest is.

    Raises:
        ValueError, OSError: as in `run_trials`.
    """
    out = Path(config.out)
    points = [Point(config.search, dilation, seed) for dilation in config.dilations for seed in config.seeds]
    trials, unfinished = run_trials(config, points, progress)
    rows = summarise(trials)
    table = sweep_table(rows)
    runs = runs_of(trials)
    write_json(
        out / "results.json",
        {
            "config": config.plain(),
            "runs": runs,
            "table": [dataclasses.asdict(row) for row in rows],
            "unfinished": [point.name for point in unfinished],
        },
    )
    write_csv(out / "results.csv", runs)
    write_text(out / "table.md", table + "\n")
    lines = [table]
    if rows:
        fixed = [row for row in rows if row.search == "none"]
        marked = {"best": max(fixed, key=lambda row: row.miou).dilation} if fixed else {}
        figure = plots.rf_curve(curve_of(trials), "mIoU", marked, field_of(config))
        plots.save(figure, out / "sweep.png")
        lines.append(f"the runs, results.json, results.csv, table.md and sweep.png are in {out}")
    if unfinished:
        names = ", ".join(point.name for point in unfinished)
        lines.append(f"not finished, another process has them: {names}; call again when it is done")
    return "\n".join(lines)
