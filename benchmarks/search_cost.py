"""Time whole training runs of each search and of a fixed dilation, in turns or at the same time.

    python -m benchmarks.search_cost --out benchmarks/search_cost.json
    python -m benchmarks.search_cost --setting camvid --kinds none,sampled --rounds 1 --side-by-side --out camvid.json

`--setting msrc21` is MSRC-21 on a frozen VGG16, the flags of studies/any_start/any_start.sh; `--setting camvid` is
CamVid and a whole EfficientNet-Lite0, similar to configs/camvid_efficientnet_lite0.yaml. Compare the ratios to the
fixed run of the same round, because the seconds depend on the machine. If other work runs on it, the CPU seconds,
scoring included, are more certain than the wall time. `--side-by-side` runs every kind at the same time, each in a
process of its own with one thread: for long runs, during which the load of a machine changes.
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from rfield.segmentation.config.train import TrainConfig
from rfield.segmentation.training import train

SETTINGS = {
    "msrc21": TrainConfig(
        data="configs/data/msrc21.yaml",
        out="",
        weights="../shared/weights/vgg16_features_imagenet_fp16.pth",
        freeze_backbone=True,
        head_channels=128,
        epochs=10,
    ),
    "camvid": TrainConfig(
        data="configs/data/camvid.yaml",
        out="",
        model="efficientnet_lite0",
        output_stride=16,
        decoder=True,
        head_channels=128,
        optimizer="adamw",
        crop_size=(288, 384),
        epochs=36,
        workers=1,
    ),
}


def _run(config: TrainConfig) -> tuple[float, float, float]:
    """Return the seconds of training, the CPU seconds of the whole run, and the seconds of the search between steps."""
    torch.set_num_threads(1)
    begun = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        metrics = train(config.replace(out=f"{folder}/run", report="none"))
    return metrics["train_seconds"], time.process_time() - begun, metrics.get("search", {}).get("seconds", 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--setting", choices=SETTINGS, default="msrc21")
    parser.add_argument("--kinds", default="none,sampled,spsa,gradient", help="the first is what the others are over")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dilation", type=int, default=6)
    parser.add_argument("--epochs", type=int, help="by default those of the setting")
    parser.add_argument("--side-by-side", action="store_true", help="all kinds of a round at once")
    arguments = parser.parse_args()
    kinds = arguments.kinds.split(",")
    epochs = arguments.epochs or SETTINGS[arguments.setting].optim.epochs
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    cpu_seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    spent: dict[str, list[float]] = {kind: [] for kind in kinds}
    for number in range(arguments.rounds):
        # Every second round backwards, so that a machine that slows down favours none.
        order = kinds[:: (-1) ** number]
        configs = [
            SETTINGS[arguments.setting].replace(
                dilation=arguments.dilation,
                search=kind,
                precision="bf16-mixed",
                seed=number,
                epochs=epochs,
                val_every=epochs,
            )
            for kind in order
        ]
        if arguments.side_by_side:
            with ProcessPoolExecutor(len(kinds), multiprocessing.get_context("spawn")) as pool:
                taken = list(pool.map(_run, configs))
        else:
            taken = [_run(config) for config in configs]
        for kind, (wall, cpu, search) in zip(order, taken, strict=True):
            seconds[kind].append(wall)
            cpu_seconds[kind].append(cpu)
            spent[kind].append(search)
            print(
                f"round {number}: {kind} {wall:.1f} s, CPU {cpu:.1f} s, readings and moves {search:.1f} s", flush=True
            )
    ratios, cpu_ratios = (
        {kind: [a / b for a, b in zip(taken[kind], taken[kinds[0]], strict=True)] for kind in kinds}
        for taken in (seconds, cpu_seconds)
    )
    machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
    medians = {kind: statistics.median(values) for kind, values in ratios.items()}
    report = {
        "machine": machine,
        "epochs": epochs,
        "side_by_side": arguments.side_by_side,
        "seconds": seconds,
        "ratios": ratios,
        "median ratio": medians,
        "cpu_seconds": cpu_seconds,
        "cpu_ratios": cpu_ratios,
        "search_seconds": spent,
    }
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["median ratio"]))


if __name__ == "__main__":
    main()
