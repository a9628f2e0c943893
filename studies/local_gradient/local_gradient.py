"""Why the local gradient fails: what the loss does around a start, and where its gradients point.

    python studies/local_gradient/local_gradient.py ADAPTED SHARED --out studies/local_gradient

ADAPTED is the folder of a frozen run at one fixed dilation, whose weights have adapted to it; SHARED that of a run
whose weights were trained at all dilations by turns (`--search sampled --no-search-narrowing --search-share 1`).
Both must have been trained on the same data. Written: local_gradient.json and local_gradient.png.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from rfield.layers import LearnedFactor
from rfield.segmentation import plots
from rfield.segmentation.data import load_dataset
from rfield.segmentation.inference.feature_cache import cache_features
from rfield.segmentation.models import HeadSpec, SinglePathHead
from rfield.segmentation.runs import build_network, load_run

IMAGES = 64
FACTORS = [0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0, 1.01, 1.05, 1.1, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0]
# Name: mechanism, and whether the loss is taken at the image's resolution (F = 8) or at the features' (F = 1).
WAYS = {
    "resampled, F = 1": ("regulator", False),
    "resampled, F = 8": ("regulator", True),
    "bilinear taps": ("dilation", False),
}


def make_head(trained: SinglePathHead, mechanism: str, dilation: int) -> SinglePathHead:
    """A head with the same weights, another base dilation and another mechanism."""
    fc6, fc8 = (next(m for n, m in trained.named_modules() if n.endswith(name)) for name in ("fc6", "fc8"))
    channels = fc6.weight.shape[0]
    head = SinglePathHead(fc6.weight.shape[1], len(fc8.weight), HeadSpec(dilation, channels, 0.0, mechanism=mechanism))
    weights = {key.split(".", 1)[1].removeprefix("module."): value for key, value in trained.state_dict().items()}
    for name, parameter in head.named_parameters():
        if not name.endswith("log_factor"):
            parameter.data = weights[name.split(".", 1)[1].removeprefix("module.")].clone()
    return head.eval().requires_grad_(False)


def layer_of(head: SinglePathHead) -> LearnedFactor:
    return next(module for module in head.modules() if isinstance(module, LearnedFactor))


def loss_of(head: SinglePathHead, features: torch.Tensor, mask: torch.Tensor, image_resolution: bool) -> torch.Tensor:
    if image_resolution:
        return F.cross_entropy(head(features, output_size=mask.shape[1:]), mask, ignore_index=255)
    return F.cross_entropy(head(features), mask[:, ::8, ::8], ignore_index=255)


def curve(trained: SinglePathHead, start: int, batches: list, ways: dict) -> dict[str, list[float]]:
    """The mean loss at d / f for every factor, the weights as they are."""
    found = {}
    for name, (mechanism, image_resolution) in ways.items():
        head = make_head(trained, mechanism, start)
        losses = []
        for factor in FACTORS:
            with torch.no_grad():
                layer_of(head).set_factor(factor)
                losses.append(float(np.mean([float(loss_of(head, *batch, image_resolution)) for batch in batches])))
        found[name] = losses
    return found


def slopes(trained: SinglePathHead, start: int, batches: list) -> dict[str, list[float]]:
    """d loss / d log(effective dilation), batch by batch; positive asks for a smaller receptive field."""
    found = {}
    for name, (mechanism, image_resolution) in WAYS.items():
        for base, factor in ((start, 1.0), (start // 2, 0.5)):
            head = make_head(trained, mechanism, base)
            layer = layer_of(head)
            layer.set_factor(factor)
            layer.log_factor.requires_grad_(True)
            key = f"exact, {name}, d = {base}, f = {factor:g}"
            found[key] = []
            for batch in batches:
                layer.log_factor.grad = None
                loss_of(head, *batch, image_resolution).backward()
                found[key].append(-float(layer.log_factor.grad.sum()))
    head = make_head(trained, "dilation", start)
    layer = layer_of(head)
    for reach in (0.1, 0.2, 0.4, 0.6, 1.0):
        key = f"difference over r e^±{reach:g}, whole dilations"
        sides = [float(max(1, round(start * np.exp(side * reach)))) for side in (1, -1)]
        found[key] = []
        for batch in batches:
            losses = []
            for side in sides:
                layer.dilation_override = (side, side)
                with torch.no_grad():
                    losses.append(float(loss_of(head, *batch, False)))
            found[key].append((losses[0] - losses[1]) / np.log(sides[0] / sides[1]))
        layer.dilation_override = None
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapted", type=Path)
    parser.add_argument("shared", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    adapted, shared = load_run(arguments.adapted), load_run(arguments.shared)
    config, start = adapted.config, adapted.config.model.dilation
    dataset = load_dataset(config.data.data, config.data.val_split)
    network = build_network(config, len(adapted.class_names), config.model.weights).eval()
    cached = cache_features(network, dataset, mirrored=False)
    batches = []
    for first in range(0, IMAGES, 4):
        samples = [cached[0, index] for index in range(first, first + 4)]
        features = torch.stack([feature for feature, _ in samples]).float()
        mask = torch.stack([mask for _, mask in samples])
        height, width = ((side - 1) * 8 + 1 for side in features.shape[2:])
        batches.append((features, F.pad(mask, (0, width - mask.shape[2], 0, height - mask.shape[1]), value=255)))
    report = {"adapted": str(arguments.adapted), "shared": str(arguments.shared), "factors": FACTORS, "start": start}
    for name, run in (("adapted", adapted), ("shared", shared)):
        trained = run.network.head
        found = {
            key: {
                "mean": float(np.mean(v)),
                "se": float(np.std(v, ddof=1) / len(v) ** 0.5),
                "toward smaller": float(np.mean(np.array(v) > 0)),
            }
            for key, v in slopes(trained, start, batches).items()
        }
        report[name + " weights"] = {"loss": curve(trained, start, batches, WAYS), "slopes": found}
        whole = make_head(trained, "dilation", start)
        dilations, losses = [1, 2, 3, 4, 5, 6, 8, 10, 12, 13, 14, 15, 16, 18, 21, 24, 28], []
        for dilation in dilations:
            layer_of(whole).dilation_override = (float(dilation), float(dilation))
            with torch.no_grad():
                losses.append(float(np.mean([float(loss_of(whole, *batch, False)) for batch in batches])))
        report[name + " weights"]["whole dilations"] = [dilations, losses]
        print(name, json.dumps(report[name + " weights"], indent=1))
    (arguments.out / "local_gradient.json").write_text(json.dumps(report, indent=1) + "\n")
    curves = {}
    for name in ("adapted weights", "shared weights"):
        for way in ("resampled, F = 1", "bilinear taps"):  # F = 8 would lie upon F = 1.
            losses = report[name]["loss"][way]
            curves[f"{way}, {name}"] = {start / factor: [loss] for factor, loss in zip(FACTORS, losses, strict=True)}
    plots.save(plots.rf_curve(curves, "loss", {"start": start}), arguments.out / "local_gradient.png")


if __name__ == "__main__":
    main()
