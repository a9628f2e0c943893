"""The report of one run: what `rfield train` has left in its folder, in the order in which a reader asks."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rfield.segmentation.plots.style import number
from rfield.segmentation.runs import read_factor_csv, read_paths_csv
from rfield.segmentation.web.report_charts import MOST_LINES, Point, curve_chart, steps_chart
from rfield.segmentation.web.report_command import command_of, without_places
from rfield.segmentation.web.report_folder import Baseline, Folder, field_boxes, find_baseline, read_folder
from rfield.segmentation.web.report_page import Block, Page, Pictures, Section, Table, read_picture
from rfield.segmentation.web.report_parts import (
    best_sets,
    cost_matrix,
    data_name,
    repeat_section,
    score_table,
    seconds_text,
    what_it_sees,
)
from rfield.segmentation.web.report_samples import sample_pictures
from rfield.text import counted


def run_page(path: Path, public: bool = False, refresh: int | None = None) -> Page:
    """Return the report of a run folder.

    Args:
        path: the folder.
        public: leave out images, names and places of the data, for a report that others will read.
        refresh: see `Page`; not of a finished run.

    Raises:
        FileNotFoundError, ValueError: as `read_folder`.
    """
    folder = read_folder(path)
    config, notes = folder.config, list(folder.notes)
    data = data_name(config.data.data, public)
    baseline = None if public else find_baseline(folder)
    seen: list[Section] = []
    if public:
        notes = [note for note in notes if str(path) not in note]
        notes.append("This report is for other readers: it has no image, file name or folder of the data.")
    elif folder.run is not None and folder.metrics is not None:
        before = None if baseline is None else baseline.path
        pictures, missing = sample_pictures(folder.run, field_boxes(folder), folder.start, before)
        seen, notes = [what_it_sees(pictures)] if pictures else [], [*notes, *missing]
    learned = config.search.search != "none"
    question = f"What receptive field did {config.model.model} learn on {data}?"
    return Page(
        title=f"rfield: {config.model.model} on {data}",
        kind="one training run",
        question=question if learned else f"How well does {config.model.model} label {data}?",
        answer=_answer(folder),
        verdicts=_verdicts(folder),
        facts=_facts(folder, baseline),
        notes=notes,
        sections=[
            *seen,
            *curve_section(folder),
            *course_section(folder),
            *_sets(folder),
            *_gates(folder, public),
            *_scores(folder, baseline),
            _cost(folder),
            _how_to_repeat(folder, public),
        ],
        refresh=refresh if folder.metrics is None else None,
    )


def curve_section(folder: Folder) -> list[Section]:
    """Return the held-out curves of a sampled search."""
    search = folder.search
    factors = search.get("factors", [{"path": 0, "axis": "height", **search}])
    if "readings" not in factors[0]:
        return []
    marked: dict[str, float] = {}
    if len(factors) == 1:
        readings = factors[0]["readings"][-MOST_LINES:]
        named = {f"after step {reading['step']}": reading for reading in readings}
        images = counted(len(search["held_out"]), "image") if "held_out" in search else "images"
        about = f"The loss on {images} that were held out of the training, read at each dilation"
        about += " as the search narrowed its range." if len(readings) > 1 else "."
        if verdict := search.get("verdict"):
            marked = {name: verdict[key] for name, key in (("start", "present"), ("learned", "dilation"))}
    else:
        step, named = _widest(factors)
        about = f"The loss on held-out images at the dilations of each path, as it was read after step {step}."
    curves = {
        name: [
            Point(dilation, loss, dict(map(tuple, reading["errors"])).get(dilation))
            for dilation, loss in reading["curve"]
            if math.isfinite(loss)
        ]
        for name, reading in list(named.items())[:MOST_LINES]
    }
    curves = {name: points for name, points in curves.items() if points}
    if not curves:
        return []
    about += " Lower is better; the band is the standard error of the difference to the lowest loss."
    marks = {name: at for name, at in marked.items() if at is not None}
    chart = curve_chart("Held-out loss over the dilation", curves, "held-out loss", marks, folder.field)
    return [Section("The curve that the answer comes from", about, [chart])]


def _widest(factors: Sequence[Mapping[str, Any]]) -> tuple[int, dict[str, Any]]:
    """Return the step whose readings cover most dilations, since late ones cover few, and its readings by name."""
    by_step: dict[int, dict[str, Any]] = {}
    for name, factor in zip(_names(factors), factors, strict=True):
        for reading in factor["readings"]:
            by_step.setdefault(reading["step"], {})[name] = reading
    step = max(by_step, key=lambda step: (sum(len(each["curve"]) for each in by_step[step].values()), step))
    return step, by_step[step]


def _names(factors: Sequence[Mapping[str, Any]]) -> list[str]:
    axes = {each["axis"] for each in factors}
    return [f"path {each['path'] + 1}" + (f", {each['axis']}" if len(axes) > 1 else "") for each in factors]


def course_section(folder: Folder) -> list[Section]:
    """Return the dilations, the loss and the scores over the steps."""
    if not (folder.path / "factor.csv").is_file():
        return []
    columns = read_factor_csv(folder.path / "factor.csv")
    if not len(columns["step"]):
        return []
    sampled = folder.config.search.search == "sampled"
    drawn_until = folder.search.get("steps", float(columns["step"][-1])) if sampled else None
    blocks: list[Block] = []
    if folder.config.search.search != "none":
        lines: Mapping[str, Any] = {"dilation": (columns["step"], columns["effective_dilation"])}
        if (folder.path / "paths.csv").is_file():
            lines = read_paths_csv(folder.path / "paths.csv") or lines
        names = list(lines)
        for first in range(0, min(len(names), 4 * MOST_LINES), MOST_LINES):
            group = {name: lines[name] for name in names[first : first + MOST_LINES]}
            blocks.append(steps_chart("Dilation over the steps", group, "dilation [feature px]", drawn_until))
    losses = {"training loss": (columns["step"], columns["loss"])}
    blocks.append(steps_chart("Training loss over the steps", losses, "loss", logarithmic=False))
    steps, scores = folder.validations
    if len(steps) > 1:
        validations = {"mIoU": (steps, scores)}
        blocks.append(steps_chart("mIoU of the validations", validations, "mIoU", logarithmic=False))
    about = "Each point is a dilation that the search drew at random for one step." if sampled else ""
    return [Section("Over the training", about, blocks)]


def _sets(folder: Folder) -> list[Section]:
    """Return the best combinations of paths, and which path serves which class."""
    sets = folder.search.get("sets")
    if not sets:
        return []
    kept = [path for path, rate in enumerate(sets["chosen"]["rates"]) if rate is not None]
    costs = [[row[path] for path in kept] for row in sets["class_costs"]]
    names = [
        each.get("branch") or f"dilation {number(each['effective_dilation'])}"
        for each in (folder.metrics or {}).get("paths", [])
    ]
    about = "Every combination of the dilations that the paths may have was scored by adding the logits of the paths."
    blocks: list[Block] = [best_sets("The ten best combinations on the held-out images", sets)]
    if len(names) == len(kept):
        blocks.append(cost_matrix(costs, folder.class_names, names))
    return [Section("The set of dilations", about, blocks)]


def _gates(folder: Folder, public: bool) -> list[Section]:
    """Return the rates that gates mix, and the figure of what they choose."""
    gates = (folder.metrics or {}).get("gates")
    if gates is None:
        return []
    rows = [
        [f"rate {each['rate']:g}", f"{each['receptive_field_px']:.0f}", f"{each['mean_gate']:.1%}"]
        for each in gates["rates"]
    ]
    blocks: list[Block] = [Table("The rates that the gates mix", ("rate", "receptive field, px", "mean gate"), rows)]
    if (file := folder.path / "gates.png").is_file() and not public:
        blocks.insert(0, Pictures([read_picture(file, "Images and the receptive field that the gates choose")]))
    about = (
        f"The input decides: on average {gates['field_px']:.0f} px, from {gates['least_field_px']:.0f} to "
        f"{gates['greatest_field_px']:.0f} px over {counted(gates['images'], 'image')}, one for each {gates['each']}."
    )
    return [Section("The receptive field that the gates choose", about, blocks)]


def _scores(folder: Folder, baseline: Baseline | None) -> list[Section]:
    if folder.metrics is None:
        return []
    about = f"On {counted(folder.metrics['val_images'], 'image')} of the validation split"
    about += f", beside the network {baseline.name}." if baseline else "."
    if baseline is None and folder.start is not None:
        about += " No run with a fixed dilation stands beside this one to compare with; a sweep trains some."
    other = None if baseline is None else (baseline.name, baseline.metrics)
    return [Section("Scores of the classes", about, [score_table(folder.metrics, other)])]


def _cost(folder: Folder) -> Section:
    metrics, search = folder.metrics or {}, folder.search
    rows = []
    if "train_seconds" in metrics:
        rows.append(["training", seconds_text(metrics["train_seconds"])])
    if "seconds" in search:
        share = search["seconds"] / metrics["train_seconds"] if metrics.get("train_seconds") else math.nan
        rows.append(["of that, the search beside the steps", f"{seconds_text(search['seconds'])} ({share:.0%})"])
        rows.append(["steps of the search", f"{search['steps']}"])
    if folder.run is not None:
        network = folder.run.network
        rows.append(["parameters", f"{sum(weight.numel() for weight in network.parameters()):,}"])
        rows.append(["of them in the head", f"{sum(weight.numel() for weight in network.head.parameters()):,}"])
        learned = sum(value.numel() for name, value in network.named_parameters() if name.endswith("log_factor"))
        rows.append(["of them learned factors", f"{learned}"])
    return Section("What it cost", "", [Table("Time and size", ("item", "amount"), rows)] if rows else [])


def _how_to_repeat(folder: Folder, public: bool) -> Section:
    config = without_places(folder.config) if public else folder.config
    return repeat_section(command_of("train", config), f"Seed {config.run.seed}", (folder.metrics or {}))


def _answer(folder: Folder) -> str:
    metrics = folder.metrics
    if metrics is None:
        return "There is no answer yet."
    if "paths" in metrics:
        shown = [each.get("branch") or number(each["effective_dilation"]) for each in metrics["paths"]]
        fields = [each["receptive_field_px"] for each in metrics["paths"] if each["receptive_field_px"]]
        ends = [f"{side:.0f}" for side in (min(fields), max(fields))] if fields else []
        span = f"{' to '.join(dict.fromkeys(ends))} px" if ends else "the whole image"
        return f"{counted(len(shown), 'path')} with dilations {', '.join(shown)}: receptive fields of {span}."
    if gates := metrics.get("gates"):
        span = f"{gates['least_field_px']:.0f} to {gates['greatest_field_px']:.0f} px"
        return f"The input decides: each image has a receptive field of {span}, {gates['field_px']:.0f} px on average."
    dilation, side = metrics["effective_dilation"], metrics["receptive_field_px"]
    fixed = "" if folder.start is not None else " The dilation was fixed; nothing was learned."
    return f"Dilation {number(dilation)}: each output pixel sees {side:.0f} px.{fixed}"


def _verdicts(folder: Folder) -> list[tuple[str, str, str]]:
    if folder.metrics is None:
        return [("", "unfinished", folder.notes[0])]
    if "verdict" not in folder.search:
        return []
    factors = folder.search.get("factors", [folder.search])
    names = _names(factors) if len(factors) > 1 else [""]
    found = [each["verdict"] for each in factors]
    return [(name, verdict["kind"], verdict["reason"]) for name, verdict in zip(names, found, strict=True)]


def _facts(folder: Folder, baseline: Baseline | None) -> list[tuple[str, str]]:
    metrics = folder.metrics
    facts = []
    if metrics is not None and metrics["miou"] is not None:
        facts.append(("mIoU", f"{metrics['miou']:.3f}"))
        if baseline is not None and baseline.metrics["miou"] is not None:
            facts.append((f"mIoU {baseline.name}", f"{baseline.metrics['miou']:.3f}"))
    if metrics is not None and folder.start is not None and "paths" not in metrics:
        facts.append(("dilation", f"{number(folder.start)} → {number(metrics['effective_dilation'])}"))
    if metrics is not None:
        facts.append(("training", seconds_text(metrics["train_seconds"])))
    return [*facts, ("epochs", str(folder.config.optim.epochs)), ("seed", str(folder.config.run.seed))]
