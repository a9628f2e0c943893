"""Experiments made of training runs: the demonstration, sweeps, tuning, the paper's."""

from rfield.experiments.demo import run_demo
from rfield.experiments.sweep import run_sweep

__all__ = ["run_demo", "run_sweep"]
