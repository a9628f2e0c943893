"""What a search costs: whole training runs of each search and of a fixed dilation, by turns in one process.

    python -m benchmarks.search_cost --out benchmarks/search_cost.json

`--setting msrc21` is MSRC-21 on a frozen VGG16, the flags of docs/results/any_start.sh; `--setting camvid` is CamVid
and the whole of an EfficientNet-Lite0, 4 epochs much as configs/camvid_efficientnet_lite0.yaml has them. The ratios to
the fixed run of the same round are what counts; the seconds depend on the machine. On one that has other work the
process's CPU seconds, scoring included, tell more than the wall time.
"""

import argparse
import dataclasses
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch

from rfield.config import TrainConfig
from rfield.training import train

SETTINGS = {
    "msrc21": TrainConfig(
        "configs/data/msrc21.yaml",
        "",
        weights="../shared/weights/vgg16_features_imagenet_fp16.pth",
        freeze_backbone=True,
        head_channels=128,
        epochs=10,
        val_every=10,
    ),
    "camvid": TrainConfig(
        "configs/data/camvid.yaml",
        "",
        model="efficientnet_lite0",
        output_stride=16,
        decoder=True,
        head_channels=128,
        optimizer="adamw",
        crop_size=(288, 384),
        epochs=4,
        val_every=4,
        workers=1,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--setting", choices=SETTINGS, default="msrc21")
    parser.add_argument("--kinds", default="none,sampled,spsa,gradient", help="the first is what the others are over")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dilation", type=int, default=6)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    kinds = arguments.kinds.split(",")
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    cpu_seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for number in range(arguments.rounds):
        # Every second round backwards, so that a machine that slows down favours none.
        for kind in kinds[:: (-1) ** number]:
            with tempfile.TemporaryDirectory() as folder:
                config = dataclasses.replace(
                    SETTINGS[arguments.setting],
                    out=f"{folder}/run",
                    dilation=arguments.dilation,
                    search=kind,
                    precision="bf16-mixed",
                    seed=number,
                )
                begun = time.process_time()
                seconds[kind].append(train(config)["train_seconds"])
                cpu_seconds[kind].append(time.process_time() - begun)
                print(
                    f"round {number}: {kind} {seconds[kind][-1]:.1f} s, CPU {cpu_seconds[kind][-1]:.1f} s", flush=True
                )
    ratios, cpu_ratios = (
        {kind: [a / b for a, b in zip(taken[kind], taken[kinds[0]], strict=True)] for kind in kinds}
        for taken in (seconds, cpu_seconds)
    )
    machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
    medians = {kind: statistics.median(values) for kind, values in ratios.items()}
    report = {
        "machine": machine,
        "epochs": SETTINGS[arguments.setting].epochs,
        "seconds": seconds,
        "ratios": ratios,
        "median ratio": medians,
        "cpu_seconds": cpu_seconds,
        "cpu_ratios": cpu_ratios,
    }
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["median ratio"]))


if __name__ == "__main__":
    main()
