"""Parsing networks: a backbone, a head whose receptive field can be learned, and what joins the two.

One forward pass reads `parsing.py` -> `backbones.py` -> `heads.py` -> `layers/regulator.py` -> `ops/resize.py`.
"""

import functools
from collections.abc import Callable

from rfield.segmentation.models.backbones import Backbone, largefov_vgg16_backbone, small_cnn_backbone
from rfield.segmentation.models.decoder import Decoder
from rfield.segmentation.models.efficientnet import default_weights, efficientnet_lite0_backbone
from rfield.segmentation.models.heads import SinglePathHead
from rfield.segmentation.models.multi_path import MultiPathHead, Paths, aspp_head
from rfield.segmentation.models.network import ParsingNetwork, efficientnet_lite0, largefov_vgg16, small_cnn

MODELS: dict[str, Callable[..., ParsingNetwork]] = {
    "efficientnet_lite0": efficientnet_lite0,
    "largefov_vgg16": largefov_vgg16,
    "small_cnn": small_cnn,
}
"""The function that builds each network, by name; all take the same keyword arguments."""


def find_model(name: str) -> Callable[..., ParsingNetwork]:
    """The function that builds a network: of `MODELS`, or for timm:NAME any network of timm.

    Raises:
        ValueError: there is no such network, or timm is missing.

    >>> find_model("small_cnn")(2, head_channels=4).stride
    4
    """
    if name in MODELS:
        return MODELS[name]
    if not name.startswith("timm:"):
        raise ValueError(f"model {name!r} is not known; the known ones are {', '.join(MODELS)} and timm:NAME")
    try:
        from rfield.segmentation.models.timm_backbone import timm_network  # Local: the other networks do without timm.
    except ImportError as error:
        raise ValueError(f"model {name} needs the package timm: pip install timm") from error
    return functools.partial(timm_network, name.removeprefix("timm:"))


__all__ = [
    "MODELS",
    "Backbone",
    "Decoder",
    "MultiPathHead",
    "ParsingNetwork",
    "Paths",
    "SinglePathHead",
    "aspp_head",
    "default_weights",
    "efficientnet_lite0",
    "efficientnet_lite0_backbone",
    "find_model",
    "largefov_vgg16",
    "largefov_vgg16_backbone",
    "small_cnn",
    "small_cnn_backbone",
]
