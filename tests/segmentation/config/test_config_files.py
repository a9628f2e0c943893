"""Every config in configs/ is one that the command line understands, flat and without inheritance."""

from pathlib import Path

import pytest
import yaml

from rfield.segmentation.cli import parse
from rfield.segmentation.config.train import TrainConfig

CONFIGS = sorted((Path(__file__).parents[3] / "configs").glob("*.yaml"))


def test_there_are_configs() -> None:
    assert {"voc2012_largefov", "msrc21_frozen"} <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_parser_understands(path: Path) -> None:
    command, config = parse(["train", "--config", str(path)])
    assert command == "train"
    assert isinstance(config, TrainConfig)
    written = yaml.safe_load(path.read_text())
    assert not [value for value in written.values() if isinstance(value, dict)]
    for key in ("data", "out", "model"):
        assert config.flat()[key] == written[key]


def test_the_paper_s_setting() -> None:
    _, config = parse(["train", "--config", str(next(path for path in CONFIGS if path.stem == "voc2012_largefov"))])
    assert isinstance(config, TrainConfig)
    config = config.resolved()
    data, model, optim = config.data, config.model, config.optim
    assert (data.crop_size, optim.batch_size, model.dilation, model.head_channels) == ((321, 321), 20, 12, 1024)
    assert (optim.optimizer, optim.lr, model.weights, data.train_split) == ("sgd", 1e-3, "imagenet", "train_aug")
