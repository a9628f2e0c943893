"""Images of a data set in a report: what a network sees of them, their labels, and its labels before and after."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from rfield.search import learned_layers
from rfield.segmentation.data import ParsingDataset, evaluation_transform, load_dataset, match_classes
from rfield.segmentation.inference.predict import compute_device, predict_logits
from rfield.segmentation.plots.masks import overlay
from rfield.segmentation.plots.style import number
from rfield.segmentation.runs import SEARCH_WEIGHTS, Run, load_run, run_at_dilations
from rfield.segmentation.web.report_page import Block, Box, Pictures, Text, picture

_SHOWN = 2


def sample_pictures(
    run: Run, boxes: Sequence[Box], start: float | None, before: Path | None
) -> tuple[list[Block], list[str]]:
    """Return pictures of two validation images, and notes on what is missing.

    Args:
        run: the network whose labels are shown.
        boxes: its receptive fields.
        start: the dilation where the search started, if there was one.
        before: a run to compare with; without it, the weights of the search are used at `start`, if they are there.
    """
    options = run.config.data
    try:
        dataset = match_classes(load_dataset(options.data, options.val_split), run.class_names, False)
        count = min(_SHOWN, len(dataset))
        places = [(2 * index + 1) * len(dataset) // (2 * count) for index in range(count)]
        samples = [(dataset.ids[place], *dataset[place]) for place in places]
    except (ValueError, OSError) as error:
        return [], [f"The data set {options.data} cannot be opened, so that no image is shown: {error}."]
    networks, about = _networks(run, start, before)
    blocks: list[Block] = [_sample(dataset, networks, boxes, *sample) for sample in samples]
    return [*blocks, *([Text([about])] if about else [])], []


def _networks(run: Run, start: float | None, before: Path | None) -> tuple[dict[str, Run], str]:
    """Return the networks to label with, by the captions of their pictures, and a sentence on the first one."""
    now, mine = {"its labels": run}, "labels after the search"
    if before is not None:
        other = load_run(before)
        dilation = number(other.network.head.effective_dilation[0])
        if run.config.search.search == "none":
            mine = f"labels at dilation {number(run.network.head.effective_dilation[0])}"
        return {f"labels at a fixed dilation {dilation}": other, mine: run}, ""
    if start is None or not (run.folder / SEARCH_WEIGHTS).is_file():
        return now, ""
    try:
        shared = load_run(run.folder, search_weights=True)
        run_at_dilations(shared.network, [start] * len(learned_layers(shared.network)))
    except (ValueError, OSError):  # A folder that someone has changed; the labels now are shown all the same.
        return now, ""
    about = (
        "The weights of the search were trained at many dilations by turns; a network that is trained at dilation "
        f"{number(start)} alone may label better there."
    )
    return {f"labels at dilation {number(start)}, weights of the search": shared, mine: run}, about


def _sample(
    dataset: ParsingDataset,
    networks: dict[str, Run],
    boxes: Sequence[Box],
    name: str,
    image: torch.Tensor,
    mask: torch.Tensor,
) -> Pictures:
    pixels: npt.NDArray[np.uint8] = image.permute(1, 2, 0).numpy()
    palette = np.array(dataset.palette, dtype=np.uint8)
    truth = mask.to(torch.uint8).numpy()
    shown = [
        picture(pixels, f"Image {name} with the receptive field around its middle", name, boxes),
        picture(overlay(pixels, truth, palette), f"True labels of {name}", "true labels"),
    ]
    present = {*np.unique(truth).tolist()}
    normalised = evaluation_transform()(image)
    for caption, run in networks.items():
        network = run.network.to(compute_device())
        logits = predict_logits(network, normalised, run.config.model.freeze_backbone)
        labels = logits.argmax(0).to(torch.uint8).cpu().numpy()
        present |= {*np.unique(labels).tolist()}
        shown.append(picture(overlay(pixels, labels, palette), f"{caption} of {name}", caption))
    legend = [
        (dataset.class_names[label], f"rgb({','.join(map(str, dataset.palette[label]))})")
        for label in sorted(present)
        if label < len(dataset.class_names)
    ]
    return Pictures(shown, legend)
