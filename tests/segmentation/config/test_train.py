import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from docstring_parser import parse_from_object

from rfield.segmentation.config.data import CheckDataConfig, ConvertConfig
from rfield.segmentation.config.experiments import DemoConfig, ReproduceConfig, SweepConfig, TuneConfig
from rfield.segmentation.config.export import (
    EvaluateConfig,
    ExportConfig,
    FuseConfig,
    PredictConfig,
    PushConfig,
    ReportConfig,
)
from rfield.segmentation.config.inspect import InspectConfig
from rfield.segmentation.config.options import Config
from rfield.segmentation.config.train import TrainConfig, differences
from rfield.segmentation.config.values import parse_class_weights
from rfield.segmentation.runs import load_config


def config_of(**values: Any) -> TrainConfig:
    return TrainConfig(**{"data": "synthetic", "out": "runs/x"} | values)


@pytest.mark.parametrize(
    ("value", "weights"),
    [
        (None, None),
        ("none", None),
        ("balanced", "balanced"),
        ("1,2.5", (1.0, 2.5)),
        ([1, 0], (1.0, 0.0)),
        ((0.5,), (0.5,)),
    ],
)
def test_class_weights(value: Any, weights: Any) -> None:
    assert parse_class_weights(value) == weights
    assert config_of(class_weights=value).optim.class_weights == weights


def test_a_decoder_needs_the_whole_backbone() -> None:
    assert config_of(decoder=True).model.decoder
    with pytest.raises(ValueError, match="decoder needs the backbone's finer map, but freeze_backbone keeps its"):
        config_of(decoder=True, freeze_backbone=True)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"aspp": "6,12", "search": "sampled"}, "aspp 6,12 must be two or more branches"),
        ({"aspp": "1x1,pool", "search": "none"}, "at least one of them a dilation, with search none and one path"),
        ({"aspp": [0, 6], "search": "none"}, "branches are dilations of at least 1, 1x1 and pool, with commas"),
        ({"extra_paths": "1x1"}, "extra_paths 1x1 need search sampled, several paths, no class_groups"),
        ({"extra_paths": "pool", "paths": 2, "search": "spsa"}, "extra_paths pool need search sampled"),
        ({"extra_paths": "pool,pool", "paths": 2}, "extra_paths are 1x1 or pool, none of them twice, got pool,pool"),
        ({"extra_paths": [6], "paths": 2}, "extra_paths are 1x1 or pool, none of them twice, got 6"),
        ({"shared_kernel": "search"}, "shared_kernel search needs several paths"),
        ({"gates": "image"}, "gates image need search none, one path, .* got search sampled, 1 paths$"),
        ({"gates": "pixel", "search": "none", "paths": 2}, "gates pixel need search none, one path, .*, 2 paths$"),
        ({"gates": "pixel", "search": "none", "aspp": "1x1,2"}, "different dilations alone, .*, 1 paths, aspp 1x1,2$"),
        ({"gates": "pixel", "search": "none", "aspp": "2,2"}, "different dilations alone, .*, 1 paths, aspp 2,2$"),
        ({"gates": "pixel", "search": "none", "aspp": "1,2", "shared_kernel": "always"}, "always needs several paths"),
    ],
)
def test_branches_that_do_not_fit(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(**values)


def test_gates_have_a_norm_and_its_learning_rate() -> None:
    gated = config_of(gates="image", search="none", freeze_backbone=True, aspp="3,1").resolved()
    assert (gated.model.aspp, gated.optim.lr) == ((3, 1), 1e-3)


def test_other_dilations_are_for_run_folders() -> None:
    assert PredictConfig(run="run", images="x", dilations="2,3.5", weights="search").dilations == (2, 3.5)
    for values in ({"dilations": "2"}, {"weights": "search"}):
        with pytest.raises(ValueError, match=r"dilations and weights are for run folders: net\.onnx has fixed"):
            PredictConfig(run="net.onnx", images="x", **values)
    with pytest.raises(ValueError, match="dilations must be positive, got 0"):
        PredictConfig(run="run", images="x", dilations="2,0")


def test_label_smoothing_goes_with_cross_entropy() -> None:
    assert config_of(label_smoothing=0.1).optim.label_smoothing == 0.1
    with pytest.raises(ValueError, match="label_smoothing goes with the loss cross_entropy, not dice"):
        config_of(label_smoothing=0.1, loss="dice")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dilation", 0),
        ("head_channels", -1),
        ("factor", 0.0),
        ("factor", float("nan")),
        ("lr", 0.0),
        ("factor_lr", float("inf")),
        ("epochs", 0),
        ("max_steps", 0),
        ("val_every", 0),
        ("weight_decay", -1.0),
        ("factor_start", -1),
        ("seed", -1),
        ("workers", -1),
        ("dropout", 1.0),
        ("label_smoothing", 1.0),
        ("label_smoothing", -0.1),
        ("scale_range", (2.0, 1.0)),
        ("scale_range", (0.0, 1.0)),
        ("crop_size", (0, 5)),
    ],
)
def test_values_out_of_range_are_named(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match="a size is HEIGHTxWIDTH" if key == "crop_size" else key):
        config_of(**{key: value})


def test_a_batch_is_dealt_evenly() -> None:
    assert config_of(batch_size=6, devices=3).run.devices == 3
    with pytest.raises(ValueError, match="batch_size 8 cannot be divided evenly among 3 devices"):
        config_of(batch_size=8, devices=3)


def test_defaults_follow_the_kind_of_run() -> None:
    whole, frozen = config_of().resolved(), config_of(freeze_backbone=True).resolved()
    assert (whole.optim.optimizer, whole.optim.lr) == ("sgd", 1e-3)
    assert frozen.optim.optimizer == "adamw"
    assert config_of(freeze_backbone=True, optimizer="sgd").resolved().optim.lr == whole.optim.lr
    for config in (whole, frozen):
        assert None not in (config.optim.lr, config.search.factor_lr, config.run.val_every)
        assert config.resolved() == config


def test_given_values_stay() -> None:
    given = {"optimizer": "adamw", "lr": 0.5, "factor_lr": 0.25, "val_every": 7}
    resolved = config_of(**given).resolved()
    assert given.items() <= resolved.flat().items()


@pytest.mark.parametrize(
    "config",
    [
        config_of(),
        config_of(canvas="30x40", lr=1e-5, freeze_backbone=True).resolved(),
        config_of(class_weights="1,2"),
        config_of(class_weights="balanced", loss="dice"),
    ],
)
def test_plain_goes_through_yaml(tmp_path: Path, config: TrainConfig) -> None:
    assert "resume" not in config.plain()
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.plain()))
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize("text", ["", "[", "data: x", "data: x\nout: y\nnonsense: 1", "data: x\nout: y\nepochs: many"])
def test_a_damaged_run_config_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"config\.yaml is not (a run's config|valid YAML)"):
        load_config(tmp_path / "config.yaml")


def test_whole_numbers_stand_for_others_in_a_run_config_and_not_the_other_way(tmp_path: Path) -> None:
    path, plain = tmp_path / "config.yaml", config_of(epochs=3, factor=2.5, flip=True).plain()
    path.write_text(yaml.safe_dump(plain | {"factor": 2, "lr": 1, "max_steps": None}))
    assert (load_config(path).search.factor, load_config(path).optim.lr) == (2, 1)
    for name, value in (("seed", 0.0), ("max_steps", 2.0), ("flip", 1), ("decoder", 0), ("train_split", 3)):
        path.write_text(yaml.safe_dump(plain | {name: value}))
        with pytest.raises(ValueError, match=rf"config\.yaml is not a run's config: {name} is {value}$"):
            load_config(path)


CONFIGS = [TrainConfig, SweepConfig, TuneConfig, ReproduceConfig, DemoConfig, EvaluateConfig, PredictConfig, FuseConfig]
CONFIGS += [ExportConfig, PushConfig, ReportConfig, ConvertConfig, InspectConfig, CheckDataConfig]


@pytest.mark.parametrize("config_class", CONFIGS)
def test_every_field_is_documented(config_class: Any) -> None:
    groups = config_class.groups().values() if issubclass(config_class, Config) else [config_class]
    names = [field.name for group in groups for field in dataclasses.fields(group)]
    assert len(set(names)) == len(names), "flat names are unique"
    for group in groups:
        documented = {
            param.arg_name: param.description
            for base in group.__mro__[:-1]
            for param in parse_from_object(base).params
            if param.description
        }
        assert {field.name for field in dataclasses.fields(group)} <= documented.keys()
    if issubclass(config_class, Config):
        assert {*config_class.fixed, *config_class.defaults} <= {*names}


def test_an_experiment_holds_the_config_that_its_runs_share() -> None:
    config = TuneConfig(data="synthetic", out="runs/tune", lr=0.5, seeds=4, storage="db://ann:secret@host/runs")
    assert config.train == config_of(
        out="runs/tune",
        lr=0.5,
        search="sampled",
        search_share=1.0,
        search_narrowing=False,
        freeze_backbone=True,
        epochs=10,
    )
    assert (config.grid.seeds, config.grid.present_dilation) == ((4,), None)
    assert config.replace(verify=True).grid.verify
    assert config.replace(verify=False) == config
    plain = config.plain()
    assert plain.items() >= {"lr": 0.5, "seeds": [4], "storage": "db://ann:***@host/runs"}.items()
    assert "resume" not in plain


def test_options_that_are_missing_or_unknown_are_named() -> None:
    with pytest.raises(TypeError, match="there is no option epoch, size"):
        config_of(epoch=3, size=4)
    with pytest.raises(TypeError, match="'out'"):
        TrainConfig(data="synthetic")


def test_differences() -> None:
    old, new = config_of().plain(), config_of(seed=3, crop_size="65", out="runs/y").plain()
    assert differences(old, new, ignored=["out"]) == ["crop_size: [321, 321] -> [65, 65]", "seed: 0 -> 3"]
    assert differences(old, old) == []
