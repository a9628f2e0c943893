"""Training in several processes: who started them, what they share, and what must be the same in all."""

import functools
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

# How long a process waits for another, which may have features to compute.
_PATIENCE = timedelta(minutes=30)


def launcher() -> ClusterEnvironment | None:
    """Return what torchrun or srun says of this process, or None if it has not started several."""
    for kind in (TorchElasticEnvironment, SLURMEnvironment):
        if kind.detect():
            environment: ClusterEnvironment = kind()
            return environment if environment.world_size() > 1 else None
    return None


def num_nodes() -> int:
    """Return the number of machines that the processes of torchrun or srun run on; 1 without them."""
    if launcher() is None:
        return 1
    if "LOCAL_WORLD_SIZE" in os.environ:  # torchrun's
        return int(os.environ["WORLD_SIZE"]) // int(os.environ["LOCAL_WORLD_SIZE"])
    return int(os.environ["SLURM_NNODES"])


def world_size(devices: int) -> int:
    """Return the number of processes of the run: that which torchrun or srun has started, else `devices`.

    Raises:
        ValueError: if torchrun or srun has started another number than `devices`, and `devices` is not 1.
    """
    environment = launcher()
    if environment is None:
        return devices
    started = environment.world_size()
    if devices not in (1, started):
        raise ValueError(f"devices is {devices}, but {started} processes were started: leave devices out")
    return started


def init_distributed(devices: int) -> None:
    """Join the `devices` processes that torchrun or srun has started, if any.

    Raises:
        ValueError: if this machine has fewer GPUs than processes.
    """
    environment = launcher()
    here = devices // num_nodes()
    if torch.cuda.is_available() and here > torch.cuda.device_count():
        raise ValueError(f"{here} processes on this machine need as many GPUs, but it has {torch.cuda.device_count()}")
    if environment is not None and not dist.is_initialized():
        # Lightning would join them too, but later, when data and run folder have been read already.
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = environment.main_address, str(environment.main_port)
        if torch.cuda.is_available():
            torch.cuda.set_device(environment.local_rank())
        dist.init_process_group(
            "nccl" if torch.cuda.is_available() else "gloo",
            timeout=_PATIENCE,
            rank=environment.global_rank(),
            world_size=environment.world_size(),
        )


def rank_and_world_size() -> tuple[int, int]:
    """Return the number of this process, and how many there are; (0, 1) for a single one."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_rank_zero() -> bool:
    """Return whether this process is the one that reads, writes and prints for all."""
    return dist.get_rank() == 0 if dist.is_initialized() else int(os.environ.get("LOCAL_RANK", 0)) == 0


def rank_zero_first(action: Callable[[], Any]) -> None:
    """Run something in the first process while the others wait.

    If it fails with a `ValueError` or `OSError`, the first process raises it and the others exit with status 2.
    (Lightning starts its own processes, for `devices`, later.)
    """
    failure: BaseException | None = None
    if is_rank_zero():
        try:
            action()
        except (ValueError, OSError) as error:
            failure = error
    if dist.is_initialized():
        failed = [failure is not None]
        dist.broadcast_object_list(failed)
        if failed[0] and not is_rank_zero():
            raise SystemExit(2)
    if failure is not None:
        raise failure


def refuse_unequal(factors: Tensor, where: str) -> None:
    """Refuse to go on if the factors of the processes differ in any bit.

    Args:
        factors: Tensor[number of factors], on the device that trains.
        where: the start of the error message.

    Raises:
        ValueError: names the least and the greatest value of each factor that differs.
    """
    least, most = factors.clone(), factors.clone()
    dist.all_reduce(least, dist.ReduceOp.MIN)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    bounds = zip(least.tolist(), most.tolist(), strict=True)
    differing = [f"{low:.9g} to {high:.9g}" for low, high in bounds if low != high]
    if differing:
        raise ValueError(
            f"{where}: the processes no longer train one network, their factors differ: {', '.join(differing)}. The "
            "last checkpoint is from before; --resume continues from it, with the same factors in all processes"
        )


def sync_batch_norm(network: nn.Module) -> None:
    """Make every batch norm in training normalise by the samples of all processes, exactly as if they were in one.

    In place. Each norm becomes a subclass of its own class, so that classes such as timm's, which add an activation,
    keep what they add. PyTorch's `SyncBatchNorm` runs on GPUs alone.
    """
    for module in network.modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            module.__class__ = _synced(type(module))  # type: ignore[arg-type]


@functools.cache
def _synced(kind: type[_BatchNorm]) -> type[_BatchNorm]:
    return kind if issubclass(kind, _SyncedBatchNorm) else type(f"Synced{kind.__name__}", (_SyncedBatchNorm, kind), {})


class _SyncedBatchNorm(_BatchNorm):
    """Base of batch norms that share the statistics of a step with the other processes."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        values = input.float()
        axes = [axis for axis in range(input.dim()) if axis != 1]
        shape = [1, -1] + [1] * (input.dim() - 2)
        count = _SumOverProcesses.apply(values.new_tensor([values.numel() / values.shape[1]]))
        mean = _SumOverProcesses.apply(values.sum(axes)) / count
        centred = values - mean.view(shape)
        variance = _SumOverProcesses.apply(centred.square().sum(axes)) / count
        self._update_running(mean, variance, count)
        whitened = (centred * (variance + self.eps).rsqrt().view(shape)).to(input.dtype)
        # The class itself applies its weight and bias, and whatever it adds.
        neutral = {"running_mean": torch.zeros_like(mean), "running_var": torch.full_like(mean, 1 - self.eps)}
        self.training = False
        try:
            result: Tensor = torch.func.functional_call(self, neutral, whitened)
        finally:
            self.training = True
        return result

    @torch.no_grad()
    def _update_running(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        weight = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, weight)
        self.running_var.lerp_(variance * count / (count - 1).clamp(min=1), weight)


class _SumOverProcesses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        total = grad_outputs[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total
