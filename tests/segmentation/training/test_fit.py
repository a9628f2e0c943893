"""One whole run on a few tiny synthetic images: its folder, schedule, checkpoints, gradients, frozen backbone."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml

from rfield.segmentation.cli import main
from rfield.segmentation.config.train import TrainConfig
from rfield.segmentation.data import AugmentedDataset, EpochSampler, load_dataset, training_transform
from rfield.segmentation.runs import build_network
from rfield.segmentation.training import FACTOR_COLUMNS, ParsingModule, read_factor_csv, train

pytestmark = pytest.mark.slow

STEPS_AN_EPOCH = 3
Make = Callable[..., TrainConfig]


def rows_of(config: TrainConfig) -> list[list[str]]:
    with (Path(config.run.out) / "factor.csv").open(newline="") as file:
        return list(csv.reader(file))


def checkpoint_of(config: TrainConfig, name: str = "last") -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(Path(config.run.out) / f"checkpoints/{name}.ckpt", weights_only=True)
    return checkpoint


def metrics_of(config: TrainConfig) -> dict[str, Any]:
    metrics: dict[str, Any] = json.loads((Path(config.run.out) / "metrics.json").read_text())
    assert metrics.pop("train_seconds") > 0
    assert metrics.get("search", {"seconds": 0}).pop("seconds") >= 0
    return metrics


@pytest.mark.figures
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

    out = Path(config.run.out)
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
    assert not list(out.rglob("*.partial*"))

    written = yaml.safe_load((out / "config.yaml").read_text())
    assert written["optimizer"] == ("adamw" if frozen else "sgd")
    assert written["canvas"] == ([36, 41] if frozen else None)


@pytest.mark.parametrize("frozen", [False, True])
def test_evaluate_gives_the_run_s_own_score_bit_for_bit(make: Make, frozen: bool) -> None:
    config = make(freeze_backbone=frozen)
    train(config)
    metrics = metrics_of(config)
    main(["evaluate", config.run.out])
    scores = json.loads((Path(config.run.out) / "evaluation-val.json").read_text())
    for key in ("miou", "per_class", "pixel_accuracy"):
        assert scores[key] == metrics[key]
    assert (scores["data"], scores["split"]) == (config.data.data, "val")

    shutil.rmtree(str(config.run.cache), ignore_errors=True)
    again = Path(config.run.out) / "new" / "again.json"
    main(["evaluate", config.run.out, "--json", str(again), "--data", config.data.data])
    assert json.loads(again.read_text()) == scores
    main(["evaluate", config.run.out, "--checkpoint", "best", "--split", "test"])
    assert (Path(config.run.out) / "evaluation-test.json").is_file()


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
    (log,) = Path(config.run.out).rglob("logs/csv/*/metrics.csv")
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
    (row,) = list(csv.DictReader((Path(config.run.out) / "factor.csv").open(newline="")))

    torch.manual_seed(config.run.seed)
    network = build_network(config, 4).double()
    dataset = load_dataset(config.data.data, "train")
    transform = training_transform(
        config.data.crop_size, config.data.scale_range, config.data.flip, config.data.colour_jitter
    )
    samples = AugmentedDataset(dataset, transform, config.run.seed)
    keys = list(EpochSampler(samples, seed=config.run.seed))[:2]
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
    config = make(freeze_backbone=True, lr=3e-3, head_lr_scale=1.0, epochs=8, val_every=8, dropout=0.0, **values)
    train(config)
    losses = read_factor_csv(Path(config.run.out) / "factor.csv")["loss"]
    assert losses[-3:].mean() < losses[:3].mean()
    backbone = build_network(config, 4).backbone.state_dict().keys()
    assert {f"network.backbone.{key}" for key in backbone} <= checkpoint_of(config)["state_dict"].keys()


def test_the_frozen_backbone_stays(make: Make) -> None:
    config = make(freeze_backbone=True, epochs=1)
    train(config)
    torch.manual_seed(config.run.seed)
    for key, weight in build_network(config.resolved(), 4).backbone.state_dict().items():
        assert torch.equal(checkpoint_of(config)["state_dict"][f"network.backbone.{key}"], weight)


def test_a_frozen_canvas_too_small_leaves_no_run(make: Make) -> None:
    config = make(freeze_backbone=True, canvas=(35, 41))
    with pytest.raises(ValueError, match="train_00000 is 36x41 px, larger than the canvas of 35x41"):
        train(config)
    assert not Path(config.run.out).exists()


def test_mixed_precision(make: Make) -> None:
    config = make(precision="bf16-mixed", epochs=1)
    assert train(config)["miou"] >= 0
    kinds = {weight.dtype for weight in checkpoint_of(config)["state_dict"].values()}
    assert {kind for kind in kinds if kind.is_floating_point} == {torch.float32}


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
