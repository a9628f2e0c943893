"""What one output pixel sees: the theoretical box, the effective field, and the score without what lies outside it."""

import dataclasses
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rfield.receptive_field.effective import contribution_squares
from rfield.receptive_field.probe import output_map, probe_window
from rfield.receptive_field.theoretical import receptive_field_px, theoretical_receptive_field
from rfield.segmentation.models import ParsingNetwork
from rfield.segmentation.web.show_pictures import Picture
from rfield.segmentation.web.show_viewer import Viewer

Box = tuple[float, float, float, float]
"""Top, left, bottom, right in px of the image, the last two excluded; what lies outside of the image is padding."""

SHARES = (0.5, 0.8, 0.95, 0.99)
"""Shares of all contributions that the square of the effective field may hold."""
_CLASSES = 5


@dataclasses.dataclass(frozen=True)
class PixelField:
    """What one output pixel sees.

    Attributes:
        theoretical: the box that can matter; None if it is not known.
        note: on the theoretical box, or "".
        square: the square around the pixel that holds the share of all contributions, within the image.
        heat: uint8 Tensor[H, W], the effective field: the logarithm of the contributions, from a thousandth of the
            largest (0) to the largest (255).
        votes: (class, share of the contributions that come from pixels with this label), the largest first.
        scores: (class, probability, probability if everything outside the square is grey), the largest first.
    """

    theoretical: Box | None
    note: str
    square: Box
    heat: Tensor
    votes: list[tuple[int, float]]
    scores: list[tuple[int, float, float]]


def pixel_field(
    viewer: Viewer, picture: Picture, dilations: Sequence[float] | None, x: int, y: int, share: float
) -> PixelField:
    """Measure what the output at pixel (x, y) sees.

    The effective field is that of `rfield.effective_receptive_field` at this pixel instead of the central one: the
    gradient of the pixel's logits, summed over classes, with respect to the image, in absolute values.

    Raises:
        ValueError: the pixel lies outside of the image, there is no such share, or no gradient reaches the image.
    """
    height, width = picture.pixels.shape[1:]
    if not (0 <= x < width and 0 <= y < height):
        raise ValueError(f"the pixel x {x}, y {y} lies outside of the image of {width}x{height} px (width x height)")
    if share not in SHARES:
        raise ValueError(f"the share is one of {', '.join(map(str, SHARES))}, got {share}")
    with viewer.lock:
        viewer.set_dilations(dilations)
        image = viewer.input(picture)
        contributions = _contributions(viewer, image, (y, x))
        half = contribution_squares(contributions, (share,), centre=(y, x))[0].side // 2
        square = (max(0, y - half), max(0, x - half), min(height, y + half + 1), min(width, x + half + 1))
        theoretical, note = _theoretical(viewer, (y, x), (height, width))
        votes, scores = [], []
        if viewer.run is not None:
            labels, _ = viewer.labels(picture, dilations)
            votes = _votes(labels, contributions)
            scores = _scores(viewer, image, square, (y, x))
    relative = (contributions / contributions.max()).clamp(min=1e-3)
    heat = relative.log10().add(3).mul(85).round().to(torch.uint8)
    return PixelField(theoretical, note, square, heat, votes, scores)


def _contributions(viewer: Viewer, image: Tensor, at: tuple[int, int]) -> Tensor:
    """Return the absolute gradient of an output pixel at the image, Tensor[H, W] on the CPU."""
    leaf = image[None].clone().requires_grad_()
    with torch.enable_grad():
        output = output_map(viewer.model(leaf.clone()))
        row, column = (at[axis] * output.shape[2 + axis] // image.shape[1 + axis] for axis in (0, 1))
        value = output[0, :, row, column].sum()
    if not value.requires_grad:
        raise ValueError("no gradient reaches the image: there is no effective field to show")
    (grad,) = torch.autograd.grad(value, leaf)
    return grad.abs()[0].sum(0).float().cpu()


def _theoretical(viewer: Viewer, at: tuple[int, int], size: tuple[int, int]) -> tuple[Box | None, str]:
    """Return the box that can matter to an output pixel, and what must be said of it."""
    model = viewer.model
    if not isinstance(model, ParsingNetwork):
        return _probed(viewer, at, size)
    try:
        field = theoretical_receptive_field(model)
        everything = not math.isfinite(max(field))
        if everything:
            field = receptive_field_px(model)
    except ValueError as error:
        return None, str(error)
    if not math.isfinite(max(field)):
        return (0, 0, *size), "the network sees the whole image"
    # The feature of position p is centred on the image's pixel p * stride; between two, both are read.
    first, last = ([end(side / model.stride) * model.stride for side in at] for end in (math.floor, math.ceil))
    reach = [(extent - 1) / 2 for extent in field]
    box = (first[0] - reach[0], first[1] - reach[1], last[0] + reach[0] + 1, last[1] + reach[1] + 1)
    return box, "without the layers that see the whole image at once" if everything else ""


def _probed(viewer: Viewer, at: tuple[int, int], size: tuple[int, int]) -> tuple[Box | None, str]:
    """Return the same for a model of another library, whose field is measured once."""
    if viewer.probed is None:
        viewer.probed = [probe_window(viewer.model, axis) for axis in (0, 1)]
    locals_ = [window.local for window in viewer.probed]
    everything = not all(math.isfinite(window.size) for window in viewer.probed)
    if not math.isfinite(max(locals_)):
        return (0, 0, *size), "the model sees the whole image"
    top, left = (at[axis] - (locals_[axis] - 1) / 2 for axis in (0, 1))
    box = (top, left, top + locals_[0], left + locals_[1])
    return box, "without the layers that see the whole image at once" if everything else ""


def _votes(labels: Tensor, contributions: Tensor) -> list[tuple[int, float]]:
    shares = torch.bincount(labels.flatten().long(), contributions.flatten().double())
    found = (shares / shares.sum()).topk(min(_CLASSES, len(shares)))
    return [
        (int(label), float(share)) for share, label in zip(found.values, found.indices, strict=True) if share > 5e-4
    ]


@torch.inference_mode()
def _scores(viewer: Viewer, image: Tensor, square: Box, at: tuple[int, int]) -> list[tuple[int, float, float]]:
    """Return the likeliest classes of a pixel, with and without what lies outside of a square."""
    top, left, bottom, right = map(int, square)
    hidden = torch.zeros_like(image)  # 0 is the mean of all images, a grey
    hidden[:, top:bottom, left:right] = image[:, top:bottom, left:right]
    before, after = (
        F.softmax(viewer.logits(viewer.features(each), (image.shape[1], image.shape[2]))[:, at[0], at[1]], dim=0)
        for each in (image, hidden)
    )
    best = torch.maximum(before, after).topk(min(_CLASSES, len(before))).indices.tolist()
    rows = [(label, float(before[label]), float(after[label])) for label in best]
    return sorted(rows, key=lambda row: -row[1])
