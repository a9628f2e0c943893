"""What batch norms after the head's convolution do, with gates and without: python studies/gates/batch_norms.py NUCLEI

Trains the head alone for 10 epochs (AdamW, poly decay, bfloat16, seed 0) and prints mIoU and the last epoch's loss.
"""

import sys

import torch
from torch import nn

from rfield.layers import GatedConv2d
from rfield.segmentation.config.train import TrainConfig
from rfield.segmentation.inference.predict import evaluate
from rfield.segmentation.training.fit import build, prepare_data

EPOCHS, BATCH = 10, 8


def run(name: str, norm: bool, lr: float, **values: object) -> None:
    """Train one head; `norm`: a batch norm after its convolution, or after each rate of it."""

    def quiet(done: int, total: int) -> None:
        """Show nothing."""

    shared = {"model": "efficientnet_lite0", "freeze_backbone": True, "head_channels": 64, "search": "none", "out": "-"}
    data = prepare_data(TrainConfig(data=f"folder:{sys.argv[1]}", **shared, **values), quiet)
    built = build(data, quiet)
    module, network, samples = built.module, built.module.network, built.train_samples
    layers = network.head.layers
    if norm and isinstance(layers.fc6, GatedConv2d):
        layers.fc6.norms = nn.ModuleList(nn.BatchNorm2d(64) for _ in layers.fc6.rates)
    elif norm:
        layers.fc6 = nn.Sequential(layers.fc6, nn.BatchNorm2d(64))
    optimizer = torch.optim.AdamW(network.head.parameters(), lr=lr, weight_decay=5e-4)
    steps = len(samples) // BATCH
    draw = torch.Generator().manual_seed(0)
    network.head.train()
    for epoch in range(EPOCHS):
        order, total = torch.randperm(len(samples), generator=draw).tolist(), 0.0
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = lr * (1 - (epoch * steps + step) / (EPOCHS * steps)) ** 0.9
            pairs = [samples[epoch, index] for index in order[BATCH * step : BATCH * (step + 1)]]
            batch = tuple(torch.stack(each) for each in zip(*pairs, strict=True))
            with torch.autocast("cpu", torch.bfloat16):
                loss = module._loss(network, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
    network.head.eval()
    miou = evaluate(network, data.val_set, True, built.val_features, quiet)["miou"]
    print(f"{name}: mIoU {100 * miou:.1f}, loss {total / steps:.3f}", flush=True)


if __name__ == "__main__":
    plain = {"dilation": 1, "path_norm": True}
    run("rate 1", False, 0.01, **plain)
    run("rate 1, batch norm", True, 0.01, **plain)
    run("gates of the image", False, 0.01, gates="image")
    run("gates of the image, batch norms", True, 0.01, gates="image")
    run("gates of the image, batch norms, a fifth of the learning rate", True, 0.002, gates="image")
