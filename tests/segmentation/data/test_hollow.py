"""Data sets on which every score is perfect, or none is computed: the warning before a training, and its remedy."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from rfield.segmentation.cli import main
from rfield.segmentation.config.train import TrainConfig
from rfield.segmentation.data import check_data
from rfield.segmentation.data.check import refuse_bad_data
from rfield.segmentation.training import train


def write(root: Path, classes: str, values: tuple[int, ...], count: int = 6) -> str:
    """Two splits whose masks hold these values in stripes."""
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for folder in ("images", "masks"):
            (root / split / folder).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            pixels = random.integers(0, 256, (33, 40, 3), dtype=np.uint8)
            PIL.Image.fromarray(pixels).save(root / split / f"images/{index}.png")
            mask = np.repeat(np.array(values, np.uint8), 40 // len(values))[None].repeat(33, axis=0)
            PIL.Image.fromarray(mask).save(root / split / f"masks/{index}.png")
    (root / "classes.txt").write_text(classes)
    return f"folder:{root}"


HOLLOW = {
    "0 and 255": (
        "background\nobject\n",
        (0, 255),
        (
            "show only one of 2 classes, 'background', so a network that always predicts it gets perfect scores",
            "255 means no label: if it stands for a class, save that class's index instead, or give the colours",
            "`colours: {background: [0, 0, 0], object: [255, 255, 255]}`",
        ),
    ),
    "one class": ("a\nb\nc\n", (1,), ("show only one of 3 classes, 'b', ", "; label a, c too, or correct the masks'")),
    "one name": ("object\n", (0, 255), ("there is only one class, 'object', so every network gets perfect scores",)),
    "no label": ("a\nb\n", (255,), ("has a labelled pixel, so nothing is learned", "; 255 means no label")),
}


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("kind", HOLLOW)
def test_hollow_data_are_told(tmp_path: Path, kind: str, quick: bool) -> None:
    classes, values, words = HOLLOW[kind]
    spec = write(tmp_path / "own", classes, values)
    told = [f for f in check_data(spec, quick=quick) if all(part in f.text for part in words)]
    assert [(f.level, f.split) for f in told] == [("warning", s) for s in ("train", "val")[: 1 + (kind != "one name")]]


@pytest.mark.parametrize("kind", HOLLOW)
def test_training_tells_of_hollow_data(tmp_path: Path, kind: str) -> None:
    classes, values, words = HOLLOW[kind]
    spec = write(tmp_path / "own", classes, values, count=1)
    warnings = refuse_bad_data(spec, ["train", "val"])
    assert any(all(part in text for part in words) for text in warnings)


@pytest.mark.parametrize("values", [(0, 1), (0, 1, 255, 255), (0, 1, 1, 0)])
def test_whole_data_are_left_in_peace(tmp_path: Path, values: tuple[int, ...]) -> None:
    spec = write(tmp_path / "own", "a\nb\n", values)
    assert check_data(spec) == []
    assert refuse_bad_data(spec, ["train", "val"]) == []


def test_the_quick_check_looks_for_a_second_class(tmp_path: Path) -> None:
    """The quick check reads a few masks, but all of them before it reports a single class."""
    spec = write(tmp_path / "own", "a\nb\n", (0,), count=9)
    path = tmp_path / "own/train/masks/7.png"
    PIL.Image.new("L", (40, 33), 1).save(path)
    assert [text.split(" show ")[0] for text in refuse_bad_data(spec, ["train", "val"])] == [
        "the masks of the split 'val'"
    ]


def test_values_that_an_option_leaves_out_are_named(tmp_path: Path) -> None:
    write(tmp_path / "own", "a\nb\n", (0, 1))
    config = tmp_path / "own.yaml"
    config.write_text("format: folder\nroot: own\nignore: 0\n")
    told = [f.text for f in check_data(str(config))]
    assert len(told) == 2
    assert all("'b', so a network" in t and "the mask value 0 has no label here: see `ignore`" in t for t in told)
    config.write_text("format: folder\nroot: own\nignore: [0, 1]\n")
    told = [f.text for f in check_data(str(config)) if f.index is None]
    assert all("nothing is learned or scored there; the mask values 0, 1 have no label" in text for text in told)


def test_one_class_of_three_that_255_may_stand_for(tmp_path: Path) -> None:
    told = [f.text for f in check_data(write(tmp_path / "own", "a\nb\nc\n", (0, 1, 255, 255)))]
    assert len(told) == 2
    assert all(t.endswith("(255 means no label; if it stands for 'c', save 2 instead)") for t in told)
    told = [f.text for f in check_data(write(tmp_path / "own", "a\nb\nc\n", (0, 1)))]
    assert [t.endswith("classes: c; they are neither learned nor scored there") for t in told] == [True, True]


def test_masks_that_cannot_be_read_are_not_called_empty(tmp_path: Path) -> None:
    spec = write(tmp_path / "own", "a\nb\n", (0, 7))
    assert {f.level for f in check_data(spec)} == {"error", "warning"}
    for path in (tmp_path / "own/val/masks").iterdir():
        path.write_bytes(b"")
    assert {f.level for f in check_data(spec) if f.split == "val"} == {"error"}


@pytest.mark.parametrize("skip_bad", [False, True])
def test_training_shows_all_warnings_of_its_quick_check(
    tmp_path: Path, make: Callable[..., TrainConfig], capsys: pytest.CaptureFixture[str], skip_bad: bool
) -> None:
    """Equal warnings for many files are shown once, and warnings for single files are shown too."""
    spec = write(tmp_path / "own", "left_hand\nright_hand\n", (0, 255), count=3)
    for path in (tmp_path / "own/train/images").iterdir():
        PIL.Image.open(path).convert("RGBA").save(path)
    own = {"data": spec, "search": "none", "factor_lr": None, "weights": "random", "epochs": 1}
    train(make(skip_bad=skip_bad, **own))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(lines) == 4
    assert "look like the left and right of one thing" in lines[0]
    assert "has an alpha channel" in lines[1]
    assert lines[1].endswith(f"(and 2 more; `rfield check-data {spec}` names them)")
    assert all("only one of 2 classes, 'left_hand'" in line for line in lines[2:])
    train(make("other", flip=False, skip_bad=skip_bad, **own))
    assert "left and right of one" not in capsys.readouterr().err


def test_the_command_tells_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = write(tmp_path / "own", "background\nobject\n", (0, 255))
    main(["check-data", spec])
    out = capsys.readouterr().out.splitlines()
    assert "`colours: {background: [0, 0, 0], object: [255, 255, 255]}`" in out[0]
    assert out[-1] == f"{spec}: 0 errors, 2 warnings"
