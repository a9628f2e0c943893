"""Find the set of dilations that a network's parallel paths should have, and write one page about it."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rfield.search import Verdict
from rfield.search.certainty import shortcomings
from rfield.segmentation import plots
from rfield.segmentation.config.experiments import TuneConfig
from rfield.segmentation.conventions import Progress
from rfield.segmentation.experiments.study import Point, Trial
from rfield.segmentation.experiments.tables import deviation, field_of, markdown, own_dilation
from rfield.segmentation.experiments.trials import finish_trials
from rfield.segmentation.files.atomic import write_json, write_text
from rfield.segmentation.training.search_report import has_random_backbone
from rfield.segmentation.web.report import try_report
from rfield.text import counted

Rates = list[Any]
"""A set in ascending order: each dilation is a number, or [height, width]."""


def run_tune_sets(config: TuneConfig, progress: Progress | None = None) -> str:
    """Search for a set of dilations, and write the answer into `out`: `answer.md`, `answer.json` and `sets.png`.

    For each seed one network with parallel paths is trained by a sampled search, which scores all combinations on
    held-out training images. The recommended set has the fewest paths whose loss is within one standard error of the
    best.

    Args, Returns, Raises: as `run_tune`.
    """
    out = Path(config.train.run.out)
    own = own_dilation(config.train.model.model)
    searches = finish_trials(config, [Point("sampled", own, seed) for seed in config.grid.seeds], progress)
    sizes = [_size(searches, count) for count in _common_sizes(searches)]
    best = min(sizes, key=lambda size: size["loss"])
    enough = next(size for size in sizes if size["loss"] - best["loss"] <= (size["error"] or 0.0))
    verdict = _judge(config, searches, sizes[0], enough)
    slope, offset = field_of(config)
    answer = {
        "verdict": {
            "kind": verdict.kind,
            "reason": verdict.reason,
            "gain": verdict.gain,
            "error": verdict.standard_error,
        },
        "recommended_rates": None if verdict.kind == "not reliable" else enough["rates"],
        "best_rates": enough["rates"],
        "receptive_fields_px": [slope * _longest(rate) + offset for rate in enough["rates"]],
        "sizes": sizes,
        "best_of_each_seed": {str(trial.point.seed): trial.metrics["search"]["sets"]["best"] for trial in searches},
        "seconds": sum(trial.metrics["train_seconds"] for trial in searches),
        "config": config.plain(),
    }
    page = _page(config, answer, verdict)
    rows = [(len(size["rates"]), size["loss"], size["error"] or 0.0, _text(size["rates"])) for size in sizes]
    plots.save(plots.set_sizes(rows), out / "sets.png")
    write_json(out / "answer.json", answer)
    write_text(out / "answer.md", page)
    if config.train.run.report != "none":
        try_report(out)
    return page + f"\nthis page, answer.json and sets.png are in {out}"


def _common_sizes(searches: Sequence[Trial]) -> list[int]:
    found = [{_count(each) for each in trial.metrics["search"]["sets"]["best_of_each_size"]} for trial in searches]
    return sorted(set.intersection(*found))


def _count(entry: dict[str, Any]) -> int:
    return sum(rate is not None for rate in entry["rates"])


def _size(searches: Sequence[Trial], count: int) -> dict[str, Any]:
    """Return the best set of so many paths: its dilations, mean loss, and the error of its difference to the best."""
    entries = [
        next(each for each in trial.metrics["search"]["sets"]["best_of_each_size"] if _count(each) == count)
        for trial in searches
    ]
    least = [trial.metrics["search"]["sets"]["best"][0]["loss"] for trial in searches]
    excess = [entry["loss"] - loss for entry, loss in zip(entries, least, strict=True)]
    errors = [entry["error"] for entry in entries if entry["error"] is not None]
    over_seeds = statistics.stdev(excess) / math.sqrt(len(excess)) if len(excess) > 1 else 0.0
    each = [sorted((rate for rate in entry["rates"] if rate is not None), key=_longest) for entry in entries]
    return {
        "rates": _middle(each),
        "rates_of_each_seed": {str(trial.point.seed): rates for trial, rates in zip(searches, each, strict=True)},
        "loss": statistics.mean(entry["loss"] for entry in entries),
        "error": max(statistics.mean(errors), over_seeds) if errors else None,
        "spread": deviation([entry["loss"] for entry in entries]),
    }


def _middle(sets: Sequence[Rates]) -> Rates:
    """Return for each place in ascending order the geometric mean over several sets, rounded.

    >>> _middle([[1.0, 4.0, 8.0], [2.0, 4.0, 18.0]]), _middle([[[1.0, 2.0]], [[1.0, 8.0]]])
    ([1, 4, 12], [[1, 4]])
    """

    def mean(values: Sequence[float]) -> int:
        return max(1, round(statistics.geometric_mean(values)))

    return [
        [mean(axis) for axis in zip(*rates, strict=True)] if isinstance(rates[0], list) else mean(rates)
        for rates in zip(*sets, strict=True)
    ]


def _longest(rate: Any) -> float:
    """Return the dilation along the height.

    >>> _longest([2.0, 3.0]), _longest(4)
    (2.0, 4)
    """
    height: float = rate[0] if isinstance(rate, list) else rate
    return height


def _text(rates: Rates) -> str:
    return ", ".join(
        "x".join(f"{side:g}" for side in rate) if isinstance(rate, list) else f"{rate:g}" for rate in rates
    )


def _judge(config: TuneConfig, searches: Sequence[Trial], one: dict[str, Any], enough: dict[str, Any]) -> Verdict:
    """Return how certain the gain of the recommended set over one path is."""
    images = min(len(trial.metrics["search"]["held_out"]) for trial in searches)
    steps = min(trial.metrics["search"]["steps"] for trial in searches)
    reasons = shortcomings(images, steps, has_random_backbone(config.train.model))
    gain, error = one["loss"] - enough["loss"], one["error"]
    count = len(enough["rates"])
    against = f"{counted(count, 'path')} at {_text(enough['rates'])} against one at {_text(one['rates'])}"
    reason = f"the held-out loss falls by {gain:.3g} ± {error or 0:.2g}: {against}"
    if reasons:
        return Verdict("not reliable", "; ".join(reasons), gain=gain, standard_error=error)
    if count == 1:
        return Verdict(
            "flat", "no larger set is better than one path by more than a standard error", None, None, 0.0, error
        )
    kind: Any = "clear" if gain > 2 * (error or math.inf) else "likely"
    return Verdict(kind, reason, gain=gain, standard_error=error)


def _page(config: TuneConfig, answer: dict[str, Any], verdict: Verdict) -> str:
    """Return the answer as a page of Markdown."""
    train, rates = config.train, _text(answer["best_rates"])
    name = f"{verdict.kind[0].upper()}{verdict.kind[1:]}: {verdict.reason}."
    headline = (
        f"**{name}**\nThe best set that was read is {rates}; nothing is recommended."
        if verdict.kind == "not reliable"
        else f"**Recommended: {counted(len(answer['best_rates']), 'path')} with dilation {rates}.**\n{name}"
    )
    sizes, best = _tables(answer)
    fields = ", ".join(f"{field:.4g}" for field in answer["receptive_fields_px"])
    return f"""# What set of receptive fields should this network have?

{train.model.model} on {train.data.data}, backbone frozen, {counted(train.optim.epochs, "epoch")}, \
{counted(len(config.grid.seeds), "seed")}, up to {counted(int(_paths(config)), "path")}.

{headline}
Receptive fields: {fields} px. As a fixed network: `--aspp {rates.replace(" ", "")} --path-norm --search none`.

{sizes}

The best sets of each seed:

{best}

What this is: for each seed one network was trained while each path drew its dilation from its own share of the range.
Then each path's logits were computed on held-out training images at each of its dilations, and the loss of every
combination is that of the sum. A set of a row is, place by place in ascending order, the geometric mean over the seeds.
An error is the standard error of the difference to the best set, over the images or over the seeds, whichever is
larger; a spread is the standard deviation over the seeds. The row that is recommended has the fewest paths within one
error of the best.
"""


def _tables(answer: dict[str, Any]) -> tuple[str, str]:
    """Return the tables of the numbers of paths and of each seed's best sets."""
    sizes = markdown(
        ("paths", "dilations", "held-out loss", "error", "spread", "cost of the head"),
        [
            (
                str(len(size["rates"])),
                f"**{_text(size['rates'])}**" if size["rates"] == answer["best_rates"] else _text(size["rates"]),
                f"{size['loss']:.4f}",
                *("-" if size[key] is None else f"{size[key]:.4f}" for key in ("error", "spread")),
                f"{len(size['rates'])} x one path",
            )
            for size in answer["sizes"]
        ],
    )
    best = markdown(
        ("seed", "dilations", "held-out loss", "error"),
        [
            (seed, _text([rate for rate in each["rates"] if rate is not None]), f"{each['loss']:.4f}",
             "-" if each["error"] is None else f"{each['error']:.4f}")
            for seed, entries in answer["best_of_each_seed"].items()
            for each in entries[:5]
        ],
    )  # fmt: skip
    return sizes, best


def _paths(config: TuneConfig) -> int:
    paths = config.train.model.paths
    return 4 if paths == "auto" else paths
