"""Semantic segmentation with a learned receptive field: data sets, networks, training, evaluation, export.

Names are resolved on first use (PEP 562), so that the command line's help imports no torch.
"""

import importlib
from typing import Any

# What each name stands for: the module that holds it, and its name there; None for the module itself.
_PUBLIC: dict[str, tuple[str, str | None]] = {
    "TrainConfig": ("rfield.segmentation.config.train", "TrainConfig"),
    "evaluate": ("rfield.segmentation.inference.predict", "evaluate_run"),
    "load_dataset": ("rfield.segmentation.data", "load_dataset"),
    "load_run": ("rfield.segmentation.runs", "load_run"),
    "models": ("rfield.segmentation.models", None),
    "predict": ("rfield.segmentation.inference.predict", "predict_run"),
    "train": ("rfield.segmentation.training", "train"),
}

__all__ = [
    "TrainConfig",
    "evaluate",
    "load_dataset",
    "load_run",
    "models",
    "predict",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'rfield.segmentation' has no attribute {name!r}")
    module, attribute = _PUBLIC[name]
    found = importlib.import_module(module)
    return found if attribute is None else getattr(found, attribute)


def __dir__() -> list[str]:
    return sorted(__all__)
