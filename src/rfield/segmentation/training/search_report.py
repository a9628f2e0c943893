"""A finished search in plain numbers, and how sure its answer is."""

from collections.abc import Sequence
from typing import Any

from rfield.search import Verdict, judge, standard_errors
from rfield.segmentation.config.train import TrainConfig
from rfield.segmentation.models import default_weights
from rfield.segmentation.training.module import Field

_AXES = ("height", "width")


def describe_search(
    config: TrainConfig,
    saved: dict[str, Any],
    fields: Sequence[Field] = (),
    ids: Sequence[str] = (),
    chances: Sequence[float] = (),
) -> dict[str, Any]:
    """A saved search in plain numbers: the curves that it read, or the way that it went (at most 200 points).

    `curve`, `errors`, `readings`, `losses`, `verdict` and `trajectory` are the first factor's along the height;
    `factors` holds all of several. `losses` are the last reading's, image by image in the order of `held_out`.

    Args:
        config: of the run.
        saved: the search in the run's checkpoint.
        fields: what the network sees at the end.
        ids: the names of the held-out images.
        chances: for each factor the held-out loss of predicting the classes' shares everywhere.
    """
    search = saved["search"]
    described = {"kind": config.search, "steps": search["steps"], "seconds": saved["seconds"]}
    if search["done"]:
        described["unsnapped_dilation"] = [value for factor in search["unsnapped"] for value in factor]
    delivered = {(field.path, field.axis): field.effective_dilation for field in fields}
    if config.search == "sampled":
        factors = []
        for (path, axis), found in search["losses"].items():
            verdict = judge(
                [[losses for _, losses in found]],
                search["starts"][path][axis],
                chosen=delivered[path, axis] if search["done"] else None,
                chance=chances[path],
                steps=search["step_index"],
                random_backbone=has_random_backbone(config),
            )
            readings = [
                {
                    "step": step,
                    "curve": [list(point) for point in curve.items()],
                    "errors": [list(point) for point in plain_errors(losses)],
                }
                for (step, curve), (_, losses) in zip(search["readings"][path, axis], found, strict=True)
            ]
            last = {key: readings[-1][key] for key in ("curve", "errors")}
            losses = {"losses": [list(point) for point in found[-1][1].items()]}
            own = {
                **last,
                "class_share_loss": chances[path],
                "verdict": verdict.plain(),
                "readings": readings,
                **losses,
            }
            factors.append({"path": path, "axis": _AXES[axis], **own})
        first = {key: value for key, value in factors[0].items() if key not in ("path", "axis")}
        return {
            **described,
            **first,
            "held_out": list(ids),
            **({"factors": factors} if len(factors) > 1 else {}),
        }
    reason = (
        f"a search by {config.search} reads no curve, so that nothing says how good its dilation is; sampled reads one"
    )
    described["verdict"] = Verdict("not reliable", reason, next(iter(delivered.values()), None)).plain()
    every = -(-len(search["trajectory"]) // 200) or 1
    points = search["trajectory"][::every]
    described["trajectory"] = [[step, dilations[0]] for step, dilations in points]
    if len(points[0][1]) > 1:
        described["trajectories"] = [[step, *dilations] for step, dilations in points]
    return described


def has_random_backbone(config: TrainConfig) -> bool:
    """Whether a run's backbone stays as it was drawn."""
    return config.freeze_backbone and (config.weights or default_weights(config.model)) in (None, "random")


def plain_errors(losses: Any) -> list[tuple[float, float | None]]:
    """`standard_errors` for a JSON file: None where there is none."""
    return [(dilation, error if error == error else None) for dilation, error in standard_errors([losses]).items()]
