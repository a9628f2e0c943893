"""Weights from files: read safely, and compared with the layers that they are for before any is copied."""

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from rfield.reading import swells

_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def misfits(state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], unused: Collection[str]) -> list[str]:
    """What is wrong with a file's weights, the layers' shapes given; `unused` are keys that it may hold besides."""
    faults = [f"missing {key}" for key in shapes if key not in state]
    faults += [f"unknown {key}" for key in state if key not in shapes and key not in unused]
    return faults + [
        f"{key} has shape {tuple(state[key].shape)} instead of {shape}"
        for key, shape in shapes.items()
        if key in state and tuple(state[key].shape) != shape
    ]


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a .pth one, of which no code is run.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read, or holds no flat dict from layer name to tensor.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f'There is no weights file {path}; give "imagenet" or the path of a .pth or .safetensors file.'
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        if swells(path):
            raise ValueError("its records are larger than the file")
        state = torch.load(path, weights_only=True, map_location="cpu")
    except ImportError as error:
        raise ValueError(f"{path} needs the package safetensors: pip install safetensors.") from error
    except Exception as error:  # Damaged files raise a dozen different types.
        raise ValueError(f"{path} cannot be read as weights ({error}); is it damaged or of another format?") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no flat dict from layer name to tensor; save the model's state_dict() alone.")
    return state


@contextmanager
def no_pickles() -> Iterator[None]:
    """While it runs, torch reads tensors alone, also where a library asks for more."""
    before = os.environ.get(_WEIGHTS_ONLY)
    os.environ[_WEIGHTS_ONLY] = "1"
    try:
        yield
    finally:
        os.environ.pop(_WEIGHTS_ONLY)
        if before is not None:
            os.environ[_WEIGHTS_ONLY] = before
