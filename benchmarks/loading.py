"""Time reading, augmenting and scoring an image, beside a training step and a forward pass.

    python -m benchmarks.loading --data camvid:../shared/data/camvid --out loading.json

EfficientNet-Lite0 at stride 16 with a 128-wide head, in float32, with one thread; milliseconds an image, in turns.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.timing import machine
from rfield.segmentation.data import evaluation_transform, load_dataset, training_transform
from rfield.segmentation.inference.predict import predict_logits
from rfield.segmentation.metrics import confusion_matrix
from rfield.segmentation.models import efficientnet_lite0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    samples, count = load_dataset(arguments.data, "train"), 16
    size = (288, 384)
    augment, plain = training_transform(size, (0.75, 1.75), colour_jitter=0.2), evaluation_transform()
    network = efficientnet_lite0(samples.num_classes, head_channels=128, output_stride=16).train()
    image, mask = plain(*samples[0])
    batch = torch.randn(8, 3, *size).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(samples.num_classes, (8, *size))
    confusion = confusion_matrix(samples.num_classes)
    labelled = predict_logits(network, image).argmax(0)

    def step() -> None:
        padded = network.pad(batch)
        logits = network.logits(padded, (padded.shape[2], padded.shape[3]))[..., : size[0], : size[1]]
        F.cross_entropy(logits, labels).backward()

    def each(act: Callable[[int], object]) -> Callable[[], None]:
        return lambda: [act(index) for index in range(count)] and None

    parts: dict[str, tuple[Callable[[], object], int]] = {
        "training step, batch 8": (step, 8),
        "read": (each(lambda index: samples[index]), count),
        "read and augment": (each(lambda index: augment(*samples[index])), count),
        "forward, one image": (lambda: predict_logits(network, image), 1),
        "score": (each(lambda index: confusion.update(labelled, mask)), count),
    }
    times: dict[str, list[float]] = {name: [] for name in parts}
    for number in range(arguments.rounds + 1):
        for name in list(parts)[:: (-1) ** number]:
            run, images = parts[name]
            begun = time.perf_counter()
            run()
            if number:  # The first round warms up.
                times[name].append(1000 * (time.perf_counter() - begun) / images)
    medians = {name: statistics.median(values) for name, values in times.items()}
    report = {"machine": machine(), "data": arguments.data, "ms an image": medians}
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    for name, value in medians.items():
        print(f"{name:24} {value:8.2f} ms an image")


if __name__ == "__main__":
    main()
