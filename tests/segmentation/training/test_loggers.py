"""The loggers of a run, by their names."""

from pathlib import Path

import pytest

from rfield.segmentation.config.train import TrainConfig
from rfield.segmentation.training import trainer as trainer_module
from rfield.segmentation.training.trainer import make_loggers


def test_loggers_by_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = {}
    for name in ("WandbLogger", "MLFlowLogger"):
        monkeypatch.setattr(trainer_module, name, lambda *args, kind=name, **options: made.setdefault(kind, options))
    with pytest.raises(ValueError, match="logger wandb needs the package wandb: pip install wandb"):
        make_loggers(tmp_path / "run", ["csv", "wandb"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert len(make_loggers(tmp_path / "run", ["csv", "wandb", "mlflow"])) == 3
    assert {name: str(options["save_dir"]) for name, options in made.items()} == {
        "WandbLogger": str(tmp_path / "run/logs"),
        "MLFlowLogger": str(tmp_path / "run/logs/mlflow"),
    }
    with pytest.raises(ValueError, match="logger must be among tensorboard, csv, wandb, mlflow, got neptune"):
        TrainConfig(data="synthetic", out="x", logger="csv,neptune")
