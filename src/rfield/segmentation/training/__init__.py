"""Train a network with a learned receptive field; Lightning runs the loop."""

from rfield.segmentation.runs import read_factor_csv
from rfield.segmentation.training.callbacks import FACTOR_COLUMNS, FactorLog, LastValidation, LineProgress
from rfield.segmentation.training.fields import present_field
from rfield.segmentation.training.fit import prepare, train
from rfield.segmentation.training.module import ParsingModule
from rfield.segmentation.training.run_folder import check_classes, clear_run_folder
from rfield.segmentation.training.stopping import Interrupted

__all__ = [
    "FACTOR_COLUMNS",
    "FactorLog",
    "Interrupted",
    "LastValidation",
    "LineProgress",
    "ParsingModule",
    "check_classes",
    "clear_run_folder",
    "prepare",
    "present_field",
    "read_factor_csv",
    "train",
]
