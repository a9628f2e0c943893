"""The learned factors of a model: found, grouped for an optimizer, set, held."""

import random
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from rfield.layers import LearnedFactor
from rfield.layers.factor import whole_range

# What torch puts into the names of a part that it wraps.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def learned_layers(model: nn.Module) -> list[list[LearnedFactor]]:
    """The layers that share a factor, group by group, in the order of the model's modules; frozen ones, too.

    >>> from rfield.layers import AdaptiveConv2d
    >>> [len(group) for group in learned_layers(AdaptiveConv2d(1, 1, 3))]
    [1]
    """
    groups: dict[int, list[LearnedFactor]] = {}
    for module in model.modules():
        if isinstance(module, LearnedFactor):
            groups.setdefault(id(module.log_factor), []).append(module)
    return list(groups.values())


def still_learned(group: Sequence[LearnedFactor]) -> list[LearnedFactor]:
    """Those layers of a group that a search may move: none of a frozen factor, and no snapped ones."""
    learns = group[0].log_factor.requires_grad or all(layer.in_search for layer in group)
    return [layer for layer in group if learns and not layer.snapped]


def names_of(model: nn.Module) -> dict[int, str]:
    """The names of a model's modules and parameters by their ids, without what wrappers put before and between."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            break
    named = [*model.named_modules(), *model.named_parameters()]
    return {
        id(part): ".".join(word for word in name.split(".") if word not in _WRAPPERS) or type(part).__name__
        for name, part in named
    }


def factor_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The learned factors of a model, each once, in the order of its modules; frozen ones, too.

    >>> from rfield.layers import AdaptiveConv2d
    >>> len(factor_parameters(AdaptiveConv2d(1, 1, 3)))
    1
    """
    return [group[0].log_factor for group in learned_layers(model)]


def parameter_groups(model: nn.Module, lr: float, factor_lr: float) -> list[dict[str, Any]]:
    """Optimizer-ready groups: the weights, and the factors at their own rate and without weight decay.

    Args:
        model: any module, with or without learned factors inside.
        lr: learning rate of the weights.
        factor_lr: learning rate of the factors (of their logarithm).

    Returns:
        Groups for any torch optimizer; parameters that need no gradient are left out.

    >>> from rfield.layers import AdaptiveConv2d
    >>> [len(group["params"]) for group in parameter_groups(AdaptiveConv2d(1, 1, 3), lr=1e-3, factor_lr=1e-2)]
    [2, 1]
    """
    factors = factor_parameters(model)
    known = {id(parameter) for parameter in factors}
    weights = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    groups: list[dict[str, Any]] = [{"params": weights, "lr": lr}]
    learned = [p for p in factors if p.requires_grad]
    if learned:
        groups.append({"params": learned, "lr": factor_lr, "weight_decay": 0.0})
    return groups


def mean_over_processes(value: Tensor) -> Tensor:
    """The mean of a number over all processes of a distributed run; the number itself elsewhere."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    # NCCL knows GPUs alone.
    total = value.to("cuda" if torch.distributed.get_backend() == "nccl" else value.device, copy=True)
    torch.distributed.all_reduce(total)
    return (total / torch.distributed.get_world_size()).to(value.device)


def gather_rows(rows: Tensor) -> Tensor:
    """The rows of all processes, Tensor[N, K] to Tensor[all N, K]: the first of each, the second of each, and so on.

    The processes need not have equally many. Elsewhere than in a distributed run: the rows themselves.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return rows
    # NCCL knows GPUs alone.
    own = rows.to("cuda") if torch.distributed.get_backend() == "nccl" else rows
    counts = [own.new_zeros(1) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(counts, own.new_tensor([len(own)]))
    most = int(max(counts))
    padded = torch.cat([own, own.new_zeros(most - len(own), own.shape[1])])
    gathered = [torch.empty_like(padded) for _ in counts]
    torch.distributed.all_gather(gathered, padded)
    held = torch.arange(most, device=own.device)[:, None] < torch.cat(counts)
    return torch.stack(gathered, dim=1)[held].to(rows.device)


def reshard(model: nn.Module) -> None:
    """Ends a forward without a backward: FSDP2 then lets go of the parameters it has gathered, which are copies."""
    for module in model.modules():
        if callable(release := getattr(module, "reshard", None)):
            release()


def dilation_range(group: Sequence[LearnedFactor]) -> tuple[float, float]:
    """The effective dilations of a group's first layer that a search may try, along the tighter axis of the last map.

    Raises:
        ValueError: if the search is to end at a whole dilation, and the bounds hold none.
    """
    first = group[0]
    seen = next((layer for layer in group if layer.map_size is not None), None)
    if seen is None or seen.map_size is None:
        return 1.0, max(32.0, *first.base_dilation)
    lower, upper = seen.factor_bounds(seen.map_size)
    least = max(base / bound for base, bound in zip(first.base_dilation, upper, strict=True))
    greatest = min(base / bound for base, bound in zip(first.base_dilation, lower, strict=True))
    greatest = max(least, greatest)
    if first.snaps and whole_range(least, greatest) is None:
        raise ValueError(
            f"its bounds (min_factor {first.min_factor}, max_factor {first.max_factor}, a map of {seen.map_size}) "
            f"leave it the dilations {least:.4g} to {greatest:.4g}, none of which is whole: widen them"
        )
    return least, greatest


def log_dilation(layer: LearnedFactor) -> Tensor:
    axes = layer.log_factor.numel()
    return torch.tensor(layer.effective_dilation[:axes], dtype=torch.float64).log().requires_grad_()


def set_dilation(group: Sequence[LearnedFactor], dilation: Sequence[float]) -> None:
    """Sets a group's factor so that its first layer has this effective dilation, one number or (height, width)."""
    first = group[0]
    first.set_factor([base / value for base, value in zip(first.base_dilation, dilation, strict=False)])


def all_round(group: Sequence[LearnedFactor]) -> bool:
    return all(layer.rounds for layer in group)


def present_dilation(group: Sequence[LearnedFactor]) -> list[float]:
    """The effective dilation of a group's first layer, one number or (height, width); whole where it is run so."""
    first = group[0]
    values = first.nearest_dilation(first.effective_dilation) if first.rounds else first.effective_dilation
    return [float(value) for value in values[: first.log_factor.numel()]]


def hold_dilation(group: Sequence[LearnedFactor], dilation: Sequence[float], draw: random.Random | None = None) -> None:
    """Has a group's layers realise a dilation of the first, one number or (height, width).

    Layers that run at integers take the nearest, or one drawn by stochastic rounding if `draw` is given.
    """
    first = group[0]
    values = (dilation[0], dilation[-1])
    for layer in group:
        held = [values[axis] * layer.base_dilation[axis] / first.base_dilation[axis] for axis in (0, 1)]
        if layer.rounds:
            noise = [0.5, 0.5] if draw is None else [draw.random(), draw.random()]
            if len(dilation) == 1:  # A square field stays square.
                noise[1] = noise[0]
            # Rounded at a half, the value moved by the rest.
            held = [*layer.nearest_dilation([value + at - 0.5 for value, at in zip(held, noise, strict=True)])]
        layer.held = (float(held[0]), float(held[1]))
