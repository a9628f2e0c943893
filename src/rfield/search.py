"""How factors are learned: the parameters that set a receptive field, apart from the weights."""

from typing import Any

from torch import nn

from rfield.layers import ReceptiveFieldRegulator


def factor_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The learned factors of a model, each once, in the order of its modules.

    >>> len(factor_parameters(ReceptiveFieldRegulator(nn.Conv2d(1, 1, 3, padding=1))))
    1
    """
    factors: dict[int, nn.Parameter] = {}
    for module in model.modules():
        if isinstance(module, ReceptiveFieldRegulator):
            factors.setdefault(id(module.log_factor), module.log_factor)
    return list(factors.values())


def parameter_groups(model: nn.Module, lr: float, factor_lr: float) -> list[dict[str, Any]]:
    """Optimizer-ready groups: the weights, and the factors at their own rate and without weight decay.

    Args:
        model: any module, with or without regulators inside.
        lr: learning rate of the weights.
        factor_lr: learning rate of the factors (of their logarithm).

    Returns:
        Groups for any torch optimizer; parameters that need no gradient are left out.

    >>> head = ReceptiveFieldRegulator(nn.Conv2d(1, 1, 3, padding=1))
    >>> [len(group["params"]) for group in parameter_groups(head, lr=1e-3, factor_lr=1e-2)]
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
