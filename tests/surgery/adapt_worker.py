"""One of two processes that train adapted models together. Arguments: `rank`, `store` and `out`."""

import runpy
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import rfield

_tested = runpy.run_path(str(Path(__file__).with_name("test_adapt_with_torch.py")))
batches, learn, network = (_tested[name] for name in ("batches", "learn", "network"))


def wrapped(wrapper: str) -> nn.Module:
    model = network()
    rfield.adapt(model)
    if wrapper == "ddp":
        return nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    rfield.regulate(model, "0")
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(model[2], mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def main(rank: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    found = {}
    for wrapper in ("ddp", "fsdp"):
        for kind in ("gradient", "spsa", "sampled"):
            model = wrapped(wrapper)
            search = learn(model, kind, batches(6, seed=rank), batches(2, seed=2 + rank))
            output = model(batches(1, seed=4)[0][0]).detach()
            found[wrapper, kind] = (search.trajectory, search.unsnapped, output)
    torch.save(found, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*(globals()[name] for name in ("rank", "store", "out")))
