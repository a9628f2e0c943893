"""Find the receptive field that a network should have, and write one page about it."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rfield.layers.dilation import round_dilation
from rfield.search import Verdict, judge, standard_errors
from rfield.segmentation import plots
from rfield.segmentation.config.experiments import TuneConfig
from rfield.segmentation.conventions import Progress
from rfield.segmentation.experiments.study import Point, Trial
from rfield.segmentation.experiments.tables import deviation, field_of, markdown, own_dilation, summarise, sweep_table
from rfield.segmentation.experiments.trials import finish_trials
from rfield.segmentation.experiments.tune_sets import run_tune_sets
from rfield.segmentation.files.atomic import write_json, write_text
from rfield.segmentation.training.search_report import has_random_backbone
from rfield.segmentation.web.report import try_report
from rfield.text import counted


def run_tune(config: TuneConfig, progress: Progress | None = None) -> str:
    """Read the whole receptive-field curve of a network, recommend a dilation, and write the answer into `out`.

    For each seed, one network is trained at randomly drawn dilations, so that it works at all of them, and its loss
    on held-out training images is read at each (`SampledSearch`). The answer is the minimum of the mean curve, and how
    sure it is (`rfield.search.judge`); if it is not reliable, nothing is recommended. The files are `answer.md`,
    `answer.json` and `curve.png`; the runs are beside them, and another call only adds what is missing. With several
    paths the answer is a set of dilations, see `run_tune_sets`.

    Args:
        config: what to tune.
        progress: as in `run_trials`.

    Returns:
        The page.

    Raises:
        ValueError, OSError: as in `finish_trials`.
    """
    if config.train.model.paths != 1:
        return run_tune_sets(config, progress)
    out = Path(config.train.run.out)
    own = own_dilation(config.train.model.model)
    # The start of a sampled search makes no difference: another present dilation needs no other runs.
    searches = finish_trials(config, [Point("sampled", own, seed) for seed in config.grid.seeds], progress)
    present = config.grid.present_dilation or own
    verdict, errors = _judge_searches(config, searches, present)
    answer = _answer(config, searches, verdict, errors, present)
    best = answer["best_dilation"]
    page = _page(config, answer, verdict)
    if config.grid.verify:
        answer["verified"], section = _verify(config, round_dilation(best), present, progress)
        page += section
    losses = common_curve([dict(trial.metrics["search"]["curve"]) for trial in searches])
    marked = {"best": best, "present": present}
    figure = plots.rf_curve(
        {"held-out": losses}, "held-out loss", marked, field_of(config), errors={"held-out": errors}
    )
    plots.save(figure, out / "curve.png")
    write_json(out / "answer.json", answer)
    write_text(out / "answer.md", page)
    if config.train.run.report != "none":
        try_report(out)
    return page + f"\nthis page, answer.json and curve.png are in {out}"


def _judge_searches(
    config: TuneConfig, searches: Sequence[Trial], present: int
) -> tuple[Verdict, dict[float, float | None]]:
    """Return how sure the best dilation is, and the standard error of each dilation's difference to it."""
    found = [trial.metrics["search"] for trial in searches]
    readings = [dict(search["losses"]) for search in found]
    images = [search["held_out"] for search in found]
    verdict = judge(
        [[reading] for reading in readings],
        present,
        chance=_mean_chance(searches),
        steps=min(search["steps"] for search in found),
        random_backbone=has_random_backbone(config.train.model),
        images=images,
    )
    errors = standard_errors(readings, images)
    return verdict, {dilation: None if np.isnan(error) else error for dilation, error in errors.items()}


def _mean_chance(searches: Sequence[Trial]) -> float:
    return float(np.mean([trial.metrics["search"]["class_share_loss"] for trial in searches]))


def _answer(
    config: TuneConfig,
    searches: Sequence[Trial],
    verdict: Verdict,
    errors: Mapping[float, float | None],
    present: int,
) -> dict[str, Any]:
    """Return the content of `answer.json`."""
    best = verdict.dilation
    assert best is not None  # A search without a finite loss ends in an error.
    curves = [dict(trial.metrics["search"]["curve"]) for trial in searches]
    slope, offset = field_of(config)
    gains = [curve_at(curve, present) - curve_at(curve, best) for curve in curves]
    relative = [gain / curve_at(curve, present) for gain, curve in zip(gains, curves, strict=True)]
    return {
        "verdict": verdict.plain(),
        "recommended_dilation": None if verdict.kind == "not reliable" else best,
        "best_dilation": best,
        "best_receptive_field_px": slope * best + offset,
        "present_dilation": present,
        "present_receptive_field_px": slope * present + offset,
        "gain": {"loss": float(np.mean(gains)), "spread": deviation(gains)},
        "relative_gain": {"loss": float(np.mean(relative)), "spread": deviation(relative)},
        "minimum_of_each_seed": {
            str(trial.point.seed): min(curve, key=lambda dilation: curve[dilation])
            for trial, curve in zip(searches, curves, strict=True)
        },
        "curve": [
            {
                "dilation": dilation,
                "receptive_field_px": slope * dilation + offset,
                "loss": float(np.mean(values)),
                "spread": deviation(values),
                "standard_error": errors[dilation],
            }
            for dilation, values in common_curve(curves).items()
        ],
        "class_share_loss": _mean_chance(searches),
        "seconds": sum(trial.metrics["train_seconds"] for trial in searches),
        "config": config.plain(),
    }


def common_curve(curves: Sequence[Mapping[float, float]]) -> dict[float, list[float]]:
    """Return the values of several curves at the dilations of all, interpolated where a curve has none.

    >>> common_curve([{1.0: 3.0, 4.0: 1.0}, {1.0: 5.0, 2.0: 3.0, 4.0: 2.0}])
    {1.0: [3.0, 5.0], 2.0: [2.0, 3.0], 4.0: [1.0, 2.0]}
    """
    dilations = sorted({dilation for curve in curves for dilation in curve})
    return {dilation: [curve_at(curve, dilation) for curve in curves] for dilation in dilations}


def curve_at(curve: Mapping[float, float], dilation: float) -> float:
    """Return a curve's value, linear in the logarithm of the dilation between its points, constant beyond its ends."""
    if dilation in curve:
        return curve[dilation]
    places = sorted(curve)
    return float(np.interp(np.log(dilation), np.log(places), [curve[place] for place in places]))


def _verify(config: TuneConfig, read: int, present: int, progress: Progress | None) -> tuple[dict[str, Any], str]:
    """Train the grid of fixed dilations; return it as data, and as a section of the page."""
    dilations = sorted({*config.grid.dilations, read, present})
    points = [Point("none", dilation, seed) for dilation in dilations for seed in config.grid.seeds]
    rows = summarise(finish_trials(config, points, progress))
    best = max(rows, key=lambda row: row.miou)
    chosen, now = (next(row for row in rows if row.dilation == dilation) for dilation in (read, present))
    verified = {
        "best_dilation": best.dilation,
        "gap_to_best": best.miou - chosen.miou,
        "gain_over_present": chosen.miou - now.miou,
        "grid": [dataclasses.asdict(row) for row in rows],
    }
    section = (
        "\n## Verified by a grid\n\n"
        f"Networks of fixed dilation, scored on {config.train.data.val_split}: mIoU {chosen.miou:.4f} at {read}, where "
        f"the least loss was read,\n{now.miou:.4f} at the present {present}, {best.miou:.4f} at the grid's best "
        f"{best.dilation}.\n"
        f"Dilation {read} is {100 * (best.miou - chosen.miou):.2f} points from the best of the grid"
        f"{_plus_minus(best.miou_spread)}.\n\n{sweep_table(rows)}\n"
    )
    return verified, section


def _plus_minus(spread: float | None) -> str:
    return "" if spread is None else f",\nwhose own spread over the seeds is {100 * spread:.2f} points"


def _headline(verdict: Verdict, field_px: float) -> str:
    """Return the answer in one paragraph."""
    name = f"{verdict.kind[0].upper()}{verdict.kind[1:]}"
    best = f"dilation {verdict.dilation:.3g}, a receptive field of {field_px:.4g} px"
    if verdict.kind in ("clear", "likely"):
        return f"**Recommended: {best}.**\n{name}: {verdict.reason}."
    nothing = "; nothing is recommended" * (verdict.kind == "not reliable")
    return f"**{name}: {verdict.reason}.**\nThe least loss was read at {best}{nothing}."


def _page(config: TuneConfig, answer: dict[str, Any], verdict: Verdict) -> str:
    """Return the answer as a page of Markdown."""
    train = config.train
    best, present = answer["best_dilation"], answer["present_dilation"]
    points = {point["dilation"]: point["loss"] for point in answer["curve"]}
    gain, relative = answer["gain"], answer["relative_gain"]
    setting = f"{counted(train.optim.epochs, 'epoch')}, {counted(len(config.grid.seeds), 'seed')}"
    spread, relative_spread = (
        "" if each["spread"] is None else f" (spread {unit * each['spread']:.3g})"
        for each, unit in ((gain, 1), (relative, 100))
    )
    minima = ", ".join(f"{dilation:.3g}" for dilation in answer["minimum_of_each_seed"].values())
    beyond = ""
    if not min(points) <= present <= max(points):
        beyond = (
            f" (read at the curve's nearest end: {train.model.model}'s map holds dilations up to {max(points):.3g})"
        )
    table = markdown(
        ("dilation", "RF [px]", "held-out loss", "error", "spread"),
        [
            (
                f"**{point['dilation']:.3g}**" if point["dilation"] == best else f"{point['dilation']:.3g}",
                f"{point['receptive_field_px']:.4g}",
                f"{point['loss']:.4f}",
                *("-" if point[key] is None else f"{point[key]:.4f}" for key in ("standard_error", "spread")),
            )
            for point in answer["curve"]
        ],
    )
    return f"""# What receptive field should this network have?

{train.model.model} on {train.data.data}, backbone frozen, {setting}.

{_headline(verdict, answer["best_receptive_field_px"])}
Now: dilation {present:.3g}, {answer["present_receptive_field_px"]:.4g} px. Minima of the single seeds: {minima}.

From the present dilation to the best the held-out loss falls by {gain["loss"]:.3g}{spread}, or \
{100 * relative["loss"]:.3g} %{relative_spread}: from {curve_at(points, present):.4g}{beyond} to {points[best]:.4g}.

What this is: for each seed one network was trained at all dilations by turns, and its loss was read at each
dilation on training images that it had not seen: cross-entropy a pixel, where a pixel weighs by the root of one over
its class's share. Predicting the classes' shares everywhere would lose {answer["class_share_loss"]:.4g}.
The gain is the difference between two points of that curve, averaged over the seeds. An error is the standard error of
a point's difference to the best, over the images or over the seeds, whichever is larger; a spread is the standard
deviation over the seeds. Networks trained at one dilation alone have losses of their own, and the gain in mIoU is
another number: --verify measures it.

{table}
"""
