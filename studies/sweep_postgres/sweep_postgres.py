"""Four workers of one sweep on a PostgreSQL database, two of them killed in the middle of a trial.

    OMP_NUM_THREADS=1 python studies/sweep_postgres/sweep_postgres.py --out studies/sweep_postgres

Needs PostgreSQL's programs (Debian: apt-get install postgresql) and `pip install 'rfield[postgres]'`. A cluster of its
own is made in a temporary folder, listens on 127.0.0.1 alone, and is removed; as root it runs as the user `postgres`,
since PostgreSQL refuses root. Or give --storage, the URL of an empty database. Each worker has a folder of its own, as
machines that share nothing but the database have. Written: sweep_postgres.json.
"""

import argparse
import contextlib
import csv
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import yaml
from optuna.trial import TrialState

from rfield.segmentation.experiments.study import Point
from rfield.segmentation.files.atomic import write_json

WORKERS = 4
VICTIMS = (0, 1)
DILATIONS = (2, 4, 6, 8)
SEEDS = (0, 1)
EPOCHS = 20


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """The URL of a database of a cluster that lives as long as this."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    programs = str(found[-1]) + "/" if found else ""
    if not (found or shutil.which("initdb")):
        raise SystemExit("PostgreSQL is missing: apt-get install postgresql, or give --storage")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        other: dict[str, Any] = {"user": "postgres"} if os.geteuid() == 0 else {}
        if other:
            shutil.chown(folder, "postgres")
        data = f"{folder}/data"

        def do(*command: str) -> None:
            subprocess.run(
                [programs + command[0], *command[1:]], check=True, cwd=folder, stdout=subprocess.DEVNULL, **other
            )

        do("initdb", "-D", data, "-U", "rfield", "--auth=trust")
        settings = f"-c listen_addresses=127.0.0.1 -c port={port} -c unix_socket_directories="
        do("pg_ctl", "-D", data, "-o", settings, "-l", f"{folder}/log", "-w", "start")
        try:
            yield f"postgresql+psycopg://rfield@127.0.0.1:{port}/postgres"
        finally:
            do("pg_ctl", "-D", data, "-m", "immediate", "stop")


def start(root: Path, number: int, url: str) -> "subprocess.Popen[bytes]":
    config = {
        "data": str(root / "data.yaml"),
        "out": str(root / f"machine{number}/sweep"),
        "model": "small_cnn",
        "head_channels": 8,
        "epochs": EPOCHS,
        "batch_size": 2,
        "crop_size": [33, 33],
        "workers": 0,
        "dilations": list(DILATIONS),
        "seeds": list(SEEDS),
        "storage": url,
    }
    path = root / f"worker{number}.yaml"
    path.write_text(yaml.safe_dump(config))
    log = (root / f"worker{number}.log").open("wb")
    command = [sys.executable, "-m", "rfield", "sweep", "--config", path]
    return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def in_training(root: Path, number: int) -> bool:
    """Whether a worker is in the middle of a trial: past its first epoch and not at its end."""
    for log in (root / f"machine{number}/sweep").glob("*/factor.csv"):
        with log.open(newline="") as file:
            done = len(list(csv.reader(file))) > 3
        if done and not (log.parent / "metrics.json").exists():
            return True
    return False


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--storage", help="the URL of an empty database; by default one is made")
    parser.add_argument("--out", type=Path, default=Path("studies/sweep_postgres"))
    args = parser.parse_args()
    place = contextlib.nullcontext(args.storage) if args.storage else postgres()
    with place as url, tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "data.yaml").write_text("format: synthetic\nsize: [36, 41]\ndistance: 12\nlength: 8\n")
        begun = time.monotonic()
        workers = [start(root, number, url) for number in range(WORKERS)]
        killed = {}
        while len(killed) < len(VICTIMS):
            for number in VICTIMS:
                if workers[number].poll() is not None and number not in killed:
                    raise SystemExit((root / f"worker{number}.log").read_text())
                if number not in killed and in_training(root, number):
                    workers[number].kill()
                    killed[number] = round(time.monotonic() - begun, 1)
            time.sleep(0.02)
        statuses = [worker.wait() for worker in workers]
        seconds = time.monotonic() - begun
        logs = [(root / f"worker{number}.log").read_text() for number in range(WORKERS)]
        for number, log in enumerate(logs):
            print(f"--- worker {number}, status {statuses[number]}\n{log}", flush=True)

        study = optuna.load_study(study_name="sweep", storage=url)
        points = {
            state: [Point(**t.user_attrs["point"]).name for t in study.trials if t.state == state]
            for state in TrialState
        }
        wanted = sorted(Point("none", dilation, seed).name for dilation in DILATIONS for seed in SEEDS)
        begun_by = Counter(line.split(":")[0] for log in logs for line in log.splitlines() if ": training" in line)
        # Without a heartbeat: what two workers that started at once have both queued.
        dead = [t for t in study.trials if t.state == TrialState.FAIL and "beats" in t.user_attrs]
        lost = sorted(Point(**t.user_attrs["point"]).name for t in dead)
        finished = [t for t in study.trials if t.state == TrialState.COMPLETE]
        again = {
            Point(**t.user_attrs["point"]).name: round(
                t.datetime_start.timestamp() - before.datetime_start.timestamp(), 1
            )
            for t in finished
            for before in dead
            if t.datetime_start and before.datetime_start
            if before.user_attrs["point"] == t.user_attrs["point"]
        }
        tables = [
            json.loads((root / f"machine{number}/sweep/results.json").read_text())["runs"]
            for number in range(WORKERS)
            if number not in VICTIMS
        ]
        result = {
            "workers": WORKERS,
            "killed_with": signal.Signals.SIGKILL.name,
            "killed_after_seconds": killed,
            "statuses": statuses,
            "points": len(wanted),
            "complete": len(points[TrialState.COMPLETE]),
            "complete_twice": len(points[TrialState.COMPLETE]) - len(set(points[TrialState.COMPLETE])),
            "missing": sorted(set(wanted) - set(points[TrialState.COMPLETE])),
            "left_running_or_waiting": len(points[TrialState.RUNNING] + points[TrialState.WAITING]),
            "lost_with_their_worker": lost,
            "seconds_from_a_lost_trial_s_start_to_its_repetition": again,
            "begun_more_than_once": sorted(name for name, count in begun_by.items() if count > 1),
            "survivors_have_one_table": all(table == tables[0] for table in tables),
            "runs_in_the_table": len(tables[0]),
            "seconds": round(seconds),
            "optuna": optuna.__version__,
            "database": "given" if args.storage else "PostgreSQL, made for this",
            "python": platform.python_version(),
        }
    write_json(args.out / "sweep_postgres.json", result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
