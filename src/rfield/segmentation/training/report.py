"""The results of a finished run: its scores and numbers in `metrics.json`, and its figures."""

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from rfield.segmentation import plots
from rfield.segmentation.config.train import TrainConfig
from rfield.segmentation.data import ParsingDataset
from rfield.segmentation.files.checkpoints import LAST
from rfield.segmentation.files.untrusted import read_json
from rfield.segmentation.inference.feature_cache import CachedFeatures
from rfield.segmentation.inference.predict import Progress, compute_device, evaluate
from rfield.segmentation.runs import load_run
from rfield.segmentation.training.bad_samples import count_skipped
from rfield.segmentation.training.callbacks import read_factor_csv, read_paths_csv
from rfield.segmentation.training.module import Field, present_fields
from rfield.segmentation.training.run_folder import write_json
from rfield.segmentation.training.search_report import describe_search


def report_results(
    out: Path,
    config: TrainConfig,
    seconds: float,
    train_set: ParsingDataset,
    val_set: ParsingDataset,
    val_features: CachedFeatures | None,
    held_out: tuple[list[str], list[float]],
    progress: Progress,
) -> dict[str, Any]:
    """Scores the last checkpoint, just as `rfield evaluate` does, and writes the run's results."""
    network = load_run(out).network.to(compute_device())
    scores = evaluate(network, val_set, config.freeze_backbone, val_features, progress)
    fields = present_fields(network)
    saved = torch.load(out / "checkpoints" / LAST, map_location="cpu", weights_only=True)
    metrics = {
        **scores,
        "factor": fields[0].factor,
        "effective_dilation": fields[0].effective_dilation,
        "receptive_field_px": fields[0].receptive_field_px,
        **_describe_paths(out, config, fields),
        **({"search": describe_search(config, saved["search"], fields, *held_out)} if "search" in saved else {}),
        **count_skipped(train_set, val_set),
        "val_images": len(val_set),
        "train_seconds": seconds,
        "seed": config.seed,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("rfield", "torch", "torchvision", "lightning")},
        },
    }
    write_json(out / "metrics.json", metrics)
    _plot(out, config, metrics)
    return metrics


def _plot(out: Path, config: TrainConfig, metrics: dict[str, Any]) -> None:
    """The run's figures."""
    columns = read_factor_csv(out / "factor.csv")
    figure = plots.factor_curve(
        columns["step"], columns["effective_dilation"], columns["receptive_field_px"], columns["loss"]
    )
    plots.save(figure, out / "factor.png")
    if (out / "paths.csv").is_file():
        plots.save(plots.factor_paths({"the paths' factors": read_paths_csv(out / "paths.csv")}), out / "paths.png")
    if config.search == "sampled":
        search = metrics["search"]
        last = search.get("factors", [{"path": 0, "axis": "height", **search}])
        curves = (
            {f"step {reading['step']}": reading for reading in search["readings"][-5:]}
            if len(last) == 1
            else {f"path {each['path'] + 1}, {each['axis']}": each for each in last[:5]}
        )
        drawn = {name: {at: [loss] for at, loss in each["curve"]} for name, each in curves.items()}
        errors = {name: dict(each["errors"]) for name, each in curves.items()}
        delivered = {"delivered": metrics["effective_dilation"]} if len(last) == 1 else None
        plots.save(plots.rf_curve(drawn, "held-out loss", delivered, errors=errors), out / "curve.png")


def _describe_paths(out: Path, config: TrainConfig, fields: list[Field]) -> dict[str, Any]:
    """The paths of a head of several, and the rectangle where height and width are learned apart."""
    described: dict[str, Any] = {}
    heights = [field for field in fields if field.axis == 0]
    if len(heights) > 1:
        groups = list(read_json(out / "classes.json").get("class_groups", {}).items())
        described["paths"] = [
            {
                **_numbers(field),
                "class_group": groups[field.path][1] if groups else None,
                "class_group_name": groups[field.path][0] if groups else None,
            }
            for field in heights
        ]
    if config.rectangular:
        described["rectangle"] = [{"path": f.path, "axis": ("height", "width")[f.axis], **_numbers(f)} for f in fields]
    return described


def _numbers(field: Field) -> dict[str, float]:
    return {
        "factor": field.factor,
        "effective_dilation": field.effective_dilation,
        "receptive_field_px": field.receptive_field_px,
    }
