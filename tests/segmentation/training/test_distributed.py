"""One run in several processes, as torchrun would start them."""

import json
import multiprocessing
import runpy
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
import yaml
from torch import nn

from rfield.segmentation.config.train import TrainConfig
from rfield.segmentation.training import read_factor_csv, train
from rfield.segmentation.training.distributed import (
    _SumOverProcesses,
    init_distributed,
    is_rank_zero,
    launcher,
    num_nodes,
    sync_batch_norm,
    world_size,
)

Make = Callable[..., TrainConfig]
SERVER = multiprocessing.get_context("forkserver")  # conftest.py says what it has imported.
# What torchrun sets and a process is, and where it speaks to.
PROCESS = """
import multiprocessing, os, sys
multiprocessing.set_start_method(None, force=True)  # as in a process that torchrun starts
rank, port, out = {rank}, {port}, {out!r}
os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", GROUP_RANK="0")
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="here")
os.dup2(os.open(f"{{out}}.out", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
os.dup2(os.open(f"{{out}}.err", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
import torch
torch.set_num_threads(1)
{code}
from rfield.segmentation.cli import main
main(["train", "--config", f"{{out}}.yaml", *{options!r}])
"""


def start(config: TrainConfig, code: str = "", *options: str) -> tuple[list[int | None], str, str]:
    """Trains in two processes; `code` comes before, with their rank in `rank`.

    Returns:
        Their statuses, and what they have written to stdout and stderr.
    """
    files = [Path(f"{config.run.out}.{suffix}") for suffix in ("yaml", "out", "err")]
    files[0].write_text(yaml.safe_dump(config.plain()))
    for file in files[1:]:
        file.write_text("")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(2):
        script = Path(f"{config.run.out}-{rank}.py")
        script.write_text(PROCESS.format(rank=rank, port=port, out=config.run.out, code=code, options=options))
        processes.append(SERVER.Process(target=runpy.run_path, args=(str(script),)))
        processes[-1].start()
    for process in processes:
        process.join(300)
    return [process.exitcode for process in processes], files[1].read_text(), files[2].read_text()


def checkpoint_of(config: TrainConfig) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(Path(config.run.out) / "checkpoints/last.ckpt", weights_only=True)
    return checkpoint


def metrics_of(config: TrainConfig) -> dict[str, Any]:
    metrics: dict[str, Any] = json.loads((Path(config.run.out) / "metrics.json").read_text())
    return metrics


@pytest.fixture
def data(tmp_path: Path) -> str:
    """Neither split can be dealt evenly, to batches or processes."""
    path = tmp_path / "odd.yaml"
    path.write_text("format: synthetic\nsize: [36, 41]\ndistance: 12\nlength: 7\n")
    return str(path)


@pytest.mark.processes
@pytest.mark.slow
def test_two_processes_learn_what_one_does(make: Make, data: str) -> None:
    """Batch norms, two factors, images held out; and a signal ends both at one step, from which both go on."""
    values = {"data": data, "search": "sampled", "paths": 2, "dropout": 0.0, "batch_size": 4, "val_every": 1}
    alone, both = make("alone", **values, lr=0.01), make("both", **values, lr=0.01)
    train(alone)
    stop = "\n".join(
        [
            "import signal",
            "from rfield.segmentation.training import ParsingModule",
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

    one, two = (read_factor_csv(Path(config.run.out) / "factor.csv") for config in (alone, both))
    for column in ("step", "effective_dilation", "loss"):
        assert two[column] == pytest.approx(one[column], rel=1e-4), column
    expected = checkpoint_of(alone)["state_dict"]
    for name, weight in checkpoint_of(both)["state_dict"].items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    assert metrics_of(both)["miou"] == pytest.approx(metrics_of(alone)["miou"], abs=1e-3)
    files = [Path(config.run.out) / "checkpoints/best.ckpt" for config in (alone, both)]
    best = [torch.load(file, weights_only=True)["global_step"] for file in files]
    assert best[0] == best[1]


@pytest.mark.processes
@pytest.mark.slow
def test_balanced_classes_are_those_of_all_pixels(make: Make, data: str) -> None:
    """The weights of the training set's masks, and of each step a mean over both processes' pixels."""
    # Logits far from 0 soon, so that classes of other weights have other losses.
    values = {"class_weights": "balanced", "search": "none", "epochs": 1, "batch_size": 4, "dropout": 0.0}
    alone, both, plain = (make(name, data=data, **values, lr=0.1) for name in ("alone", "both", "plain"))
    train(alone)
    statuses, _, errors = start(both)
    assert statuses == [0, 0], errors
    train(plain.replace(class_weights=None))
    one, two, other = (read_factor_csv(Path(config.run.out) / "factor.csv")["loss"] for config in (alone, both, plain))
    assert two == pytest.approx(one, rel=1e-5)
    assert other[-1] != pytest.approx(one[-1], rel=1e-3)
    expected = checkpoint_of(alone)["state_dict"]
    for name, weight in checkpoint_of(both)["state_dict"].items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.processes
@pytest.mark.slow
def test_factors_that_differ_end_the_run(make: Make) -> None:
    nudge = "\n".join(
        [
            "from rfield.segmentation.training import ParsingModule",
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


@pytest.mark.processes
@pytest.mark.slow
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
        assert not Path(config.run.out).exists()


def test_what_a_launcher_says(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (num_nodes(), world_size(1), world_size(3)) == (1, 1, 3)
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
    assert num_nodes() == 2
    with pytest.raises(ValueError, match="devices is 2, but 4 processes were started: leave devices out"):
        world_size(2)
    with pytest.raises(ValueError, match="batch_size 2 cannot be divided evenly among 4 devices"):
        make().replace(devices=world_size(1))


@pytest.fixture(scope="module")
def met(tmp_path_factory: pytest.TempPathFactory, in_processes: Any) -> list[dict[str, Any]]:
    """What each of two processes has done and met, see two_processes.py."""
    folder = tmp_path_factory.mktemp("two")
    values = [{"rank": rank, "store": f"{folder}/store", "out": f"{folder}/{rank}.pt"} for rank in range(2)]
    in_processes(Path(__file__).with_name("two_processes.py"), *values)
    return [torch.load(each["out"], weights_only=True) for each in values]


def test_shared_statistics_and_their_gradients_are_those_of_the_whole_batch(met: list[dict[str, Any]]) -> None:
    """Also that of an image, whose own process is not alone in looking at its statistics."""
    functions = runpy.run_path(str(Path(__file__).with_name("two_processes.py")))
    whole = functions["learn"](functions["network"](), *functions["batch"]())
    halves = [each["learned"] for each in met]
    for rank, half in enumerate(halves):
        for key in ("logits", "eval"):
            torch.testing.assert_close(half[key], whole[key][functions["SHARES"][rank]], rtol=1e-5, atol=1e-5)
        # Each process's loss is twice its share, so that their mean is the whole one's; and so are gradients.
        torch.testing.assert_close(half["state"], whole["state"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(half["input"] / 2, whole["input"][functions["SHARES"][rank]], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close((halves[0]["loss"] + halves[1]["loss"]) / 2, whole["loss"])
    for name, gradient in whole["gradients"].items():
        mean = (halves[0]["gradients"][name] + halves[1]["gradients"][name]) / 2
        assert name in ("0.bias", "3.bias") or gradient.abs().max() > 1e-4, name  # A batch norm takes a bias away.
        torch.testing.assert_close(mean, gradient, rtol=1e-4, atol=1e-7, msg=name)


def test_numbers_that_processes_share(met: list[dict[str, Any]]) -> None:
    assert [each["place"] for each in met] == [(0, 2), (1, 2)]
    assert [each["first"] for each in met] == [True, False]
    assert [each["mean"] for each in met] == [[0.5, 4.0]] * 2
    assert [each["norm"] for each in met] == [5.0, 5.0]
    assert [each["own norm"] for each in met] == [1.0, 10.0], "where no gradients are taken each is on its own"
    assert [each["skipped"] for each in met] == [["train_00001", "train_00002"]] * 2


@pytest.mark.parametrize("kind", ["cross_entropy", "focal"])
def test_losses_and_their_gradients_are_those_of_all_pixels(met: list[dict[str, Any]], kind: Any) -> None:
    if kind == "focal":
        pytest.importorskip("segmentation_models_pytorch")
    functions = runpy.run_path(str(Path(__file__).with_name("two_processes.py")))
    _, mask = functions["batch"]()
    value, gradient = functions["loss_of"](kind, mask)
    values, gradients = zip(*(each[kind] for each in met), strict=True)
    torch.testing.assert_close((values[0] + values[1]) / 2, value)
    torch.testing.assert_close(torch.cat(gradients) / 2, gradient)


def test_factors_that_differ_are_told_by_all(met: list[dict[str, Any]]) -> None:
    assert [each["same"] for each in met] == ["", ""]
    for each in met:
        assert each["unequal"].startswith(
            "ValueError: step 4: the processes no longer train one network, their factors differ: 2 to 3, 2 to 3. "
        )


def test_what_the_first_process_does_for_all(met: list[dict[str, Any]]) -> None:
    assert [each["calls"] for each in met] == [[0], []]
    for error in ("ValueError", "FileNotFoundError"):
        assert [each[error] for each in met] == [f"{error}: no such file", "SystemExit: 2"]


def test_images_are_dealt_to_processes(met: list[dict[str, Any]]) -> None:
    assert [each["held out"] for each in met] == [[[[4]], [[0]]], [[[2]]]]
    assert [each["scored of 5"] for each in met] == [[0, 2, 4], [1, 3]], "each once"
    assert [each["scored of 2"] for each in met] == [[0], [1]]
    assert [each["scored of 1"] for each in met] == [[0], [0]], "rather by all than by none"
    orders = []
    for each in met:
        share, epoch, seen, held_out, order, seed = each["dealt"]
        assert (share, epoch, seen, held_out, seed) == (2, 2, (2, 2), [1], 3)
        assert len(order) == 1, "two of three have been seen"
        orders += order
    assert orders[0] != orders[1]
    assert all(epoch == 2 and index != 1 for epoch, index in orders)


@pytest.mark.parametrize(("processes", "here", "found"), [(1, 1, 1), (4, 2, 2), (4, 4, 1), (6, 2, 3)])
def test_what_torchrun_says(processes: int, here: int, found: int, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": here, "RANK": 1, "LOCAL_RANK": 1, "GROUP_RANK": 0}
    for name, value in {**names, "TORCHELASTIC_RUN_ID": "here", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    assert num_nodes() == found
    if processes == 1:
        assert launcher() is None
        assert world_size(1) == 1
        init_distributed(1)
        return
    environment = launcher()
    assert environment is not None
    assert (environment.world_size(), environment.global_rank(), is_rank_zero()) == (processes, 1, False)
    # As many GPUs as processes on this machine.
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.set_device", lambda rank: None)
    joined: list[Any] = []
    monkeypatch.setattr("torch.distributed.init_process_group", lambda *args, **values: joined.append((args, values)))
    monkeypatch.setattr("torch.cuda.device_count", lambda: here - 1)
    with pytest.raises(ValueError, match=f"{here} processes on this machine need as many GPUs, but it has {here - 1}"):
        init_distributed(processes)
    monkeypatch.setattr("torch.cuda.device_count", lambda: here)
    assert world_size(1) == processes
    init_distributed(processes)
    ((backend,), values), *others = joined
    assert (backend, values["rank"], values["world_size"], others) == ("nccl", 1, processes, [])


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """The only process of a group."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("momentum", [0.1, 0.3, None])
@pytest.mark.parametrize("size", [(3, 4, 5, 6), (7, 4), (3, 4, 5)])
def test_shared_statistics_of_one_process_are_an_ordinary_batch_norm_s(size: Any, momentum: float | None) -> None:
    torch.manual_seed(0)
    input = torch.randn(size, requires_grad=True)
    kind = nn.BatchNorm2d if len(size) == 4 else nn.BatchNorm1d
    plain, shared = kind(4, momentum=momentum), kind(4, momentum=momentum)
    sync_batch_norm(nn.Sequential(shared))
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
    assert shared.training


@pytest.mark.usefixtures("alone")
def test_shared_statistics_in_low_precision_and_of_one_value() -> None:
    """Summed in float32; the output is the input's kind. A variance of one value is 0, as torch's own cannot say."""
    norm = nn.BatchNorm2d(2, momentum=1.0)
    sync_batch_norm(norm)
    input = torch.randn(4, 2, 9, 9) + 30
    output = norm(input.bfloat16())
    assert output.dtype == torch.bfloat16
    assert norm.running_mean is not None
    torch.testing.assert_close(norm.running_mean, input.bfloat16().float().mean((0, 2, 3)), rtol=1e-6, atol=0)
    output = norm(torch.tensor([3.0, 4.0]).reshape(1, 2, 1, 1))
    assert not output.any()
    assert norm.running_mean.tolist() == [3.0, 4.0]
    assert norm.running_var is not None
    assert norm.running_var.tolist() == [0.0, 0.0]


def test_a_norm_that_keeps_no_statistics_shares_none() -> None:
    model = nn.Sequential(nn.BatchNorm2d(2, track_running_stats=False), nn.InstanceNorm2d(2))
    sync_batch_norm(model)
    assert [type(module) for module in model.modules()] == [nn.Sequential, nn.BatchNorm2d, nn.InstanceNorm2d]


@pytest.mark.usefixtures("alone")
def test_a_sum_over_processes_changes_nothing_that_it_is_given() -> None:
    value, gradient = torch.arange(6.0).reshape(2, 3).requires_grad_(), torch.randn(3, 2).T
    before = gradient.clone()
    total = _SumOverProcesses.apply(value)
    total.add_(1)
    assert value.tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    (got,) = torch.autograd.grad(total, value, gradient)
    assert torch.equal(got, before)
    got.add_(1)
    assert torch.equal(gradient, before)
