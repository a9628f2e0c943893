"""The reports of a sweep and of `rfield reproduce`: the runs of a grid, and of searches beside it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rfield.segmentation.config.experiments import ReproduceConfig, SweepConfig
from rfield.segmentation.files.untrusted import read_json
from rfield.segmentation.plots.style import number
from rfield.segmentation.runs import load_run, read_factor_csv
from rfield.segmentation.web.report_charts import MOST_LINES, Point, curve_chart, steps_chart
from rfield.segmentation.web.report_command import command_of, without_places
from rfield.segmentation.web.report_page import Block, Box, Page, Section, Table
from rfield.segmentation.web.report_parts import data_name, repeat_section, score_table, seconds_text, what_it_sees
from rfield.segmentation.web.report_samples import sample_pictures
from rfield.text import counted


def sweep_page(path: Path, public: bool) -> Page:
    """Return the report of a folder with a results.json.

    Raises:
        ValueError: a file in it is damaged.
    """
    content = read_json(path / "results.json")
    paper = "paper" in content
    config = (ReproduceConfig if paper else SweepConfig)(**content["config"])
    rows, verdict = content["table"], content.get("verdict")
    fixed = [row for row in rows if row["search"] == "none"]
    best = max(fixed or rows, key=lambda row: row["miou"])
    present = _present(fixed, best, verdict)
    notes = [f"Not finished yet: {', '.join(content['unfinished'])}."] if content.get("unfinished") else []
    model, data = config.train.model.model, data_name(config.train.data.data, public)
    pictures, missing = ([], []) if public else _pictures(path, content["runs"], best, present)
    return Page(
        title=f"rfield: {model} on {data}",
        kind="the experiments of Wei et al., CVPR 2017" if paper else "a sweep over dilations",
        question=f"Which dilation should {model} have on {data}?",
        answer=_answer(best, verdict),
        verdicts=[("", verdict["kind"], verdict["reason"])] if verdict else [],
        facts=[
            ("best mIoU", f"{best['miou']:.3f}"),
            *([(f"mIoU at dilation {number(present['dilation'])}", f"{present['miou']:.3f}")] if present else []),
            ("runs", str(len(content["runs"]))),
            ("training in all", seconds_text(sum(run["train_seconds"] for run in content["runs"]))),
        ],
        notes=[*notes, *missing],
        sections=[
            *([what_it_sees(pictures)] if pictures else []),
            _curve(rows, content["runs"], present, best),
            *_courses(path, content["runs"]),
            *([_starts(content, rows)] if paper else []),
            *_scores(path, content["runs"], best, present),
            _runs(rows, best),
            _repeat(path, config, content["runs"], public),
        ],
    )


def unfinished_page(runs: Sequence[Path]) -> Page:
    """Return the report of a folder of runs that has no results yet."""
    scores = {run.name: read_json(run / "metrics.json") for run in runs if (run / "metrics.json").is_file()}
    rows = [
        [run.name, f"{found['miou']:.4f}" if (found := scores.get(run.name)) and found["miou"] is not None else "-"]
        for run in runs
    ]
    table = Table("The runs so far", ("run", "mIoU"), rows)
    return Page(
        title="rfield: an experiment that is not finished",
        kind="an experiment that is not finished",
        question="How far are these runs?",
        answer=f"{len(scores)} of {counted(len(runs), 'run')} that have started are finished.",
        verdicts=[("", "unfinished", "the command has not written its results; call it again to continue")],
        facts=[],
        notes=[],
        sections=[Section("The runs", "Each has a report of its own: rfield report RUN.", [table])],
    )


def _present(
    fixed: Sequence[dict[str, Any]], best: Mapping[str, Any], verdict: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    """Return the row that the best one is compared with, with a `name`: the verdict's, or the worst of the grid."""
    others = [row for row in fixed if row["dilation"] != best["dilation"]]
    named = [row for row in others if verdict and row["dilation"] == verdict["present"]]
    found = min(named or others, key=lambda row: row["miou"], default=None)
    return None if found is None else {**found, "name": "compared with" if named else "lowest"}


def _answer(best: Mapping[str, Any], verdict: Mapping[str, Any] | None) -> str:
    reached = f"mIoU {best['miou']:.3f} at dilation {number(best['dilation'])}, {best['receptive_field_px']:.0f} px"
    if verdict and verdict["kind"] == "not reliable":
        return f"Nothing is recommended; the highest was {reached}."
    return f"The best is {reached}."


def _run_of(runs: Sequence[Mapping[str, Any]], row: Mapping[str, Any]) -> str:
    """Return the name of the first run of a row."""
    same = [run for run in runs if (run["search"], run["dilation"]) == (row["search"], row["dilation"])]
    return str(min(same, key=lambda run: run["seed"])["name"])


def _pictures(
    path: Path, runs: Sequence[Mapping[str, Any]], best: Mapping[str, Any], present: Mapping[str, Any] | None
) -> tuple[list[Block], list[str]]:
    folder = path / _run_of(runs, best)
    boxes = [
        Box(f"{row.get('name', 'best')}: dilation {number(row['dilation'])}, {side:.0f} px", side, side, colour)
        for colour, row in enumerate((present, best))
        if row is not None and (side := row["receptive_field_px"])
    ]
    try:
        run = load_run(folder)
    except (ValueError, OSError) as error:
        return [], [f"The network of the best run cannot be opened, so that no image is labelled: {error}."]
    before = None if present is None else path / _run_of(runs, present)
    return sample_pictures(run, boxes, None, before)


def _curve(
    rows: Sequence[Mapping[str, Any]],
    runs: Sequence[Mapping[str, Any]],
    present: Mapping[str, Any] | None,
    best: Mapping[str, Any],
) -> Section:
    curves: dict[str, list[Point]] = {}
    for row in rows:
        place = (row["search"], row["dilation"])
        singles = [run["miou"] for run in runs if (run["search"], run["dilation"]) == place]
        name = "fixed" if row["search"] == "none" else f"{row['search']}, from there"
        curves.setdefault(name, []).append(Point(row["dilation"], row["miou"], row["miou_spread"], singles))
    marked = {"best": best["dilation"], **({present["name"]: present["dilation"]} if present else {})}
    chart = curve_chart(
        "mIoU over the dilation", curves, "mIoU", marked, _field(rows), "standard deviation over the seeds"
    )
    about = "Each point is the mean of its seeds; the band is one standard deviation, the small circles are the runs."
    return Section("The curve that the answer comes from", about, [chart])


def _field(rows: Sequence[Mapping[str, Any]]) -> tuple[float, float] | None:
    """Return (slope, offset) of the receptive field over the dilation, from two different rows."""
    known = sorted({(row["effective_dilation"], row["receptive_field_px"]) for row in rows if row["search"] == "none"})
    if len(known) < 2:
        return None
    (low, small), (high, large) = known[0], known[-1]
    slope = (large - small) / (high - low)
    return slope, small - slope * low


def _courses(path: Path, runs: Sequence[Mapping[str, Any]]) -> list[Section]:
    """Return the dilations of the learned runs over the steps, one chart for each search."""
    searches: dict[str, dict[str, Any]] = {}
    for run in runs:
        file = path / run["name"] / "factor.csv"
        if run["search"] != "none" and file.is_file():
            columns = read_factor_csv(file)
            name = f"from dilation {run['dilation']}, seed {run['seed']}"
            searches.setdefault(run["search"], {})[name] = columns["step"], columns["effective_dilation"]
    charts: list[Block] = [
        steps_chart(f"Dilation over the steps, search {search}", dict(list(lines.items())[:MOST_LINES]), "dilation")
        for search, lines in searches.items()
    ]
    return [Section("Learned from these starts", "", charts)] if charts else []


def _starts(content: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Section:
    """Return where the searches of `rfield reproduce` ended, beside the paper's."""
    fixed = {row["dilation"]: row["receptive_field_px"] for row in rows if row["search"] == "none"}
    shown = []
    for row in rows:
        ends = content["before_snapping_px"].get(f"{row['search']}, d={row['dilation']}")
        if ends is None:
            continue
        paper = content["paper"]["ends_px"].get(str(212 + 16 * row["dilation"]))
        start = fixed.get(row["dilation"])
        shown.append(
            [
                f"{row['search']} from dilation {row['dilation']}" + ("" if start is None else f", {start:.0f} px"),
                f"{sum(ends) / len(ends):.0f}",
                f"{row['receptive_field_px']:.0f}",
                f"{row['miou']:.4f}",
                str(paper) if row["search"] == "gradient" and paper else "-",
            ]
        )
    header = ("search", "end, px", "snapped, px", "mIoU", "the paper's end, px")
    about = "The paper trained on PASCAL VOC; its receptive fields are nominal, 212 px and 16 px a dilation."
    return Section("From bad starts", about, [Table("Where each search ended", header, shown)])


def _scores(
    path: Path, runs: Sequence[Mapping[str, Any]], best: Mapping[str, Any], present: Mapping[str, Any] | None
) -> list[Section]:
    folder = path / _run_of(runs, best)
    if not (folder / "metrics.json").is_file():
        return []
    metrics, about, other = read_json(folder / "metrics.json"), f"Of the run {folder.name}", None
    if present is not None and (path / _run_of(runs, present) / "metrics.json").is_file():
        before = path / _run_of(runs, present)
        other = f"dilation {number(present['dilation'])}", read_json(before / "metrics.json")
        about += f", beside {before.name}"
    return [Section("Scores of the classes", f"{about}.", [score_table(metrics, other)])]


def _runs(rows: Sequence[Mapping[str, Any]], best: Mapping[str, Any]) -> Section:
    shown = [
        [
            f"{'fixed' if row['search'] == 'none' else row['search']}, dilation {number(row['dilation'])}",
            f"{row['miou']:.4f}",
            "-" if row["miou_spread"] is None else f"{row['miou_spread']:.4f}",
            str(len(row["seeds"])),
            f"{row['effective_dilation']:.3g}",
            f"{row['receptive_field_px']:.4g}",
            seconds_text(row["train_seconds"]),
        ]
        for row in rows
    ]
    header = ("runs", "mIoU", "spread", "seeds", "delivered dilation", "receptive field, px", "time of one")
    table = Table("All runs, each row over its seeds", header, shown, list(rows).index(best))
    return Section("What it cost", "", [table])


def _repeat(path: Path, config: SweepConfig, runs: Sequence[Mapping[str, Any]], public: bool) -> Section:
    files = [path / run["name"] / "metrics.json" for run in runs]
    metrics: dict[str, Any] = next((read_json(file) for file in files if file.is_file()), {})
    config = without_places(config) if public else config
    name = "reproduce" if isinstance(config, ReproduceConfig) else "sweep"
    return repeat_section(command_of(name, config), f"Seeds {config.grid.seeds}", metrics)
