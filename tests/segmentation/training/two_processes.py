"""One of two processes: what each does and meets, for test_processes.py. Run with `rank`, `store` and `out` given."""

import contextlib
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from rfield.search.factors import mean_over_processes
from rfield.segmentation.data import SkippingDataset, SyntheticCues
from rfield.segmentation.training.bad_samples import share_skipped
from rfield.segmentation.training.distributed import (
    is_rank_zero,
    rank_and_world_size,
    rank_zero_first,
    refuse_unequal,
    sync_batch_norm,
)
from rfield.segmentation.training.held_out import HeldOut
from rfield.segmentation.training.loaders import Loaders
from rfield.segmentation.training.losses import make_loss, norm_over_processes

# Of five images the first process has three. None of these numbers is special.
SHARES = ([0, 1, 2], [3, 4])


def network() -> nn.Sequential:
    """Two batch norms, so that a gradient goes through one on its way to the other; one averages all it has seen."""
    torch.manual_seed(0)
    norms = nn.BatchNorm2d(4), nn.BatchNorm2d(3, momentum=None)
    for norm in norms:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return nn.Sequential(nn.Conv2d(2, 4, 3), norms[0], nn.Sigmoid(), nn.Conv2d(4, 3, 3), norms[1])


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(5, 2, 9, 8, generator=generator) * torch.arange(1.0, 6.0)[:, None, None, None] + 2
    mask = torch.randint(3, (5, 5, 4), generator=generator)
    mask[0, :3] = 255
    return images, mask


def learn(model: nn.Module, images: Tensor, mask: Tensor) -> dict[str, Any]:
    """Two steps' forward, and the second one's gradients."""
    images = images.clone().requires_grad_()
    model(images.detach() + 1)
    logits = model(images)
    loss = make_loss("cross_entropy", 3, (1.0, 2.0, 0.5))(logits, mask)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    unlearned = model.eval()(images).detach()
    values = {"logits": logits.detach(), "loss": loss.detach(), "state": state, "input": images.grad}
    return {**values, "gradients": gradients, "eval": unlearned}


def loss_of(kind: Any, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Of logits that depend on the labels alone."""
    logits = F.one_hot(mask % 3, 3).movedim(-1, 1).double().sin_().mul_(mask[:, :1, :1, None] + 1.0).requires_grad_()
    loss = make_loss(kind, 3, (1.0, 2.0, 0.5))(logits, mask)
    loss.backward()
    assert logits.grad is not None
    return loss.detach(), logits.grad


def caught(action: Any, *arguments: Any) -> str:
    """What it raises, in words."""
    try:
        action(*arguments)
    except (Exception, SystemExit) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def meet(rank: int) -> dict[str, Any]:
    met: dict[str, Any] = {"place": rank_and_world_size(), "first": is_rank_zero()}
    model = network()
    sync_batch_norm(model)
    images, mask = batch()
    met["learned"] = learn(model, images[SHARES[rank]], mask[SHARES[rank]])

    for kind in ("cross_entropy", "focal"):
        with contextlib.suppress(ValueError):  # There need be no package for the second.
            met[kind] = loss_of(kind, mask[SHARES[rank]])

    met["mean"] = mean_over_processes(torch.tensor([float(rank), 4.0])).tolist()
    met["norm"] = norm_over_processes(torch.tensor(10 * rank)).item()
    with torch.no_grad():
        met["own norm"] = norm_over_processes(torch.tensor(10 * rank)).item()

    met["same"] = caught(refuse_unequal, torch.tensor([1.5, 2.0]), "step 3")
    met["unequal"] = caught(refuse_unequal, torch.tensor([1.5, 2.0 + rank, 3.0 - rank]), "step 4")

    calls: list[int] = []
    rank_zero_first(lambda: calls.append(rank))
    met["calls"] = calls
    for error in (ValueError, FileNotFoundError):
        met[error.__name__] = caught(rank_zero_first, lambda error=error: (_ for _ in ()).throw(error("no such file")))

    dataset = SkippingDataset(SyntheticCues("train", size=(17, 17), distance=6, length=5))
    dataset.bad[rank + 1] = 1
    share_skipped([dataset, SyntheticCues("val", size=(17, 17), distance=6, length=2)])
    met["skipped"] = dataset.skipped()

    samples: Any = [(torch.tensor([float(index)]), torch.tensor([index])) for index in range(5)]
    met["held out"] = [mask.tolist() for _, mask in HeldOut(samples, [4, 2, 0])]
    for count in (1, 2, 5):
        loaders = Loaders(samples, samples[:count], batch_size=2, workers=0, seed=3)
        met[f"scored of {count}"] = [mask.item() for _, mask in loaders.val_dataloader()]
    loader = Loaders(
        samples, samples, batch_size=2, workers=0, seed=3, position=(2, 1), held_out=frozenset([1])
    ).train_dataloader()
    sampler: Any = loader.sampler
    met["dealt"] = loader.batch_size, sampler.epoch, sampler.seen, sorted(sampler.held_out), list(sampler), sampler.seed
    return met


if __name__ == "__main__":
    rank, store, out = globals()["rank"], globals()["store"], globals()["out"]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.save(meet(rank), out)
    dist.destroy_process_group()
