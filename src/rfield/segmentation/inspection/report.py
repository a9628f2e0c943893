"""Measure the receptive field of a network and write a report: `rfield inspect`."""

import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as TF

from rfield.receptive_field.advice import field_warnings
from rfield.receptive_field.effective import Square, contribution_squares, effective_receptive_field, random_images
from rfield.receptive_field.per_layer import LayerField, layer_receptive_fields
from rfield.segmentation import plots
from rfield.segmentation.config.inspect import InspectConfig
from rfield.segmentation.conventions import Progress
from rfield.segmentation.data import evaluation_transform
from rfield.segmentation.data.images import read_single_image
from rfield.segmentation.files.atomic import write_csv, write_json
from rfield.segmentation.inference.predict import compute_device, find_images
from rfield.segmentation.inspection.model_names import Source, open_model
from rfield.segmentation.models import ParsingNetwork

_DRAWN = (0.5, 0.99)  # shares of contribution_squares that are drawn


@dataclasses.dataclass(frozen=True)
class Inspection:
    """The receptive field of one network."""

    name: str
    weights: str
    layers: list[LayerField]
    """The last is the output."""
    warnings: list[str]
    squares: list[Square]
    """The squares of the effective field; empty if it was not measured."""
    scores: Tensor | None
    """The effective field, Tensor[H, W]."""

    @property
    def output(self) -> LayerField:
        return self.layers[-1]

    @property
    def whole_image(self) -> list[LayerField]:
        """Return the layers through which the output sees the whole image, if it does."""
        if math.isfinite(max(self.output.field)):
            return []
        return [layer for layer in self.layers[:-1] if layer.kernel is None]

    def summary(self, size: tuple[int, int]) -> list[str]:
        """Describe the fields in sentences, for an image of size (height, width)."""
        local = self.output.local
        lines = []
        if math.isfinite(max(local)):
            shares = " x ".join(f"{extent / side:.2f}" for extent, side in zip(local, size, strict=True))
            lines.append(f"theoretical field {local[0]:.4g}x{local[1]:.4g} px, {shares} of the image's sides")
        if self.whole_image:
            names = [f"{layer.name} ({layer.kind})" for layer in self.whole_image]
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"the whole image is seen through {', '.join(names[:3])}{more}")
        return lines + [
            f"{100 * square.share:.0f} % of the contributions come from {square.side}x{square.side} px, "
            f"{100 * square.area_ratio:.3g} % of the image's area"
            for square in self.squares
        ]


def run_inspect(config: InspectConfig, progress: Progress) -> dict[str, Inspection]:
    """Measure a network, and another one if the config names it or the run has a different start.

    Write inspect.json, layers.csv and (if the effective field is measured) effective.png, if the config names a folder.

    Args:
        config: the flags of the command.
        progress: called with (images done, all images).

    Returns:
        First the other network's inspection under `before`, then the network's under `after`; or only the network's,
        under its name.

    Raises:
        FileNotFoundError, ValueError: as `open_model`; or if the network cannot be run on images of that size.
    """
    torch.manual_seed(config.seed)
    source = open_model(config.model, config.weights)
    sources = {source.name: source}
    if config.against is not None:
        torch.manual_seed(config.seed)
        against = open_model(config.against, config.against_weights)
        sources = {"before": against, "after": source}
    elif source.start is not None:
        start = dataclasses.replace(source, name=f"{source.name}, at its starting dilation", model=source.start)
        sources = {"before": start, "after": source}
    images = [] if config.count == 0 else _images(config)
    total = len(sources) * len(images)

    found: dict[str, Inspection] = {}
    for index, (title, each) in enumerate(sources.items()):
        found[title] = _inspect(each, config, _counted(images, progress, index * len(images), total))
    if config.out is None:
        return found
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    measured = {title: each for title, each in found.items() if each.scores is not None}
    if measured:
        figure = plots.effective_fields({title: _panel(each) for title, each in measured.items()})
        plots.save(figure, out / "effective.png")
    _write_layers(out / "layers.csv", list(found.values())[-1], config.size)
    content = {"size": config.size, "images": config.images or "random", "measure": config.measure}
    networks = {title: _plain(each) for title, each in found.items()}
    write_json(out / "inspect.json", {**content, "count": len(images), "networks": networks}, allow_nan=False)
    return found


def _inspect(source: Source, config: InspectConfig, images: Iterable[Tensor]) -> Inspection:
    layers = _layers(source.model, config.size)
    squares, scores = [], None
    if config.count:
        model: nn.Module = source.model.to(compute_device())
        try:
            scores = effective_receptive_field(model, images, config.measure)
        except ValueError:
            raise
        except Exception as error:  # each network has its own exceptions
            size = f"{config.size[0]}x{config.size[1]}"
            raise ValueError(f"{source.name} cannot be run on images of {size} px: {error}") from error
        squares = contribution_squares(scores, compress=config.measure == "replknet")
    return Inspection(source.name, source.weights, layers, field_warnings(layers, config.size), squares, scores)


def _layers(model: nn.Module, size: tuple[int, int]) -> list[LayerField]:
    if not isinstance(model, ParsingNetwork):
        return layer_receptive_fields(model, size=size)
    # Padded to `min_size`, a short strip has the map of a longer one, which hides the stride.
    canvas, model.min_size = model.min_size, (1, 1)
    try:
        return layer_receptive_fields(model, size=size)
    finally:
        model.min_size = canvas


def _images(config: InspectConfig) -> list[Tensor]:
    if config.images is None:
        return list(random_images(config.size, config.count, seed=config.seed))
    images = map(read_single_image, find_images(config.images)[: config.count])
    return [evaluation_transform()(TF.resize(image, list(config.size), antialias=True)) for image in images]


def _counted(images: list[Tensor], progress: Progress, done: int, total: int) -> Iterable[Tensor]:
    for index, image in enumerate(images):
        progress(done + index, total)
        yield image
    progress(done + len(images), total)


def _panel(found: Inspection) -> tuple[Any, dict[str, tuple[float, float]]]:
    boxes = {}
    if math.isfinite(max(found.output.local)):
        boxes["theoretical field" + ", and the whole image" * bool(found.whole_image)] = found.output.local
    for square in found.squares:
        if square.share in _DRAWN:
            boxes[f"{100 * square.share:.0f} % of the contributions"] = (float(square.side),) * 2
    return found.scores.cpu().numpy() if found.scores is not None else None, boxes


def _write_layers(path: Path, found: Inspection, size: tuple[int, int]) -> None:
    pairs = ("kernel", "dilation", "stride", "field", "local", "field_per_image")
    rows = [["layer", "kind", *(f"{name}_{side}" for name in pairs for side in ("height", "width"))]]
    for layer in found.layers:
        shares = [field / side for field, side in zip(layer.field, size, strict=True)]
        values = (layer.kernel, layer.dilation, layer.stride, layer.field, layer.local, shares)
        row = ["" if pair is None else f"{pair[axis]:.6g}" for pair in values for axis in (0, 1)]
        rows.append([layer.name, layer.kind, *row])
    write_csv(path, rows)


def _plain(found: Inspection) -> dict[str, Any]:
    """Return plain values for JSON; null means infinite: the whole image, or one output for all of it."""
    return {
        "model": found.name,
        "weights": found.weights,
        "warnings": found.warnings,
        "whole_image_by": [layer.name for layer in found.whole_image],
        "effective": [dataclasses.asdict(square) for square in found.squares],
        "layers": [_finite(dataclasses.asdict(layer)) for layer in found.layers],
    }


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (tuple, list)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
