"""What a run is put together from: its trainer, its logs, its advice, what it says of a search. No run is trained."""

import csv
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from rfield.layers import AdaptiveConv2d
from rfield.search import GradientSearch, SampledSearch, SpsaSearch, learned_layers
from rfield.segmentation.config.train import TrainConfig
from rfield.segmentation.files.untrusted import read_yaml
from rfield.segmentation.runs import build_network, read_paths_csv
from rfield.segmentation.training import LineProgress, ParsingModule, prepare, read_factor_csv, train
from rfield.segmentation.training import fit as fit_module
from rfield.segmentation.training import module as module_module
from rfield.segmentation.training.callbacks import (
    FactorLog,
    LastValidation,
    PathLog,
    PinnedFactor,
    SearchStep,
    bounds_reached,
)
from rfield.segmentation.training.fit import _canvas
from rfield.segmentation.training.loaders import loader_position
from rfield.segmentation.training.run_folder import save_config
from rfield.segmentation.training.search_report import describe_search
from rfield.segmentation.training.stopping import StopOnSignal
from rfield.segmentation.training.trainer import make_trainer, quiet_lightning

Make = Any


def module_of(**values: Any) -> ParsingModule:
    torch.manual_seed(0)
    tiny: dict[str, Any] = {"model": "small_cnn", "dilation": 3, "head_channels": 4, "dropout": 0.0, "batch_size": 2}
    config = TrainConfig(data="synthetic", out="x", **tiny | values).resolved()
    return ParsingModule(build_network(config, 4), config, ("a", "b", "c", "d"))


@pytest.mark.parametrize(
    "values",
    [
        {"epochs": 5, "val_every": 2, "clip_norm": 0.5},
        {"epochs": 7, "val_every": 3, "clip_norm": 0.0, "max_steps": 11, "precision": "bf16-mixed", "paths": 2},
        {"rectangular": True, "search": "sampled"},
    ],
)
def test_a_trainer_is_as_its_config_says(make: Make, values: dict[str, Any], tmp_path: Path) -> None:
    config, log_paths = make(**values).resolved(), "paths" in values
    with quiet_lightning():
        trainer = make_trainer(
            tmp_path, config.optim, config.run, [stop := StopOnSignal(tmp_path / "last.ckpt")], log_paths
        )
    assert trainer.gradient_clip_val == (config.optim.clip_norm or None)
    assert (trainer.max_epochs, trainer.max_steps) == (config.optim.epochs, config.optim.max_steps or -1)
    assert (trainer.check_val_every_n_epoch, trainer.log_every_n_steps) == (config.run.val_every, 10)
    assert (trainer.precision, trainer.num_devices, trainer.num_nodes) == (config.run.precision, 1, 1)
    assert [type(logger) for logger in trainer.loggers] == [TensorBoardLogger, CSVLogger]
    assert {Path(logger.save_dir or "") for logger in trainer.loggers} == {tmp_path / "logs"}
    kinds = [type(callback) for callback in trainer.callbacks]
    assert (PathLog in kinds) == log_paths
    assert {FactorLog, PinnedFactor, LastValidation, LineProgress} <= set(kinds)
    # The logs show a step as it ran, the stop saves it with the search's part.
    place = kinds.index(SearchStep)
    assert max(kinds.index(FactorLog), kinds.index(PinnedFactor)) < place < trainer.callbacks.index(stop)
    saved = {each.filename: each for each in trainer.callbacks if isinstance(each, ModelCheckpoint)}
    assert {Path(each.dirpath or "") for each in saved.values()} == {tmp_path / "checkpoints"}
    best, last = saved["best"], saved["last"]
    assert (best.monitor, best.mode, best._save_on_train_epoch_end) == ("miou", "max", False)
    assert (last.monitor, last._save_on_train_epoch_end) == (None, True)
    assert not any(each._enable_version_counter for each in saved.values())


def test_paths_that_a_search_chooses_are_four_at_first() -> None:
    for paths, count in (("auto", 4), (2, 2)):
        assert len(module_of(paths=paths, search="sampled").network.head.heads()) == count  # type: ignore[union-attr]


def test_advice_is_kept_from_those_who_run_a_training_and_no_other_warning() -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with quiet_lightning():
            warnings.warn("The 'train_dataloader' does not have many workers which may be", stacklevel=1)
            warnings.warn("something else", stacklevel=1)
    assert [str(each.message) for each in told] == ["something else"]


# -------------------------------------------------------------------------------------------------------------- logs


def trainer_at(step: int, **values: Any) -> Any:
    return SimpleNamespace(global_step=step, **values)


def test_rows_are_written_in_fifties_and_with_every_checkpoint(tmp_path: Path) -> None:
    module, log = module_of(search="gradient"), FactorLog(tmp_path / "factor.csv")
    log.on_train_start(trainer_at(0), module)
    for step in range(1, 53):
        module.mean_loss = torch.tensor(step / 4)
        log.on_train_batch_end(trainer_at(step), module, None, None, 0)
        assert len(read_factor_csv(log.path)["step"]) == (0 if step < 50 else 50)
    log.on_save_checkpoint(trainer_at(52), module, {})
    columns = read_factor_csv(log.path)
    assert columns["step"].tolist() == list(range(1, 53))
    assert columns["loss"].tolist() == [step / 4 for step in range(1, 53)]
    log.on_save_checkpoint(trainer_at(52), module, {})
    assert len(read_factor_csv(log.path)["step"]) == 52, "each row once"


def test_a_resumed_log_keeps_the_rows_of_its_checkpoint(tmp_path: Path) -> None:
    module, log = module_of(search="gradient"), FactorLog(tmp_path / "factor.csv")
    rows = [[step, 1, 3, 39, "", "", 0.5] for step in range(1, 8)]
    for step, kept in ((4, 4), (7, 7), (0, 0)):
        with log.path.open("w", newline="") as file:
            csv.writer(file).writerows([log.columns, *rows, [2, 1, 3]])
        log.on_train_start(trainer_at(step), module)
        assert read_factor_csv(log.path)["step"].tolist() == list(range(1, kept + 1))


@pytest.mark.parametrize("rectangular", [False, True])
def test_paths_are_logged_by_name(tmp_path: Path, rectangular: bool) -> None:
    module = module_of(search="sampled", paths=2, rectangular=rectangular)
    log = PathLog(tmp_path / "paths.csv")
    log.on_train_start(trainer_at(0), module)
    for step in (1, 2):
        learned_layers(module.network)[1][0].set_factor((1.0 + step, 1.5) if rectangular else 1.0 + step)
        log.on_train_batch_end(trainer_at(step), module, None, None, 0)
    log.on_save_checkpoint(trainer_at(2), module, {})
    base = module.network.head.paths[0].dilation
    found = {
        name: (steps.tolist(), np.round(base / dilations, 4).tolist())
        for name, (steps, dilations) in read_paths_csv(log.path).items()
    }
    if rectangular:
        names = [f"path {path}, {axis}" for path in (1, 2) for axis in ("height", "width")]
        assert list(found) == names
        assert found["path 2, width"] == ([1, 2], [1.5, 1.5])
        assert found["path 2, height"] == ([1, 2], [2, 3])
    else:
        assert found == {"path 1": ([1, 2], [1, 1]), "path 2": ([1, 2], [2, 3])}


def test_a_line_an_epoch(capsys: pytest.CaptureFixture[str]) -> None:
    metrics = {"loss": torch.tensor(0.123456), "miou": torch.tensor(0.5), "factor": torch.tensor(2.0), "other": 1}
    trainer = trainer_at(3, callback_metrics=metrics, current_epoch=1, max_epochs=4)
    LineProgress().on_train_epoch_end(trainer, module_of(search="none"))
    assert capsys.readouterr().out == "epoch 2/4: loss 0.1235, factor 2\n", "an earlier epoch's score is none of this"
    progress = LineProgress()
    progress.on_validation_end(trainer, module_of(search="none"))
    progress.on_train_epoch_end(trainer, module_of(search="none"))
    assert capsys.readouterr().out == "epoch 2/4: loss 0.1235, miou 0.5, factor 2\n"


def test_the_last_epoch_is_validated() -> None:
    for epoch, expected in ((0, 3), (2, 3), (3, 1)):
        trainer = trainer_at(0, current_epoch=epoch, max_epochs=4, check_val_every_n_epoch=3)
        LastValidation().on_train_start(trainer, module_of(search="none"))  # As one that is resumed inside it.
        assert trainer.check_val_every_n_epoch == expected


def test_factors_of_two_processes_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(module_module, "refuse_unequal", lambda *given: seen.append(given))
    module = module_of(search="gradient", paths=2, factor=2.0)
    for size in (1, 2):
        module._trainer = trainer_at(7, world_size=size)
        module.on_train_epoch_end()
    ((factors, where),) = seen
    assert factors.tolist() == pytest.approx([2.0, 2.0])
    assert (where, factors.requires_grad) == ("step 7", False)


def test_a_config_keeps_the_order_of_its_groups(tmp_path: Path) -> None:
    config = TrainConfig(data="synthetic", out="x").resolved()
    save_config(tmp_path, config)
    assert list(read_yaml(tmp_path / "config.yaml").items()) == list(config.plain().items())


# ------------------------------------------------------------------------------------------------ a factor at a bound


def watched(kind: str, steps: int, factor: float, seen: int, start: int = 0) -> list[str]:
    """What is said of a search of so many steps whose factor is at a bound for so many."""
    module = module_of(search=kind)
    layer = learned_layers(module.network)[0][0]
    kinds: dict[str, Any] = {"gradient": GradientSearch, "spsa": SpsaSearch}
    if kind == "sampled":
        module.search = SampledSearch(module.network, module._loss, steps, [0])
    else:
        module.search = kinds[kind](module.network, module._loss, steps)
    module.factor_start = start
    module.network(torch.zeros(1, 3, 33, 33))  # Shows the layer its map, of 9x9.
    layer.set_factor(factor)
    watch = PinnedFactor()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(1, seen + 1):
            watch.on_train_batch_end(trainer_at(step), module, None, None, 0)
    return [str(each.message).split(". ")[0] for each in caught]


@pytest.mark.parametrize("kind", ["gradient", "spsa"])
def test_a_fifth_of_a_search_at_a_bound_is_told(kind: str) -> None:
    large = "the factor of path 1, height, has been at its lower bound, where the dilation is the map's size for"
    small = "the factor of path 1, height, has been at its upper bound, where the dilation is 1 for"
    assert watched(kind, 200, 3.0, 39) == []
    assert watched(kind, 200, 3.0, 80) == [f"step 40: {small} 40 steps"]
    assert watched(kind, 200, 3 / 9, 40) == [f"step 40: {large} 40 steps"]
    assert watched(kind, 50, 3.0, 19) == [], "fewer than 20 mean nothing"
    assert watched(kind, 50, 3.0, 20) == [f"step 20: {small} 20 steps"]
    assert watched(kind, 50, 1.5, 50) == []


def test_a_curve_s_end_and_a_factor_that_waits_are_no_bounds() -> None:
    assert watched("sampled", 200, 3.0, 100) == []
    assert watched("gradient", 50, 3.0, 29, start=10) == []
    assert watched("gradient", 50, 3.0, 30, start=10)[0].startswith("step 30: ")
    assert watched("spsa", 50, 3.0, 20, start=10)[0].startswith("step 20: ")


# --------------------------------------------------------------------------------------------- what a run says and does


@pytest.mark.parametrize(("count", "shown"), [(1, 1), (200, 200), (201, 101), (1000, 200), (1001, 167)])
def test_a_search_s_way_has_at_most_200_points(make: Make, count: int, shown: int) -> None:
    search = {"steps": count, "done": False, "trajectory": [(step, [float(step), 2.0]) for step in range(count)]}
    described = describe_search("spsa", {"search": search, "seconds": 1.5})
    assert (described["kind"], described["steps"], described["seconds"]) == ("spsa", count, 1.5)
    assert len(described["trajectory"]) == len(described["trajectories"]) == shown
    assert described["trajectory"][0] == [0, 0.0]
    assert described["trajectories"][-1] == [*described["trajectory"][-1], 2.0]
    assert "unsnapped_dilation" not in described
    one = {**search, "done": True, "unsnapped": [[4.5], [2.0, 3.0]], "trajectory": [(1, [4.0])]}
    described = describe_search("gradient", {"search": one, "seconds": 1.5})
    assert described["unsnapped_dilation"] == [4.5, 2.0, 3.0]
    assert "trajectories" not in described


def test_a_canvas_holds_every_image_of_both_splits() -> None:
    splits: Any = [SimpleNamespace(sizes=lambda sizes=sizes: sizes) for sizes in ([(5, 9), (7, 3)], [(2, 11), (6, 1)])]
    assert _canvas(splits) == (7, 11)


def test_features_are_cached_in_eval_mode(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def cache_features(network: Any, *given: Any) -> tuple[Any, ...]:
        return network.backbone.training, *given

    monkeypatch.setattr(fit_module, "cache_features", cache_features)
    network, data, progress = module_of().network.train(), object(), object()
    for cache, folder in ((str(tmp_path), tmp_path), (None, None)):
        options: Any = SimpleNamespace(cache=cache, seed=7)
        found: Any = fit_module._cache_features(network, data, options, True, progress)  # type: ignore[arg-type]
        assert found == (False, data, folder, True, 7, progress)


def test_the_bounds_of_a_map() -> None:
    """Of 24x48 px at dilation 6: factors of 1/4 to 6 along the height, and of 1/8 to 6 along the width."""
    layer = AdaptiveConv2d(1, 1, 3, dilation=6)
    assert bounds_reached(layer, tighter=True) == {}
    layer(torch.rand(1, 1, 24, 48))
    for factor, tight, loose in (
        *((1.0, None, None), (6.0, False, False), (6 / 1.0009, False, False), (6 / 1.0011, None, None)),
        *((0.25, True, None), (0.25 * 1.0009, True, None), (0.25 * 1.0011, None, None), (0.125 * 1.0009, True, True)),
    ):
        layer.set_factor(factor)
        assert (bounds_reached(layer, True), bounds_reached(layer, False)) == ({0: tight}, {0: loose})


def test_the_bounds_along_each_axis() -> None:
    layer = AdaptiveConv2d(1, 1, 3, dilation=(6, 4), factor=(1.0, 1.0))
    layer(torch.rand(1, 1, 24, 48))
    for factors, tight, loose in (
        ((6.0, 4.0), {0: False, 1: False}, {0: False, 1: False}),
        ((4.0, 0.25), {0: False, 1: True}, {0: None, 1: None}),
        ((0.25, 1 / 12), {0: True, 1: True}, {0: True, 1: True}),
    ):
        layer.set_factor(factors)
        assert (bounds_reached(layer, True), bounds_reached(layer, False)) == (tight, loose)
    # Bounds that leave no room are never reached.
    for high, expected in ((1.001, None), (1.0011, True)):
        layer = AdaptiveConv2d(1, 1, 3, dilation=6, min_factor=1.0, max_factor=high)
        layer(torch.rand(1, 1, 24, 48))
        assert bounds_reached(layer, False) == {0: expected}


def test_where_a_checkpoint_goes_on() -> None:
    for processed, started, batches, expected in ((2, 2, 3, (2, 0)), (1, 2, 2, (1, 2)), (0, 1, 1, (0, 1))):
        epochs = {"current": {"processed": processed, "started": started}}
        loop = {"epoch_progress": epochs, "epoch_loop.batch_progress": {"current": {"processed": batches}}}
        assert loader_position({"loops": {"fit_loop": loop}}) == expected


@pytest.mark.parametrize(
    ("values", "read"),
    [
        ({"search": "sampled"}, True),
        ({"search": "sampled", "loss": "focal"}, False),
        ({"search": "sampled", "class_weights": "balanced"}, False),
        ({"search": "sampled", "class_weights": (1, 2, 3, 4)}, False),
        ({"search": "gradient"}, False),
        ({"search": "gradient", "paths": 2, "class_groups": {"x": ["both"], "y": ["red", "neither"]}}, False),
    ],
)
def test_a_loss_that_says_what_counts_is_read_as_it_is(
    make: Make, values: dict[str, Any], read: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []

    def module(*arguments: Any) -> None:
        given.extend(arguments)
        raise InterruptedError

    monkeypatch.setattr(fit_module, "ParsingModule", module)
    with pytest.raises(InterruptedError):
        train(make(**values))
    _, config, names, held_out, groups, weights, reading_weights = given
    assert (len(held_out) > 0) == (values["search"] == "sampled")
    assert (len(names), groups) == (4, [(3,), (0, 2)] if "class_groups" in values else None)
    assert (reading_weights is not None) == read
    assert (weights is not None) == ("class_weights" in values)
    assert config.optim.epochs == 3


def test_preparing_computes_what_a_frozen_run_needs_and_writes_no_run(make: Make) -> None:
    frozen = make(freeze_backbone=True, search="none")
    done: list[int] = []
    prepare(frozen, lambda count, total: done.append(total))
    assert done, "the features of both splits"
    assert not Path(frozen.run.out).exists()
    done.clear()
    prepare(make(search="none"), lambda count, total: done.append(total))
    assert not done
    with pytest.raises(ValueError, match="larger than the canvas"):
        prepare(make(freeze_backbone=True, canvas=(35, 41)))
