"""One run in several processes, as torchrun would start them."""

import json
import multiprocessing
import runpy
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
import yaml
from torch import nn

from rfield.config import TrainConfig
from rfield.training import read_factor_csv, train
from rfield.training.processes import join, machines, share_statistics

Make = Callable[..., TrainConfig]
# Its server has everything imported, and forks.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["rfield.cli", "rfield.training", "rfield.data.check"])
# What torchrun sets and a process is, and where it speaks to.
PROCESS = """
import os, sys
rank, port, out = {rank}, {port}, {out!r}
os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", GROUP_RANK="0")
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="here")
os.dup2(os.open(f"{{out}}.out", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
os.dup2(os.open(f"{{out}}.err", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
import torch
torch.set_num_threads(1)
{code}
from rfield.cli import main
main(["train", "--config", f"{{out}}.yaml", *{options!r}])
"""


def start(config: TrainConfig, code: str = "", *options: str) -> tuple[list[int | None], str, str]:
    """Trains in two processes; `code` comes before, with their rank in `rank`.

    Returns:
        Their statuses, and what they have written to stdout and stderr.
    """
    files = [Path(f"{config.out}.{suffix}") for suffix in ("yaml", "out", "err")]
    files[0].write_text(yaml.safe_dump(config.plain()))
    for file in files[1:]:
        file.write_text("")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(2):
        script = Path(f"{config.out}-{rank}.py")
        script.write_text(PROCESS.format(rank=rank, port=port, out=config.out, code=code, options=options))
        processes.append(SERVER.Process(target=runpy.run_path, args=(str(script),)))
        processes[-1].start()
    for process in processes:
        process.join(300)
    return [process.exitcode for process in processes], files[1].read_text(), files[2].read_text()


def checkpoint_of(config: TrainConfig) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(Path(config.out) / "checkpoints/last.ckpt", weights_only=True)
    return checkpoint


def metrics_of(config: TrainConfig) -> dict[str, Any]:
    metrics: dict[str, Any] = json.loads((Path(config.out) / "metrics.json").read_text())
    return metrics


@pytest.fixture
def data(tmp_path: Path) -> str:
    """Neither split can be dealt evenly, to batches or processes."""
    path = tmp_path / "odd.yaml"
    path.write_text("format: synthetic\nsize: [36, 41]\ndistance: 12\nlength: 7\n")
    return str(path)


def test_two_processes_learn_what_one_does(make: Make, data: str) -> None:
    """Batch norms, two factors, images held out; and a signal ends both at one step, from which both go on."""
    values = {"data": data, "search": "sampled", "paths": 2, "dropout": 0.0, "batch_size": 4, "val_every": 1}
    alone, both = make("alone", **values, lr=0.01), make("both", **values, lr=0.01)
    train(alone)
    stop = "\n".join(
        [
            "import signal",
            "from rfield.training import ParsingModule",
            "real = ParsingModule.training_step",
            "def training_step(self, batch, batch_index):",
            "    if self.global_step == 2 and rank == 1:",
            "        os.kill(os.getpid(), signal.SIGTERM)",
            "    return real(self, batch, batch_index)",
            "ParsingModule.training_step = training_step",
        ]
    )
    statuses, _, errors = start(both, stop)
    assert statuses == [143, 143], errors
    assert errors.count("stopped by SIGTERM; 3 steps are saved") == 2
    assert checkpoint_of(both)["global_step"] == 3
    statuses, said, errors = start(both, "", "--resume")
    assert statuses == [0, 0], errors
    assert said.count("mIoU") == 1, "the first process alone reports"

    one, two = (read_factor_csv(Path(config.out) / "factor.csv") for config in (alone, both))
    for column in ("step", "effective_dilation", "loss"):
        assert two[column] == pytest.approx(one[column], rel=1e-4), column
    expected = checkpoint_of(alone)["state_dict"]
    for name, weight in checkpoint_of(both)["state_dict"].items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=1e-4, msg=name)
    assert metrics_of(both)["miou"] == pytest.approx(metrics_of(alone)["miou"], abs=1e-3)
    best = [torch.load(Path(c.out) / "checkpoints/best.ckpt", weights_only=True)["global_step"] for c in (alone, both)]
    assert best[0] == best[1]


def test_factors_that_differ_end_the_run(make: Make) -> None:
    nudge = "\n".join(
        [
            "from rfield.training import ParsingModule",
            "from rfield.search import factor_parameters",
            "real = ParsingModule.on_train_batch_end",
            "def on_train_batch_end(self, *arguments):",
            "    real(self, *arguments)",
            "    if self.global_step == 6 and rank == 1:",
            "        factor_parameters(self.network)[0].data += 1e-6",
            "ParsingModule.on_train_batch_end = on_train_batch_end",
        ]
    )
    config = make(search_share=1.0)
    statuses, _, errors = start(config, nudge)
    assert statuses == [2, 2]
    assert "rfield train: step 6: the processes no longer train one network, their factors differ: " in errors
    assert checkpoint_of(config)["global_step"] == 3, "the last one is from before"


@pytest.mark.parametrize("skip", [False, True])
def test_a_bad_file_is_refused_or_skipped_by_all(make: Make, tmp_path: Path, skip: bool) -> None:
    for split, count in (("train", 4), ("val", 3)):
        for index in range(count):
            for folder, mode in (("images", "RGB"), ("masks", "L")):
                path = tmp_path / f"own/{split}/{folder}/{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                PIL.Image.new(mode, (41, 33), 1 if mode == "L" else (index, 9, 9)).save(path)
    (tmp_path / "own/classes.txt").write_text("road\ncar\nsky\n")
    for bad in ("train/images/3.png", "val/masks/1.png"):
        (tmp_path / "own" / bad).write_bytes(b"no image")
    config = make(data=f"folder:{tmp_path}/own", search="none", epochs=1, skip_bad=skip)
    statuses, _, errors = start(config)
    if skip:
        assert statuses == [0, 0], errors
        assert metrics_of(config)["skipped_samples"] == {"train": ["3"], "val": ["1"]}
    else:
        assert statuses == [2, 2]
        assert errors.count("rfield train: ") == 1, "the first process says it, the others go"
        assert "3.png" in errors
        assert not Path(config.out).exists()


def test_what_a_launcher_says(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (machines(), join(make())) == (1, make())
    srun = {
        "NTASKS": 4,
        "NTASKS_PER_NODE": 2,
        "NNODES": 2,
        "PROCID": 3,
        "LOCALID": 1,
        "NODEID": 1,
        "JOB_ID": 123456,
        "JOB_NAME": "train",
    }
    for name, value in srun.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    assert machines() == 2
    with pytest.raises(ValueError, match="devices is 2, but 4 processes were started: leave devices out"):
        join(make(devices=2))
    with pytest.raises(ValueError, match="batch_size 2 cannot be dealt evenly to 4 devices"):
        join(make())


@pytest.mark.parametrize("momentum", [0.1, None])
def test_shared_statistics_of_one_process_are_an_ordinary_batch_norm_s(tmp_path: Path, momentum: float | None) -> None:
    torch.manual_seed(0)
    input = torch.randn(3, 4, 5, 6, requires_grad=True)
    plain, shared = nn.BatchNorm2d(4, momentum=momentum), nn.BatchNorm2d(4, momentum=momentum)
    share_statistics(nn.Sequential(shared))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for _ in range(2):
            for mode in (True, False):
                outputs = [norm.train(mode)(input * 2 + 1) for norm in (plain, shared)]
                torch.testing.assert_close(outputs[0], outputs[1])
        sums = [norm.train()(input).square().sin().sum() for norm in (plain, shared)]
        gradients = [
            torch.autograd.grad(total, [input, *norm.parameters()])
            for total, norm in zip(sums, (plain, shared), strict=True)
        ]
        torch.testing.assert_close(*gradients)
        torch.testing.assert_close(plain.state_dict(), shared.state_dict())
    finally:
        torch.distributed.destroy_process_group()
