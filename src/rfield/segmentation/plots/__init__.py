"""Draw learned receptive fields and labelled images: arrays in, matplotlib Figures out."""

from rfield.segmentation.plots.curves import dilation_paths, rf_curve
from rfield.segmentation.plots.effective import effective_fields
from rfield.segmentation.plots.fields import factor_curve, learned_field
from rfield.segmentation.plots.gates import gate_maps
from rfield.segmentation.plots.masks import colourise, overlay, panel
from rfield.segmentation.plots.path_costs import class_paths, set_sizes
from rfield.segmentation.plots.style import save

__all__ = [
    "class_paths",
    "colourise",
    "dilation_paths",
    "effective_fields",
    "factor_curve",
    "gate_maps",
    "learned_field",
    "overlay",
    "panel",
    "rf_curve",
    "save",
    "set_sizes",
]
