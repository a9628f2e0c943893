"""The same small trainings in 1, 2 and 4 processes; then one of the processes is killed, and the run resumed.

    OMP_NUM_THREADS=1 python studies/processes/processes.py --out studies/processes

Written: processes.json. A server that has everything imported forks the processes and sets what torchrun sets, so that
a run takes seconds; the kill is done once more to processes that torchrun itself has started. Gloo, on one machine.
"""

import argparse
import csv
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import yaml

from rfield.segmentation.config.train import TrainConfig
from rfield.segmentation.files.atomic import write_json
from rfield.segmentation.training import fit, read_factor_csv, train

BATCH = 4
# 11 images in either split: neither the batches nor the processes divide them.
RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "none": (11, {"search": "none"}),
    "gradient": (11, {"search": "gradient", "factor_lr": 0.05}),
    "spsa": (11, {"search": "spsa"}),
    "sampled": (11, {"search": "sampled"}),
    "sampled, frozen backbone": (11, {"search": "sampled", "freeze_backbone": True}),
    "sampled, two paths with batch norm": (12, {"search": "sampled", "paths": 2}),
    "the same, 11 images": (11, {"search": "sampled", "paths": 2}),
}


def config_of(kind: str, root: Path, out: str, **values: Any) -> TrainConfig:
    length, own = RUNS[kind]
    data = root / f"data{length}.yaml"
    data.write_text(f"format: synthetic\nsize: [36, 41]\ndistance: 12\nlength: {length}\n")
    settings: dict[str, Any] = {
        "model": "small_cnn",
        "dilation": 3,
        "head_channels": 8,
        "dropout": 0.0,
        "epochs": 4,
        "val_every": 1,
        "lr": 0.01,
        "batch_size": BATCH,
        "crop_size": (33, 33),
        "workers": 0,
        "cache": str(root / "cache"),
        "resume": True,
        "report": "none",
    }
    return TrainConfig(data=str(data), out=str(root / out), **settings | own | values)


def start(config: TrainConfig, processes: int) -> list[int]:
    """Forks the processes of a run; each ends with status 0, 3 if it failed, 2 or 143 as the command does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [_fork(config, rank, processes, port) for rank in range(processes)]


def _fork(config: TrainConfig, rank: int, processes: int, port: int) -> int:
    process = os.fork()
    if process:
        return process
    status = 0
    log = os.open(f"{config.run.out}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if processes > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        names |= {"GROUP_RANK": 0, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in names.items()})
        os.environ.update({"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "here"})
    # The pictures take as long as the training, and are drawn from what is compared.
    fit.plot_results = lambda *arguments: None
    try:
        train(config)
    except KeyboardInterrupt as error:
        status = 128 + getattr(error, "signum", signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        status = 3
    os._exit(status)


def finish(config: TrainConfig, pids: list[int]) -> None:
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    if any(statuses):
        raise SystemExit(f"{config.run.out} ended with {statuses}:\n{Path(f'{config.run.out}.log').read_text()}")


def contents(config: TrainConfig) -> dict[str, Any]:
    out = Path(config.run.out)
    metrics = json.loads((out / "metrics.json").read_text())
    log = max((out / "logs/csv").glob("*/metrics.csv"), key=lambda path: path.stat().st_mtime)
    with log.open(newline="") as file:
        mious = [float(row["miou"]) for row in csv.DictReader(file) if row.get("miou")]
    columns = read_factor_csv(out / "factor.csv")
    return {
        "weights": torch.load(out / "checkpoints/last.ckpt", weights_only=True)["state_dict"],
        "dilations": columns["effective_dilation"],
        "losses": columns["loss"],
        "mious": [*mious, metrics["miou"]],
        "delivered": metrics["effective_dilation"],
    }


def differences(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The greatest differences of two runs."""
    weights = {name: value for name, value in one["weights"].items() if value.is_floating_point()}
    apart = {name: (value - other["weights"][name]).abs().max().item() for name, value in weights.items()}
    return {
        "weights": max(apart.values()),
        "dilation_of_a_step": abs(one["dilations"] - other["dilations"]).max(),
        "loss_of_a_step": abs(one["losses"] - other["losses"]).max(),
        # A resumed run's log begins where it was resumed.
        "miou_of_a_validation": max(abs(a - b) for a, b in zip(one["mious"][::-1], other["mious"][::-1], strict=False)),
        "delivered_dilation": abs(one["delivered"] - other["delivered"]),
    }


def compare(kind: str, root: Path) -> dict[str, Any]:
    found = {}
    for processes in (1, 2, 4):
        config = config_of(kind, root, f"{kind}-{processes}".replace(" ", "-"))
        finish(config, start(config, processes))
        found[processes] = contents(config)
    ends = found[1]["weights"]
    row = {
        "images": RUNS[kind][0],
        "steps": len(found[1]["losses"]),
        "largest_weight": max(value.abs().max().item() for value in ends.values() if value.is_floating_point()),
        "dilations": [float(found[1]["dilations"].min()), float(found[1]["dilations"].max())],
        "delivered_dilation": found[1]["delivered"],
        "2": differences(found[1], found[2]),
        "4": differences(found[1], found[4]),
    }
    print(kind, json.dumps(row), flush=True)
    return row


def wait_for_checkpoint(config: TrainConfig) -> None:
    limit = time.monotonic() + 600
    while not (Path(config.run.out) / "checkpoints/last.ckpt").exists():
        if time.monotonic() > limit:
            raise SystemExit(f"{config.run.out} has no checkpoint")
        time.sleep(0.01)
    time.sleep(0.3)


def kill_one(root: Path, processes: int) -> dict[str, Any]:
    """One of forked processes is killed; nobody tells the others."""
    config = config_of("spsa", root, f"killed-{processes}", epochs=10)
    whole = config_of("spsa", root, f"whole-{processes}", epochs=10)
    pids = start(config, processes)
    wait_for_checkpoint(config)
    os.kill(pids[-1], signal.SIGKILL)
    moment = time.monotonic()
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    seconds = time.monotonic() - moment
    saved = torch.load(Path(config.run.out) / "checkpoints/last.ckpt", weights_only=True)["global_step"]
    for each in (config, whole):
        finish(each, start(each, processes))
    return {
        "processes": processes,
        "started_by": "fork",
        "seconds_until_all_ended": round(seconds, 1),
        "statuses": statuses,
        "resumed_from_step": saved,
        "of_steps": len(contents(whole)["losses"]),
        "differences_to_an_uninterrupted_run": differences(contents(whole), contents(config)),
    }


def kill_under_torchrun(root: Path, processes: int) -> dict[str, Any]:
    config = config_of("spsa", root, f"torchrun-{processes}", epochs=10)
    path = Path(f"{config.run.out}.yaml")
    path.write_text(yaml.safe_dump(config.plain()))
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "-m"]
    command = [*run, "rfield", "train", "--config", str(path), "--resume"]
    with Path(f"{config.run.out}.log").open("wb") as log:
        parent = subprocess.Popen(command, stdout=log, stderr=log)
        wait_for_checkpoint(config)
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        moment = time.monotonic()
        status = parent.wait()
        seconds = time.monotonic() - moment
    left = [pid for pid in children if Path(f"/proc/{pid}").exists()]
    finish(config, start(config, processes))
    return {
        "processes": processes,
        "started_by": "torchrun",
        "seconds_until_all_ended": round(seconds, 1),
        "statuses": [status],
        "processes_left": len(left),
        "differences_to_an_uninterrupted_run": differences(
            contents(config_of("spsa", root, f"whole-{processes}", epochs=10)), contents(config)
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("studies/processes"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "batch": BATCH,
        "runs": {},
        "kills": [],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for kind in RUNS:
            result["runs"][kind] = compare(kind, root)
            write_json(args.out / "processes.json", result)
        for kill, processes in ((kill_one, 2), (kill_under_torchrun, 2), (kill_one, 4)):
            result["kills"].append(kill(root, processes))
            write_json(args.out / "processes.json", result)
            print(json.dumps(result["kills"][-1], indent=2), flush=True)


if __name__ == "__main__":
    main()
