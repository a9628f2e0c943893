"""The known-answer test as a demonstration: a receptive field whose best value is known is learned."""

from pathlib import Path

import numpy as np
import torch

from rfield.receptive_field.theoretical import receptive_field_px
from rfield.segmentation import plots
from rfield.segmentation.config.experiments import DemoConfig
from rfield.segmentation.config.train import TrainConfig
from rfield.segmentation.conventions import Progress
from rfield.segmentation.data import SyntheticCues, evaluation_transform
from rfield.segmentation.inference.predict import predict_logits
from rfield.segmentation.runs import load_config, load_run
from rfield.segmentation.training import Interrupted, clear_run_folder, read_factor_csv, train


def run_demo(config: DemoConfig, progress: Progress | None = None) -> str:
    """Learns a receptive field on synthetic images whose best one is known; leaves a run folder with pictures.

    Args:
        config: where to start and where to write.
        progress: as in `train`.

    Returns:
        What was learned, in words.

    Raises:
        FileExistsError: if the folder holds a run that is no demo.
    """
    out = Path(config.out)
    if (out / "config.yaml").is_file():
        earlier = load_config(out / "config.yaml")
        if (earlier.data.data, earlier.model.model) != ("synthetic", "small_cnn"):
            raise FileExistsError(f"{out} holds a run that is no demo: give another --out")
        clear_run_folder(out)
    try:
        train(
            TrainConfig(
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
            ),
            progress,
        )
    except Interrupted as error:
        raise Interrupted(error.signum, error.done, "a further call starts anew") from error
    run = load_run(out)
    dataset = SyntheticCues("val")
    best = dataset.best_dilation(run.network.stride)
    learned = run.network.head.effective_dilation[0]
    factor_px = receptive_field_px(run.network)[0] - learned * 2 * run.network.stride

    def field(dilation: float) -> float:
        return factor_px + dilation * 2 * run.network.stride

    columns = read_factor_csv(out / "factor.csv")
    curve = plots.factor_curve(
        columns["step"], columns["effective_dilation"], columns["receptive_field_px"], columns["loss"], best
    )
    plots.save(curve, out / "factor.png")
    palette = np.array(run.palette, dtype=np.uint8)
    samples = [dataset[index] for index in range(4)]
    images = [image.permute(1, 2, 0).numpy() for image, _ in samples]
    truths = [mask.numpy() for _, mask in samples]
    transform = evaluation_transform()
    labels = [predict_logits(run.network, transform(image)).argmax(0).to(torch.uint8).numpy() for image, _ in samples]
    columns_of_panel = {"image": images, "ground truth": truths, "prediction": labels}
    plots.save(plots.panel(columns_of_panel, palette, run.class_names), out / "panel.png")
    fields = {"start": field(config.dilation), "learned": field(learned), "known best": field(best)}
    plots.save(
        plots.learned_field(images[0], fields, columns["step"], columns["receptive_field_px"]),
        out / "learned_field.png",
    )
    lines = [
        f"{name}: effective dilation {d:.2f}, receptive field {field(d):.0f} px"
        for name, d in (("start", float(config.dilation)), ("learned", learned), ("known best", best))
    ]
    return "\n".join([*lines, f"pictures: {out}/factor.png, {out}/panel.png, {out}/learned_field.png"])
