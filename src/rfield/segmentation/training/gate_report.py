"""The receptive fields that a network with gates chooses for its validation images: in numbers, and drawn."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rfield.segmentation import plots
from rfield.segmentation.data import ParsingDataset, evaluation_transform
from rfield.segmentation.data.class_groups import object_sizes, region_areas
from rfield.segmentation.inference.feature_cache import CachedFeatures
from rfield.segmentation.inference.gates import field_map, gated_layer, rate_fields, read_gates
from rfield.segmentation.models import ParsingNetwork

# Number of images that are read, spread over the split, and of those that are drawn.
_READ, _DRAWN = 200, 4


def describe_gates(
    out: Path, network: ParsingNetwork, dataset: ParsingDataset, frozen: bool, features: CachedFeatures | None
) -> dict[str, Any]:
    """Return the part of a run's metrics that describes its gates, and draw them to `gates.png`.

    Args:
        out: the run folder.
        network: in eval mode; without gates nothing is returned or drawn.
        dataset: the validation split; up to 200 of its images are read.
        frozen: the network's head was trained on cached features.
        features: those of the split, if they are cached.

    Returns:
        `gates`: what has gates of its own; the `rates` with the receptive field and the mean gate of each; the mean
        `field_px` that the images choose, its least and greatest; and `size_correlation`, Spearman's correlation over
        the images between the chosen field and the size of the objects (None if either does not vary). An image's
        objects are the regions of all classes but the one with most pixels in the split.
    """
    layer = gated_layer(network)
    if layer is None:
        return {}
    transform = evaluation_transform()
    indices = range(0, len(dataset), max(1, -(-len(dataset) // _READ)))
    means, areas = [], []
    for index in indices:
        image, mask = transform(*dataset[index])
        known = None if features is None else features.plain(index)[0]
        means.append(read_gates(network, image, frozen, known).mean((1, 2)))
        areas.append(region_areas(mask.numpy()))
    fields = rate_fields(network)
    chosen = [float(mean @ mean.new_tensor(fields)) for mean in means]
    mean_gates = [sum(each) / len(means) for each in zip(*(mean.tolist() for mean in means), strict=True)]
    ranked = np.argsort(chosen)[np.linspace(0, len(chosen) - 1, min(_DRAWN, len(chosen))).round().astype(int)]
    _draw(out, network, dataset, frozen, features, [indices[place] for place in ranked])
    return {
        "gates": {
            "each": layer.gates,
            "rates": [
                {"rate": rate, "receptive_field_px": field, "mean_gate": gate}
                for rate, field, gate in zip(layer.rates, fields, mean_gates, strict=True)
            ],
            "field_px": sum(chosen) / len(chosen),
            "least_field_px": min(chosen),
            "greatest_field_px": max(chosen),
            "images": len(chosen),
            "size_correlation": rank_correlation(chosen, object_sizes(areas)),
        }
    }


def _draw(
    out: Path,
    network: ParsingNetwork,
    dataset: ParsingDataset,
    frozen: bool,
    features: CachedFeatures | None,
    indices: list[int],
) -> None:
    transform = evaluation_transform()
    images, maps = [], []
    for index in indices:
        image, mask = dataset[index]
        known = None if features is None else features.plain(index)[0]
        gates = read_gates(network, transform(image, mask)[0], frozen, known)
        images.append(image.permute(1, 2, 0).numpy())
        maps.append(field_map(network, gates, (image.shape[1], image.shape[2])).numpy())
    plots.save(plots.gate_maps(images, maps, rate_fields(network)), out / "gates.png")


def rank_correlation(first: list[float], second: list[float | None]) -> float | None:
    """Return Spearman's correlation of the pairs that have both values; None if one of the two does not vary.

    >>> rank_correlation([1.0, 2.0, 9.0, 5.0], [10.0, 30.0, 40.0, None])
    1.0
    """
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if b is not None]
    if len(pairs) < 3:
        return None
    ranks = [_ranks(np.array(column)) for column in zip(*pairs, strict=True)]
    a, b = (each - each.mean() for each in ranks)
    spread = float(a @ a) * float(b @ b)
    return float(a @ b) / spread**0.5 if spread else None


def _ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return twice the rank of each value; equal values have the mean of their ranks."""
    ordered = np.sort(values)
    below, up_to = (np.searchsorted(ordered, values, side).astype(np.float64) for side in ("left", "right"))
    ranks: npt.NDArray[np.float64] = below + up_to
    return ranks
