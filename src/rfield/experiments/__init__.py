"""Experiments made of training runs: the demonstration, sweeps, tuning, the paper's."""

from rfield.experiments.demo import run_demo
from rfield.experiments.reproduce import run_reproduce
from rfield.experiments.sweep import run_sweep
from rfield.experiments.tune import run_tune

__all__ = ["run_demo", "run_reproduce", "run_sweep", "run_tune"]
