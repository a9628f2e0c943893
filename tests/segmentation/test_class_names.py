"""Class lists are matched by name: reordered if the order differs, refused if the names differ."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import yaml

from rfield.segmentation.cli import main
from rfield.segmentation.config.experiments import SweepConfig
from rfield.segmentation.config.train import TrainConfig
from rfield.segmentation.data import load_dataset, match_classes
from rfield.segmentation.experiments.study import Point
from rfield.segmentation.experiments.trials import run_trials
from rfield.segmentation.inference.onnx import evaluate_onnx, load_onnx
from rfield.segmentation.inference.predict import evaluate_run
from rfield.segmentation.inference.scores import scores_path
from rfield.segmentation.models.saving import describe_network
from rfield.segmentation.runs import build_network, load_run
from rfield.segmentation.training import train

NAMES = ("background", "left", "right")
OTHER_ORDER = ("right", "background", "left")
OTHER_NAMES = ("background", "left", "top")
MakeData = Callable[..., str]


@pytest.fixture
def make_data(tmp_path: Path, undrawn: None) -> MakeData:
    """A folder of images whose masks have the same meaning with every order of the names."""

    def make(names: tuple[str, ...] = NAMES, folder: str = "data") -> str:
        root, random = tmp_path / folder, np.random.default_rng(0)
        for split in ("train", "val"):
            for name in ("images", "masks"):
                (root / split / name).mkdir(parents=True, exist_ok=True)
            for index in range(3):
                labels = random.integers(0, 4, (17, 21))
                places = [names.index(name) if name in names else 2 for name in NAMES] + [255]
                pixels = random.integers(0, 256, (17, 21, 3), dtype=np.uint8)
                PIL.Image.fromarray(pixels).save(root / split / f"images/{index}.png")
                PIL.Image.fromarray(np.uint8(places)[labels]).save(root / split / f"masks/{index}.png")
        (root / "classes.txt").write_text("\n".join(names))
        return f"folder:{root}"

    return make


@pytest.fixture
def run(tmp_path: Path, make_data: MakeData) -> Path:
    """The folder of a run of a random network with strong opinions."""
    out = tmp_path / "run"
    (out / "checkpoints").mkdir(parents=True)
    given: dict[str, Any] = {"model": "small_cnn", "dilation": 2, "head_channels": 8, "search": "none"}
    config = TrainConfig(data=make_data(), out=str(out), **given, cache=str(tmp_path / "cache")).resolved()
    torch.manual_seed(0)
    network = build_network(config, 3)
    for parameter in network.head.parameters():
        parameter.data *= 20 if parameter.dim() > 1 else 1
    (out / "config.yaml").write_text(yaml.safe_dump(config.plain()))
    (out / "classes.json").write_text(json.dumps({"class_names": NAMES, "palette": [(i, i, i) for i in range(9)]}))
    state = {f"network.{key}": value for key, value in network.state_dict().items()}
    torch.save({"state_dict": state, "rfield": describe_network(network)}, out / "checkpoints/last.ckpt")
    return out


def test_another_order_is_matched_by_name(run: Path, make_data: MakeData, capsys: pytest.CaptureFixture[str]) -> None:
    own, other = load_dataset(make_data(), "val"), load_dataset(make_data(OTHER_ORDER, "other"), "val")
    assert not torch.equal(own[0][1], other[0][1])
    matched = match_classes(other, NAMES)
    assert capsys.readouterr().err.count("another order (right, background, left): matched by name") == 1
    assert matched.class_names == NAMES
    assert matched.fingerprint() != other.fingerprint()
    assert (matched.sizes(), matched.palette[1]) == (own.sizes(), other.palette[2])
    for index in range(3):
        assert torch.equal(own[index][1], matched[index][1])
        assert torch.equal(own[index][0], matched[index][0])
    expected = evaluate_run(load_run(run), own)
    assert evaluate_run(load_run(run), other) == expected
    assert evaluate_run(load_run(run), other, ignore_names=True)["miou"] != expected["miou"]


def test_pairs_that_mirror_each_other_keep_their_names(make_data: MakeData) -> None:
    other = load_dataset(make_data(OTHER_ORDER), "val")
    other.mirrored_classes = ((0, 2),)
    (pair,) = match_classes(other, NAMES).mirrored_classes
    assert {NAMES[label] for label in pair} == {"left", "right"}


@pytest.mark.slow
@pytest.mark.parametrize("command", ["evaluate", "evaluate model.onnx", "fuse", "export"])
def test_other_names_are_refused_unless_asked_for(
    run: Path,
    make_data: MakeData,
    command: str,
    onnx_file: Callable[[Sequence[str]], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    data = make_data(OTHER_NAMES, "other")
    if "onnx" in command:
        onnx_file(NAMES)
    words = {
        "evaluate": ["evaluate", str(run), "--json", "scores.json"],
        "evaluate model.onnx": ["evaluate", "model.onnx", "--json", "scores.json"],
        "fuse": ["fuse", str(run), "--out", "plain"],
        "export": ["export", str(run), "--out", "small.onnx", "--int8"],
    }[command]
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit):
        main([*words, "--data", data])
    message = "trained on 3 classes, but the data set has 3: right missing, top new; --ignore-class-names compares"
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before, "refused before anything is made"
    if command != "export":
        main([*words, "--data", data, "--ignore-class-names"])
        assert "mIoU" in capsys.readouterr().out
    if "onnx" in command:
        own, order = load_dataset(make_data(), "val"), load_dataset(make_data(OTHER_ORDER, "third"), "val")
        scores = [evaluate_onnx(load_onnx("model.onnx"), data, lambda done, total: None) for data in (own, order)]
        assert scores[0] == scores[1]


@pytest.mark.parametrize("names", [OTHER_ORDER, OTHER_NAMES, (*NAMES, "top")])
def test_a_run_is_not_resumed_with_other_classes(make_data: MakeData, tmp_path: Path, names: tuple[str, ...]) -> None:
    config = TrainConfig(
        data=make_data(),
        out=str(tmp_path / "trained"),
        model="small_cnn",
        head_channels=4,
        search="none",
        epochs=1,
        report="none",
    )
    config.data.crop_size, config.run.workers, config.optim.batch_size = (17, 17), 0, 3
    train(config)
    (tmp_path / "data/classes.txt").write_text("\n".join(names))
    config.run.resume = True
    with pytest.raises(ValueError, match=r"trained was trained on 3 classes, .*(right, background|top)"):
        train(config)


def test_finished_trials_of_other_classes_are_not_reported(
    make_data: MakeData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values: dict[str, Any] = {"model": "small_cnn", "head_channels": 4, "epochs": 1, "workers": 0, "batch_size": 3}
    config = SweepConfig(data=make_data(), out=str(tmp_path / "sweep"), crop_size=(17, 17), dilations=(2,), **values)
    points = [Point("none", 2, 0)]
    run_trials(config, points)
    (tmp_path / "data/classes.txt").write_text("\n".join(OTHER_ORDER))
    with pytest.raises(ValueError, match="sweep have 3 classes, which the data set has in another order"):
        run_trials(config, points)
    (tmp_path / "sweep/study.journal").unlink()
    with pytest.raises(ValueError, match="d02-seed0 was trained on 3 classes, which the data set has in another order"):
        run_trials(config, points)


def test_the_file_of_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "scores.json"
    assert scores_path(None, path, {"data": "x"}) == scores_path(str(path), tmp_path, {"data": "x"}) == path
    about = {"model": "runs/x", "data": "voc:data", "checkpoint": "best", "files": "1"}
    for held, refused, said in (
        (about, False, ""),
        (about | {"data": "voc:other/../data", "more": 5}, False, ""),
        (about | {"checkpoint": "last"}, False, "checkpoint last"),
        (about | {"files": "2"}, False, "other files"),
        (about | {"files": "2", "checkpoint": "last"}, False, "checkpoint last"),
        (about | {"data": "voc:other"}, True, "data voc:other"),
        (about | {"data": "camvid:data", "files": "2"}, True, "data camvid:data"),
        (about | {"model": "y", "data": "voc:z"}, True, "model y, data voc:z"),
        ({"miou": 0.5}, True, "data None"),
        ([], True, "something else"),
    ):
        path.write_text(json.dumps(held))
        assert scores_path(str(path), tmp_path / "other.json", about) == path
        note = f"note: {path} held the scores of {said}, which are replaced\n" if said else ""
        assert capsys.readouterr().err == note
        if refused:
            with pytest.raises(ValueError, match=f"holds the scores of {said}: give --json FILE for those of voc:data"):
                scores_path(None, path, about)
        else:
            assert scores_path(None, path, about) == path
        assert capsys.readouterr().err == ("" if refused else note)


def test_scores_of_another_data_set_are_not_replaced(
    run: Path, make_data: MakeData, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main(["evaluate", str(run)])
    path = run / "evaluation-val.json"
    own = path.read_text()
    other = make_data(NAMES, "other")
    with pytest.raises(SystemExit):
        main(["evaluate", str(run), "--data", other])
    assert f"holds the scores of data folder:{tmp_path}/data: give --json FILE" in capsys.readouterr().err
    assert path.read_text() == own
    main(["evaluate", str(run), "--data", other, "--json", str(path)])
    assert f"held the scores of data folder:{tmp_path}/data, which are replaced" in capsys.readouterr().err
    assert json.loads(path.read_text())["data"] == other
    path.write_text(own)
    with pytest.raises(SystemExit):
        main(["evaluate", str(run), "--data", make_data(OTHER_NAMES, "top"), "--json", str(path)])
    assert capsys.readouterr().err.startswith("rfield evaluate: the network was trained on"), "nothing is replaced"
    monkeypatch.chdir(tmp_path)
    main(["evaluate", str(run), "--data", "folder:./data"])
    assert capsys.readouterr().err == "", "another way to write the same folder"
    make_data(NAMES)
    main(["evaluate", str(run)])
    assert "held the scores of other files, which are replaced" in capsys.readouterr().err
    path.write_text("notes")
    with pytest.raises(SystemExit):
        main(["evaluate", str(run)])
    assert path.read_text() == "notes"


@pytest.mark.parametrize(
    "values",
    [
        {"class_names": ["left", "left", "right"]},
        {"palette": [[0, 0, 0]]},
        {"class_names": ["background", "left"]},
    ],
)
def test_names_that_do_not_fit_the_network_are_refused(run: Path, values: dict[str, Any], tmp_path: Path) -> None:
    path = run / "classes.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    with pytest.raises(ValueError, match=r"classes\.json (does not say|has 2 class names for a network of 3 classes)"):
        load_run(run)
