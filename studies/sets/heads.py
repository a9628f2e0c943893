"""The pyramids of other libraries at fixed and at learned rates, on frozen features of EfficientNet-Lite0.

python studies/sets/heads.py runs/heads --data ../shared/data --settings nuclei,coffee --seeds 0,1
python studies/sets/heads.py runs/heads --report [--into studies/sets/heads.json]

Heads, at output stride 16: smp's DeepLabV3+ (separable pyramid, decoder at stride 4, 64 channels) and torchvision's
DeepLabHead (256 channels). Both have a 1x1 convolution and image pooling beside three rates: the library's own (12, 24,
36), DeepLab's own for this stride (6, 12, 18), log-spaced ones (2, 4, 8), or rates that `rfield.SampledSearch` learns.
"""

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from sets import SETTINGS, data_spec
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.models.segmentation.deeplabv3 import DeepLabHead

import rfield
from rfield.search.held_out import HeldOut
from rfield.segmentation.data import IGNORE_INDEX, ParsingDataset, load_dataset
from rfield.segmentation.data.dataset import exchange_classes
from rfield.segmentation.files.atomic import write_json, write_text
from rfield.segmentation.metrics import confusion_matrix, segmentation_scores
from rfield.segmentation.models.efficientnet import efficientnet_lite0_backbone, load_efficientnet_lite0_weights

RATES = {"stock": (12, 24, 36), "deeplab": (6, 12, 18), "log-spaced": (2, 4, 8), "learned": (2, 4, 8)}
PYRAMIDS = {"smp": "decoder.aspp.0", "torchvision": "head.0"}
STRIDE, BATCH, LEARNING_RATE, SEARCH_SHARE = 16, 8, 2e-3, 0.6
ENCODER = "timm-tf_efficientnet_lite0"


def make_encoder() -> nn.Module:
    """Return smp's EfficientNet-Lite0 with its published ImageNet weights."""
    encoder: nn.Module = smp.encoders.get_encoder(ENCODER, weights=None, output_stride=STRIDE)
    backbone = efficientnet_lite0_backbone(STRIDE, block=6)
    load_efficientnet_lite0_weights(backbone, "imagenet")
    encoder.load_state_dict({**encoder.state_dict(), **backbone.layers.state_dict()})
    return encoder.eval().requires_grad_(False)


class SmpHead(nn.Module):
    """The decoder and the last layer of smp's DeepLabV3+."""

    def __init__(self, classes: int, rates: tuple[int, ...]) -> None:
        super().__init__()
        options: dict[str, Any] = {"decoder_channels": 64, "decoder_atrous_rates": rates}
        whole = smp.DeepLabV3Plus(ENCODER, encoder_weights=None, classes=classes, **options)
        self.decoder, self.last = whole.decoder, whole.segmentation_head

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        logits: Tensor = self.last(self.decoder([None, None, fine, None, None, coarse]))
        return logits


class TorchvisionHead(nn.Module):
    """torchvision's head of DeepLabV3."""

    def __init__(self, classes: int, rates: tuple[int, ...]) -> None:
        super().__init__()
        self.head = DeepLabHead(320, classes, rates)

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        return F.interpolate(self.head(coarse), scale_factor=STRIDE, mode="bilinear", align_corners=False)


class Features(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """The encoder's maps of a split and its masks, padded to one size; in training also those of mirrored images."""

    def __init__(self, dataset: ParsingDataset, encoder: nn.Module, size: tuple[int, int], mirror: bool) -> None:
        self.versions = 1 + mirror
        self.samples = []
        for index in range(len(dataset)):
            image, mask = (part.as_subclass(Tensor) for part in dataset[index])
            self.samples.append(encode(encoder, image, mask, size))
            if mirror:
                exchanged = exchange_classes(mask, dataset.mirrored_classes)
                self.samples.append(encode(encoder, image.flip(-1), exchanged.as_subclass(Tensor).flip(-1), size))

    def __len__(self) -> int:
        return len(self.samples) // self.versions

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        fine, coarse, mask = self.samples[index * self.versions + int(torch.randint(self.versions, ()))]
        return fine.float(), coarse.float(), mask.long()


@torch.no_grad()
def encode(encoder: nn.Module, image: Tensor, mask: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the maps at strides 4 and 16 and the mask of an image, padded with grey and unlabelled pixels."""
    padding = (0, size[1] - mask.shape[1], 0, size[0] - mask.shape[0])
    # The published weights were trained on images from -1 to 1.
    maps = encoder(F.pad((image.float() - 127) / 128, padding)[None])
    return maps[2][0].half(), maps[5][0].half(), F.pad(mask, padding, value=IGNORE_INDEX)


def common_size(splits: list[ParsingDataset]) -> tuple[int, int]:
    """Return the smallest multiples of the stride that hold every image."""
    shapes = [data[index][1].shape for data in splits for index in range(len(data))]
    return tuple(STRIDE * math.ceil(max(shape[side] for shape in shapes) / STRIDE) for side in (0, 1))  # type: ignore[return-value]


def loss_fn(head: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    *maps, mask = batch
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(*(part.contiguous(memory_format=torch.channels_last) for part in maps))
    return F.cross_entropy(logits.float(), mask, ignore_index=IGNORE_INDEX)


def train(kind: str, rates: str, seed: int, data: Features, classes: int, epochs: int) -> tuple[nn.Module, list[int]]:
    """Train a head, and return it with the rates that it ends at."""
    torch.manual_seed(seed)
    head = (SmpHead if kind == "smp" else TorchvisionHead)(classes, RATES[rates]).to(memory_format=torch.channels_last)
    loader = DataLoader(data, BATCH, shuffle=True, drop_last=True)
    steps = epochs * len(loader)
    search = held_out = None
    if rates == "learned":
        rfield.adapt(head, PYRAMIDS[kind])
        held_out = HeldOut(loader, seed)
        search = rfield.SampledSearch(head, loss_fn, round(SEARCH_SHARE * steps), held_out, seed)
    optimizer = torch.optim.AdamW([part for part in head.parameters() if part.requires_grad], LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, steps, power=0.9)
    head.train()
    for _ in range(epochs):
        for batch in loader:
            (loss_fn(head, batch) if search is None or search.done else search.loss(batch)).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if search is not None and held_out is not None and not search.done:
                search.step()
                if search.done:
                    held_out.give_back()
    found = list(RATES[rates]) if search is None else [round(group[0].effective_dilation[0]) for group in search.groups]
    return head.eval(), found


@torch.no_grad()
def score(head: nn.Module, data: Features, names: list[str]) -> float:
    confusion = confusion_matrix(len(names))
    for index in range(len(data)):
        fine, coarse, mask = data[index]
        confusion.update(head(fine[None], coarse[None]).argmax(1), mask[None])
    return 100 * float(segmentation_scores(confusion.compute(), names)["miou"])


def run_setting(setting: str, options: argparse.Namespace) -> None:
    """Train what is missing of a data set."""
    jobs = [
        (kind, rates, seed, options.root / f"{setting}-{kind}-{rates}-seed{seed}.json")
        for seed in map(int, options.seeds.split(","))
        for kind in options.heads.split(",")
        for rates in RATES
    ]
    jobs = [job for job in jobs if not job[-1].is_file()]
    if not jobs:
        return
    splits = [load_dataset(data_spec(setting, options.data), split) for split in ("train", "val")]
    names, size, encoder = list(splits[0].class_names), common_size(splits), make_encoder()
    train_data, val_data = (Features(data, encoder, size, data is splits[0]) for data in splits)
    print(f"{setting}: {len(train_data)} + {len(val_data)} images, padded to {size[0]}x{size[1]}", flush=True)
    for kind, rates, seed, path in jobs:
        began = time.process_time()
        head, found = train(kind, rates, seed, train_data, len(names), options.epochs)
        cpu = time.process_time() - began
        row = {"setting": setting, "head": kind, "rates": rates, "seed": seed, "found": found}
        write_json(path, {**row, "miou": score(head, val_data, names), "cpu_seconds": cpu, "epochs": options.epochs})
        print(path.read_text(), flush=True)


def table(rows: list[dict[str, Any]]) -> str:
    """Return the scores as a table, and the learned rates."""
    columns = list(dict.fromkeys((row["setting"], row["head"]) for row in rows))
    lines = ["| data, head | " + " | ".join(RATES) + " | learned rates | cost of a search |", "|---" * 7 + "|"]
    for setting, head in columns:
        cells = []
        for rates in RATES:
            own = [row for row in rows if (row["setting"], row["head"], row["rates"]) == (setting, head, rates)]
            scores = [row["miou"] for row in own]
            error = f" ± {statistics.stdev(scores) / len(scores) ** 0.5:.1f}" if len(scores) > 1 else ""
            cells.append(f"{statistics.mean(scores):.1f}{error}" if scores else "-")
        own = [row for row in rows if (row["setting"], row["head"]) == (setting, head)]
        learned = [row for row in own if row["rates"] == "learned"]
        fixed = [row["cpu_seconds"] for row in own if row["rates"] != "learned"]
        cost = statistics.median(row["cpu_seconds"] for row in learned) / statistics.median(fixed) if learned else 0
        found = "; ".join(", ".join(map(str, row["found"])) for row in learned)
        lines.append(f"| {setting}, {head} | {' | '.join(cells)} | {found} | {cost:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder of the results, a file for each run")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the data sets")
    parser.add_argument("--settings", default=",".join(SETTINGS))
    parser.add_argument("--heads", default=",".join(PYRAMIDS))
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--report", action="store_true", help="train nothing")
    parser.add_argument("--into", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    options.root.mkdir(parents=True, exist_ok=True)
    for setting in options.settings.split(",") if not options.report else ():
        run_setting(setting, options)
    rows = [json.loads(path.read_text()) for path in sorted(options.root.glob("*.json"))]
    print(table(rows))
    if options.into:
        write_text(options.into, "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


if __name__ == "__main__":
    main()
