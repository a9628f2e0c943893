"""Measure the receptive field of a network and write a report: `rfield inspect`."""

import dataclasses
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as TF

from rfield.receptive_field.advice import outer_taps_on_map
from rfield.receptive_field.effective import Measure, random_images
from rfield.receptive_field.inspection import Inspection, measure_effective
from rfield.receptive_field.per_layer import LayerField, layer_receptive_fields
from rfield.segmentation import plots
from rfield.segmentation.config.inspect import InspectConfig
from rfield.segmentation.config.values import Size
from rfield.segmentation.conventions import Progress
from rfield.segmentation.data import evaluation_transform, load_dataset
from rfield.segmentation.data.images import read_single_image
from rfield.segmentation.files.atomic import write_csv, write_json
from rfield.segmentation.inference.predict import compute_device, find_images
from rfield.segmentation.inspection.model_names import Source, open_model
from rfield.segmentation.models import ParsingNetwork


@dataclasses.dataclass(frozen=True)
class Named:
    """What a network sees, with the network's name and the origin of its weights."""

    name: str
    weights: str
    inspection: Inspection


def run_inspect(config: InspectConfig, progress: Progress) -> dict[str, Named]:
    """Measure a network, and another one if the config names it or the run has a different start.

    Write inspect.json, layers.csv and (if the effective field is measured) effective.png, if the config names a folder.

    Args:
        config: the flags of the command; a model in a Python file is run.
        progress: called with (images done, all images).

    Returns:
        First the other network's inspection under `before`, then the network's under `after`; or only the network's,
        under its name.

    Raises:
        FileNotFoundError, ValueError: as `open_model`; or if the network cannot be run on images of that size.
    """
    torch.manual_seed(config.seed)
    source = open_model(config.model, config.weights, run_files=True)
    sources = {source.name: source}
    if config.against is not None:
        torch.manual_seed(config.seed)
        against = open_model(config.against, config.against_weights, run_files=True)
        sources = {"before": against, "after": source}
    elif source.start is not None:
        start = dataclasses.replace(source, name=f"{source.name}, at its starting dilation", model=source.start)
        sources = {"before": start, "after": source}
    size, images = _size_and_images(config)
    total = len(sources) * len(images)

    found: dict[str, Named] = {}
    for index, (title, each) in enumerate(sources.items()):
        found[title] = _inspect(each, size, config.measure, _counted(images, progress, index * len(images), total))
    if config.out is None:
        return found
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    measured = {title: each.inspection for title, each in found.items() if each.inspection.scores is not None}
    if measured:
        figure = plots.effective_fields({title: _panel(each) for title, each in measured.items()})
        plots.save(figure, out / "effective.png")
    _write_layers(out / "layers.csv", list(found.values())[-1].inspection)
    content = {"size": size, "images": config.data or config.images or "random", "measure": config.measure}
    networks = {title: _plain(each) for title, each in found.items()}
    write_json(out / "inspect.json", {**content, "count": len(images), "networks": networks}, allow_nan=False)
    return found


def _inspect(source: Source, size: Size, measure: Measure, images: Iterable[Tensor]) -> Named:
    layers = _layers(source.model, size)
    scores, squares = measure_effective(source.model.to(compute_device()), images, size, measure)
    return Named(source.name, source.weights, Inspection(size, layers, scores, squares))


def _layers(model: nn.Module, size: Size) -> list[LayerField]:
    if not isinstance(model, ParsingNetwork):
        return layer_receptive_fields(model, size=size)
    # Padded to `min_size`, a short strip has the map of a longer one, which hides the stride.
    canvas, model.min_size = model.min_size, (1, 1)
    try:
        return layer_receptive_fields(model, size=size)
    finally:
        model.min_size = canvas


def _size_and_images(config: InspectConfig) -> tuple[Size, list[Tensor]]:
    """Return the size to inspect at, and the images of that size to measure the effective field on."""
    if config.data is not None:
        dataset = load_dataset(config.data, config.split)
        size = config.size or Size([round(statistics.median(sides)) for sides in zip(*dataset.sizes(), strict=True)])
        # Evenly from the whole split, since neighbours are often alike.
        chosen = [len(dataset) * place // config.count for place in range(min(config.count, len(dataset)))]
        return size, [_resized(dataset[index][0], size) for index in chosen]
    size = config.size or Size(512)
    if config.images is None:
        return size, list(random_images(size, config.count, seed=config.seed))
    images = map(read_single_image, find_images(config.images)[: config.count])
    return size, [_resized(image, size) for image in images]


def _resized(image: Tensor, size: Size) -> Tensor:
    normalised: Tensor = evaluation_transform()(TF.resize(image, list(size), antialias=True))
    return normalised


def _counted(images: list[Tensor], progress: Progress, done: int, total: int) -> Iterable[Tensor]:
    for index, image in enumerate(images):
        progress(done + index, total)
        yield image
    progress(done + len(images), total)


def _panel(found: Inspection) -> tuple[Any, dict[str, tuple[float, float]]]:
    return found.scores.cpu().numpy() if found.scores is not None else None, found.boxes()


def _write_layers(path: Path, found: Inspection) -> None:
    pairs = ("kernel", "dilation", "stride", "field", "local", "field_per_image")
    names = [f"{name}_{side}" for name in pairs for side in ("height", "width")]
    rows = [["layer", "kind", *names, "outer_taps_on_map"]]
    for layer in found.layers:
        shares = [field / side for field, side in zip(layer.field, found.size, strict=True)]
        values = (layer.kernel, layer.dilation, layer.stride, layer.field, layer.local, shares)
        row = ["" if pair is None else f"{pair[axis]:.6g}" for pair in values for axis in (0, 1)]
        taps = outer_taps_on_map(layer, found.size)
        rows.append([layer.name, layer.kind, *row, "" if taps is None else f"{taps:.6g}"])
    write_csv(path, rows)


def _plain(found: Named) -> dict[str, Any]:
    """Return plain values for JSON; null means infinite: the whole image, or one output for all of it."""
    inspection = found.inspection
    return {
        "model": found.name,
        "weights": found.weights,
        "advice": [dataclasses.asdict(advice) for advice in inspection.advice],
        "whole_image_by": [layer.name for layer in inspection.whole_image],
        "effective": [dataclasses.asdict(square) for square in inspection.squares],
        "layers": [_finite(dataclasses.asdict(layer)) for layer in inspection.layers],
    }


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (tuple, list)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
