"""Segmentation networks: a backbone, a head whose receptive field can be learned, and what joins the two.

One forward pass reads `network.py` -> `backbones.py` -> `heads.py` -> `layers/regulator.py` -> `ops/resize.py`.
"""

from rfield.segmentation.models.backbones import Backbone, largefov_vgg16_backbone, small_cnn_backbone
from rfield.segmentation.models.build import (
    MODELS,
    build_from_spec,
    build_model,
    efficientnet_lite0,
    find_model,
    largefov_vgg16,
    small_cnn,
)
from rfield.segmentation.models.decoder import Decoder
from rfield.segmentation.models.efficientnet import default_weights, efficientnet_lite0_backbone
from rfield.segmentation.models.heads import HeadSpec, SinglePathHead
from rfield.segmentation.models.multi_path import MultiPathHead, build_head
from rfield.segmentation.models.network import NetworkSpec, ParsingNetwork

__all__ = [
    "MODELS",
    "Backbone",
    "Decoder",
    "HeadSpec",
    "MultiPathHead",
    "NetworkSpec",
    "ParsingNetwork",
    "SinglePathHead",
    "build_from_spec",
    "build_head",
    "build_model",
    "default_weights",
    "efficientnet_lite0",
    "efficientnet_lite0_backbone",
    "find_model",
    "largefov_vgg16",
    "largefov_vgg16_backbone",
    "small_cnn",
    "small_cnn_backbone",
]
