"""What a training validates and saves while it searches."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rfield.layers import LearnedFactor
from rfield.segmentation.config.train import TrainConfig
from rfield.segmentation.data import load_dataset
from rfield.segmentation.inference.predict import evaluate_run
from rfield.segmentation.runs import load_run
from rfield.segmentation.training import ParsingModule, train
from rfield.segmentation.training.stopping import WholeCheckpoints

pytestmark = pytest.mark.slow

Make = Callable[..., TrainConfig]


@pytest.mark.parametrize(
    "values",
    [
        {"search": "sampled"},
        {"search": "spsa", "factor": 1.3, "freeze_backbone": True},
        {"search": "spsa", "mechanism": "regulator"},
    ],
)
def test_a_best_checkpoint_of_mid_search_scores_what_was_validated(
    make: Make, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make(epochs=2, val_every=1, search_share=1.0, **values)
    out, kept, validated = Path(config.run.out), [], []
    real_save, real_end = WholeCheckpoints.save_checkpoint, ParsingModule.on_validation_epoch_end

    def save_checkpoint(self: WholeCheckpoints, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        real_save(self, checkpoint, path)
        if Path(path).name == "best.ckpt":
            kept.append(shutil.copy(path, out / f"{len(kept)}.kept"))

    def on_validation_epoch_end(self: ParsingModule) -> None:
        layers = [module for module in self.network.modules() if isinstance(module, LearnedFactor)]
        validated.append((self.confusion.compute(), [layer.realised_dilation for layer in layers]))
        real_end(self)

    monkeypatch.setattr(WholeCheckpoints, "save_checkpoint", save_checkpoint)
    monkeypatch.setattr(ParsingModule, "on_validation_epoch_end", on_validation_epoch_end)
    train(config)
    shutil.copy(kept[0], out / "checkpoints/best.ckpt")
    saved = torch.load(out / "checkpoints/best.ckpt", weights_only=True)
    assert not saved["search"]["search"]["done"]
    assert saved["global_step"] == 3
    (logged,) = (state["best_model_score"] for state in saved["callbacks"].values() if state.get("monitor") == "miou")
    run = load_run(out, "best")
    layers = [module for module in run.network.modules() if isinstance(module, LearnedFactor)]
    confusion, realised = validated[0]
    assert [layer.realised_dilation for layer in layers] == realised
    scores = evaluate_run(run, load_dataset(config.data.data, "val"))
    assert scores["miou"] == pytest.approx(float(logged), abs=1e-7)
    assert confusion.sum() > 0
    # Of the last epoch, where the search has ended, the same holds for the other checkpoint.
    last = evaluate_run(load_run(out, "last"), load_dataset(config.data.data, "val"))
    assert last["miou"] == json.loads((out / "metrics.json").read_text())["miou"]
    assert all(layer.snapped for layer in load_run(out, "last").network.modules() if isinstance(layer, LearnedFactor))
