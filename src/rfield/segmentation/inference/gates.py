"""Read what receptive field a network with gates chooses for an image, or for each of its pixels."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rfield.layers import GatedConv2d
from rfield.receptive_field.theoretical import receptive_field_px
from rfield.segmentation.inference.predict import feature_logits, predict_logits
from rfield.segmentation.models import ParsingNetwork


def gated_layer(network: ParsingNetwork) -> GatedConv2d | None:
    """Return the layer of a network's head that has gates, or None."""
    return next((layer for layer in network.head.modules() if isinstance(layer, GatedConv2d)), None)


def rate_fields(network: ParsingNetwork) -> list[float]:
    """Return the receptive field in px of a network with gates at each of its rates.

    >>> from rfield.segmentation.models import small_cnn
    >>> rate_fields(small_cnn(2, gates="pixel", rates=(1, 4)))
    [23.0, 47.0]
    """
    layer = gated_layer(network)
    assert layer is not None
    largest = receptive_field_px(network)[0]
    return [largest - 2.0 * network.stride * (max(layer.rates) - rate) for rate in layer.rates]


@torch.inference_mode()
def read_gates(network: ParsingNetwork, image: Tensor, frozen: bool = False, features: Tensor | None = None) -> Tensor:
    """Return the gates that a network chooses for one image.

    Args:
        network: in eval mode, with gates.
        image: Tensor[3, H, W], normalised.
        frozen: the network's head was trained on cached features.
        features: those of the image, Tensor[C, h, w], if they are cached.

    Returns:
        Tensor[R, h', w'] on the CPU: one gate a rate and feature px that lies on the image, or h' = w' = 1 for gates of
        the whole image.
    """
    layer = gated_layer(network)
    assert layer is not None
    read: list[Tensor] = []

    def see(module: Any, inputs: Any, output: Tensor) -> None:
        read.append(output[0].float().cpu())

    handle = layer.gate.register_forward_hook(see)
    try:
        if features is None:
            predict_logits(network, image, frozen)
        else:
            feature_logits(network, features, (image.shape[1], image.shape[2]))
    finally:
        handle.remove()
    rows, columns = ((side - 1) // network.stride + 1 for side in image.shape[1:])
    return read[0][:, :rows, :columns]


def field_map(network: ParsingNetwork, gates: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the receptive field in px that gates choose at each pixel of an image: the mean of the rates' fields.

    Args:
        network: the one that the gates were read from.
        gates: of `read_gates`, Tensor[R, h, w].
        size: (H, W) of the image in px.

    Returns:
        Tensor[H, W].

    Example:
        >>> from rfield.segmentation.models import small_cnn
        >>> network = small_cnn(2, gates="pixel", rates=(1, 4)).eval()
        >>> image = torch.rand(3, 30, 41)
        >>> field_map(network, read_gates(network, image), (30, 41)).mean()
        tensor(35.)
    """
    fields = torch.tensor(rate_fields(network))
    chosen = (gates * fields[:, None, None]).sum(0)
    if chosen.numel() == 1:
        return chosen.expand(size)
    sides = [(side - 1) * network.stride + 1 for side in chosen.shape]
    resized = F.interpolate(chosen[None, None], size=sides, mode="bilinear", align_corners=True)[0, 0]
    # The last feature px may lie before the image's last pixel.
    missing = [max(0, side - own) for side, own in zip(size, resized.shape, strict=True)]
    return F.pad(resized[None, None], (0, missing[1], 0, missing[0]), mode="replicate")[0, 0, : size[0], : size[1]]
