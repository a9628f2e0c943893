"""File descriptors and memory of a long training of a tiny network, epoch by epoch.

    OMP_NUM_THREADS=1 python studies/leaks/leaks.py --out studies/leaks

Written: leaks.json and leaks.png. `rfield.segmentation.training.train` runs as it is, with a callback more that reads
the process's resident memory, open files, threads and children at the end of each epoch: 1,000 epochs without processes
that load images, and 100 with two. Growth is the slope of a line through the epochs after the first tenth, for 1,000
epochs.
"""

import argparse
import contextlib
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import psutil
from lightning.pytorch.callbacks import Callback
from matplotlib.figure import Figure

from rfield.segmentation.config.train import OptimOptions, RunOptions, TrainConfig
from rfield.segmentation.plots import style
from rfield.segmentation.training import fit as fit_module
from rfield.segmentation.training import train

COLUMNS = ("memory_mib", "files", "threads", "children")


class Sampler(Callback):
    """A row of `COLUMNS` for each epoch."""

    def __init__(self, samples: Path) -> None:
        self.process = psutil.Process()
        self.samples = samples

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == 0:
            return
        process = self.process
        children = len(process.children(recursive=True))
        row = (process.memory_info().rss / 2**20, process.num_fds(), process.num_threads(), children)
        with self.samples.open("a") as file:
            file.write(json.dumps(row) + "\n")


def measure(epochs: int, workers: int, scratch: Path) -> list[list[float]]:
    """Trains in this process."""
    data = scratch / "data.yaml"
    data.write_text("format: synthetic\nsize: [36, 41]\ndistance: 12\nlength: 4\n")
    samples = scratch / f"samples-{workers}.txt"
    make_trainer = fit_module.make_trainer

    def with_sampler(
        out: Path, optim: OptimOptions, run: RunOptions, callbacks: list[Callback], log_paths: bool
    ) -> L.Trainer:
        return make_trainer(out, optim, run, [*callbacks, Sampler(samples)], log_paths)

    fit_module.make_trainer = with_sampler  # type: ignore[attr-defined]
    config = TrainConfig(
        data=str(data),
        out=str(scratch / f"run-{workers}"),
        model="small_cnn",
        dilation=3,
        head_channels=8,
        search="spsa",
        epochs=epochs,
        val_every=10,
        batch_size=2,
        crop_size=(33, 33),
        workers=workers,
        report="none",
    )
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            train(config)
    finally:
        fit_module.make_trainer = make_trainer  # type: ignore[attr-defined]
    return [json.loads(line) for line in samples.read_text().splitlines()]


def growth(values: list[float]) -> float:
    """For 1,000 epochs, after the first tenth."""
    series = np.array(values[len(values) // 10 :])
    return float(np.polyfit(np.arange(len(series)), series, 1)[0] * 1000)


def summarise(rows: list[list[float]], seconds: float) -> dict[str, Any]:
    columns = {name: [row[index] for row in rows] for index, name in enumerate(COLUMNS)}
    tenth = len(rows) // 10
    return {
        "epochs": len(rows) + 1,
        "seconds": round(seconds),
        "growth_per_1000_epochs": {name: round(growth(values), 3) for name, values in columns.items()},
        "after_the_first_tenth": {name: round(values[tenth], 1) for name, values in columns.items()},
        "at_the_end": {name: round(values[-1], 1) for name, values in columns.items()},
        "samples": {name: [round(value, 2) for value in values] for name, values in columns.items()},
    }


def draw(found: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    for axes, name, label in zip(figure.subplots(1, 2), COLUMNS, ("resident memory, MiB", "open files"), strict=False):
        for (title, each), colour in zip(found.items(), style.FIELD_COLOURS, strict=False):
            values = each["samples"][name]
            axes.plot(range(1, len(values) + 1), values, color=colour, label=title)
        style.plain_axes(axes, label)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("epoch")
        axes.legend(**style.LEGEND)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path("studies/leaks"))
    args = parser.parse_args()
    found = {}
    for workers, epochs in ((0, args.epochs), (2, args.epochs // 10)):
        with tempfile.TemporaryDirectory() as scratch:
            started = time.monotonic()
            rows = measure(epochs, workers, Path(scratch))
        found[f"{workers} workers"] = summarise(rows, time.monotonic() - started)
    (args.out / "leaks.json").write_text(json.dumps(found) + "\n")
    style.save(draw(found), args.out / "leaks.png")
    for title, each in found.items():
        print(title, {name: value for name, value in each.items() if name != "samples"})


if __name__ == "__main__":
    main()
