"""Learn a receptive field whose best value is known, as a demonstration."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from rfield.receptive_field.theoretical import receptive_field_px
from rfield.segmentation import plots
from rfield.segmentation.config.experiments import DemoConfig
from rfield.segmentation.config.train import TrainConfig
from rfield.segmentation.conventions import Progress
from rfield.segmentation.data import SyntheticCues, evaluation_transform
from rfield.segmentation.inference.predict import predict_logits
from rfield.segmentation.runs import Run, load_config, load_run
from rfield.segmentation.training import Interrupted, clear_run_folder, read_factor_csv, train


def run_demo(config: DemoConfig, progress: Progress | None = None) -> str:
    """Learn a receptive field on synthetic images whose best one is known; leave a run folder with pictures.

    Args:
        config: where to start and where to write.
        progress: as in `train`.

    Returns:
        What was learned, in words.

    Raises:
        FileExistsError: if the folder holds a run that is not a demo.
    """
    out = Path(config.out)
    if (out / "config.yaml").is_file():
        earlier = load_config(out / "config.yaml")
        if (earlier.data.data, earlier.model.model) != ("synthetic", "small_cnn"):
            raise FileExistsError(f"{out} holds a run that is not a demo: give another --out")
        clear_run_folder(out)
    try:
        train(_train_config(config), progress)
    except Interrupted as error:
        raise Interrupted(error.signum, error.done, "run the command again to start over") from error
    run = load_run(out)
    dataset = SyntheticCues("val")
    dilations = {
        "start": float(config.dilation),
        "learned": run.network.head.effective_dilation[0],
        "known best": dataset.best_dilation(run.network.stride),
    }
    px = 2 * run.network.stride
    rest = receptive_field_px(run.network)[0] - dilations["learned"] * px
    fields = {name: rest + dilation * px for name, dilation in dilations.items()}
    _draw(run, dataset, dilations["known best"], fields)
    lines = [
        f"{name}: effective dilation {dilation:.2f}, receptive field {fields[name]:.0f} px"
        for name, dilation in dilations.items()
    ]
    return "\n".join([*lines, f"pictures: {out}/factor.png, {out}/panel.png, {out}/learned_field.png"])


def _train_config(config: DemoConfig) -> TrainConfig:
    return TrainConfig(
        data="synthetic",
        out=config.out,
        model="small_cnn",
        dilation=config.dilation,
        head_channels=32,
        dropout=0.0,
        search="gradient",
        factor_lr=0.05,
        factor_start=0,
        epochs=config.epochs,
        batch_size=8,
        optimizer="adamw",
        lr=3e-3,
        head_lr_scale=1.0,
        crop_size=(129, 129),
        scale_range=(1.0, 1.0),
        flip=False,
        colour_jitter=0.0,
        workers=0,
        seed=config.seed,
    )


def _draw(run: Run, dataset: SyntheticCues, best: float, fields: dict[str, float]) -> None:
    """Draw the learned factor, predictions, and the receptive fields in px by name, into the run folder."""
    out, transform = run.folder, evaluation_transform()
    steps = read_factor_csv(out / "factor.csv")
    curve = plots.factor_curve(
        steps["step"], steps["effective_dilation"], steps["receptive_field_px"], steps["loss"], best
    )
    plots.save(curve, out / "factor.png")
    samples = [dataset[index] for index in range(4)]
    logits = [predict_logits(run.network, transform(image)) for image, _ in samples]
    columns: dict[str, list[npt.NDArray[np.uint8]]] = {
        "image": [image.permute(1, 2, 0).numpy() for image, _ in samples],
        "ground truth": [mask.to(torch.uint8).numpy() for _, mask in samples],
        "prediction": [each.argmax(0).to(torch.uint8).numpy() for each in logits],
    }
    palette = np.array(run.palette, dtype=np.uint8)
    plots.save(plots.panel(columns, palette, run.class_names), out / "panel.png")
    figure = plots.learned_field(columns["image"][0], fields, steps["step"], steps["receptive_field_px"])
    plots.save(figure, out / "learned_field.png")
