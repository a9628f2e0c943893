"""The regulator around a stack of ordinary 3x3 convolutions, which no dilation can replace: does f go the right way?

    python studies/regulated_stack/regulated_stack.py --out studies/regulated_stack/regulated_stack.json

MSRC-21, frozen VGG16, as in configs/data/msrc21.yaml; a head of three 3x3 convolutions (dilation 1) and a 1x1 one, 128
wide, inside a regulator. Fixed factors, then each search from starts that see too much and too little. Everything is a
hand-written training loop over the library's parts.
"""

import argparse
import json
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from rfield import GradientSearch, ReceptiveFieldRegulator, SampledSearch, SpsaSearch, parameter_groups
from rfield.segmentation.config.train import TrainConfig
from rfield.segmentation.data import load_dataset
from rfield.segmentation.inference.feature_cache import cache_features
from rfield.segmentation.inference.predict import evaluate
from rfield.segmentation.models import ParsingNetwork
from rfield.segmentation.runs import build_network

EPOCHS, BATCH, CANVAS = 10, 8, (320, 320)
WEIGHTS = "../shared/weights/vgg16_features_imagenet_fp16.pth"
FIXED = (0.125, 0.2, 0.35, 0.5, 0.7, 1.0, 1.5)
STARTS = (0.125, 1.5)


class Stack(nn.Module):
    """Three ordinary 3x3 convolutions in a regulator; f = 0.5 has them see as far as one of dilation 6."""

    def __init__(self, in_channels: int, num_classes: int, factor: float, width: int = 128) -> None:
        super().__init__()
        self.in_channels, self.num_classes = in_channels, num_classes
        sizes = (in_channels, width, width)
        layers = [part for size in sizes for part in (nn.Conv2d(size, width, 3, padding=1), nn.ReLU(inplace=True))]
        self.regulator = ReceptiveFieldRegulator(nn.Sequential(*layers, nn.Conv2d(width, num_classes, 1)), factor)

    def forward(self, features: torch.Tensor, output_size: tuple[int, int] | None = None) -> torch.Tensor:
        return self.regulator(features, output_size=output_size)


def loss_of(head: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    features, mask = batch
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = head(features.float())
    mask = F.pad(mask, (0, 321 - mask.shape[2], 0, 321 - mask.shape[1]), value=255)[:, ::8, ::8]
    return F.cross_entropy(logits.float(), mask, ignore_index=255)


def train(backbone: nn.Module, data: tuple, kind: str, factor: float, seed: int) -> dict:
    """One run: the four lines of a search in a plain loop."""
    features, val_set, val_features = data
    torch.manual_seed(seed)
    features.seed = seed
    head = Stack(backbone.out_channels, val_set.num_classes, factor)
    count = len(features)
    held = set(random.Random(seed).sample(range(count), count // 10)) if kind == "sampled" else set()
    held_out = [tuple(part[None] for part in features.plain(index)) for index in sorted(held)]
    # The held-out masks are at the image's own size; the loss wants the canvas.
    held_out = [(f, F.pad(m, (0, 320 - m.shape[2], 0, 320 - m.shape[1]), value=255)) for f, m in held_out]
    steps = EPOCHS * (count // BATCH)
    search = {
        "none": lambda: None,
        "gradient": lambda: GradientSearch(head, loss_of, int(0.8 * steps)),
        "spsa": lambda: SpsaSearch(head, loss_of, int(0.5 * steps), seed),
        "sampled": lambda: SampledSearch(head, loss_of, int(0.6 * steps), held_out, seed),
    }[kind]()
    if kind == "none":
        head.regulator.freeze_factor()
    optimizer = torch.optim.AdamW(parameter_groups(head, lr=1e-3, factor_lr=0.02), weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 - step / steps) ** 0.9)
    started, step, way = time.monotonic(), 0, []
    for epoch in range(EPOCHS):
        kept = [index for index in range(count) if index not in held or search.done]
        random.Random(repr((seed, epoch))).shuffle(kept)
        for first in range(0, len(kept) - BATCH + 1, BATCH):
            samples = [features[epoch, index] for index in kept[first : first + BATCH]]
            batch = tuple(torch.stack(parts) for parts in zip(*samples, strict=True))
            loss = loss_of(head, batch) if search is None else search.loss(batch)
            loss.backward()
            if step < steps // 10 and head.regulator.log_factor.grad is not None:
                head.regulator.log_factor.grad = None
            optimizer.step()
            optimizer.zero_grad()
            if search is not None:
                search.step()
            schedule.step()
            step += 1
            if step % 20 == 0:
                way.append([step, float(head.regulator.factor)])
            if step >= steps:
                break
    scores = evaluate(ParsingNetwork(backbone, head.eval(), CANVAS), val_set, True, val_features)
    end = float(head.regulator.factor)
    return {"search": kind, "start": factor, "seed": seed, "end": end, "miou": scores["miou"],
            "seconds": time.monotonic() - started, "way": way}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments = parser.parse_args()
    config = TrainConfig(data="configs/data/msrc21.yaml", out="", weights=WEIGHTS, freeze_backbone=True, canvas=CANVAS)
    sets = [load_dataset(config.data.data, split) for split in ("train", "val")]
    network = build_network(config.resolved(), sets[0].num_classes, WEIGHTS).eval()
    data = (cache_features(network, sets[0]), sets[1], cache_features(network, sets[1], mirrored=False))
    runs = json.loads(arguments.out.read_text()) if arguments.out.exists() else []
    done = {(run["search"], run["start"], run["seed"]) for run in runs}
    todo = [("none", factor) for factor in FIXED]
    todo += [(kind, start) for kind in ("gradient", "spsa", "sampled") for start in STARTS]
    for seed in arguments.seeds:
        for kind, factor in todo:
            if (kind, factor, seed) not in done:
                runs.append(train(network.backbone, data, kind, factor, seed))
                arguments.out.write_text(json.dumps(runs, indent=1) + "\n")
                print({key: value for key, value in runs[-1].items() if key != "way"}, flush=True)


if __name__ == "__main__":
    main()
