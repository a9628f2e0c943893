"""Every dilation and seed exactly once, whatever happens on the way."""

import csv
import json
import multiprocessing
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import yaml
from optuna.storages import JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from rfield.segmentation.cli import main
from rfield.segmentation.config.experiments import SweepConfig
from rfield.segmentation.config.train import TrainConfig
from rfield.segmentation.experiments import run_sweep, trials
from rfield.segmentation.experiments import study as shared_study
from rfield.segmentation.experiments.study import Point
from rfield.segmentation.training import Interrupted, read_factor_csv, train

pytestmark = pytest.mark.slow

Make = Callable[..., SweepConfig]
NAMES = ["d02-seed0", "d02-seed1", "d05-seed0", "d05-seed1"]


@pytest.fixture
def make(tmp_path: Path, tiny: dict[str, Any]) -> Make:
    def make_config(**values: Any) -> SweepConfig:
        own: dict[str, Any] = {"out": str(tmp_path / "sweep"), "dilations": (2, 5), "seeds": (0, 1)}
        return SweepConfig(**tiny | own | values)

    return make_config


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the run folders that are trained from now on."""
    names: list[str] = []

    def watched(config: TrainConfig) -> dict[str, Any]:
        names.append(Path(config.run.out).name)
        return train(config)

    monkeypatch.setattr(trials, "train", watched)
    return names


def study_of(config: SweepConfig) -> optuna.Study:
    storage = JournalStorage(JournalFileBackend(f"{config.train.run.out}/study.journal"))
    return optuna.load_study(study_name="sweep", storage=storage)


def results_of(config: SweepConfig) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((Path(config.train.run.out) / "results.json").read_text())
    return results


def metrics_of(config: SweepConfig, name: str) -> dict[str, Any]:
    metrics: dict[str, Any] = json.loads((Path(config.train.run.out) / name / "metrics.json").read_text())
    return metrics


def names_in(study: optuna.Study, state: TrialState) -> list[str]:
    return sorted(Point(**trial.user_attrs["point"]).name for trial in study.get_trials(states=(state,)))


def write_yaml(config: SweepConfig) -> str:
    path = Path(config.train.run.out).with_suffix(".yaml")
    path.write_text(yaml.safe_dump({key: value for key, value in config.plain().items() if key not in config.fixed}))
    return str(path)


def test_every_dilation_and_seed_once(make: Make, trained: list[str]) -> None:
    config = make(report="end")
    text = run_sweep(config)
    out = Path(config.train.run.out)
    assert "mIoU over the dilation" in (out / "report.html").read_text(encoding="utf-8")
    assert len(list(out.rglob("report.html"))) == 1
    assert sorted(trained) == NAMES
    study = study_of(config)
    assert names_in(study, TrialState.COMPLETE) == NAMES
    assert len(study.trials) == 4
    assert study.trials[3].params == {"dilation": 5, "seed": 1, "search": "none"}
    assert not list((out / "locks").iterdir())

    results = results_of(config)
    assert [run["name"] for run in results["runs"]] == NAMES
    assert results["unfinished"] == []
    with (out / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for run, row in zip(results["runs"], rows, strict=True):
        metrics = metrics_of(config, run["name"])
        assert run == {
            "name": f"d{run['dilation']:02d}-seed{run['seed']}",
            "search": "none",
            "dilation": metrics["effective_dilation"],
            "seed": metrics["seed"],
            **{key: metrics[key] for key in ("miou", "pixel_accuracy", "effective_dilation", "receptive_field_px")},
            "train_seconds": metrics["train_seconds"],
            "verdict": None,
        }
        assert row == {key: "" if value is None else str(value) for key, value in run.items()}
    for row_of_table, dilation in zip(results["table"], (2, 5), strict=True):
        mious = [metrics_of(config, f"d{dilation:02d}-seed{seed}")["miou"] for seed in (0, 1)]
        assert row_of_table["dilation"] == dilation
        assert row_of_table["seeds"] == [0, 1]
        assert row_of_table["miou"] == pytest.approx(np.mean(mious))
        assert row_of_table["miou_spread"] == pytest.approx(abs(mious[0] - mious[1]) / 2**0.5)
        assert f"{np.mean(mious):.4f}" in text
    assert (out / "table.md").read_text().strip() in text
    assert (out / "sweep.png").stat().st_size > 10_000
    assert "epoch 2/2" in (out / "d02-seed0/train.log").read_text()

    # Once more, and then with one dilation more; the grid's runs are what plain training gives.
    trained.clear()
    assert run_sweep(config) == text
    assert trained == []
    run_sweep(make(dilations=(2, 3, 5), seeds=(0,)))
    assert trained == ["d03-seed0"]
    alone = train(config.run_config(f"{out}-alone", 3, 0, "none").replace(resume=False))
    assert alone["miou"] == metrics_of(config, "d03-seed0")["miou"]


KILLED = """
import os, signal, sys
from rfield.segmentation.cli import main
from rfield.segmentation.training import ParsingModule

real = ParsingModule.training_step

def training_step(self, batch, batch_index):
    if self.config.model.dilation == 5 and self.global_step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, batch, batch_index)

ParsingModule.training_step = training_step
main(sys.argv[1:])
"""


def test_a_killed_trial_is_run_again_and_no_other(make: Make, forked: Any, trained: list[str]) -> None:
    config = make(seeds=(0,), dilations=(2, 5, 3))
    assert forked(KILLED, "sweep", "--config", write_yaml(config)).returncode == -signal.SIGKILL
    study = study_of(config)
    assert names_in(study, TrialState.COMPLETE) == ["d02-seed0"]
    assert names_in(study, TrialState.RUNNING) == ["d05-seed0"]
    before = (Path(config.train.run.out) / "d02-seed0/metrics.json").stat()

    run_sweep(config)
    assert sorted(trained) == ["d03-seed0", "d05-seed0"]
    study = study_of(config)
    assert names_in(study, TrialState.COMPLETE) == ["d02-seed0", "d03-seed0", "d05-seed0"]
    assert names_in(study, TrialState.FAIL) == ["d05-seed0"]
    assert len(study.trials) == 4
    assert (Path(config.train.run.out) / "d02-seed0/metrics.json").stat() == before
    assert len(read_factor_csv(Path(config.train.run.out) / "d05-seed0/factor.csv")["step"]) == 6
    log = (Path(config.train.run.out) / "d05-seed0/train.log").read_text()
    assert [line.split(":")[0] for line in log.splitlines()] == ["epoch 1/2", "epoch 2/2"], "resumed from epoch 1"


def test_a_stop_names_what_goes_on(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sweep has no --resume."""

    def stopped(config: TrainConfig) -> dict[str, Any]:
        raise Interrupted(signal.SIGTERM, "stopped by SIGTERM; 5 steps are saved")

    monkeypatch.setattr(trials, "train", stopped)
    with pytest.raises(Interrupted) as error:
        run_sweep(make())
    assert str(error.value) == "stopped by SIGTERM; 5 steps are saved, call again to continue from there"
    assert error.value.signum == signal.SIGTERM


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_trial_is_run_again(
    make: Make, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    config = make(seeds=(0,))

    def failing(config: TrainConfig) -> dict[str, Any]:
        if config.model.dilation == 5:
            raise error("no")
        return train(config)

    with monkeypatch.context() as patch:
        patch.setattr(trials, "train", failing)
        with pytest.raises(error):
            run_sweep(config)
    assert names_in(study_of(config), TrialState.FAIL) == ["d05-seed0"]
    run_sweep(config)
    assert names_in(study_of(config), TrialState.COMPLETE) == ["d02-seed0", "d05-seed0"]


@pytest.fixture
def _forked_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spares the workers their imports."""
    contexts = {"spawn": multiprocessing.get_context("fork")}
    monkeypatch.setattr("rfield.segmentation.experiments.trials.multiprocessing.get_context", contexts.__getitem__)


@pytest.mark.processes
@pytest.mark.usefixtures("_forked_workers")
def test_two_workers_share_a_journal(make: Make, capfd: pytest.CaptureFixture[str]) -> None:
    config = make(jobs=2)
    main(["sweep", "--config", write_yaml(config)])
    shown = capfd.readouterr().out
    study = study_of(config)
    assert names_in(study, TrialState.COMPLETE) == NAMES
    for name in NAMES:
        assert shown.count(f"{name}: training") == 1
    assert not list((Path(config.train.run.out) / "locks").iterdir())
    one = make(jobs=1, out=f"{config.train.run.out}-one", seeds=(0,), dilations=(5,))
    run_sweep(one)
    assert metrics_of(one, "d05-seed0")["miou"] == metrics_of(config, "d05-seed0")["miou"]


@pytest.mark.processes
@pytest.mark.usefixtures("_forked_workers")
def test_a_worker_s_failure_is_one_line(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    config = make(jobs=2)
    other = config.run_config(f"{config.train.run.out}/d05-seed1", 5, 1, "none").replace(epochs=1, resume=False)
    train(other)
    with pytest.raises(SystemExit):
        main(["sweep", "--config", write_yaml(config)])
    error = capsys.readouterr().err
    assert "rfield sweep: d05-seed1: " in error
    assert "d05-seed1 holds a run with other settings (epochs: 1 -> 2" in error
    assert "Traceback" not in error
    assert names_in(study_of(config), TrialState.COMPLETE) == NAMES[:3]


def test_a_database_is_shared_by_machines_with_folders_of_their_own(
    make: Make, tmp_path: Path, trained: list[str]
) -> None:
    url = f"sqlite:///{tmp_path}/sweep.db"
    one, two = (make(storage=url, seeds=(0,), out=str(tmp_path / machine / "sweep")) for machine in ("one", "two"))
    run_sweep(one)
    assert len(trained) == 2
    run_sweep(two)
    assert len(trained) == 2
    assert results_of(one)["runs"] == results_of(two)["runs"]
    assert not (Path(one.train.run.out) / "study.journal").exists()

    # What a machine is at belongs to it: the other one neither waits for it nor takes it over.
    study = optuna.load_study(study_name="sweep", storage=RDBStorage(url))
    point = {"dilation": 7, "seed": 0, "search": "none"}
    study.enqueue_trial(point, user_attrs={"point": point})
    busy = study.ask()
    text = run_sweep(make(storage=url, seeds=(0,), dilations=(2, 7), out=two.train.run.out))
    assert "not finished, another process has them: d07-seed0" in text
    assert len(trained) == 2
    assert results_of(two)["unfinished"] == ["d07-seed0"]
    assert [run["name"] for run in results_of(two)["runs"]] == ["d02-seed0", "d05-seed0"]
    study.tell(busy, state=TrialState.FAIL)
    run_sweep(make(storage=url, seeds=(0,), dilations=(2, 7), out=two.train.run.out))
    assert trained[2:] == ["d07-seed0"]


def test_a_silent_worker_s_trial_is_taken_up(
    make: Make, forked: Any, tmp_path: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"sqlite:///{tmp_path}/sweep.db"
    one, two = (make(storage=url, seeds=(0,), out=str(tmp_path / machine / "sweep")) for machine in ("one", "two"))
    Path(one.train.run.out).parent.mkdir()
    assert forked(KILLED, "sweep", "--config", write_yaml(one)).returncode == -signal.SIGKILL
    study = optuna.load_study(study_name="sweep", storage=RDBStorage(url))
    assert names_in(study, TrialState.RUNNING) == ["d05-seed0"]

    for module in (shared_study, trials):
        monkeypatch.setattr(module, "HEARTBEAT", 1)
    monkeypatch.setattr(shared_study, "_SILENCE", 2)
    run_sweep(two)
    assert trained == ["d05-seed0"]
    assert names_in(study, TrialState.COMPLETE) == ["d02-seed0", "d05-seed0"]
    assert names_in(study, TrialState.FAIL) == ["d05-seed0"]
    assert results_of(two)["unfinished"] == []


def test_a_worker_that_was_only_slow_is_not_in_the_way(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make(storage=f"sqlite:///{tmp_path}/sweep.db", seeds=(0,), dilations=(2,))
    names = []

    def slow(own: TrainConfig) -> dict[str, Any]:
        names.append(Path(own.run.out).name)
        study = optuna.load_study(study_name="sweep", storage=RDBStorage(str(config.grid.storage)))
        study.tell(0, state=TrialState.FAIL)  # as another does that has not heard of it for long
        return train(own)

    monkeypatch.setattr(trials, "train", slow)
    assert "not finished, another process has them: d02-seed0" in run_sweep(config)
    assert "not finished" not in run_sweep(config)
    assert names == ["d02-seed0"], "what is in the folder is taken"


def test_no_password_is_written(make: Make) -> None:
    assert "secret" not in str(make(storage="postgresql+psycopg://ann:secret@db/sweeps").plain())


def test_what_two_processes_have_queued_is_run_once(make: Make, trained: list[str]) -> None:
    config = make(seeds=(0,), dilations=(2,))
    run_sweep(config)
    study = study_of(config)
    for dilation in (2, 3, 3):
        point = {"dilation": dilation, "seed": 0, "search": "none"}
        study.enqueue_trial(point, user_attrs={"point": point})
    run_sweep(make(seeds=(0,), dilations=(2, 3)))
    assert trained == ["d02-seed0", "d03-seed0"]
    assert names_in(study_of(config), TrialState.COMPLETE) == ["d02-seed0", "d03-seed0"]
    assert not study_of(config).get_trials(states=(TrialState.WAITING, TrialState.RUNNING))


@pytest.mark.figures
def test_starts_are_compared_in_the_same_folder(make: Make, trained: list[str]) -> None:
    run_sweep(make(seeds=(0,), dilations=(2,)))
    text = run_sweep(make(seeds=(0,), dilations=(2, 5), search="sampled"))
    assert trained == ["d02-seed0", "d02-seed0-sampled", "d05-seed0-sampled"]
    rows = results_of(make())["table"]
    assert [(row["search"], row["dilation"]) for row in rows] == [("none", 2), ("sampled", 2), ("sampled", 5)]
    assert rows[1]["effective_dilation"] == pytest.approx(rows[2]["effective_dilation"])
    assert text.count("| sampled | ") == 2
    assert (Path(make().train.run.out) / "d05-seed0-sampled/curve.png").stat().st_size > 10_000


def test_other_settings_are_refused(make: Make) -> None:
    run_sweep(make(seeds=(0,), dilations=(2,)))
    with pytest.raises(ValueError, match=r"holds trials with other settings \(epochs: 2 -> 3\): give another --out"):
        run_sweep(make(seeds=(0,), dilations=(2,), epochs=3))
