"""rfield: semantic segmentation networks that learn how far they should see.

Public names are resolved on first use (PEP 562), so that `import rfield` costs next to nothing.
"""

import importlib
from typing import Any

__version__ = "0.2.0"

_PUBLIC = {
    "AdaptiveConv2d": "rfield.layers",
    "GatedConv2d": "rfield.layers",
    "GradientSearch": "rfield.search",
    "ImageAdaptiveRegulator": "rfield.layers",
    "Inflation2d": "rfield.layers",
    "Interpolation2d": "rfield.layers",
    "ReceptiveFieldRegulator": "rfield.layers",
    "SampledSearch": "rfield.search",
    "SpsaSearch": "rfield.search",
    "WeightedGradient": "rfield.layers",
    "adapt": "rfield.surgery.adapt",
    "contribution_squares": "rfield.receptive_field.effective",
    "dilations": "rfield.surgery.fuse",
    "effective_receptive_field": "rfield.receptive_field.effective",
    "fractional_conv2d": "rfield.ops",
    "fuse": "rfield.surgery.fuse",
    "inspect": "rfield.receptive_field.inspection",
    "largefov_vgg16": "rfield.segmentation.models",
    "layer_receptive_fields": "rfield.receptive_field.per_layer",
    "parameter_groups": "rfield.search",
    "probe_receptive_field": "rfield.receptive_field.probe",
    "regulate": "rfield.surgery.adapt",
    "resize_bilinear": "rfield.ops",
    "resized_size": "rfield.ops",
    "set_dilations": "rfield.surgery.fuse",
    "theoretical_receptive_field": "rfield.receptive_field.theoretical",
    "tune": "rfield.surgery.tune",
    "weight_gradient": "rfield.layers",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'rfield' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return __all__
