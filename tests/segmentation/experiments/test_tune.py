import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rfield.search import Verdict, standard_errors
from rfield.segmentation.config.experiments import TuneConfig
from rfield.segmentation.experiments import run_tune
from rfield.segmentation.experiments.tune import _headline, common_curve, curve_at


@pytest.mark.slow
def test_the_answer_is_the_curve_s_minimum_and_what_it_is_worth(tmp_path: Path, tiny: dict[str, Any]) -> None:
    out = tmp_path / "tune"
    values = {**tiny, "out": str(out), "seeds": (1, 0), "dilations": (2, 3)}
    page = run_tune(TuneConfig(**values, present_dilation=2))
    answer = json.loads((out / "answer.json").read_text())
    losses = {point["dilation"]: point["loss"] for point in answer["curve"]}
    best = min(losses, key=lambda dilation: losses[dilation])
    assert answer["best_dilation"] == best
    assert answer["best_receptive_field_px"] == 15 + 8 * best
    assert (answer["present_dilation"], answer["present_receptive_field_px"]) == (2, 31)
    assert (min(losses), max(losses)) == (1, 10), "the whole curve: from 1 to the map's size"

    searches = {seed: json.loads((out / f"d04-seed{seed}-sampled/metrics.json").read_text()) for seed in (0, 1)}
    curves = {seed: dict(metrics["search"]["curve"]) for seed, metrics in searches.items()}
    assert losses == {d: float(np.mean(v)) for d, v in common_curve([curves[1], curves[0]]).items()}
    assert answer["minimum_of_each_seed"] == {str(s): min(c, key=lambda d: c[d]) for s, c in curves.items()}
    gains = [curve_at(curve, 2) - curve_at(curve, best) for curve in curves.values()]
    assert answer["gain"]["loss"] == pytest.approx(np.mean(gains))
    assert answer["gain"]["loss"] == pytest.approx(losses[2] - losses[best])
    assert answer["gain"]["spread"] == pytest.approx(np.std(gains, ddof=1))
    assert searches[0]["search"]["steps"] == 6, "all of the steps"

    assert (out / "answer.md").read_text().strip() in page
    # Random features, two images and six steps: nothing is recommended.
    assert answer["recommended_dilation"] is None
    assert answer["verdict"]["kind"] == "not reliable"
    assert f"**Not reliable: {answer['verdict']['reason']}.**" in page
    for reason in ("2 held-out images", "frozen at random weights", "6 steps"):
        assert reason in page
    assert "Recommended" not in page
    assert f"The least loss was read at dilation {best:.3g}, a receptive field of {15 + 8 * best:.4g} px" in page
    read = [dict(searches[seed]["search"]["losses"]) for seed in (1, 0)]
    names = [searches[seed]["search"]["held_out"] for seed in (1, 0)]
    errors = standard_errors(read, names)
    assert [point["standard_error"] for point in answer["curve"]] == pytest.approx([*errors.values()])
    assert "Now: dilation 2, 31 px" in page
    assert "Verified" not in page
    assert (out / "curve.png").stat().st_size > 10_000

    # The grid is trained beside it, and the searches are not repeated; nor do they depend on the present dilation.
    before = (out / "d04-seed0-sampled/metrics.json").stat()
    page = run_tune(TuneConfig(**{**values, "report": "end"}, verify=True))
    report = (out / "report.html").read_text(encoding="utf-8")
    for text in ("Verified by a grid", ">not reliable</span>", "weights of the search", "--verify"):
        assert text in report
    assert [file.parent for file in out.rglob("report.html")] == [out]
    assert (out / "d04-seed0-sampled/metrics.json").stat() == before
    verified = json.loads((out / "answer.json").read_text())["verified"]
    assert [row["dilation"] for row in verified["grid"]] == sorted({2, 3, 4, round(best)})
    mious = {
        dilation: np.mean(
            [json.loads((out / f"d{dilation:02d}-seed{s}/metrics.json").read_text())["miou"] for s in (0, 1)]
        )
        for dilation in {2, 3, 4, round(best)}
    }
    assert verified["best_dilation"] == max(mious, key=lambda dilation: mious[dilation])
    assert verified["gap_to_best"] == pytest.approx(max(mious.values()) - mious[round(best)])
    assert verified["gain_over_present"] == pytest.approx(mious[round(best)] - mious[4])
    assert f"Dilation {round(best)} is {100 * verified['gap_to_best']:.2f} points from the best" in page
    assert "ecommend" not in page.replace("nothing is recommended", ""), "a grid makes a reading no surer"
    assert "Now: dilation 4, 47 px" in page


@pytest.mark.slow
def test_several_paths_are_answered_with_a_set(tmp_path: Path, tiny: dict[str, Any]) -> None:
    out = tmp_path / "tune"
    page = run_tune(TuneConfig(**{**tiny, "out": str(out), "seeds": (0, 1), "paths": 2, "report": "end"}))
    assert "The ten best combinations of d04-seed1-sampled" in (out / "report.html").read_text(encoding="utf-8")
    answer = json.loads((out / "answer.json").read_text())
    found = [
        json.loads((out / f"d04-seed{seed}-sampled/metrics.json").read_text())["search"]["sets"] for seed in (0, 1)
    ]
    assert [len(size["rates"]) for size in answer["sizes"]] == [1, 2]
    for place, size in enumerate(answer["sizes"]):
        entries = [sets["best_of_each_size"][place] for sets in found]
        assert size["loss"] == pytest.approx(np.mean([entry["loss"] for entry in entries]))
        assert size["rates_of_each_seed"]["1"] == sorted(rate for rate in entries[1]["rates"] if rate is not None)
    assert answer["best_rates"] in [size["rates"] for size in answer["sizes"]]
    assert answer["recommended_rates"] is None  # two images and a random backbone
    assert "**Not reliable: 2 held-out images, where 16 are needed" in page
    assert f"--aspp {','.join(map(str, answer['best_rates']))} " in page
    assert (out / "sets.png").stat().st_size > 5_000
    with pytest.raises(ValueError, match="neither verify nor class_groups"):
        TuneConfig(data="synthetic", out="x", paths=2, verify=True)


@pytest.mark.parametrize(
    ("kind", "headline"),
    [
        ("clear", "**Recommended: dilation 5, a receptive field of 292 px.**\nClear: why."),
        ("likely", "**Recommended: dilation 5, a receptive field of 292 px.**\nLikely: why."),
        ("flat", "**Flat: why.**\nThe least loss was read at dilation 5, a receptive field of 292 px."),
        ("at the edge", "**At the edge: why.**\nThe least loss was read at dilation 5, a receptive field of 292 px."),
    ],
)
def test_only_a_clear_or_likely_answer_is_a_recommendation(kind: Any, headline: str) -> None:
    assert _headline(Verdict(kind, "why", 5.0), 292.0) == headline


def test_a_curve_between_and_beyond_its_points() -> None:
    curve = {1.0: 3.0, 4.0: 1.0}
    assert [curve_at(curve, dilation) for dilation in (0.5, 1.0, 2.0, 4.0, 9.0)] == [3, 3, pytest.approx(2), 1, 1]
