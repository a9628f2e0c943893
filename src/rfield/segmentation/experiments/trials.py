"""Training runs as trials of an Optuna study: each exactly once, by several processes or machines, resumable."""

import contextlib
import dataclasses
import fcntl
import multiprocessing
import os
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, get_args

import optuna
import torch
from optuna.distributions import CategoricalDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage, fail_stale_trials
from optuna.storages._heartbeat import BaseHeartbeat
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from rfield.segmentation.config.experiments import SweepConfig, without_password
from rfield.segmentation.config.train import Search, TrainConfig, differences
from rfield.segmentation.console import escape_what_cannot_be_shown
from rfield.segmentation.conventions import Progress
from rfield.segmentation.data import class_difference, load_dataset
from rfield.segmentation.files.untrusted import read_json
from rfield.segmentation.runs import load_config
from rfield.segmentation.training import Interrupted, check_classes, prepare, train
from rfield.segmentation.training.distributed import launcher

# What may differ between the calls that share a study.
_OWN = ("dilation", "seed", "search", "out", "workers", "cache", "resume", "skip_bad")
# In a database: how often a worker says that it is alive, and how long it may be silent, in seconds.
_HEARTBEAT = 15
_SILENCE = 90
_DISTRIBUTIONS = {
    "dilation": IntDistribution(1, 2**20),
    "seed": IntDistribution(0, 2**32 - 1),
    "search": CategoricalDistribution(get_args(Search)),
}


@dataclasses.dataclass(frozen=True)
class Point:
    """What tells the runs of one study apart."""

    search: Search
    dilation: int
    seed: int

    @property
    def name(self) -> str:
        """The run folder's.

        >>> Point("none", 6, 0).name, Point("sampled", 14, 2).name
        ('d06-seed0', 'd14-seed2-sampled')
        """
        return f"d{self.dilation:02d}-seed{self.seed}" + ("" if self.search == "none" else f"-{self.search}")

    @property
    def place(self) -> tuple[int, int, int]:
        """For sorting: the grid first, then search by search."""
        return get_args(Search).index(self.search), self.dilation, self.seed


@dataclasses.dataclass(frozen=True)
class Trial:
    """A finished run and what its `metrics.json` holds."""

    point: Point
    metrics: dict[str, Any]


def run_trials(
    config: SweepConfig, points: Sequence[Point], progress: Progress | None = None
) -> tuple[list[Trial], list[Point]]:
    """Trains what is not trained yet.

    Every point is a trial of the study that all processes with one storage share: whoever is free takes the next.
    A trial whose process has died is run again, from its last epoch where its folder is still there; one that is
    finished never. Machines may share the folder `out` or have each their own. With a database the processes watch each
    other: all stay until no trial is left, and one whose process falls silent is taken up by another.

    Args:
        config: the settings of all runs, the folder, the storage, and how many runs at a time.
        points: what to train.
        progress: called with (images done, images in all) while features are computed, before the first run.

    Returns:
        All finished trials of the study, sorted, and those of the points that another process is still at.

    Raises:
        ValueError: if a run cannot be trained, if the study or a folder holds runs with other settings, or if the
            storage cannot be opened.
        OSError: if files are missing or a worker has died.
    """
    if launcher() is not None:
        raise ValueError(
            "the workers of a sweep are no parts of one run: start each alone, not with torchrun or srun -n"
        )
    out = Path(config.train.run.out)
    if any(not (out / point.name / "metrics.json").is_file() for point in points):
        # Frozen random backbones differ from seed to seed, pretrained ones do not.
        for seed in sorted({point.seed for point in points})[: 1 if config.train.model.weights else None]:
            prepare(config.run_config(config.train.run.out, points[0].dilation, seed, points[0].search), progress)
    study = _open_study(config)
    names = load_dataset(config.train.data.data, config.train.data.val_split).class_names
    known = tuple(study.user_attrs.get("class_names", names))
    if known != names:
        raise ValueError(f"{class_difference(f'the trials in {out} have', known, names)}: give another --out")
    if "class_names" not in study.user_attrs:
        study.set_user_attr("class_names", names)
    out.mkdir(parents=True, exist_ok=True)
    _fail_dead(study, config)
    _enqueue(study, points)
    waiting = len(study.get_trials(deepcopy=False, states=(TrialState.WAITING,)))
    jobs = min(config.grid.jobs, max(waiting, len(_watched(study))))
    if jobs == 1:
        _work(config)
    elif jobs > 1:
        earlier = _failures(study)
        _work_in_processes(config, jobs)
        for number, message in _failures(study).items():
            if number not in earlier:
                raise ValueError(message)
    finished = _finished(study)
    done = {trial.point for trial in finished}
    return finished, [point for point in points if point not in done]


def finish_trials(config: SweepConfig, points: Sequence[Point], progress: Progress | None = None) -> list[Trial]:
    """As `run_trials`, but only the points' trials are returned, and all of them.

    Raises:
        ValueError: also if another process is still at one of the points.
    """
    trials, unfinished = run_trials(config, points, progress)
    if unfinished:
        names = ", ".join(point.name for point in unfinished)
        raise ValueError(f"not finished, another process has them: {names}; call again when it is done")
    return [trial for trial in trials if trial.point in points]


def finish_run(config: TrainConfig) -> dict[str, Any]:
    """What a run's `metrics.json` holds: read if it is finished, trained to its end otherwise.

    What training prints goes to `train.log` in the run folder.

    Raises:
        ValueError: if the folder holds a run with other settings.
    """
    out = Path(config.run.out)
    if not (out / "metrics.json").is_file():
        out.mkdir(parents=True, exist_ok=True)
        with (out / "train.log").open("a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
            fcntl.flock(log, fcntl.LOCK_EX)  # A process that was silent too long may still be at it.
            if not (out / "metrics.json").is_file():
                try:
                    return train(config.replace(resume=True))
                except Interrupted as error:
                    raise Interrupted(error.signum, error.done, "call again to go on from there") from error
    chosen = () if config.model.canvas else ("canvas",)
    changed = differences(load_config(out / "config.yaml").plain(), config.resolved().plain(), (*_OWN[3:], *chosen))
    if changed:
        raise ValueError(f"{out} holds a run with other settings ({'; '.join(changed)}): give another --out")
    check_classes(out, load_dataset(config.data.data, config.data.val_split))
    metrics: dict[str, Any] = read_json(out / "metrics.json")
    return metrics


def _open_study(config: SweepConfig) -> optuna.Study:
    """The study of a folder; checks that what it holds was trained with the same settings."""
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
        except Exception as error:  # Every database and its driver has errors of its own.
            # Of processes that make a database's tables at once, one succeeds.
            if attempt == 2 or type(error).__name__ not in ("IntegrityError", "OperationalError", "ProgrammingError"):
                place = out / "study.journal" if config.grid.storage is None else without_password(config.grid.storage)
                raise ValueError(f"storage {place} cannot be used: {error}") from error
            time.sleep(1)
    assert study is not None
    settings = {key: value for key, value in config.run_config("", 1, 0, "none").plain().items() if key not in _OWN}
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
        return RDBStorage(config.grid.storage, heartbeat_interval=_HEARTBEAT, grace_period=_SILENCE)


def _enqueue(study: optuna.Study, points: Sequence[Point]) -> None:
    """Queues what is neither finished nor running nor queued."""
    known = {_point(trial) for trial in study.get_trials(deepcopy=False) if trial.state != TrialState.FAIL}
    for point in points:
        if point not in known:
            study.enqueue_trial(dataclasses.asdict(point), user_attrs={"point": dataclasses.asdict(point)})


def _point(trial: optuna.trial.FrozenTrial) -> Point | None:
    return Point(**trial.user_attrs["point"]) if "point" in trial.user_attrs else None


def _finished(study: optuna.Study) -> list[Trial]:
    trials = {_point(trial): trial for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))}
    found = [Trial(point, trial.user_attrs["metrics"]) for point, trial in trials.items() if point is not None]
    return sorted(found, key=lambda trial: trial.point.place)


def _claim(study: optuna.Study) -> optuna.Trial | None:
    """The next trial of the queue, which is now this process's; None if the queue is empty."""
    while study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Heartbeat of storage is supposed")  # `_beating` does what it is for.
            trial = study.ask(_DISTRIBUTIONS)
        # Where another process has taken the last one, Optuna has made up a new trial. And two processes that
        # start at once may both have queued a point: the earlier trial counts.
        mine = study.get_trials(deepcopy=False)[trial.number]
        if _point(mine) is not None and not any(
            _point(other) == _point(mine)
            and (other.state == TrialState.COMPLETE or (other.number < trial.number and not other.state.is_finished()))
            for other in study.get_trials(deepcopy=False)
        ):
            return trial
        study.tell(trial, state=TrialState.FAIL)
    return None


def _work(config: SweepConfig) -> None:
    """Runs trials until none is left, in a database also none of another worker that might yet fall silent."""
    study = _open_study(config)
    parent = multiprocessing.parent_process()
    waits = False
    while parent is None or parent.is_alive():
        trial = _claim(study)
        if trial is not None:
            _run(study, trial, config)
        elif _watched(study):
            if not waits:
                print("waiting for the trials of other workers", flush=True)
            waits = True
            time.sleep(_HEARTBEAT)
            _fail_dead(study, config)
        else:
            break


def _run(study: optuna.Study, trial: optuna.Trial, config: SweepConfig) -> None:
    point = Point(**trial.user_attrs["point"])
    folder = Path(config.train.run.out) / point.name
    with _owned(Path(config.train.run.out), trial.number), _beating(study, trial, config):
        print(f"{point.name}: training, see {folder}/train.log", flush=True)
        try:
            metrics = finish_run(config.run_config(str(folder), point.dilation, point.seed, point.search))
            if metrics["miou"] is None:
                raise ValueError(f"the split {config.train.data.val_split} has no labelled pixel to score")
        except BaseException as error:
            with contextlib.suppress(UpdateFinishedTrialError):
                trial.set_user_attr("error", str(error))
            study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
            raise
        # If this process was silent for too long, another has the trial by now, and its result counts.
        with contextlib.suppress(UpdateFinishedTrialError):
            trial.set_user_attr("metrics", metrics)
            study.tell(trial, metrics["miou"], skip_if_finished=True)
    done = len(_finished(study))
    seconds = metrics["train_seconds"]
    print(f"{point.name}: mIoU {metrics['miou']:.4f}, {seconds:.3g} s ({done} finished)", flush=True)


@contextmanager
def _beating(study: optuna.Study, trial: optuna.Trial, config: SweepConfig) -> Iterator[None]:
    """Has this process say that it is alive while it is at a trial, where the storage is a database."""
    storage = study._storage
    if config.grid.storage is None or not isinstance(storage, BaseHeartbeat):
        yield
        return
    storage.record_heartbeat(trial._trial_id)
    trial.set_user_attr("beats", True)
    over = threading.Event()

    def beat() -> None:
        while not over.wait(_HEARTBEAT):
            with contextlib.suppress(Exception):  # The database may be back the next time.
                storage.record_heartbeat(trial._trial_id)

    threading.Thread(target=beat, daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _watched(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """The trials whose processes say that they are alive."""
    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    return [trial for trial in running if "beats" in trial.user_attrs]


def _work_in_processes(config: SweepConfig, jobs: int) -> None:
    """Several workers at once, each with its share of the cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(1, min(torch.get_num_threads(), cores // jobs))
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_worker, args=(config, threads)) for _ in range(jobs)]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.terminate()
    statuses = [worker.exitcode for worker in workers]
    if any(status not in (0, 2) for status in statuses):
        raise ChildProcessError(
            f"the workers ended with status {statuses}; call again to go on (-9 is what a lack of memory looks like: "
            "then with fewer --jobs)"
        )


def _worker(config: SweepConfig, threads: int) -> None:
    """One of several processes; a failure is told by the trial that failed."""
    torch.set_num_threads(threads)
    escape_what_cannot_be_shown()
    try:
        _work(config)
    except (ValueError, OSError):
        if os.environ.get("RFIELD_DEBUG"):
            raise
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _failures(study: optuna.Study) -> dict[int, str]:
    """What went wrong, by the number of the trial."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.FAIL,))
    return {
        trial.number: f"{point.name}: {trial.user_attrs['error']}"
        for trial in trials
        if "error" in trial.user_attrs and (point := _point(trial)) is not None
    }


@contextmanager
def _owned(out: Path, number: int) -> Iterator[None]:
    """A file that is locked while this process runs a trial; the lock goes with the process."""
    path = out / "locks" / f"trial-{number}.lock"
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    with partial.open("w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        os.replace(partial, path)  # It is never seen unlocked.
        yield
        path.unlink(missing_ok=True)


def _fail_dead(study: optuna.Study, config: SweepConfig) -> None:
    """Frees the trials whose processes have died: in this folder, by their locks; elsewhere, if they fall silent."""
    long_ago = datetime.now() - timedelta(seconds=_SILENCE)
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        # Not those that were begun in another folder, nor those that are being run.
        with (
            contextlib.suppress(FileNotFoundError, BlockingIOError),
            (Path(config.train.run.out) / "locks" / f"trial-{trial.number}.lock").open("rb") as file,
        ):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
            continue
        if config.grid.storage and "beats" not in trial.user_attrs and (trial.datetime_start or long_ago) < long_ago:
            study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)  # It died before it said anything.
    if config.grid.storage is None:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        fail_stale_trials(study)
    trials = study.get_trials(deepcopy=False)
    dead = [_point(trial) for trial in trials if trial.state == TrialState.FAIL and "error" not in trial.user_attrs]
    _enqueue(study, [point for point in dict.fromkeys(dead) if point is not None])
