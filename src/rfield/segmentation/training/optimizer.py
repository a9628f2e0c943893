"""The optimizer of a run, with a learning rate of its own for each part of a network."""

from typing import Any

import torch

from rfield.search import factor_parameters
from rfield.segmentation.config.train import TrainConfig
from rfield.segmentation.models import ParsingNetwork


def make_optimizer(network: ParsingNetwork, config: TrainConfig) -> torch.optim.Optimizer:
    """Return the optimizer of a resolved config; a frozen backbone is left out."""
    optim = config.optim
    lr, factor_lr = optim.lr or 0.0, config.search.factor_lr or 0.0
    factors = factor_parameters(network)
    known = {id(factor) for factor in factors}
    # The head and the decoder, if there is one.
    known |= {id(weight) for weight in network.backbone.parameters()}
    head = [weight for weight in network.parameters() if id(weight) not in known]
    groups: list[dict[str, Any]] = [{"params": head, "lr": lr * optim.head_lr_scale}]
    if factors:
        groups.append({"params": factors, "lr": factor_lr, "weight_decay": 0.0})
    if not config.model.freeze_backbone:
        groups.append({"params": list(network.backbone.parameters()), "lr": lr})
    if optim.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=0.9, weight_decay=optim.weight_decay)
    return torch.optim.AdamW(groups, weight_decay=optim.weight_decay)
