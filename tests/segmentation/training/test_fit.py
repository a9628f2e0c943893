"""Whole runs on a few tiny synthetic images, in this process or in one of their own."""

import csv
import dataclasses
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml

from rfield.search import SampledSearch
from rfield.segmentation.cli import main
from rfield.segmentation.config.train import TrainConfig
from rfield.segmentation.data import AugmentedDataset, EpochSampler, load_dataset, training_transform
from rfield.segmentation.models import ParsingNetwork
from rfield.segmentation.runs import build_network, load_config, load_run
from rfield.segmentation.training import FACTOR_COLUMNS, ParsingModule, read_factor_csv, train

pytestmark = pytest.mark.slow

STEPS_AN_EPOCH = 3
Make = Callable[..., TrainConfig]
Forked = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(autouse=True)
def _restored_signals() -> Iterator[None]:
    """Lightning ignores SIGINT for good after a KeyboardInterrupt."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


def rows_of(config: TrainConfig) -> list[list[str]]:
    with (Path(config.out) / "factor.csv").open(newline="") as file:
        return list(csv.reader(file))


def checkpoint_of(config: TrainConfig, name: str = "last") -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(Path(config.out) / f"checkpoints/{name}.ckpt", weights_only=True)
    return checkpoint


def metrics_of(config: TrainConfig) -> dict[str, Any]:
    metrics: dict[str, Any] = json.loads((Path(config.out) / "metrics.json").read_text())
    assert metrics.pop("train_seconds") > 0
    assert metrics.get("search", {"seconds": 0}).pop("seconds") >= 0
    return metrics


def assert_same_run(one: TrainConfig, other: TrainConfig) -> None:
    """The same numbers everywhere."""
    assert rows_of(one) == rows_of(other)
    assert metrics_of(one) == metrics_of(other)
    for name in ("last", "best"):
        weights, other_weights = (checkpoint_of(config, name)["state_dict"] for config in (one, other))
        assert weights.keys() == other_weights.keys()
        for key, weight in weights.items():
            assert torch.equal(weight, other_weights[key]), key


def stop_at(patch: pytest.MonkeyPatch, step: int, error: type[BaseException]) -> None:
    """Has the training step raise an error after so many steps."""
    real = ParsingModule.training_step

    def failing(self: ParsingModule, batch: Any, batch_index: int) -> Any:
        if self.global_step == step:
            raise error
        return real(self, batch, batch_index)

    patch.setattr(ParsingModule, "training_step", failing)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_run_folder(make: Make, frozen: bool, capsys: pytest.CaptureFixture[str]) -> None:
    config = make(freeze_backbone=frozen, epochs=4)
    returned = train(config)
    shown = capsys.readouterr()
    assert [line.split(":")[0] for line in shown.out.splitlines()] == [f"epoch {n}/4" for n in (1, 2, 3, 4)]
    assert "loss" in shown.out
    assert "miou" in shown.out
    assert "rf_px" in shown.out
    assert shown.err == ""

    out = Path(config.out)
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics == returned
    assert {"miou", "per_class", "pixel_accuracy", "factor", "effective_dilation", "receptive_field_px"} < set(metrics)
    assert {"train_seconds", "seed", "versions"} < set(metrics)
    assert 0 <= metrics["miou"] <= 1
    assert list(metrics["per_class"]) == ["neither", "green below", "red right", "both"]
    assert {"python", "rfield", "torch", "torchvision", "lightning"} == set(metrics["versions"])
    assert metrics["effective_dilation"] == pytest.approx(3 / metrics["factor"])
    assert metrics["receptive_field_px"] == pytest.approx(15 + 8 * metrics["effective_dilation"])

    rows = rows_of(config)
    head = "step,factor,effective_dilation,receptive_field_px,grad_inflation,grad_interpolation,loss"
    assert ",".join(rows[0]) == head
    assert [int(row[0]) for row in rows[1:]] == list(range(1, 13))
    columns = read_factor_csv(out / "factor.csv")
    assert columns["factor"][-1] == pytest.approx(metrics["factor"], rel=1e-5)
    assert (columns["factor"] != 1).any()
    # The search takes 0.8 of the 12 steps; then the dilation is an integer and the factor has no gradient any more.
    assert all(abs(columns[name][:10]).min() > 0 for name in FACTOR_COLUMNS)
    assert all(row[4] == row[5] == "" for row in rows[11:])
    assert set(columns["effective_dilation"][10:]) == {float(round(metrics["effective_dilation"]))}
    assert metrics["search"]["kind"] == "gradient"
    assert metrics["search"]["steps"] == 10
    assert len(metrics["search"]["trajectory"]) == 10

    assert (out / "factor.png").stat().st_size > 10_000
    for name in ("last", "best"):
        assert checkpoint_of(config, name)["hyper_parameters"]["config"]["dilation"] == 3
    assert list((out / "logs").rglob("events.out.tfevents.*"))
    (log,) = (out / "logs").rglob("metrics.csv")
    assert {"miou", "factor", "rf_px"} <= set(log.read_text().splitlines()[0].split(","))
    assert not list(out.rglob("*.partial"))

    written = yaml.safe_load((out / "config.yaml").read_text())
    assert written["optimizer"] == ("adamw" if frozen else "sgd")
    assert written["canvas"] == ([36, 41] if frozen else None)


@pytest.mark.parametrize("frozen", [False, True])
def test_evaluate_gives_the_run_s_own_score_bit_for_bit(make: Make, frozen: bool) -> None:
    config = make(freeze_backbone=frozen)
    train(config)
    metrics = metrics_of(config)
    main(["evaluate", config.out])
    scores = json.loads((Path(config.out) / "evaluation-val.json").read_text())
    for key in ("miou", "per_class", "pixel_accuracy"):
        assert scores[key] == metrics[key]
    assert (scores["data"], scores["split"]) == (config.data, "val")

    shutil.rmtree(str(config.cache), ignore_errors=True)
    again = Path(config.out) / "new" / "again.json"
    main(["evaluate", config.out, "--json", str(again), "--data", config.data])
    assert json.loads(again.read_text()) == scores
    main(["evaluate", config.out, "--checkpoint", "best", "--split", "test"])
    assert (Path(config.out) / "evaluation-test.json").is_file()


def test_the_written_config_gives_the_same_run(make: Make) -> None:
    config = make(epochs=1, freeze_backbone=True)
    train(config)
    other = dataclasses.replace(config, out=f"{config.out}-again")
    main(["train", "--config", f"{config.out}/config.yaml", "--out", other.out])
    assert_same_run(config, other)


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"workers": 1}, RuntimeError),
        ({"freeze_backbone": True}, KeyboardInterrupt),
        ({"val_every": 2, "optimizer": "adamw", "loss_resolution": "image", "factor_start": 2}, RuntimeError),
        ({"search": "spsa", "freeze_backbone": True}, RuntimeError),
        ({"search": "spsa", "search_share": 0.4, "mechanism": "regulator"}, RuntimeError),
        ({"search": "sampled", "search_share": 0.6, "freeze_backbone": True}, RuntimeError),
        ({"search": "sampled", "search_share": 0.3, "workers": 1}, RuntimeError),
    ],
)
def test_an_interrupted_run_goes_on_exactly(
    make: Make, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], error: type[BaseException]
) -> None:
    whole, cut = make("whole", dropout=0.5, **values), make("cut", dropout=0.5, **values)
    train(whole)
    with monkeypatch.context() as patch:
        stop_at(patch, STEPS_AN_EPOCH + 2, error)
        with pytest.raises(error):
            train(cut)
    assert not (Path(cut.out) / "metrics.json").exists()
    # What a kill in the midst of writing leaves: steps of the unfinished epoch, and half a row.
    with (Path(cut.out) / "factor.csv").open("a") as file:
        file.write("4,1,3,39,0,0,1\n5,1,3,39,0,0,1\n1,1,3")
    train(dataclasses.replace(cut, resume=True))
    assert_same_run(whole, cut)


KILLED = """
import os, signal, sys
from rfield.segmentation.cli import main
from rfield.segmentation.training import ParsingModule

real = ParsingModule.training_step

def training_step(self, batch, batch_index):
    if self.global_step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, batch, batch_index)

ParsingModule.training_step = training_step
main(sys.argv[1:])
"""


def test_a_killed_run_goes_on_exactly(make: Make, forked: Forked) -> None:
    whole, cut = make("whole", dropout=0.5), make("cut", dropout=0.5, workers=1)
    train(whole)
    config = Path(cut.out).with_suffix(".yaml")
    config.write_text(yaml.safe_dump(cut.plain()))
    assert forked(KILLED, "train", "--config", str(config)).returncode == -signal.SIGKILL
    main(["train", "--config", str(config), "--resume"])
    assert_same_run(whole, cut)


def test_a_run_that_never_ended_an_epoch_begins_anew(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, cut = make("whole", epochs=1), make("cut", epochs=1)
    train(whole)
    with monkeypatch.context() as patch:
        stop_at(patch, 1, RuntimeError)
        with pytest.raises(RuntimeError):
            train(cut)
    train(dataclasses.replace(cut, resume=True))
    assert_same_run(whole, cut)


def test_resuming_a_finished_run_just_finishes(make: Make) -> None:
    for config in (make("a", epochs=1), make("b", max_steps=STEPS_AN_EPOCH + 1)):
        first = train(config)
        rows = rows_of(config)
        again = train(dataclasses.replace(config, resume=True))
        assert rows_of(config) == rows
        for metrics in (first, again):
            metrics.pop("train_seconds")
            metrics["search"].pop("seconds")
        assert again == first


def test_resuming_where_there_is_no_run_begins_one(make: Make) -> None:
    config = make(epochs=1)
    train(dataclasses.replace(config, resume=True))
    assert len(rows_of(config)) == 1 + STEPS_AN_EPOCH


def test_other_settings_are_no_continuation(make: Make) -> None:
    config = make(epochs=1)
    train(config)
    changed = dataclasses.replace(config, resume=True, seed=1, crop_size=(17, 17), workers=1, cache=None)
    message = r"other settings: crop_size: \[33, 33\] -> \[17, 17\]; seed: 0 -> 1$"
    with pytest.raises(ValueError, match=message):
        train(changed)
    assert load_config(Path(config.out) / "config.yaml") == config.resolved()


def test_a_run_is_never_overwritten(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    config = make(epochs=1)
    train(config)
    before = {path: path.read_bytes() for path in Path(config.out).rglob("*") if path.is_file()}
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main(["train", "--config", f"{config.out}/config.yaml"])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error == f"rfield train: {config.out} holds a run already: give --resume to continue it, or another --out\n"
    assert {path: path.read_bytes() for path in Path(config.out).rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("damage", ["cut", "garbage", "other"])
def test_a_damaged_checkpoint_is_answered_with_one_line(
    make: Make, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    config = make(epochs=1)
    train(config)
    path = Path(config.out) / "checkpoints/last.ckpt"
    if damage == "cut":
        os.truncate(path, path.stat().st_size // 2)
    elif damage == "garbage":
        path.write_bytes(b"garbage" * 99)
    else:
        torch.save({"state_dict": {"network.head.nonsense": torch.zeros(1)}}, path)
    capsys.readouterr()
    for words in (["evaluate", config.out], ["train", "--config", f"{config.out}/config.yaml", "--resume"]):
        with pytest.raises(SystemExit) as exit_:
            main(words)
        assert exit_.value.code == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "last.ckpt is damaged or not a checkpoint of this run" in error


def test_a_step_limit_ends_inside_an_epoch(make: Make) -> None:
    config = make(max_steps=STEPS_AN_EPOCH + 1)
    train(config)
    assert [row[0] for row in rows_of(config)[1:]] == ["1", "2", "3", "4"]
    assert checkpoint_of(config)["global_step"] == 4
    (group, *_) = checkpoint_of(config)["optimizer_states"][0]["param_groups"]
    assert group["lr"] == 0


@pytest.mark.parametrize(("epochs", "val_every", "scored"), [(3, 2, 2), (2, 9, 1), (2, 1, 2)])
def test_the_last_epoch_ends_with_a_validation(make: Make, epochs: int, val_every: int, scored: int) -> None:
    config = make(epochs=epochs, val_every=val_every)
    miou = train(config)["miou"]
    (log,) = Path(config.out).rglob("logs/csv/*/metrics.csv")
    with log.open(newline="") as file:
        scores = [float(row["miou"]) for row in csv.DictReader(file) if row["miou"]]
    assert len(scores) == scored
    assert scores[-1] == pytest.approx(miou, abs=1e-6)
    if scored == 1:
        assert checkpoint_of(config, "best")["epoch"] == epochs - 1


def test_the_best_checkpoint_is_the_best(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([0.2, 0.8, 0.5])
    monkeypatch.setattr(ParsingModule, "on_validation_epoch_end", lambda self: self.log("miou", next(scores)))
    config = make(val_every=1)
    train(config)
    assert checkpoint_of(config, "best")["epoch"] == 1
    assert checkpoint_of(config, "last")["epoch"] == 2


def test_learning_rates_and_weight_decay(make: Make) -> None:
    config = make(epochs=2, max_steps=STEPS_AN_EPOCH, lr=0.01, head_lr_scale=4.0, factor_lr=0.5, weight_decay=0.125)
    train(config)
    head, factor, backbone = checkpoint_of(config)["optimizer_states"][0]["param_groups"]
    assert [group["initial_lr"] for group in (head, factor, backbone)] == [0.04, 0.5, 0.01]
    assert [group["weight_decay"] for group in (head, factor, backbone)] == [0.125, 0.0, 0.125]
    assert [len(group["params"]) for group in (head, factor, backbone)] == [6, 1, 6]
    assert [group["lr"] for group in (head, factor, backbone)] == [0.0, 0.0, 0.0]


def test_learning_rates_decay_by_the_power_of_9_tenths(make: Make) -> None:
    config = make(lr=0.01, search="none", epochs=3)
    seen: list[float] = []
    real = ParsingModule.training_step

    def watching(self: ParsingModule, batch: Any, batch_index: int) -> Any:
        optimizer: Any = self.optimizers()
        seen.append(optimizer.param_groups[-1]["lr"])
        return real(self, batch, batch_index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ParsingModule, "training_step", watching)
        train(config)
    assert seen == pytest.approx([0.01 * (1 - step / 9) ** 0.9 for step in range(9)])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_factor_waits_for_its_start(make: Make, optimizer: str) -> None:
    waiting = make("waiting", optimizer=optimizer, factor_start=4, max_steps=4)
    train(waiting)
    assert {row[1] for row in rows_of(waiting)[1:]} == {"1"}
    state = checkpoint_of(waiting)["optimizer_states"][0]
    assert float(checkpoint_of(waiting)["state_dict"]["network.head.layers.log_factor"]) == 0
    assert state["param_groups"][1]["params"][0] not in state["state"], "no momentum is collected"
    assert len(state["state"]) == 12

    started = make("started", optimizer=optimizer, factor_start=4)
    train(started)
    factors = [row[1] for row in rows_of(started)[1:]]
    assert factors[:4] == ["1"] * 4
    assert factors[4] != "1"


def test_no_search_is_the_plain_network(make: Make) -> None:
    config = make(search="none", epochs=1)
    metrics = train(config)
    assert (metrics["factor"], metrics["effective_dilation"], metrics["receptive_field_px"]) == (1.0, 3.0, 39.0)
    for row in rows_of(config)[1:]:
        assert row[1:6] == ["1", "3", "39", "", ""]
    assert not [key for key in checkpoint_of(config)["state_dict"] if "factor" in key]


@pytest.mark.parametrize("loss_resolution", ["features", "image"])
def test_the_recorded_gradients_are_the_loss_s_derivative(make: Make, loss_resolution: str) -> None:
    config = make(
        factor=1.1, max_steps=1, dropout=0.0, loss_resolution=loss_resolution, crop_size=(33, 41), lr=1e-3
    ).resolved()
    train(config)
    (row,) = list(csv.DictReader((Path(config.out) / "factor.csv").open(newline="")))

    torch.manual_seed(config.seed)
    network = build_network(config, 4).double()
    dataset = load_dataset(config.data, "train")
    transform = training_transform(config.crop_size, config.scale_range, config.flip, config.colour_jitter)
    samples = AugmentedDataset(dataset, transform, config.seed)
    keys = list(EpochSampler(samples, seed=config.seed))[:2]
    images, masks = (torch.stack(part) for part in zip(*(samples[key] for key in keys), strict=True))

    def loss(factor: float) -> float:
        regulator: Any = network.head.layers
        with torch.no_grad():
            regulator.log_factor.data = torch.tensor([factor], dtype=torch.float64).log()
            features = network.backbone(images.double())
            if loss_resolution == "image":
                logits, target = network.head(features, output_size=(33, 41)), masks
            else:
                logits, target = network.head(features), masks[:, ::4, ::4]
            return float(F.cross_entropy(logits, target, ignore_index=255))

    assert float(row["loss"]) == pytest.approx(loss(1.1), rel=1e-4)
    slope = (loss(1.1 + 1e-6) - loss(1.1 - 1e-6)) / 2e-6
    assert abs(slope) > 1e-5
    assert float(row["grad_inflation"]) + float(row["grad_interpolation"]) == pytest.approx(slope, rel=1e-3)


@pytest.mark.parametrize("values", [{"canvas": (39, 50)}, {"loss_resolution": "image"}, {"flip": False}])
def test_frozen_runs_learn_at_sizes_off_the_stride(make: Make, values: dict[str, Any]) -> None:
    config = make(freeze_backbone=True, lr=3e-3, head_lr_scale=1.0, epochs=8, dropout=0.0, **values)
    train(config)
    losses = read_factor_csv(Path(config.out) / "factor.csv")["loss"]
    assert losses[-3:].mean() < losses[:3].mean()
    backbone = build_network(config, 4).backbone.state_dict().keys()
    assert {f"network.backbone.{key}" for key in backbone} <= checkpoint_of(config)["state_dict"].keys()


def test_the_frozen_backbone_stays(make: Make) -> None:
    config = make(freeze_backbone=True, epochs=1)
    train(config)
    torch.manual_seed(config.seed)
    for key, weight in build_network(config.resolved(), 4).backbone.state_dict().items():
        assert torch.equal(checkpoint_of(config)["state_dict"][f"network.backbone.{key}"], weight)


def test_a_frozen_canvas_too_small_leaves_no_run(make: Make) -> None:
    config = make(freeze_backbone=True, canvas=(35, 41))
    with pytest.raises(ValueError, match="train_00000 is 36x41 px, larger than the canvas of 35x41"):
        train(config)
    assert not Path(config.out).exists()


def test_mixed_precision(make: Make) -> None:
    config = make(precision="bf16-mixed", epochs=1)
    assert train(config)["miou"] >= 0
    kinds = {weight.dtype for weight in checkpoint_of(config)["state_dict"].values()}
    assert {kind for kind in kinds if kind.is_floating_point} == {torch.float32}


def test_runs_repeat_themselves_and_seeds_differ(make: Make) -> None:
    one, same, other = make("one", epochs=1), make("same", epochs=1, workers=1), make("other", epochs=1, seed=1)
    for config in (one, same, other):
        train(config)
    assert_same_run(one, same)
    assert rows_of(one) != rows_of(other)


def test_two_processes_are_one_run(make: Make, forked: Forked) -> None:
    """Lightning starts the second, as the command line has started the first."""
    values: dict[str, Any] = {
        "dropout": 0.0,
        "scale_range": (1, 1),
        "crop_size": (36, 41),
        "epochs": 2,
        "lr": 0.1,
        "head_lr_scale": 1.0,
    }
    alone, both = make("alone", **values), make("both", devices=2, **values)
    train(alone)
    config = Path(both.out).with_suffix(".yaml")
    config.write_text(yaml.safe_dump(both.plain()))
    code = "import runpy; runpy.run_module('rfield', run_name='__main__', alter_sys=True)"
    done = forked(code, "train", "--config", str(config))
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.count("mIoU") == 1, "the first process alone reports"
    assert len(rows_of(both)) == 1 + 2 * STEPS_AN_EPOCH
    torch.manual_seed(alone.seed)
    start = build_network(alone.resolved(), 4).state_dict()
    ends = [checkpoint_of(config)["state_dict"] for config in (alone, both)]
    for key in (key for key, weight in start.items() if weight.dim() == 4):
        one, two = (end[f"network.{key}"] - start[key] for end in ends)
        assert (one - two).norm() < 0.01 * one.norm(), key
    assert metrics_of(both)["miou"] == pytest.approx(metrics_of(alone)["miou"], abs=1e-3)


@pytest.mark.parametrize("search", ["gradient", "spsa", "sampled"])
@pytest.mark.parametrize("rectangular", [False, True])
def test_paths_are_learned_and_recorded(make: Make, search: str, rectangular: bool) -> None:
    groups = {"near": ["neither"], "far": ["both", "red right"]}
    values: dict[str, Any] = {"search": search, "rectangular": rectangular, "search_share": 0.9}
    config = make(paths=2, class_groups=groups, dilation=4, epochs=2, **values)
    metrics = train(config)
    assert [path["class_group"] for path in metrics["paths"]] == [["neither"], ["red right", "both"]]
    assert [path["class_group_name"] for path in metrics["paths"]] == ["near", "far"]
    with (Path(config.out) / "paths.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    series = {(row["path"], row["axis"]) for row in rows}
    assert series == {(path, axis) for path in "12" for axis in (("height", "width") if rectangular else ("height",))}
    assert len(rows) == 2 * STEPS_AN_EPOCH * len(series)
    last = {(int(row["path"]), row["axis"]): float(row["effective_dilation"]) for row in rows[-len(series) :]}
    # Snapped at the search's end, before the last step.
    assert [path["effective_dilation"] for path in metrics["paths"]] == [last[index, "height"] for index in (1, 2)]
    for path in metrics["paths"]:
        assert path["receptive_field_px"] == pytest.approx(15 + 8 * path["effective_dilation"], rel=1e-6)
        assert path["factor"] == pytest.approx(4 / path["effective_dilation"], rel=1e-6)
    assert ("rectangle" in metrics) == rectangular
    for field in metrics.get("rectangle", ()):
        assert field["effective_dilation"] == last[field["path"] + 1, field["axis"]]
    # Each has gone its own way, and what a step ran at is what its row says.
    ways = [[row["factor"] for row in rows if (row["path"], row["axis"]) == each] for each in sorted(series)]
    assert all(len(set(way)) > 2 for way in ways)
    assert all(ways.count(way) == 1 for way in ways)
    assert (Path(config.out) / "paths.png").is_file()
    if search == "sampled":
        assert len(metrics["search"]["factors"]) == len(series)
    again = load_run(config.out).network
    for path, described in zip(again.head.paths, metrics["paths"], strict=True):
        assert path.effective_dilation[0] == pytest.approx(described["effective_dilation"], rel=1e-6)


@pytest.mark.parametrize(("search", "most"), [("sampled", 0.7), ("spsa", 0.8)])
def test_a_search_computes_features_once_for_all_dilations(
    make: Make, monkeypatch: pytest.MonkeyPatch, search: str, most: float
) -> None:
    calls = {"features": 0, "logits_of": 0}

    def count(method: str) -> None:
        real = getattr(ParsingNetwork, method)

        def counting(self: ParsingNetwork, *arguments: Any) -> Any:
            calls[method] += not torch.is_inference_mode_enabled()  # The validation looks once.
            return real(self, *arguments)

        monkeypatch.setattr(ParsingNetwork, method, counting)

    count("features")
    count("logits_of")
    train(make(search=search, decoder=True))
    assert 0 < calls["features"] < most * calls["logits_of"], calls


def test_published_guidance_warns_of_the_drift(make: Make) -> None:
    values: dict[str, Any] = {"path_guidance": "gradient", "path_weight": 30.0, "optimizer": "adamw", "lr": 0.05}
    config = make(paths=2, class_groups=[["neither"], ["both"]], epochs=20, head_lr_scale=1.0, dropout=0.0, **values)
    with pytest.warns(UserWarning, match="no joint rest point"):
        train(config)


def test_a_drift_is_told_where_the_sum_explodes_too(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    real = ParsingModule.training_step

    def training_step(self: ParsingModule, *arguments: Any) -> Any:
        loss = real(self, *arguments)
        self.network.head.path_logits = torch.tensor([60.0, 55.0, 80.0])
        return loss

    monkeypatch.setattr(ParsingModule, "training_step", training_step)
    config = make(paths=2, class_groups=[["neither"], ["both"]], path_guidance="gradient", epochs=1)
    with pytest.warns(UserWarning, match="60 in root mean square where their sum has 80"):
        train(config)


def test_aspp_trains(make: Make) -> None:
    metrics = train(make(aspp=(2, 4), search="none", epochs=1))
    assert [path["effective_dilation"] for path in metrics["paths"]] == [2, 4]
    assert metrics["receptive_field_px"] == 15 + 8 * 2


@pytest.mark.shared
def test_real_images_and_weights(
    shared: Path, small_msrc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = shared / "weights/vgg16_features_imagenet_fp16.pth"
    out = tmp_path / "run"
    command = (
        f"train --data voc:{small_msrc} --model largefov_vgg16 --weights {weights} --freeze-backbone --head-channels 16"
    )
    command += f" --dilation 6 --search none --epochs 2 --seed 0 --out {out} --cache {tmp_path / 'cache'}"
    main(command.split())
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["receptive_field_px"] == 308
    assert (metrics["factor"], metrics["effective_dilation"]) == (1, 6)
    assert len(metrics["per_class"]) == 21
    main(["evaluate", str(out), "--split", "val"])
    scores = json.loads((out / "evaluation-val.json").read_text())
    shutil.rmtree(tmp_path / "cache")
    main(["evaluate", str(out), "--split", "val"])
    assert json.loads((out / "evaluation-val.json").read_text()) == scores
    assert {key: scores[key] for key in ("miou", "per_class", "pixel_accuracy")} == {
        key: metrics[key] for key in ("miou", "per_class", "pixel_accuracy")
    }
    main(["predict", str(out), f"{small_msrc}/JPEGImages", "--out", str(tmp_path / "out")])
    assert len(list((tmp_path / "out").glob("*.png"))) == 12
    assert "308 px" in capsys.readouterr().out


def test_a_sampled_search_holds_images_out_and_gives_them_back(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[set[int]] = []
    real = AugmentedDataset.__getitem__

    def watched(self: AugmentedDataset, key: tuple[int, int]) -> Any:
        seen.extend(set() for _ in range(key[0] + 1 - len(seen)))
        seen[key[0]].add(key[1])
        return real(self, key)

    monkeypatch.setattr(AugmentedDataset, "__getitem__", watched)
    config = make(search="sampled", search_share=0.6, dilation=5)
    metrics = train(config)
    assert [len(images) for images in seen] == [4, 4, 6], "a third is held out"
    dilations = read_factor_csv(Path(config.out) / "factor.csv")["effective_dilation"]
    assert dilations[5:].tolist() == pytest.approx([metrics["effective_dilation"]] * 4)
    assert metrics["search"]["kind"] == "sampled"
    curve = dict(metrics["search"]["curve"])
    assert min(curve, key=lambda dilation: curve[dilation]) == pytest.approx(metrics["effective_dilation"], abs=1)
    assert all(loss > 0 for loss in curve.values())


@pytest.mark.parametrize("loss", ["cross_entropy", "dice"])
def test_the_curve_counts_small_classes_unless_the_loss_says_what_counts(
    make: Make, loss: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    read: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]] = []
    real_logits, real_losses = ParsingModule._logits, SampledSearch._call_loss_fn

    def watched_logits(self: ParsingModule, network: torch.nn.Module, batch: Any) -> Any:
        seen.append(real_logits(self, network, batch))
        return seen[-1]

    def watched_losses(self: SampledSearch, batch: Any) -> Any:
        output = real_losses(self, batch)
        if not self.model.training:
            read.append((batch[1], *seen[-1], output[1]))
        return output

    monkeypatch.setattr(ParsingModule, "_logits", watched_logits)
    monkeypatch.setattr(SampledSearch, "_call_loss_fn", watched_losses)
    train(make(search="sampled", search_share=0.6, loss=loss))
    whole = {mask.numpy().tobytes(): mask for mask, *_ in read}
    labels = torch.cat([mask[mask != 255] for mask in whole.values()])
    weight = (labels.bincount() / len(labels)).sqrt().sum()
    for _, logits, mask, factor_losses in read:
        losses = [
            F.cross_entropy(logits[0, :, y, x], mask[0, y, x]) * (len(labels) / (labels == mask[0, y, x]).sum()).sqrt()
            for y, x in (mask[0] != 255).nonzero().tolist()
        ]
        expected = (torch.stack(losses).mean() / weight).item()
        assert (factor_losses.item() == pytest.approx(expected, rel=1e-4)) == (loss == "cross_entropy")


def test_the_start_of_a_sampled_search_does_not_matter(make: Make) -> None:
    first, second = (train(make(f"from-{d}", search="sampled", dilation=d, freeze_backbone=True)) for d in (2, 7))
    assert first["miou"] == second["miou"]
    assert first["effective_dilation"] == pytest.approx(second["effective_dilation"])


def test_no_search_has_no_factor(make: Make) -> None:
    metrics = train(make(search="none", epochs=1))
    assert "search" not in metrics
    assert metrics["factor"] == 1
