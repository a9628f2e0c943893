"""Panels of the val images that guidance changed most: where two runs agree least with each other.

    python studies/paths/panels.py UNGUIDED GUIDED --out panels.png [--images 4]

UNGUIDED and GUIDED are run folders of studies/paths/paths.sh, with a frozen backbone.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from rfield.segmentation import plots
from rfield.segmentation.data import evaluation_transform, load_dataset
from rfield.segmentation.inference.predict import predict_logits
from rfield.segmentation.runs import load_run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("unguided", type=Path)
    parser.add_argument("guided", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=4)
    arguments = parser.parse_args()
    runs = [load_run(arguments.unguided), load_run(arguments.guided)]
    dataset = load_dataset(runs[0].config.data.data, runs[0].config.data.val_split)
    transform = evaluation_transform()
    found = []
    for index in range(len(dataset)):
        image, mask = dataset[index]
        masks = [predict_logits(run.network, transform(image), True).argmax(0) for run in runs]
        differ = ((masks[0] != masks[1]) & (mask != 255)).float().mean().item()
        found.append((differ, index, mask, masks))
    found.sort(key=lambda item: -item[0])
    shown = sorted(found[: arguments.images], key=lambda item: item[1])
    for differ, index, *_ in shown:
        print(f"{dataset.ids[index]}: {differ:.1%} of the pixels differ")

    columns: dict[str, list[np.ndarray]] = {
        title: [masks[which].to(torch.uint8).numpy() for *_, masks in shown]
        for which, title in enumerate(("unguided", "guided"))
    }
    columns["mended (green), broken (red)"] = [changes(mask, *masks) for *_, mask, masks in shown]
    palette = np.array(dataset.palette, dtype=np.uint8)
    plots.save(plots.panel(columns, palette, dataset.class_names), arguments.out)


def changes(mask: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> np.ndarray:
    """uint8 [H, W, 3]: green where only `after` is right, red where only `before` is, else grey."""
    picture = np.full((*mask.shape, 3), 235, dtype=np.uint8)
    for other, this, colour in ((before, after, (0, 140, 60)), (after, before, (200, 30, 30))):
        picture[((this == mask) & (other != mask)).numpy()] = colour
    return picture


if __name__ == "__main__":
    main()
