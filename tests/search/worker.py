"""One of two processes that learn a receptive field together. Arguments: `kind`, `rank`, `store` and `out`."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from rfield.layers import AdaptiveConv2d
from rfield.search import SampledSearch, SpsaSearch, factor_parameters, parameter_groups


def batches_of(rank: int, count: int) -> list[tuple[Tensor, Tensor]]:
    """Return the batches of each process: different noise, and a different best dilation."""
    generator = torch.Generator().manual_seed(rank)
    batches = []
    for _ in range(count):
        noise = F.avg_pool2d(torch.randn(2, 1, 24, 24, generator=generator), 3, 1, 1)
        batches.append((noise * 3, (noise[:, 0].roll(-3 - 4 * rank, 2) > 0).long()))
    return batches


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def main(kind: str, rank: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    first = AdaptiveConv2d(1, 4, 3, padding=5, dilation=5)
    second = AdaptiveConv2d(4, 4, 3, padding=2, dilation=2)
    model = nn.parallel.DistributedDataParallel(
        nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Conv2d(4, 2, 1)), find_unused_parameters=True
    )
    search: SpsaSearch | SampledSearch
    if kind == "spsa":
        search = SpsaSearch(model, loss_of, steps=20)
    else:
        search = SampledSearch(model, loss_of, steps=20, held_out=batches_of(rank + 2, 2 + rank))
    optimizer = torch.optim.Adam(parameter_groups(model, 0.02, 0.02))
    own_losses = []
    for batch in batches_of(rank, 22):
        loss = search.loss(batch)
        own_losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        search.step()
    torch.save(
        {
            "losses": own_losses,
            "trajectory": search.trajectory,
            "unsnapped": search.unsnapped,
            "factors": [factor.detach() for factor in factor_parameters(model)],
            "weights": [parameter.detach() for parameter in model.parameters()],
            "readings": getattr(search, "readings", None),
            "held_out_losses": getattr(search, "losses", None),
        },
        out,
    )
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*(globals()[name] for name in ("kind", "rank", "store", "out")))
