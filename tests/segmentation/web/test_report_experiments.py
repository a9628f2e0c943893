"""Reports of folders of several runs, and of an inspection, from files as the commands write them."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from rfield.segmentation.config.experiments import ReproduceConfig, SweepConfig, TuneConfig
from rfield.segmentation.web.report import write_report

pytestmark = pytest.mark.usefixtures("plain_charts")
VERDICT = {"kind": "likely", "reason": "dilation 3 beats 1", "dilation": 3.0, "present": 1}


def html_of(folder: Path) -> str:
    write_report(folder, folder / "report.html")
    return (folder / "report.html").read_text(encoding="utf-8")


def row(search: str, dilation: int, miou: float) -> dict[str, Any]:
    field = 15 + 8 * dilation
    return {
        **{"search": search, "dilation": dilation, "seeds": [0], "miou": miou, "miou_spread": 0.01},
        **{"effective_dilation": dilation, "receptive_field_px": field, "train_seconds": 2.0},
    }


@pytest.fixture
def sweep(tmp_path: Path, run_folder: Callable[..., Path]) -> Path:
    """A folder of two fixed runs, the results of which are written."""
    plain = {key: value for key, value in run_folder.metrics.items() if key != "search"}
    for dilation, miou in ((1, 0.25), (3, 0.5)):
        run_folder(f"sweep/d{dilation:02d}-seed0", {**plain, "miou": miou}, search="none")
    folder = tmp_path / "sweep"
    rows = [row("none", 1, 0.25), row("none", 3, 0.5)]
    runs = [{"name": f"d{each['dilation']:02d}-seed0", "seed": 0, **each} for each in rows]
    data = next(tmp_path.glob("my*"))
    config = SweepConfig(data=f"voc:{data}", out=str(folder), model="small_cnn", dilations=(1, 3))
    content = {"config": config.plain(), "verdict": VERDICT, "runs": runs, "table": rows, "unfinished": ["d09-seed0"]}
    (folder / "results.json").write_text(json.dumps(content))
    return folder


def test_a_sweep_is_one_report(sweep: Path) -> None:
    html = html_of(sweep)
    for text in (
        "Which dilation should small_cnn have on voc:my &#34;data&#34; &amp; &#39;more&#39;?",
        "The best is mIoU 0.500 at dilation 3, 39 px.",
        "Not finished yet: d09-seed0.",
        "labels at a fixed dilation 1",
        "Of the run d03-seed0, beside d01-seed0.",
        "<td>+25.0</td>",
        "rfield sweep --data",
        "rfield 0.2.0",
    ):
        assert text in html
    assert html.count("data:image/webp") == 8


def test_runs_without_results_are_listed(sweep: Path) -> None:
    (sweep / "results.json").unlink()
    (sweep / "d03-seed0/metrics.json").unlink()
    html = html_of(sweep)
    assert "1 of 2 runs that have started are finished." in html
    assert ">unfinished</span>" in html


def test_the_paper_s_experiments_name_the_paper_s_ends(sweep: Path) -> None:
    content = json.loads((sweep / "results.json").read_text())
    config = ReproduceConfig(data=content["config"]["data"], out=str(sweep), model="small_cnn")
    learned = row("gradient", 14, 0.4)
    content |= {
        **{"config": config.plain(), "verdict": None, "best_dilation": 3, "unfinished": []},
        **{"paper": {"best_px": 404, "ends_px": {"436": 396, "308": 364}}},
        **{"before_snapping_px": {"gradient, d=14": [120.0, 130.0]}, "table": [*content["table"], learned]},
    }
    content["runs"].append({"name": "d14-seed0-gradient", "seed": 0, **learned})
    (sweep / "results.json").write_text(json.dumps(content))
    html = html_of(sweep)
    cells = ["125", "127", "0.4000", "396"]
    assert "".join(f"<td>{cell}</td>" for cell in cells) in html
    assert "rfield reproduce --data" in html
    assert "lowest: dilation 1, 23 px" in html


def tuned(folder: Path, answer: dict[str, Any], **options: Any) -> str:
    folder.mkdir(exist_ok=True)
    config = TuneConfig(data="synthetic", out=str(folder), **{"model": "small_cnn", "seeds": (0, 1), **options})
    (folder / "answer.json").write_text(json.dumps({"config": config.plain(), "seconds": 9.0, **answer}))
    return html_of(folder)


def test_an_answer_of_tune_is_one_report(tmp_path: Path, run_folder: Callable[..., Path]) -> None:
    run_folder("tune/d01-seed0-sampled")
    curve = [
        {"dilation": at, "receptive_field_px": 15 + 8 * at, "loss": loss, "spread": None, "standard_error": error}
        for at, loss, error in ((1, 0.5, 0.1), (3, 0.4, 0.0))
    ]
    grid = {"best_dilation": 3, "gap_to_best": 0.0, "gain_over_present": 0.1, "grid": [row("none", 3, 0.5)]}
    answer = {
        **{"verdict": VERDICT, "best_dilation": 3.0, "best_receptive_field_px": 39.0, "present_dilation": 1},
        **{"present_receptive_field_px": 23.0, "curve": curve, "class_share_loss": 1.25},
        "minimum_of_each_seed": {"0": 3.0},
    }
    html = tuned(tmp_path / "tune", answer)
    assert "Recommended: dilation 3, a receptive field of 39 px." in html
    assert "No network was trained at a fixed dilation" in html
    assert "would lose 1.250" in html
    assert "rfield tune --data synthetic" in html
    assert html.count('class="box') == 4
    assert "0.00 points of mIoU from the best" in tuned(tmp_path / "tune", {**answer, "verified": grid})


def test_an_answer_on_sets_has_the_best_ten_and_the_classes(tmp_path: Path, run_folder: Callable[..., Path]) -> None:
    losses = {None: 0.3, 3.0: 0.35, 2.0: 0.4}
    entries = [{"rates": [1.0, rate], "loss": loss, "error": None} for rate, loss in losses.items()]
    sets = {"chosen": entries[1], "best": entries, "best_of_each_size": [], "class_costs": [[0.5, None], [-0.25, 0.0]]}
    metrics = {**run_folder.metrics, "search": {**run_folder.metrics["search"], "sets": sets}}
    metrics["per_class"] = dict(list(metrics["per_class"].items())[:2])
    run_folder("tune/d01-seed0-sampled", metrics)
    sizes = [{"rates": rates, "loss": 0.3, "error": None, "spread": None} for rates in ([1], [1, 3])]
    answer = {
        **{"verdict": {**VERDICT, "kind": "clear"}, "recommended_rates": [1, 3], "best_rates": [1, 3]},
        **{"receptive_fields_px": [23.0, 39.0], "sizes": sizes},
    }
    html = tuned(tmp_path / "tune", answer, paths=2)
    assert "Recommended: 2 paths with dilation 1, 3." in html
    assert '<tr class="marked"><th scope="row">1, 3</th><td>2</td><td>0.3500</td><td>+0.0500</td>' in html
    assert '<td class="more" style="--share:1.000">+0.5</td><td>no pixels</td>' in html
    assert '<td class="less" style="--share:0.500">-0.25</td>' in html


def test_an_answer_on_a_model_in_a_file_names_its_layers(tmp_path: Path) -> None:
    factor = {
        **{"layers": {"aspp.0.<i>": {"now": 12, "best": 4}}, "side": None, "curve": [[4.0, 0.5], [12.0, math.nan]]},
        "verdict": {**VERDICT, "kind": "flat"},
    }
    answer = {"recommended_dilations": {"aspp.0.<i>": 4}, "factors": [factor], "steps": 3}
    html = tuned(tmp_path / "tune", answer, model="nets/my.py:build")
    assert "What receptive field should build have on synthetic?" in html
    assert "Recommended dilations for 1 layer." in html
    assert '<span class="subject">aspp.0.&lt;i&gt;</span>' in html


def test_an_inspection_is_one_report(tmp_path: Path) -> None:
    layer = {"name": "conv", "kind": "Conv2d", "kernel": [3, 3], "dilation": [2.0, 2.0], "stride": [1.0, 1.0]}
    network = {
        **{"model": "torchvision:x", "weights": "random weights", "whole_image_by": []},
        **{"advice": [{"text": "too <wide>", "code": "model.x = 3"}]},
        **{"effective": [{"share": 0.5, "side": 9, "area_ratio": 0.02}]},
        "layers": [{**layer, "field": [5.0, 5.0]}, {**layer, "name": "pool", "kernel": None, "field": [None, None]}],
    }
    content = {"size": [64, 48], "images": "random", "measure": "luo", "count": 2, "networks": {"x": network}}
    (tmp_path / "inspect.json").write_text(json.dumps(content))
    PIL.Image.new("RGB", (40, 20), "white").save(tmp_path / "effective.png")
    html = html_of(tmp_path)
    assert "What does torchvision:x see of images of 64x48 px?" in html
    assert "sees the whole image, and half of the effect comes from the middle 9 px." in html
    assert "too &lt;wide&gt;" in html
    assert "model.x = 3" in html
    assert html.count("data:image/webp") == 1
