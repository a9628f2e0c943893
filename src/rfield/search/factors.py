"""Find, group, read and set the learned factors of a model; share values between processes."""

import random
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from rfield.layers import LearnedFactor
from rfield.layers.dilation import integer_range

# Name parts that torch inserts when it wraps a module.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def learned_layers(model: nn.Module) -> list[list[LearnedFactor]]:
    """Return all learned layers, frozen ones too, in groups that share a factor, in the order of the model's modules.

    Example:
        >>> from rfield.layers import AdaptiveConv2d
        >>> [len(group) for group in learned_layers(AdaptiveConv2d(1, 1, 3))]
        [1]
    """
    groups: dict[int, list[LearnedFactor]] = {}
    for module in model.modules():
        if isinstance(module, LearnedFactor):
            groups.setdefault(id(module.log_factor), []).append(module)
    return list(groups.values())


def searchable_layers(group: Sequence[LearnedFactor]) -> list[LearnedFactor]:
    """Return the layers of a group that a search may change: none with a frozen factor, and no snapped ones."""
    is_learned = group[0].log_factor.requires_grad or all(layer.in_search for layer in group)
    return [layer for layer in group if is_learned and not layer.snapped]


def names_by_id(model: nn.Module) -> dict[int, str]:
    """Return the names of a model's modules and parameters, by their ids, without the name parts that wrappers add."""
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
    """Return the learned factors of a model, frozen ones too, each once, in the order of the model's modules.

    Example:
        >>> from rfield.layers import AdaptiveConv2d
        >>> len(factor_parameters(AdaptiveConv2d(1, 1, 3)))
        1
    """
    return [group[0].log_factor for group in learned_layers(model)]


def parameter_groups(model: nn.Module, lr: float, factor_lr: float) -> list[dict[str, Any]]:
    """Return parameter groups for an optimizer: the weights, and the factors with their own rate and no weight decay.

    Args:
        model: any module, with or without learned factors inside.
        lr: learning rate of the weights.
        factor_lr: learning rate of the factors, which applies to their logarithm.

    Returns:
        Groups for any torch optimizer; parameters that need no gradient are left out.

    Example:
        >>> from rfield.layers import AdaptiveConv2d
        >>> [len(group["params"]) for group in parameter_groups(AdaptiveConv2d(1, 1, 3), lr=1e-3, factor_lr=1e-2)]
        [2, 1]
    """
    factors = factor_parameters(model)
    factor_ids = {id(parameter) for parameter in factors}
    weights = [p for p in model.parameters() if p.requires_grad and id(p) not in factor_ids]
    groups: list[dict[str, Any]] = [{"params": weights, "lr": lr}]
    learned = [p for p in factors if p.requires_grad]
    if learned:
        groups.append({"params": learned, "lr": factor_lr, "weight_decay": 0.0})
    return groups


def mean_over_processes(value: Tensor) -> Tensor:
    """Return the mean of a tensor over all processes of a distributed run, or the tensor itself in a single process."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    # NCCL supports GPU tensors only.
    total = value.to("cuda" if torch.distributed.get_backend() == "nccl" else value.device, copy=True)
    torch.distributed.all_reduce(total)
    return (total / torch.distributed.get_world_size()).to(value.device)


def gather_rows(rows: Tensor) -> Tensor:
    """Return the rows of all processes, from Tensor[N, K] to Tensor[sum of N, K].

    The first row of each process comes first, then the second row of each, and so on. The processes may have different
    numbers of rows. In a single process, return the rows themselves.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return rows
    # NCCL supports GPU tensors only.
    own = rows.to("cuda") if torch.distributed.get_backend() == "nccl" else rows
    counts = [own.new_zeros(1) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(counts, own.new_tensor([len(own)]))
    most = int(max(counts))
    padded = torch.cat([own, own.new_zeros(most - len(own), own.shape[1])])
    gathered = [torch.empty_like(padded) for _ in counts]
    torch.distributed.all_gather(gathered, padded)
    is_row = torch.arange(most, device=own.device)[:, None] < torch.cat(counts)
    return torch.stack(gathered, dim=1)[is_row].to(rows.device)


def reshard(model: nn.Module) -> None:
    """Make FSDP2 free the parameters that it gathered for a forward pass that no backward pass follows."""
    for module in model.modules():
        if callable(release := getattr(module, "reshard", None)):
            release()


def dilation_range(group: Sequence[LearnedFactor]) -> tuple[float, float]:
    """Return the least and the greatest effective dilation of a group's first layer that a search may try.

    Where the axes of the last map differ, the tighter axis counts.

    Raises:
        ValueError: if the search must end at an integer dilation, and none lies within the bounds.
    """
    first = group[0]
    has_run = next((layer for layer in group if layer.map_size is not None), None)
    if has_run is None or has_run.map_size is None:
        return 1.0, max(32.0, *first.base_dilation)
    lower, upper = has_run.factor_bounds(has_run.map_size)
    least = max(base / bound for base, bound in zip(first.base_dilation, upper, strict=True))
    greatest = min(base / bound for base, bound in zip(first.base_dilation, lower, strict=True))
    greatest = max(least, greatest)
    if first.snaps and integer_range(least, greatest) is None:
        raise ValueError(
            f"its bounds (min_factor {first.min_factor}, max_factor {first.max_factor}, a map of {has_run.map_size}) "
            f"leave it the dilations {least:.4g} to {greatest:.4g}, none of which is whole: widen them"
        )
    return least, greatest


def log_dilation(layer: LearnedFactor) -> Tensor:
    """Return the logarithm of a layer's effective dilation, a float64 leaf Tensor[1] or Tensor[2]."""
    axes = layer.log_factor.numel()
    return torch.tensor(layer.effective_dilation[:axes], dtype=torch.float64).log().requires_grad_()


def set_effective_dilation(group: Sequence[LearnedFactor], dilation: Sequence[float]) -> None:
    """Set a group's factor so that its first layer has this effective dilation, one number or (height, width)."""
    first = group[0]
    first.set_factor([base / value for base, value in zip(first.base_dilation, dilation, strict=False)])


def runs_at_integers(group: Sequence[LearnedFactor]) -> bool:
    """Return whether a search runs all layers of a group at integer dilations."""
    return all(layer.rounds for layer in group)


def current_dilation(group: Sequence[LearnedFactor]) -> list[float]:
    """Return the dilation that a group's first layer runs at without an override, one number or (height, width)."""
    first = group[0]
    values = first.nearest_dilation(first.effective_dilation) if first.rounds else first.effective_dilation
    return [float(value) for value in values[: first.log_factor.numel()]]


def override_dilation(
    group: Sequence[LearnedFactor], dilation: Sequence[float], draw: random.Random | None = None
) -> None:
    """Make a group's layers run at a dilation of the first layer, one number or (height, width).

    Layers that run at integers take the nearest integer, or, if `draw` is given, one drawn by stochastic rounding.
    """
    first = group[0]
    values = (dilation[0], dilation[-1])
    for layer in group:
        override = [values[axis] * layer.base_dilation[axis] / first.base_dilation[axis] for axis in (0, 1)]
        if layer.rounds:
            noise = [0.5, 0.5] if draw is None else [draw.random(), draw.random()]
            if len(dilation) == 1:  # a square receptive field stays square
                noise[1] = noise[0]
            # Stochastic rounding is rounding to the nearest after a shift by uniform noise in [-0.5, 0.5).
            override = [*layer.nearest_dilation([value + at - 0.5 for value, at in zip(override, noise, strict=True)])]
        layer.dilation_override = (float(override[0]), float(override[1]))
