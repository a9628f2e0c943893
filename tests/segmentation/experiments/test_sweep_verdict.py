"""How sure the best of a grid is: in pairs of the same seed."""

from typing import Any

import pytest

from rfield.segmentation.config.experiments import SweepConfig
from rfield.segmentation.experiments.study import Point, Trial
from rfield.segmentation.experiments.sweep import judge_grid


def trials(scores: dict[int, list[float]], images: int = 50, per_class: dict[str, Any] | None = None) -> list[Trial]:
    """Runs of fixed dilation with these mIoUs, one a seed."""
    classes = per_class or {"a": 0.9, "b": 0.5}
    return [
        Trial(Point("none", dilation, seed), {"miou": miou, "val_images": images, "per_class": classes})
        for dilation, mious in scores.items()
        for seed, miou in enumerate(mious)
    ]


def config(**values: Any) -> SweepConfig:
    return SweepConfig(data="synthetic", out="", model="largefov_vgg16", **values)


VALLEY = {2: [0.5, 0.52, 0.48], 6: [0.7, 0.72, 0.69], 12: [0.65, 0.67, 0.63], 24: [0.4, 0.42, 0.44]}


def test_clear_against_the_model_s_own_dilation() -> None:
    verdict, errors = judge_grid(config(), trials(VALLEY))
    assert verdict is not None
    assert (verdict.kind, verdict.dilation, verdict.present) == ("clear", 6, 12)
    assert verdict.gain == pytest.approx((0.05 + 0.05 + 0.06) / 3)
    assert verdict.standard_error == pytest.approx(0.01 / 3)
    assert errors[6] == 0
    assert errors[12] == pytest.approx(0.01 / 3)


def test_the_nearest_where_its_own_is_not_in_the_grid() -> None:
    grid = {2: VALLEY[2], 6: VALLEY[6], 10: VALLEY[12], 24: VALLEY[24]}
    verdict, _ = judge_grid(config(), trials(grid))
    assert verdict is not None
    assert str(verdict).startswith("clear: dilation 6 beats the present 10 by 0.0533 ± 0.0033")
    assert str(verdict).endswith("(the model's own 12 is not in the grid)")


@pytest.mark.parametrize(
    ("scores", "options", "values", "reason"),
    [
        ({d: each[:2] for d, each in VALLEY.items()}, {}, {}, "2 common seeds, where 3 are needed"),
        ({**VALLEY, 8: [0.6]}, {}, {}, "1 common seed, where 3 are needed"),
        (VALLEY, {"images": 15}, {}, "15 validation images, where 16 are needed"),
        (VALLEY, {}, {"freeze_backbone": True}, "the backbone is frozen at random weights"),
        (VALLEY, {"per_class": {"a": 0.7, "b": 0.0, "c": None}}, {}, "every run labels all pixels alike"),
        ({6: VALLEY[6]}, {}, {}, "one dilation has nothing to be compared with"),
    ],
)
def test_not_reliable(scores: Any, options: Any, values: Any, reason: str) -> None:
    verdict, _ = judge_grid(config(**values), trials(scores, **options))
    assert verdict is not None
    assert str(verdict) == f"not reliable: {reason}"


def test_dilations_without_a_common_seed() -> None:
    one, two = trials({6: [0.5]}), [Trial(Point("none", 8, 1), {"miou": 0.6, "val_images": 50, "per_class": {}})]
    verdict, errors = judge_grid(config(), [*one, *two])
    assert str(verdict) == "not reliable: the dilations have no seed in common"
    assert errors == {}


def test_the_end_of_a_grid_asks_for_more_dilations_and_d_1_for_finer_features() -> None:
    rising = {d: [0.1 * place + 0.01 * seed for seed in range(3)] for place, d in enumerate((2, 6, 24), start=1)}
    verdict, _ = judge_grid(config(), trials(rising))
    assert str(verdict) == "at the edge: dilation 24 is the largest of the grid: train larger ones too, by --dilations"
    falling = dict(zip((1, 6, 24), list(rising.values())[::-1], strict=True))
    verdict, _ = judge_grid(config(), trials(falling))
    assert "dilation 1 is the smallest that was read: try a smaller output stride" in str(verdict)


def test_searches_are_judged_by_themselves() -> None:
    searched = [Trial(Point("sampled", 6, 0), {"miou": 0.9})]
    assert judge_grid(config(), searched) == (None, {})
    verdict, _ = judge_grid(config(), [*trials(VALLEY), *searched])
    assert verdict is not None
    assert verdict.dilation == 6
