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
        assert getattr(config, key) == written[key]


def test_the_paper_s_setting() -> None:
    _, config = parse(["train", "--config", str(next(path for path in CONFIGS if path.stem == "voc2012_largefov"))])
    assert isinstance(config, TrainConfig)
    config = config.resolved()
    assert (config.crop_size, config.batch_size, config.dilation, config.head_channels) == ((321, 321), 20, 12, 1024)
    assert (config.optimizer, config.lr, config.weights, config.train_split) == ("sgd", 1e-3, "imagenet", "train_aug")
