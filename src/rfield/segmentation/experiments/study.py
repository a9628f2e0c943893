"""The Optuna study of a sweep: its storage, its trials and whose they are."""

import contextlib
import dataclasses
import fcntl
import os
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, get_args

import optuna
from optuna.distributions import CategoricalDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage, JournalStorage, RDBStorage, fail_stale_trials
from optuna.storages._heartbeat import BaseHeartbeat
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from rfield.segmentation.config.experiments import SweepConfig, without_password
from rfield.segmentation.config.train import Search, differences

# Settings that may differ between the calls that share a study.
FREE_SETTINGS = ("dilation", "seed", "search", "out", "workers", "cache", "resume", "skip_bad", "logger", "report")
# With a database, in seconds: the interval of a worker's signs of life, and how long they may be missing.
HEARTBEAT = 15
_SILENCE = 90
_DISTRIBUTIONS = {
    "dilation": IntDistribution(1, 2**20),
    "seed": IntDistribution(0, 2**32 - 1),
    "search": CategoricalDistribution(get_args(Search)),
}


@dataclasses.dataclass(frozen=True)
class Point:
    """The settings in which the runs of one study differ."""

    search: Search
    dilation: int
    seed: int

    @property
    def name(self) -> str:
        """Return the name of the run folder.

        >>> Point("none", 6, 0).name, Point("sampled", 14, 2).name
        ('d06-seed0', 'd14-seed2-sampled')
        """
        return f"d{self.dilation:02d}-seed{self.seed}" + ("" if self.search == "none" else f"-{self.search}")

    @property
    def place(self) -> tuple[int, int, int]:
        """Return a key for sorting: the grid first, then search by search."""
        return get_args(Search).index(self.search), self.dilation, self.seed


@dataclasses.dataclass(frozen=True)
class Trial:
    """A finished run and the content of its `metrics.json`."""

    point: Point
    metrics: dict[str, Any]


def open_study(config: SweepConfig) -> optuna.Study:
    """Open the study of a folder, and check that its trials have the same settings."""
    out = Path(config.train.run.out)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = None
    for attempt in range(3):
        try:
            study = optuna.create_study(
                storage=_open_storage(config),
                sampler=optuna.samplers.RandomSampler(),
                study_name=out.resolve().name,
                direction="maximize",
                load_if_exists=True,
            )
            break
        except Exception as error:  # Each database driver has errors of its own.
            # If several processes create the tables of a database at once, one succeeds.
            if attempt == 2 or type(error).__name__ not in ("IntegrityError", "OperationalError", "ProgrammingError"):
                place = out / "study.journal" if config.grid.storage is None else without_password(config.grid.storage)
                raise ValueError(f"storage {place} cannot be used: {error}") from error
            time.sleep(1)
    assert study is not None
    settings = {
        key: value for key, value in config.run_config("", 1, 0, "none").plain().items() if key not in FREE_SETTINGS
    }
    if "settings" not in study.user_attrs:
        study.set_user_attr("settings", settings)
    changed = differences(study.user_attrs["settings"], settings)
    if changed:
        raise ValueError(f"{out} holds trials with other settings ({'; '.join(changed)}): give another --out")
    return study


def _open_storage(config: SweepConfig) -> BaseStorage:
    if config.grid.storage is None:
        Path(config.train.run.out).mkdir(parents=True, exist_ok=True)
        return JournalStorage(JournalFileBackend(f"{config.train.run.out}/study.journal"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return RDBStorage(config.grid.storage, heartbeat_interval=HEARTBEAT, grace_period=_SILENCE)


def enqueue(study: optuna.Study, points: Sequence[Point]) -> None:
    """Queue the points that are neither finished nor running nor queued."""
    known = {point_of(trial) for trial in study.get_trials(deepcopy=False) if trial.state != TrialState.FAIL}
    for point in points:
        if point not in known:
            study.enqueue_trial(dataclasses.asdict(point), user_attrs={"point": dataclasses.asdict(point)})


def point_of(trial: optuna.trial.FrozenTrial) -> Point | None:
    """Return the point of a trial; None for one that Optuna has made up."""
    return Point(**trial.user_attrs["point"]) if "point" in trial.user_attrs else None


def finished_trials(study: optuna.Study) -> list[Trial]:
    """Return the finished trials, sorted by their points."""
    trials = {point_of(trial): trial for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))}
    found = [Trial(point, trial.user_attrs["metrics"]) for point, trial in trials.items() if point is not None]
    return sorted(found, key=lambda trial: trial.point.place)


def claim(study: optuna.Study) -> optuna.Trial | None:
    """Take the next trial of the queue for this process; return None if the queue is empty."""
    while study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Heartbeat of storage is supposed")  # `beating` replaces it.
            trial = study.ask(_DISTRIBUTIONS)
        # If another process took the last one, Optuna has made a new trial up. And two processes that start at once
        # may both have queued a point: the earlier trial counts.
        mine = study.get_trials(deepcopy=False)[trial.number]
        if point_of(mine) is not None and not any(
            point_of(other) == point_of(mine)
            and (other.state == TrialState.COMPLETE or (other.number < trial.number and not other.state.is_finished()))
            for other in study.get_trials(deepcopy=False)
        ):
            return trial
        study.tell(trial, state=TrialState.FAIL)
    return None


@contextmanager
def beating(study: optuna.Study, trial: optuna.Trial, config: SweepConfig) -> Iterator[None]:
    """Record signs of life while this process runs a trial, if the storage is a database."""
    storage = study._storage
    if config.grid.storage is None or not isinstance(storage, BaseHeartbeat):
        yield
        return
    storage.record_heartbeat(trial._trial_id)
    trial.set_user_attr("beats", True)
    over = threading.Event()

    def beat() -> None:
        while not over.wait(HEARTBEAT):
            with contextlib.suppress(Exception):  # The database may be back the next time.
                storage.record_heartbeat(trial._trial_id)

    threading.Thread(target=beat, daemon=True).start()
    try:
        yield
    finally:
        over.set()


def watched(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """Return the running trials whose processes record signs of life."""
    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    return [trial for trial in running if "beats" in trial.user_attrs]


def failures(study: optuna.Study) -> dict[int, str]:
    """Return the errors of failed trials by the trials' numbers."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.FAIL,))
    return {
        trial.number: f"{point.name}: {trial.user_attrs['error']}"
        for trial in trials
        if "error" in trial.user_attrs and (point := point_of(trial)) is not None
    }


@contextmanager
def owned(out: Path, number: int) -> Iterator[None]:
    """Hold a locked file while this process runs a trial; the lock ends with the process."""
    path = out / "locks" / f"trial-{number}.lock"
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    with partial.open("w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        os.replace(partial, path)  # Others never see it unlocked.
        yield
        path.unlink(missing_ok=True)


def fail_dead(study: optuna.Study, config: SweepConfig) -> None:
    """Free the trials whose processes have died: known by their locks in this folder, elsewhere by their silence."""
    long_ago = datetime.now() - timedelta(seconds=_SILENCE)
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        # Trials of other folders have no lock here, and the locks of running trials are taken.
        with (
            contextlib.suppress(FileNotFoundError, BlockingIOError),
            (Path(config.train.run.out) / "locks" / f"trial-{trial.number}.lock").open("rb") as file,
        ):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
            continue
        if config.grid.storage and "beats" not in trial.user_attrs and (trial.datetime_start or long_ago) < long_ago:
            study.tell(
                trial.number, state=TrialState.FAIL, skip_if_finished=True
            )  # It died before its first sign of life.
    if config.grid.storage is None:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        fail_stale_trials(study)
    trials = study.get_trials(deepcopy=False)
    dead = [point_of(trial) for trial in trials if trial.state == TrialState.FAIL and "error" not in trial.user_attrs]
    enqueue(study, [point for point in dict.fromkeys(dead) if point is not None])
