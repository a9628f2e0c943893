"""Pictures of learned receptive fields and of labelled images: arrays in, matplotlib Figures out."""

from rfield.plots.curves import factor_paths, rf_curve
from rfield.plots.effective import effective_fields
from rfield.plots.fields import factor_curve, learned_field
from rfield.plots.masks import colourise, overlay, panel
from rfield.plots.style import save

__all__ = [
    "colourise",
    "effective_fields",
    "factor_curve",
    "factor_paths",
    "learned_field",
    "overlay",
    "panel",
    "rf_curve",
    "save",
]
