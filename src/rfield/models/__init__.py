"""Parsing networks: a backbone, a head whose receptive field can be learned, and what joins the two.

One forward pass reads `parsing.py` -> `backbones.py` -> `heads.py` -> `layers/regulator.py` -> `ops/resize.py`.
"""

from collections.abc import Callable

from rfield.models.backbones import Backbone, largefov_vgg16_backbone, small_cnn_backbone
from rfield.models.efficientnet import default_weights, efficientnet_lite0_backbone
from rfield.models.heads import SinglePathHead
from rfield.models.multi_path import MultiPathHead, Paths, aspp_head
from rfield.models.parsing import ParsingNetwork, efficientnet_lite0, largefov_vgg16, small_cnn

MODELS: dict[str, Callable[..., ParsingNetwork]] = {
    "efficientnet_lite0": efficientnet_lite0,
    "largefov_vgg16": largefov_vgg16,
    "small_cnn": small_cnn,
}
"""The function that builds each network, by name; all take the same keyword arguments."""

__all__ = [
    "MODELS",
    "Backbone",
    "MultiPathHead",
    "ParsingNetwork",
    "Paths",
    "SinglePathHead",
    "aspp_head",
    "default_weights",
    "efficientnet_lite0",
    "efficientnet_lite0_backbone",
    "largefov_vgg16",
    "largefov_vgg16_backbone",
    "small_cnn",
    "small_cnn_backbone",
]
