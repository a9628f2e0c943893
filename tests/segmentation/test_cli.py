"""The flags of the command line, and its errors. The tests of each package cover the commands themselves."""

import dataclasses
import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from rfield.segmentation.cli import COMMANDS, main, parse
from rfield.segmentation.config.experiments import DemoConfig, ReproduceConfig, SweepConfig, TuneConfig
from rfield.segmentation.config.export import EvaluateConfig, PredictConfig
from rfield.segmentation.config.options import Config
from rfield.segmentation.config.train import TrainConfig
from rfield.segmentation.console import print_scores

TRAIN = ["train", "--data", "synthetic", "--out", "runs/x"]


def train_config(*words: str) -> TrainConfig:
    command, config = parse([*TRAIN, *words])
    assert command == "train"
    assert isinstance(config, TrainConfig)
    return config


def error_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line on stderr with which a command fails."""
    with pytest.raises(SystemExit) as exit_:
        main(list(words))
    assert exit_.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.endswith("\n")
    assert captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith("rfield")
    return captured.err


def test_the_issue_s_commands() -> None:
    assert parse(["demo"]) == ("demo", DemoConfig())
    words = (
        "train --data voc:../shared/data/msrc21_voc --model largefov_vgg16 --weights "
        "../shared/weights/vgg16_features_imagenet_fp16.pth --freeze-backbone --head-channels 128 --dilation 6 "
        "--search none --epochs 10 --seed 0 --out runs/msrc-d6"
    )
    assert parse(shlex.split(words)) == (
        "train",
        TrainConfig(
            data="voc:../shared/data/msrc21_voc",
            out="runs/msrc-d6",
            weights="../shared/weights/vgg16_features_imagenet_fp16.pth",
            freeze_backbone=True,
            head_channels=128,
            dilation=6,
            search="none",
            epochs=10,
        ),
    )
    words = "evaluate runs/msrc-d6 --split test --data voc:elsewhere --checkpoint best"
    expected = EvaluateConfig("runs/msrc-d6", data="voc:elsewhere", split="test", checkpoint="best")
    assert parse(shlex.split(words)) == ("evaluate", expected)
    words = "predict runs/msrc-d6 ../shared/data/msrc21_voc/JPEGImages --out out"
    expected_prediction = PredictConfig("runs/msrc-d6", "../shared/data/msrc21_voc/JPEGImages", out="out")
    assert parse(shlex.split(words)) == ("predict", expected_prediction)


def test_the_issue_s_experiments() -> None:
    msrc = "--data voc:../shared/data/msrc21_voc --weights ../shared/weights/vgg16_features_imagenet_fp16.pth"
    shared: dict[str, Any] = {
        "data": "voc:../shared/data/msrc21_voc",
        "weights": "../shared/weights/vgg16_features_imagenet_fp16.pth",
        "head_channels": 128,
    }
    words = (
        f"sweep {msrc} --model largefov_vgg16 --freeze-backbone --head-channels 128 --dilations 2,6,14 --seeds 0,1 "
        "--epochs 10 --out runs/sweep"
    )
    swept = SweepConfig(**shared, out="runs/sweep", freeze_backbone=True, epochs=10, dilations=(2, 6, 14), seeds=(0, 1))
    assert parse(shlex.split(words)) == ("sweep", swept)
    assert (swept.train.search.search, swept.grid.jobs, swept.grid.storage) == ("none", 1, None)
    run = swept.run_config("runs/sweep/d06-seed1", 6, 1, "none")
    expected = TrainConfig(
        **shared,
        out="runs/sweep/d06-seed1",
        freeze_backbone=True,
        epochs=10,
        dilation=6,
        seed=1,
        search="none",
        resume=True,
        report="none",
    )
    assert run == expected

    command, tuned = parse(shlex.split(f"tune {msrc} --model largefov_vgg16 --head-channels 128 --out runs/tune"))
    assert (command, tuned) == ("tune", TuneConfig(**shared, out="runs/tune"))
    shared_by_all = tuned.train
    assert (shared_by_all.model.freeze_backbone, shared_by_all.search.search) == (True, "sampled")
    assert (shared_by_all.optim.epochs, tuned.grid.seeds) == (10, (0, 1, 2))
    _, tuned = parse(shlex.split(f"tune {msrc} --out runs/tune --verify --seeds 3 --dilations 2,4"))
    assert (tuned.grid.verify, tuned.grid.seeds, tuned.grid.dilations) == (True, (3,), (2, 4))

    command, reproduced = parse(shlex.split(f"reproduce {msrc} --head-channels 128 --out runs/paper"))
    assert (command, reproduced) == ("reproduce", ReproduceConfig(**shared, out="runs/paper"))
    assert reproduced.train.model.freeze_backbone
    assert reproduced.grid.dilations == (2, 4, 6, 8, 10, 12, 14, 18, 24)
    whole = parse(shlex.split(f"reproduce {msrc} --out x --no-freeze-backbone"))[1]
    assert not whole.train.model.freeze_backbone


@pytest.mark.parametrize("text", ["2,6,14", "[2, 6, 14]", '"2,6,14"'])
def test_lists_in_a_config(tmp_path: Path, text: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"data: synthetic\nout: x\ndilations: {text}\nseeds: 3\n")
    config = parse(["sweep", "--config", str(file)])[1]
    assert (config.grid.dilations, config.grid.seeds) == ((2, 6, 14), (3,))
    file.write_text(
        yaml.safe_dump({key: value for key, value in config.plain().items() if key not in SweepConfig.fixed})
    )
    assert parse(["sweep", "--config", str(file)])[1] == config


def test_completion_knows_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--print_completion", "jsonschema"])
    assert exit_.value.code == 0
    assert '"crop_size"' in capsys.readouterr().out
    if importlib.util.find_spec("shtab") is None:
        message = error_of(capsys, "--print_completion", "shtab-bash")
        assert message == "rfield: --print_completion needs the package shtab: pip install shtab\n"
        return
    with pytest.raises(SystemExit):
        main(["--print_completion", "shtab-bash"])
    assert "--crop-size" in capsys.readouterr().out


def test_defaults_are_the_dataclass_s() -> None:
    assert train_config() == TrainConfig(data="synthetic", out="runs/x")


def test_flags_and_config_override_each_other_in_their_order(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("epochs: 3\nseed: 5\ncrop_size: [65, 33]\nflip: false\nfreeze_backbone: true\n")
    flags, given = ["--epochs", "7", "--flip", "--no-freeze-backbone"], ["--config", str(file)]
    after = train_config(*given, *flags)
    assert (after.optim.epochs, after.run.seed, after.data.crop_size) == (7, 5, (65, 33))
    assert (after.data.flip, after.model.freeze_backbone) == (True, False)
    before = train_config(*flags, *given)
    assert (before.optim.epochs, before.run.seed) == (3, 5)
    assert (before.data.flip, before.model.freeze_backbone) == (False, True)


def test_required_values_may_come_from_the_config(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("data: synthetic\nout: runs/y\n")
    assert parse(["train", "--config", str(file)])[1] == TrainConfig(data="synthetic", out="runs/y")


def test_a_run_s_config_can_be_given_back(tmp_path: Path) -> None:
    config = train_config("--crop-size", "65x97", "--lr", "1e-5").resolved()
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config.plain()))
    assert train_config("--config", str(file)) == config


@pytest.mark.parametrize(("text", "size"), [("520x640", (520, 640)), ("520", (520, 520)), ("[520, 640]", (520, 640))])
def test_sizes(tmp_path: Path, text: str, size: tuple[int, int]) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"crop_size: {text}\ncanvas: {text}\n")
    config = train_config("--config", str(file))
    assert (config.data.crop_size, config.model.canvas) == (size, size)
    if "[" not in text:
        assert train_config("--crop-size", text).data.crop_size == size


def test_null_stands_for_the_default(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("canvas: null\nlr: null\nmax_steps: null\n")
    assert train_config("--config", str(file)) == train_config()


def test_switches() -> None:
    assert train_config().data.flip
    assert not train_config("--no-flip").data.flip
    assert train_config("--no-flip", "--flip").data.flip
    assert train_config("--freeze-backbone", "--resume").run.resume
    assert train_config("--scale-range", "0.75,1.25").data.scale_range == (0.75, 1.25)


@pytest.mark.slow
def test_every_field_has_a_flag_and_a_text(capsys: pytest.CaptureFixture[str]) -> None:
    for command in COMMANDS:
        with pytest.raises(SystemExit) as exit_:
            main([command, "--help"])
        assert exit_.value.code == 0
        shown = capsys.readouterr().out
        config_class = COMMANDS[command][0]
        composed = issubclass(config_class, Config)
        groups = config_class.groups() if composed else {"": config_class}
        for title, group in groups.items():
            assert title == "" or f"\n{title}:\n" in shown
            for field in dataclasses.fields(group):
                flag = re.search(rf"--{field.name.replace('_', '-')}[\s,\]]", shown)
                positional = not composed and field.default is dataclasses.MISSING and not field.kw_only
                fixed = composed and field.name in config_class.fixed
                assert (flag is not None or positional) != fixed, (command, field.name)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "give a command: demo, train, evaluate"),
        ("dance", "invalid choice: 'dance'"),
        ("train", "required: data, out"),
        ("train --out x", "required: data"),
        ("evaluate", "required: run"),
        ("predict runs/x", "required: images"),
        ("train --data synthetic --out x --nonsense 3", "unrecognized arguments: --nonsense 3"),
        ("train --data synthetic --out x --epochs many", "epochs.*many"),
        ("train --data synthetic --out x --epochs 0", "epochs must be positive, got 0"),
        ("train --data synthetic --out x --epochs 2.5", r"epochs.*2\.5"),
        ("train --data synthetic --out x --search luck", "none.*gradient.*luck"),
        ("train --data synthetic --out x --crop-size big", "such as 520x640, got 'big'"),
        ("train --data synthetic --out x --scale-range 3", "such as 0.5,2, got '?3"),
        ("train --config nowhere.yaml", r"nowhere\.yaml"),
        ("train --data synthetic --out x --batch-size 3 --devices 2", "cannot be divided evenly"),
        ("train --data voc:nowhere --out x", "nowhere is not a folder"),
        ("train --data nowhere.yaml --out x", r"no data config nowhere\.yaml"),
        ("train --data nonsense --out x", "data 'nonsense' is not understood"),
        ("train --data synthetic --out x --model resnet", "'resnet' is not known.* largefov_vgg16, small_cnn"),
        ("train --data synthetic --out x --weights nowhere.pth", r"no weights file nowhere\.pth"),
        ("train --data synthetic --out x --colour-jitter 3", "colour_jitter must be from 0 to 1"),
        ("evaluate nowhere", r"nowhere is not a run folder: there is no such folder; give the --out"),
        ("predict nowhere image.jpg", "nowhere is not a run folder: there is no such folder"),
        ("sweep --data synthetic --out x --dilations 2,2", "such as 2,6,14, got '2,2'"),
        ("sweep --data synthetic --out x --dilations 2,x", "such as 2,6,14, got '2,x'"),
        ("sweep --data synthetic --out x --dilations 0,1", "dilations must be positive, got 0"),
        ("sweep --data synthetic --out x --seeds -1", "seeds must not be negative, got -1"),
        ("sweep --data synthetic --out x --jobs 0", "jobs must be positive, got 0"),
        ("sweep --data synthetic --out x --seed 3", "unrecognized arguments: --seed 3"),
        ("sweep --data synthetic --out x --model resnet", "'resnet' is not known"),
        ("sweep --data synthetic --out x --model small_cnn --storage nonsense", "storage nonsense cannot be used"),
        ("sweep --data voc:nowhere --out x", "nowhere is not a folder"),
        ("tune --data synthetic --out x --search none", "unrecognized arguments: --search none"),
        ("tune --data synthetic --out x --model resnet", "'resnet' is not known"),
        ("tune --data synthetic --out x --present-dilation 0", "present_dilation must be positive, got 0"),
        ("reproduce --data voc:nowhere --out x", "nowhere is not a folder"),
        ("reproduce --data voc:nowhere --out x --images 0", "images must be positive, got 0"),
        ("evaluate nowhere --checkpoint first", "last.*best.*first"),
    ],
)
def test_mistakes_are_answered_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    error = error_of(capsys, *shlex.split(words))
    assert re.search(message, error), error
    assert not list(tmp_path.iterdir()), "a mistake leaves nothing behind"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("crop_size: [a, b]", "such as 520x640"),
        ("crop_size: {height: 5}", "such as 520x640"),
        ("scale_range: [1]", "such as 0.5,2"),
        ("epochs: many", "epochs"),
        ("epochs: -2", "epochs must be positive"),
        ("dilation: null", "dilation must be positive, got None"),
        (f"dilation: 1{'0' * 400}", "dilation must be less than 2147483648, got 1000"),
        ("paths: 65536", "paths is auto or a number from 1 to 255, got 65536"),
        ("nonsense: 1", "nonsense"),
        ("train: {epochs: 1}", "train"),
        ("flip: perhaps", "not boolean: perhaps"),
        ("data: [", "config"),
        ("- data", "config"),
        ("just words", "config"),
    ],
)
def test_mistakes_in_a_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(text)
    assert message in error_of(capsys, *TRAIN, "--config", "config.yaml")
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_debugging_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RFIELD_DEBUG", "1")
    with pytest.raises(FileNotFoundError, match="nowhere is not a run folder"):
        main(["evaluate", "nowhere"])


def test_an_interruption_ends_with_status_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(config: DemoConfig) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(COMMANDS, "demo", (DemoConfig, interrupt))
    with pytest.raises(SystemExit) as exit_:
        main(["demo"])
    assert exit_.value.code == 130
    assert capsys.readouterr().err == "rfield demo: interrupted\n"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    import rfield

    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out.strip() == f"rfield {rfield.__version__}"


def test_scores_without_any_labelled_pixel_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    print_scores({"miou": None, "per_class": {"sky": None}, "pixel_accuracy": None})
    assert "mIoU nan   pixel accuracy nan" in capsys.readouterr().out


def test_scores_of_faces_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    faces = {"f1": {"eyes": 0.5, "hair": None}, "f1_overall": 0.256}
    print_scores({"miou": 0.5, "per_class": {"nose": 0.5}, "pixel_accuracy": 0.9, **faces})
    assert capsys.readouterr().out.splitlines()[-1] == "F1 % of eyes 50.0, hair -; overall 25.6"
