import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from rfield.segmentation.cli import main
from rfield.segmentation.data import voc_palette

pytestmark = pytest.mark.slow

NAMES = [
    *("d02-seed0", "d06-seed0", "d14-seed0"),
    *(f"d{d:02d}-seed0-{kind}" for kind in ("gradient", "spsa", "sampled") for d in (6, 14)),
]


@pytest.fixture
def devkit(tmp_path: Path) -> Path:
    """Six images to train on and three to validate on, of 36x41 px and three classes, in the layout of VOC."""
    root = tmp_path / "devkit"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    (root / "classes.txt").write_text("road\ncar\nsky\n")
    random = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3)):
        names = [f"{split}{index}" for index in range(count)]
        (root / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(names))
        for name in names:
            labels = random.integers(0, 3, (4, 5)).repeat(9, 0).repeat(9, 1)[:36, :41].astype(np.uint8)
            noise = random.integers(0, 60, (36, 41, 3))
            PIL.Image.fromarray((80 * labels[..., None] + noise).astype(np.uint8)).save(root / f"JPEGImages/{name}.jpg")
            mask = PIL.Image.fromarray(labels)
            mask.putpalette([level for colour in voc_palette() for level in colour])
            mask.save(root / f"SegmentationClass/{name}.png")
    return root


@pytest.mark.usefixtures("undrawn")
def test_the_paper_s_experiments(devkit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "paper"
    command = f"reproduce --data voc:{devkit} --model small_cnn --head-channels 8 --epochs 2 --dilations 2 --out {out}"
    words = [*command.split(), "--images", "2", "--cache", str(tmp_path / "cache"), "--batch-size", "2"]
    main(words)
    shown = capsys.readouterr().out
    assert "From bad starts" in (out / "report.html").read_text(encoding="utf-8")
    results = json.loads((out / "results.json").read_text())
    runs = {run["name"]: run for run in results["runs"]}
    assert sorted(runs) == sorted(NAMES)
    metrics = {name: json.loads((out / name / "metrics.json").read_text()) for name in NAMES}
    for name, run in runs.items():
        for key in ("miou", "effective_dilation", "receptive_field_px", "train_seconds"):
            assert run[key] == metrics[name][key]
    grid = {d: metrics[f"d{d:02d}-seed0"]["miou"] for d in (2, 6, 14)}
    assert results["best_dilation"] == max(grid, key=lambda dilation: grid[dilation])
    assert results["paper"] == {"best_px": 404, "ends_px": {"436": 396, "308": 364}}
    trajectory = metrics["d14-seed0-gradient"]["search"]["trajectory"]
    assert results["before_snapping_px"]["gradient, d=14"] == [pytest.approx(15 + 8 * trajectory[-1][1])]

    report = (out / "report.md").read_text()
    assert report.strip() in shown
    for text in ("404", "436 -> 396", "308 -> 364", "CVPR 2017", "10.1007/s41095-018-0112-1"):
        assert text in report
    for name in NAMES:
        assert f"{metrics[name]['miou']:.4f}" in report
    for name in ("grid", "factor", "panel-gradient", "panel-spsa", "panel-sampled"):
        assert (out / f"{name}.png").stat().st_size > 10_000

    before = {name: (out / name / "metrics.json").stat() for name in NAMES}
    main(words)
    assert {name: (out / name / "metrics.json").stat() for name in NAMES} == before
    assert "training, see" not in capsys.readouterr().out
