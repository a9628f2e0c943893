"""Reports of run folders: what they say, that strangers' texts stay texts, and the page in a browser."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rfield.segmentation.cli import main, parse
from rfield.segmentation.config.experiments import SweepConfig
from rfield.segmentation.config.train import TrainConfig
from rfield.segmentation.web import report_page
from rfield.segmentation.web.report import write_report
from rfield.segmentation.web.report_command import command_of


def specs(html: str) -> list[Any]:
    """Return the charts of a report."""
    return [json.loads(found) for found in re.findall(r'<script type="application/json">(.*?)</script>', html)]


def test_a_run_is_told_in_the_order_of_the_questions(run_folder: Callable[..., Path], plain_charts: None) -> None:
    out = run_folder()
    main(["report", str(out)])
    html = (out / "report.html").read_text(encoding="utf-8")
    told = [
        "Dilation 3: each output pixel sees 39 px",
        "dilation 3 beats the present 1 by 0.06 ± 0.005",
        "What one output pixel sees",
    ]
    told += [
        "The curve that the answer comes from",
        "Over the training",
        "Scores of the classes",
        "No run with a fixed",
    ]
    told += ["<td>1 min 15 s</td>", "Seed 0. Versions: rfield 0.2.0, torch 2.9"]
    places = [html.index(text) for text in told]
    assert places == sorted(places)
    for side in (39.0, 23.0):  # The field now, and at the start: 8 px less a dilation.
        assert f'width="{side}" height="{side}"><title>' in html
    curve, dilations, loss = specs(html)
    assert curve["layer"][-1]["data"]["values"][0] == {
        **{
            "curve": "after step 4",
            "dilation": 1.0,
            "value": 0.9,
            "error": 0.1,
            "low": 0.8,
            "high": 1.0,
            "field": 23.0,
        },
    }
    assert [len(layer["data"]["values"]) for layer in dilations["layer"]] == [6, 2]
    assert len(loss["layer"][0]["data"]["values"]) == 8
    assert html.count("data:image/webp") == 6
    assert len(html) < 200_000


def test_texts_of_strangers_stay_texts(run_folder: Callable[..., Path], plain_charts: None, tmp_path: Path) -> None:
    out = run_folder()
    write_report(out, tmp_path / "a.html")
    html = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    for found in ("<script>alert", "<b>car", "<i>", 'my "data"'):
        assert found not in html
    assert re.search(r"(?:src|href|url\()[=\"']*(?:https?:)?//", html) is None
    assert report_page.plain_json({"a": run_folder.classes}).count("<") == 0
    policy = re.search(r'Security-Policy" content="([^"]*)"', html)
    assert policy is not None
    assert "default-src 'none'" in policy[1]


def test_a_fixed_run_beside_it_is_the_baseline(run_folder: Callable[..., Path], plain_charts: None) -> None:
    other = {
        **run_folder.metrics,
        "miou": 0.25,
        "per_class": dict.fromkeys(run_folder.classes, 0.25),
        "effective_dilation": 1.0,
    }
    del other["search"]
    run_folder("d01-seed0", other, search="none")
    out = run_folder("d01-seed0-sampled")
    write_report(out, out / "a.html")
    html = (out / "a.html").read_text(encoding="utf-8")
    assert "fixed at dilation 1, %" in html
    assert "<td>+50.0</td>" in html
    assert "labels at a fixed dilation 1" in html
    write_report(out.with_name("d01-seed0"), out / "b.html")
    fixed = (out / "b.html").read_text(encoding="utf-8")
    assert "The dilation was fixed; nothing was learned." in fixed
    assert 'class="badge' not in fixed


def test_gates_and_paths_answer_for_themselves(
    run_folder: Callable[..., Path], plain_charts: None, tmp_path: Path
) -> None:
    rates = [{"rate": 2, "receptive_field_px": 31.0, "mean_gate": 0.25}]
    gates = {
        **{"each": "pixel", "rates": rates, "field_px": 31.0, "least_field_px": 30.0, "greatest_field_px": 32.0},
        "images": 2,
    }
    fields = [{"effective_dilation": 3.0, "receptive_field_px": 39.0}, {**rates[0], "effective_dilation": 2.0}]
    paths = [*fields, {"effective_dilation": 0.0, "receptive_field_px": None, "branch": "pool"}]
    for name, found, told in (
        ("gates", {"gates": gates}, "The input decides: each image has a receptive field of 30 to 32 px, 31 px"),
        ("paths", {"paths": paths}, "3 paths with dilations 3, 2, pool: receptive fields of 31 to 39 px."),
        ("alike", {"paths": fields[:1] * 2}, "2 paths with dilations 3, 3: receptive fields of 39 px."),
    ):
        out = run_folder(name, {**run_folder.metrics, "search": {}, **found}, search="none")
        write_report(out, tmp_path / "a.html")
        html = (tmp_path / "a.html").read_text(encoding="utf-8")
        assert told in html
        assert ('<th scope="row">rate 2</th><td>31</td><td>25.0%</td>' in html) == (name == "gates")
        assert html.count('class="box c1"') == 2


def test_what_is_missing_is_said(run_folder: Callable[..., Path], plain_charts: None, tmp_path: Path) -> None:
    out = run_folder(metrics=None)
    write_report(out, tmp_path / "a.html", refresh=15)
    html = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "The run is not finished: 2 of 4 epochs are saved" in html
    assert 'http-equiv="refresh" content="15"' in html
    assert "Over the training" in html
    (out / "metrics.json").write_text(json.dumps(run_folder.metrics))
    (out / "checkpoints/last.ckpt").unlink()
    next(tmp_path.glob("my*")).rename(tmp_path / "gone")
    write_report(out, tmp_path / "a.html", refresh=15)
    html = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "The network cannot be opened, so that no image is labelled" in html
    assert "refresh" not in html


def test_a_public_report_has_nothing_of_the_data(
    run_folder: Callable[..., Path], plain_charts: None, tmp_path: Path
) -> None:
    main(["report", str(run_folder()), "--public", "--out", str(tmp_path / "a.html")])
    html = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "data:image" not in html
    assert str(tmp_path) not in html
    assert "--data DATA --out OUT" in html


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "is not a folder of rfield train, tune, sweep, reproduce or inspect: it holds nothing"),
        ({"a.txt": "", "b.txt": ""}, r"it holds a\.txt, b\.txt; give the --out of one"),
        (None, "there is no such folder"),
    ],
)
def test_other_folders_are_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], files: dict[str, str] | None, message: str
) -> None:
    folder = tmp_path / "folder"
    if files is not None:
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
    with pytest.raises(SystemExit):
        main(["report", str(folder)])
    said = capsys.readouterr().err
    assert re.search(message, said)
    assert said.count("\n") == 1


@pytest.mark.parametrize("damage", [{"search": 3}, {"miou": "much"}, {"per_class": None}])
def test_damaged_metrics_are_named_in_one_line(
    run_folder: Callable[..., Path], tmp_path: Path, damage: dict[str, Any]
) -> None:
    out = run_folder(metrics={**run_folder.metrics, **damage})
    with pytest.raises(ValueError, match="holds a file that is not what rfield writes"):
        write_report(out, tmp_path / "a.html")


@pytest.mark.parametrize(
    ("command", "config"),
    [
        ("train", TrainConfig(data="synthetic", out="a b", resume=True).resolved()),
        (
            "train",
            TrainConfig(
                **{"data": "voc:it's", "out": "x", "flip": False, "freeze_backbone": True, "crop_size": (33, 65)},
                **{"scale_range": (0.5, 2.0), "paths": 2, "class_groups": {"a=b": ["x y"], "c": ["z,"]}},
                **{"class_weights": (1.0, 0.1), "logger": ["csv"], "lr": 1e-5},
            ).resolved(),
        ),
        ("train", TrainConfig(data="d", out="x", paths=3, extra_paths=["1x1", "pool"], rectangular=True)),
        ("train", TrainConfig(data="-d", out="x", search="none", aspp="1x1,6,12", decoder=True)),
        ("sweep", SweepConfig(data="synthetic", out="x", dilations=(2, 3), seeds=(0, 1), search="sampled")),
    ],
)
def test_the_command_gives_the_same_config_again(command: str, config: Any) -> None:
    words = shlex.split(command_of(command, config).replace("\\\n", ""))
    assert parse(words[1:]) == (command, config.replace(resume=False))


def test_the_page_works_in_a_browser(
    run_folder: Callable[..., Path],
    open_page: Callable[..., Any],
    axe_problems: Callable[[Any], list[str]],
    tmp_path: Path,
) -> None:
    write_report(run_folder(), tmp_path / "a.html")
    assert (tmp_path / "a.html").stat().st_size < 1_200_000
    for width, scheme in ((1200, "light"), (390, "dark")):
        page = open_page((tmp_path / "a.html").as_uri(), width, color_scheme=scheme)
        page.on("dialog", lambda dialog: pytest.fail(f"a name ran as a script: {dialog.message}"))
        page.wait_for_selector("figure.chart:last-of-type svg")
        assert page.locator("figure.chart .plot svg").count() == 3
        assert axe_problems(page) == []
        # 39 and 23 of the 16 px of the image, around its middle.
        places = "each => { const r = each.getBoundingClientRect(); return [r.x + r.width / 2, r.width]; }"
        first = page.locator(".pictures svg").first
        image, now, start = (first.locator(name).evaluate(places) for name in ("image", "rect.box.c1", "rect.box.c0"))
        assert [now[1] / image[1], start[1] / image[1]] == pytest.approx([39 / 16, 23 / 16], rel=0.01)
        assert [now[0], start[0]] == pytest.approx([image[0]] * 2, abs=0.1)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        light = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert light == (scheme == "light")
        # The values stand in a tooltip, and for the keyboard in a table.
        points = page.locator("figure.chart").first.locator("svg .mark-symbol path")
        points.first.hover(force=True)
        page.wait_for_selector("#vg-tooltip-element.visible")
        assert "held-out loss" in page.inner_text("#vg-tooltip-element")
        page.locator("figure.chart summary").first.focus()
        page.keyboard.press("Enter")
        assert page.locator("figure.chart details[open] tbody tr").first.inner_text().split("\t")[1:] == [
            *("1", "23", "0.9000", "0.1"),
        ]
        assert run_folder.classes[0] in page.inner_text("table:has(.bars)")
