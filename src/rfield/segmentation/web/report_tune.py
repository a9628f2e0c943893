"""The reports of `rfield tune`: one dilation, a set of dilations, and those of a network in a Python file."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rfield.segmentation.config.experiments import TuneConfig
from rfield.segmentation.config.values import split_model_file
from rfield.segmentation.files.untrusted import read_json
from rfield.segmentation.plots.style import number
from rfield.segmentation.runs import load_run
from rfield.segmentation.web.report_charts import Point, curve_chart
from rfield.segmentation.web.report_command import command_of, without_places
from rfield.segmentation.web.report_page import Block, Box, Page, Section, Table
from rfield.segmentation.web.report_parts import (
    best_sets,
    cost_matrix,
    data_name,
    rates_text,
    repeat_section,
    score_table,
    seconds_text,
    what_it_sees,
)
from rfield.segmentation.web.report_samples import sample_pictures
from rfield.text import counted


def tune_page(path: Path, public: bool) -> Page:
    """Return the report of a folder with an answer.json.

    Raises:
        ValueError: a file in it is damaged.
    """
    answer = read_json(path / "answer.json")
    config = TuneConfig(**answer["config"])
    model = config.train.model.model
    if (file := split_model_file(model)) is not None:
        model = file[1]
    data = data_name(config.train.data.data, public)
    kinds = {"factors": _of_file, "sizes": _of_sets, "curve": _of_one}
    headline, verdicts, boxes, start, sections = next(make for key, make in kinds.items() if key in answer)(
        path, answer
    )
    pictures, missing = ([], []) if public else _pictures(path, config, boxes, start)
    config = without_places(config) if public else config
    metrics = next(iter(_searches(path, config)), (None, {}))[1]
    return Page(
        title=f"rfield: {model} on {data}",
        kind="tune",
        question=f"What receptive field should {model} have on {data}?",
        answer=headline,
        verdicts=verdicts,
        facts=[
            ("seeds", str(config.grid.seeds)),
            ("epochs of each", str(config.train.optim.epochs)),
            *([("training in all", seconds_text(answer["seconds"]))] if "seconds" in answer else []),
        ],
        notes=missing,
        sections=[
            *([what_it_sees(pictures)] if pictures else []),
            *sections,
            repeat_section(command_of("tune", config), f"Seeds {config.grid.seeds}", metrics),
        ],
    )


_Parts = tuple[str, list[tuple[str, str, str]], list[Box], float | None, list[Section]]


def _of_one(path: Path, answer: Mapping[str, Any]) -> _Parts:
    """Return headline, verdicts, boxes, present dilation and sections of the answer on one dilation."""
    best, present, verdict = answer["best_dilation"], answer["present_dilation"], answer["verdict"]
    now = f"dilation {number(best)}, a receptive field of {answer['best_receptive_field_px']:.0f} px"
    recommended, unknown = verdict["kind"] in ("clear", "likely"), verdict["kind"] == "not reliable"
    least = f"{'Nothing is recommended; the' if unknown else 'The'} least loss was read at {now}."
    headline = f"Recommended: {now}." if recommended else least
    sides = {
        "now": (present, answer["present_receptive_field_px"], 0),
        "best": (best, answer["best_receptive_field_px"], 1),
    }
    boxes = [
        Box(f"{name}: dilation {number(dilation)}, {side:.0f} px", side, side, colour)
        for name, (dilation, side, colour) in sides.items()
    ]
    points = [Point(each["dilation"], each["loss"], each["standard_error"]) for each in answer["curve"]]
    field = None
    if len(answer["curve"]) > 1:
        low, high = answer["curve"][0], answer["curve"][-1]
        slope = (high["receptive_field_px"] - low["receptive_field_px"]) / (high["dilation"] - low["dilation"])
        field = slope, low["receptive_field_px"] - slope * low["dilation"]
    chart = curve_chart(
        "Held-out loss over the dilation", {"held-out": points}, "held-out loss", {"best": best, "now": present}, field
    )
    about = (
        f"For each of {counted(len(answer['minimum_of_each_seed']), 'seed')} one network was trained at all dilations "
        "by turns, and its loss was read at each on images that were held out of the training. Lower is better; the "
        f"band is the standard error of the difference to the best. Predicting the shares of the classes everywhere "
        f"would lose {answer['class_share_loss']:.3f}."
    )
    sections = [Section("The curve that the answer comes from", about, [chart]), *_verified(path, answer)]
    return headline, [("", verdict["kind"], verdict["reason"])], boxes, float(present), sections


def _verified(path: Path, answer: Mapping[str, Any]) -> list[Section]:
    """Return the scores of the grid of `--verify`."""
    if "verified" not in answer:
        about = "No network was trained at a fixed dilation to compare with; tune --verify trains some."
        return [Section("Scores of the classes", about, [])]
    grid = answer["verified"]["grid"]
    points = [Point(row["dilation"], row["miou"], row["miou_spread"]) for row in grid]
    chart = curve_chart(
        *("mIoU of networks of fixed dilation", {"fixed": points}, "mIoU"), band="standard deviation over the seeds"
    )
    blocks: list[Block] = [chart]
    seed = min(grid[0]["seeds"])
    files = [
        next(iter(sorted(path.glob(f"d{round(dilation):02d}-seed{seed}/metrics.json"))), None)
        for dilation in (answer["best_dilation"], answer["present_dilation"])
    ]
    if files[0] is not None and files[1] is not None:
        name = f"dilation {number(answer['present_dilation'])}"
        blocks.append(score_table(read_json(files[0]), (name, read_json(files[1]))))
    about = (
        f"Networks that were trained at one dilation alone: the best dilation of the curve is "
        f"{100 * answer['verified']['gap_to_best']:.2f} points of mIoU from the best of the grid."
    )
    return [Section("Verified by a grid", about, blocks)]


def _of_sets(path: Path, answer: Mapping[str, Any]) -> _Parts:
    """Return headline, verdicts, boxes and sections of the answer on a set of dilations."""
    verdict, rates = answer["verdict"], answer["best_rates"]
    what = f"{counted(len(rates), 'path')} with dilation {rates_text(rates)}"
    headline = f"Recommended: {what}." if answer["recommended_rates"] else f"The best set that was read: {what}."
    boxes = [
        Box(f"dilation {rates_text([rate])}, {side:.0f} px", side, side, 1 + place % 4)
        for place, (rate, side) in enumerate(zip(rates, answer["receptive_fields_px"], strict=True))
    ]
    rows = [
        [
            str(len(size["rates"])),
            rates_text(size["rates"]),
            f"{size['loss']:.4f}",
            *("-" if size[key] is None else f"{size[key]:.2g}" for key in ("error", "spread")),
        ]
        for size in answer["sizes"]
    ]
    marked = next((place for place, size in enumerate(answer["sizes"]) if size["rates"] == rates), None)
    header = ("paths", "dilations", "held-out loss", "standard error", "spread over the seeds")
    table = Table("The best set of each number of paths; the smallest good one is bold", header, rows, marked)
    blocks: list[Block] = [table]
    for name, metrics in _searches(path, TuneConfig(**answer["config"])):
        sets = metrics["search"]["sets"]
        blocks.append(best_sets(f"The ten best combinations of {name}", sets))
        kept = [place for place, rate in enumerate(sets["chosen"]["rates"]) if rate is not None]
        costs = [[row[place] for place in kept] for row in sets["class_costs"]]
        names = [f"dilation {rates_text([sets['chosen']['rates'][place]])}" for place in kept]
        blocks.append(cost_matrix(costs, [*metrics["per_class"]], names))
    about = (
        "For each seed one network was trained while each path drew its dilation from its own share of the range; then "
        "every combination was scored on held-out images by adding the logits of the paths."
    )
    sections = [Section("The sets that the answer comes from", about, blocks)]
    return headline, [("", verdict["kind"], verdict["reason"])], boxes, None, sections


def _of_file(path: Path, answer: Mapping[str, Any]) -> _Parts:
    """Return headline, verdicts and sections of the answer on a network in a Python file."""
    found = answer["recommended_dilations"]
    headline = f"Recommended dilations for {counted(len(found), 'layer')}." if found else "Nothing is recommended."
    verdicts, charts, rows = [], [], []
    for factor in answer["factors"]:
        name = ", ".join(factor["layers"]) + (f" ({factor['side']})" if factor["side"] else "")
        verdicts.append((name, factor["verdict"]["kind"], factor["verdict"]["reason"]))
        points = [Point(dilation, loss) for dilation, loss in factor["curve"] if math.isfinite(loss)]
        charts.append(curve_chart(f"Held-out loss over the dilation of {name}", {name: points}, "held-out loss"))
        rows += [[layer, f"{each['now']}", f"{each['best']}"] for layer, each in factor["layers"].items()]
    table = Table("The layers", ("layer", "dilation now", "best dilation that was read"), rows)
    return headline, verdicts, [], None, [Section("The curves that the answer comes from", "", [*charts, table])]


def _searches(path: Path, config: TuneConfig) -> list[tuple[str, dict[str, Any]]]:
    """Return the names and metrics of the runs of the search, one for each seed."""
    found = []
    for seed in config.grid.seeds:
        found += [
            (file.parent.name, read_json(file)) for file in sorted(path.glob(f"d*-seed{seed}-sampled/metrics.json"))
        ]
    return found


def _pictures(
    path: Path, config: TuneConfig, boxes: Sequence[Box], start: float | None
) -> tuple[list[Block], list[str]]:
    """Return pictures with the network of the first seed, whose weights of the search label at the present dilation."""
    names = [name for name, _ in _searches(path, config)]
    if not names or not boxes:
        return [], []
    try:
        return sample_pictures(load_run(path / names[0]), boxes, start, None)
    except (ValueError, OSError) as error:
        return [], [f"The network of {names[0]} cannot be opened, so that no image is labelled: {error}."]
