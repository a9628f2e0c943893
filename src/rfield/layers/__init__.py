"""Layers: the operators as modules, and the regulator made of them."""

from rfield.layers.regulator import ReceptiveFieldRegulator
from rfield.layers.resize import Inflation2d, Interpolation2d

__all__ = ["Inflation2d", "Interpolation2d", "ReceptiveFieldRegulator"]
