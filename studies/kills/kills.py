"""Kills small trainings at random moments, resumes them, and compares what they end with, bit for bit.

    OMP_NUM_THREADS=1 python studies/kills/kills.py --kills 200 --terminations 50 --out studies/kills

Written: kills.json. A server that has everything imported forks a process for every start. One SIGKILL in three waits
for a checkpoint that is being written, the others for a time drawn from the run's whole length. Each run is killed
until it gets to its end, and a new one is begun until the kills are used up; the last goes to its end unharmed.
"""

import argparse
import contextlib
import importlib
import json
import os
import platform
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from rfield.segmentation.config.train import TrainConfig
from rfield.segmentation.files.atomic import write_json
from rfield.segmentation.training import fit, train

RUNS: dict[str, dict[str, Any]] = {
    "spsa": {"search": "spsa", "search_share": 0.6},
    "gradient": {"search": "gradient", "factor_lr": 0.05},
    "sampled": {"search": "sampled", "search_share": 0.55, "freeze_backbone": True},
}


def config_of(kind: str, data: Path, out: Path) -> TrainConfig:
    return TrainConfig(
        data=str(data),
        out=str(out),
        model="small_cnn",
        dilation=3,
        head_channels=8,
        dropout=0.5,
        epochs=5,
        val_every=2,
        colour_jitter=0.0,
        batch_size=2,
        crop_size=(33, 33),
        workers=0,
        cache=str(data.parent / "cache"),
        resume=True,
        report="none",
        **RUNS[kind],
    )


def start(config: TrainConfig) -> int:
    """Forks a process that trains; its exit status is 0 at the run's end, 3 if it failed, 143 if it stopped."""
    process = os.fork()
    if process:
        return process
    status = 0
    log = os.open(f"{config.run.out}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    # The pictures of a finished run take as long as its training, and are drawn from what is compared.
    fit.plot_results = lambda *arguments: None
    try:
        train(config)
        Path(f"{config.run.out}.modules").write_text("\n".join(sys.modules))
    except KeyboardInterrupt as error:
        status = 128 + getattr(error, "signum", signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        status = 3
    os._exit(status)


def preload(modules: Path) -> None:
    """Imports what a run has imported, so that the next process starts with it."""
    for name in modules.read_text().split():
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def interrupt(process: int, signum: int, moment: float, folder: Path | None) -> int:
    """Sends a signal at a moment, or at the first one after it at which a checkpoint is being written in `folder`.

    Returns:
        The exit status, negative if a signal has ended the process: 0 if it was faster.
    """
    pattern = ".last.*.partial.ckpt"
    while time.monotonic() < moment or (folder is not None and not any(folder.glob(pattern))):
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.0001)
    os.kill(process, signum)
    return finish(process)


def finish(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def contents(out: Path) -> dict[str, Any]:
    """What a run ends with, but for the time it took."""
    found: dict[str, Any] = {"factor.csv": (out / "factor.csv").read_bytes()}
    metrics = json.loads((out / "metrics.json").read_text())
    del metrics["train_seconds"], metrics["search"]["seconds"]
    found["metrics.json"] = metrics
    for name in ("last", "best"):
        saved = torch.load(out / f"checkpoints/{name}.ckpt", weights_only=True)
        for part in ("state_dict", "optimizer_states"):
            found[f"{name} {part}"] = plain(saved[part])
    return found


def plain(value: Any) -> Any:
    """Tensors as bytes, so that == compares every bit."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.contiguous().numpy().tobytes()
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, list) else value


def where(out: Path) -> str:
    """What lies in the folder after a kill; half a checkpoint may be an earlier kill's."""
    checkpoints = out / "checkpoints"
    if checkpoints.is_dir() and any(checkpoints.glob(".*.partial.*")):
        return "half a checkpoint in the folder"
    if not (checkpoints / "last.ckpt").is_file():
        return "no checkpoint yet"
    return "one checkpoint" if not (checkpoints / "previous.ckpt").is_file() else "two checkpoints"


def kill_runs(signum: int, kills: int, root: Path, rng: random.Random, whole: dict[str, Any]) -> dict[str, Any]:
    """Kills until `kills` are used up; how the runs ended."""
    done, runs, equal = 0, 0, 0
    met: Counter[str] = Counter()
    statuses: Counter[str] = Counter()
    different: list[str] = []
    while done < kills:
        kind = list(RUNS)[runs % len(RUNS)]
        out = root / f"{signal.Signals(signum).name}-{runs}"
        config = config_of(kind, root / "data.yaml", out)
        runs += 1
        while done < kills:
            aimed = signum == signal.SIGKILL and rng.random() < 1 / 3
            moment = time.monotonic() + rng.uniform(0, whole[kind]["seconds"] / (2 if aimed else 1))
            status = interrupt(start(config), signum, moment, out / "checkpoints" if aimed else None)
            if status == 0:
                break
            if status == 3:
                raise SystemExit(f"{out} failed:\n{Path(f'{out}.log').read_text()}")
            done += 1
            met[where(out)] += 1
            statuses[str(status)] += 1
        if finish(start(config)) != 0:
            raise SystemExit(f"{out} failed:\n{Path(f'{out}.log').read_text()}")
        found = contents(out)
        wrong = [name for name, value in whole[kind]["contents"].items() if found[name] != value]
        equal += not wrong
        different += [f"{out.name}, {kind}: {name}" for name in wrong]
        print(f"{signal.Signals(signum).name}: {done} kills, {runs} runs, {equal} equal", flush=True)
    return {
        "signal": signal.Signals(signum).name,
        "kills": done,
        "runs": runs,
        "runs_equal": equal,
        "different": different,
        "exit_statuses": dict(statuses),
        "met": dict(met),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=200, help="by SIGKILL")
    parser.add_argument("--terminations", type=int, default=50, help="by SIGTERM")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("studies/kills"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(args.seed)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "data.yaml").write_text("format: synthetic\nsize: [36, 41]\ndistance: 12\nlength: 8\n")
        whole: dict[str, Any] = {}
        for kind in RUNS:
            for attempt in ("cold", "whole"):  # The first one fills the cache of features.
                config, moment = config_of(kind, root / "data.yaml", root / f"{attempt}-{kind}"), time.monotonic()
                if finish(start(config)) != 0:
                    raise SystemExit(Path(f"{config.run.out}.log").read_text())
                preload(Path(f"{config.run.out}.modules"))
            whole[kind] = {"seconds": time.monotonic() - moment, "contents": contents(Path(config.run.out))}
        found = [
            kill_runs(signum, count, root, rng, whole)
            for signum, count in ((signal.SIGKILL, args.kills), (signal.SIGTERM, args.terminations))
        ]
    result = {
        "runs": found,
        "seconds": round(time.monotonic() - begun),
        "steps": {kind: each["contents"]["factor.csv"].count(b"\n") - 1 for kind, each in whole.items()},
        "uninterrupted_seconds": {kind: round(each["seconds"], 2) for kind, each in whole.items()},
        "seed": args.seed,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    write_json(args.out / "kills.json", result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
