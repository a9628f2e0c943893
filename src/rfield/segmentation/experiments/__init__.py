"""Experiments made of training runs: the demonstration, sweeps, tuning, the paper's."""

from rfield.segmentation.experiments.demo import run_demo
from rfield.segmentation.experiments.reproduce import run_reproduce
from rfield.segmentation.experiments.sweep import run_sweep
from rfield.segmentation.experiments.tune import run_tune
from rfield.segmentation.experiments.tune_file import run_tune_file

__all__ = ["run_demo", "run_reproduce", "run_sweep", "run_tune", "run_tune_file"]
