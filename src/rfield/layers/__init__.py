"""Layers: the operators as modules, and the layers with a learned receptive field."""

from rfield.layers.adaptive_conv import AdaptiveConv2d
from rfield.layers.factor import LearnedFactor
from rfield.layers.gated import GatedConv2d
from rfield.layers.image_regulator import ImageAdaptiveRegulator
from rfield.layers.regulator import ReceptiveFieldRegulator
from rfield.layers.resize import Inflation2d, Interpolation2d
from rfield.layers.weighted_gradient import WeightedGradient, weight_gradient

__all__ = [
    "AdaptiveConv2d",
    "GatedConv2d",
    "ImageAdaptiveRegulator",
    "Inflation2d",
    "Interpolation2d",
    "LearnedFactor",
    "ReceptiveFieldRegulator",
    "WeightedGradient",
    "weight_gradient",
]
