"""A finished search in plain numbers, and how sure its answer is."""

from collections.abc import Sequence
from typing import Any

from rfield.search import Verdict, judge, standard_errors
from rfield.segmentation.config.train import ModelOptions
from rfield.segmentation.models import default_weights
from rfield.segmentation.training.fields import Field

_AXES = ("height", "width")


def describe_search(
    kind: str,
    saved: dict[str, Any],
    fields: Sequence[Field] = (),
    ids: Sequence[str] = (),
    chances: Sequence[float] = (),
    random_backbone: bool = False,
) -> dict[str, Any]:
    """Return a saved search in plain numbers: the curves that it read, or its way (at most 200 points).

    `curve`, `errors`, `readings`, `losses`, `verdict` and `trajectory` are those of the first factor along the height;
    `factors` holds all if there are several. `losses` are the last reading's, for each image in the order of
    `held_out`.

    Args:
        kind: gradient, spsa or sampled.
        saved: the search in the run's checkpoint.
        fields: the receptive fields at the end.
        ids: the names of the held-out images.
        chances: for each factor the held-out loss of predicting the classes' shares everywhere.
        random_backbone: whether the backbone stayed at random weights.
    """
    search = saved["search"]
    described = {"kind": kind, "steps": search["steps"], "seconds": saved["seconds"]}
    if search["done"]:
        described["unsnapped_dilation"] = [value for factor in search["unsnapped"] for value in factor]
    delivered = {(field.path, field.axis): field.effective_dilation for field in fields}
    if kind != "sampled":
        verdict = Verdict(
            "not reliable",
            f"a search by {kind} reads no curve, so that nothing says how good its dilation is; sampled reads one",
            next(iter(delivered.values()), None),
        )
        return {**described, "verdict": verdict.plain(), **_describe_way(search["trajectory"])}
    left_out = search["left_out"]
    factors = [
        {
            "path": path,
            "axis": _AXES[axis],
            **_describe_factor(search, path, axis, delivered.get((path, axis)), chances[path], random_backbone),
        }
        for path, axis in search["losses"]
        if path not in left_out
    ]
    first = {key: value for key, value in factors[0].items() if key not in ("path", "axis")}
    several = {"factors": factors} if len(search["starts"]) > 1 else {}
    sets = {"sets": _describe_sets(search["set_readings"][-1])} if search["set_readings"] else {}
    return {**described, **first, "held_out": list(ids), **several, **sets}


def _describe_sets(reading: dict[str, Any]) -> dict[str, Any]:
    """Return the last evaluation of combinations, with square dilations as numbers and unknown errors as None."""

    def entry(found: dict[str, Any]) -> dict[str, Any]:
        rates = [rate[0] if rate is not None and len(rate) == 1 else rate for rate in found["rates"]]
        return {**found, "rates": rates, "error": found["error"] if found["error"] == found["error"] else None}

    return {
        "chosen": entry(reading["chosen"]),
        "best": [entry(found) for found in reading["best"]],
        "best_of_each_size": [entry(found) for found in reading["sizes"]],
        "class_costs": reading["class_costs"],
    }


def _describe_factor(
    search: dict[str, Any], path: int, axis: int, delivered: float | None, chance: float, random_backbone: bool
) -> dict[str, Any]:
    """Return what a sampled search read of one factor, and how sure its answer is."""
    found = search["losses"][path, axis]
    verdict = judge(
        [[losses for _, losses in found]],
        search["starts"][path][axis],
        chosen=delivered if search["done"] else None,
        chance=chance,
        steps=search["step_index"],
        random_backbone=random_backbone,
    )
    readings = [
        {
            "step": step,
            "curve": [list(point) for point in curve.items()],
            "errors": [list(point) for point in plain_errors(losses)],
        }
        for (step, curve), (_, losses) in zip(search["readings"][path, axis], found, strict=True)
    ]
    return {
        "curve": readings[-1]["curve"],
        "errors": readings[-1]["errors"],
        "class_share_loss": chance,
        "verdict": verdict.plain(),
        "readings": readings,
        "losses": [list(point) for point in found[-1][1].items()],
    }


def _describe_way(trajectory: Sequence[Any]) -> dict[str, Any]:
    """Return at most 200 points (step, dilation) of a search; of several factors all dilations besides."""
    points = trajectory[:: -(-len(trajectory) // 200) or 1]
    described = {"trajectory": [[step, dilations[0]] for step, dilations in points]}
    if len(points[0][1]) > 1:
        described["trajectories"] = [[step, *dilations] for step, dilations in points]
    return described


def has_random_backbone(options: ModelOptions) -> bool:
    """Return whether the backbone stays at random weights."""
    return options.freeze_backbone and (options.weights or default_weights(options.model)) in (None, "random")


def plain_errors(losses: Any) -> list[tuple[float, float | None]]:
    """`standard_errors` for a JSON file: None where there is none."""
    return [(dilation, error if error == error else None) for dilation, error in standard_errors([losses]).items()]
