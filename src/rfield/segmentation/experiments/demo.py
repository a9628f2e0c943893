"""Learn a receptive field from a bad start on the images that the package ships: before and after."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from rfield.receptive_field.theoretical import receptive_field_px
from rfield.segmentation import plots
from rfield.segmentation.config.experiments import DemoConfig
from rfield.segmentation.config.train import TrainConfig
from rfield.segmentation.conventions import Progress
from rfield.segmentation.data import evaluation_transform, load_dataset
from rfield.segmentation.inference.predict import predict_logits
from rfield.segmentation.runs import Run, load_config, load_run
from rfield.segmentation.training import Interrupted, clear_run_folder, read_factor_csv, train
from rfield.segmentation.web.report import try_report

_SHOWN = 4


def run_demo(config: DemoConfig, progress: Progress | None = None) -> str:
    """Train at a bad dilation, and with the default search from it; leave two run folders and pictures.

    Args:
        config: where to start and where to write; the network before is in the folder `before` of the run.
        progress: as in `train`.

    Returns:
        Both networks and the search's verdict, in words.

    Raises:
        FileExistsError: if the folder holds a run that is not a demo.
    """
    out = Path(config.out)
    folders = {"before": out / "before", "after": out}
    for folder in folders.values():
        if (folder / "config.yaml").is_file():
            earlier = load_config(folder / "config.yaml")
            if (earlier.data.data, earlier.model.model) != ("scenes", "small_cnn"):
                raise FileExistsError(f"{folder} holds a run that is not a demo: give another --out")
            clear_run_folder(folder)
    try:
        scores = {
            name: train(_train_config(config, folder, "sampled" if name == "after" else "none"), progress)
            for name, folder in folders.items()
        }
    except Interrupted as error:
        raise Interrupted(error.signum, error.done, "run the command again to start over") from error
    runs = {name: load_run(folder) for name, folder in folders.items()}
    fields = {name: receptive_field_px(run.network)[0] for name, run in runs.items()}
    _draw(runs, fields)
    if config.report != "none":
        try_report(out)
    lines = [
        f"{name}: dilation {run.network.head.effective_dilation[0]:.3g}, receptive field {fields[name]:.0f} px, "
        f"mIoU {scores[name]['miou']:.3f}"
        for name, run in runs.items()
    ]
    verdict = scores["after"]["search"]["verdict"]
    lines.append(f"the search's verdict: {verdict['kind']}: {verdict['reason']}")
    lines.append(f"pictures: {out}/factor.png, {out}/panel.png, {out}/learned_field.png")
    if (out / "report.html").is_file():
        lines.append(f"all of it on one page: {out}/report.html")
    return "\n".join(lines)


def _train_config(config: DemoConfig, out: Path, search: str) -> TrainConfig:
    return TrainConfig(
        data="scenes",
        out=str(out),
        model="small_cnn",
        dilation=config.dilation,
        head_channels=32,
        dropout=0.0,
        search=search,
        epochs=config.epochs,
        val_every=config.epochs,
        batch_size=8,
        optimizer="adamw",
        lr=3e-3,
        head_lr_scale=1.0,
        crop_size=(129, 129),
        scale_range=(1.0, 1.0),
        colour_jitter=0.0,
        workers=0,
        seed=config.seed,
        report="none",
    )


def _draw(runs: dict[str, Run], fields: dict[str, float]) -> None:
    """Draw the learned dilation, predictions before and after, and the receptive fields in px, into the run folder."""
    out, transform, dataset = runs["after"].folder, evaluation_transform(), load_dataset("scenes", "val")
    steps = read_factor_csv(out / "factor.csv")
    samples = [dataset[index] for index in range(_SHOWN)]
    columns: dict[str, list[npt.NDArray[np.uint8]]] = {
        "image": [image.permute(1, 2, 0).numpy() for image, _ in samples],
        "ground truth": [mask.to(torch.uint8).numpy() for _, mask in samples],
    }
    for name, run in runs.items():
        logits = [predict_logits(run.network, transform(image)) for image, _ in samples]
        columns[name] = [each.argmax(0).to(torch.uint8).numpy() for each in logits]
    palette = np.array(runs["after"].palette, dtype=np.uint8)
    plots.save(plots.panel(columns, palette, dataset.class_names), out / "panel.png")
    figure = plots.learned_field(columns["image"][0], fields, steps["step"], steps["receptive_field_px"])
    plots.save(figure, out / "learned_field.png")
