"""Training runs as trials of a study: each exactly once, in several processes or on several machines, resumable."""

import contextlib
import fcntl
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState

from rfield.segmentation.config.experiments import SweepConfig
from rfield.segmentation.config.train import TrainConfig, differences
from rfield.segmentation.console import escape_unencodable
from rfield.segmentation.conventions import Progress
from rfield.segmentation.data import class_difference, load_dataset
from rfield.segmentation.experiments.study import (
    FREE_SETTINGS,
    HEARTBEAT,
    Point,
    Trial,
    beating,
    claim,
    enqueue,
    fail_dead,
    failures,
    finished_trials,
    open_study,
    owned,
    watched,
)
from rfield.segmentation.files.untrusted import read_json
from rfield.segmentation.runs import load_config
from rfield.segmentation.training import Interrupted, check_classes, prepare, train
from rfield.segmentation.training.distributed import launcher


def run_trials(
    config: SweepConfig, points: Sequence[Point], progress: Progress | None = None
) -> tuple[list[Trial], list[Point]]:
    """Train the points that are not trained yet.

    Each point is a trial of the study that all processes with the same storage share: a free process takes the next
    one. If the process of a trial has died, the trial is run again, from its last epoch if its folder still exists; a
    finished trial is never run again. Machines may share the folder `out`, or have a folder each. With a database, the
    processes watch each other: all of them stay until no trial is left, and take over the trial of a silent process.

    Args:
        config: the settings of all runs, the folder, the storage, and how many runs at a time.
        points: what to train.
        progress: called with (images done, all images) while features are computed, before the first run.

    Returns:
        All finished trials of the study, sorted, and the points that another process is still training.

    Raises:
        ValueError: if a run cannot be trained, if the study or a folder holds runs with other settings, or if the
            storage cannot be opened.
        OSError: if files are missing or a worker has died.
    """
    if launcher() is not None:
        raise ValueError(
            "the workers of a sweep are not parts of one run: start each alone, not with torchrun or srun -n"
        )
    out = Path(config.train.run.out)
    if any(not (out / point.name / "metrics.json").is_file() for point in points):
        # Frozen random backbones differ from seed to seed, pretrained ones do not.
        for seed in sorted({point.seed for point in points})[: 1 if config.train.model.weights else None]:
            prepare(config.run_config(config.train.run.out, points[0].dilation, seed, points[0].search), progress)
    study = open_study(config)
    names = load_dataset(config.train.data.data, config.train.data.val_split).class_names
    known = tuple(study.user_attrs.get("class_names", names))
    if known != names:
        raise ValueError(f"{class_difference(f'the trials in {out} have', known, names)}: give another --out")
    if "class_names" not in study.user_attrs:
        study.set_user_attr("class_names", names)
    out.mkdir(parents=True, exist_ok=True)
    fail_dead(study, config)
    enqueue(study, points)
    waiting = len(study.get_trials(deepcopy=False, states=(TrialState.WAITING,)))
    jobs = min(config.grid.jobs, max(waiting, len(watched(study))))
    if jobs == 1:
        _work(config)
    elif jobs > 1:
        earlier = failures(study)
        _work_in_processes(config, jobs)
        for number, message in failures(study).items():
            if number not in earlier:
                raise ValueError(message)
    finished = finished_trials(study)
    done = {trial.point for trial in finished}
    return finished, [point for point in points if point not in done]


def finish_trials(config: SweepConfig, points: Sequence[Point], progress: Progress | None = None) -> list[Trial]:
    """Train as `run_trials` does, and return the trials of the points alone, all of them.

    Raises:
        ValueError: also if another process is still training one of the points.
    """
    trials, unfinished = run_trials(config, points, progress)
    if unfinished:
        names = ", ".join(point.name for point in unfinished)
        raise ValueError(f"not finished, another process has them: {names}; call again when it is done")
    return [trial for trial in trials if trial.point in points]


def finish_run(config: TrainConfig) -> dict[str, Any]:
    """Return the content of a run's `metrics.json`; train it to its end first if it is not finished.

    The output of the training goes to `train.log` in the run folder.

    Raises:
        ValueError: if the folder holds a run with other settings.
    """
    out = Path(config.run.out)
    if not (out / "metrics.json").is_file():
        out.mkdir(parents=True, exist_ok=True)
        with (out / "train.log").open("a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
            fcntl.flock(log, fcntl.LOCK_EX)  # A process that was silent too long may still be training it.
            if not (out / "metrics.json").is_file():
                try:
                    return train(config.replace(resume=True))
                except Interrupted as error:
                    raise Interrupted(error.signum, error.done, "call again to continue from there") from error
    chosen = () if config.model.canvas else ("canvas",)
    changed = differences(
        load_config(out / "config.yaml").plain(), config.resolved().plain(), (*FREE_SETTINGS[3:], *chosen)
    )
    if changed:
        raise ValueError(f"{out} holds a run with other settings ({'; '.join(changed)}): give another --out")
    check_classes(out, load_dataset(config.data.data, config.data.val_split))
    metrics: dict[str, Any] = read_json(out / "metrics.json")
    return metrics


def _work(config: SweepConfig) -> None:
    """Run trials until none is left; with a database, until the other workers have finished theirs too."""
    study = open_study(config)
    parent = multiprocessing.parent_process()
    waits = False
    while parent is None or parent.is_alive():
        trial = claim(study)
        if trial is not None:
            _run(study, trial, config)
        elif watched(study):
            if not waits:
                print("waiting for the trials of other workers", flush=True)
            waits = True
            time.sleep(HEARTBEAT)
            fail_dead(study, config)
        else:
            break


def _run(study: optuna.Study, trial: optuna.Trial, config: SweepConfig) -> None:
    point = Point(**trial.user_attrs["point"])
    folder = Path(config.train.run.out) / point.name
    with owned(Path(config.train.run.out), trial.number), beating(study, trial, config):
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
    done = len(finished_trials(study))
    seconds = metrics["train_seconds"]
    print(f"{point.name}: mIoU {metrics['miou']:.4f}, {seconds:.3g} s ({done} finished)", flush=True)


def _work_in_processes(config: SweepConfig, jobs: int) -> None:
    """Run several workers at once, each with its share of the cores."""
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
            f"the workers ended with status {statuses}; call again to continue (-9 may mean too little memory: "
            "then use fewer --jobs)"
        )


def _worker(config: SweepConfig, threads: int) -> None:
    """Run one of several processes; the trial that failed keeps the message."""
    # Otherwise the data loaders would spawn their processes too, each with all imports, in every epoch.
    multiprocessing.set_start_method(None, force=True)
    torch.set_num_threads(threads)
    escape_unencodable()
    try:
        _work(config)
    except (ValueError, OSError):
        if os.environ.get("RFIELD_DEBUG"):
            raise
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
