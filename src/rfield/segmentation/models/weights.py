"""Weights from files: read safely, and compared with the layers that they are for before any is copied."""

import argparse
import itertools
import os
import pickle
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import safe_globals

from rfield.segmentation.files.untrusted import swells

_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
# Under which names training scripts save a model's weights, the likeliest first, averages last.
_WRAPPERS = (
    *("state_dict", "model_state_dict", "model_state", "model", "network_state_dict", "network", "net", "weights"),
    *("params", "module", "student", "ema_state_dict", "state_dict_ema", "model_ema", "ema", "params_ema", "teacher"),
)
_NO_MODEL = ("optimizer", "optimizer_state_dict", "lr_scheduler", "scheduler", "scaler", "optimizer_states")
# Classes without code of their own, which training scripts save beside the weights.
_PLAIN: list[Any] = [argparse.Namespace]
_DEEPEST = 3


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
    """The tensors of a .safetensors file, or of one of torch.save, of which no code is run.

    What a training script puts around a state dict is taken off: `{"state_dict": ...}`, `{"model": ...}` and the like;
    of weights and their running average, which are told by their names, the weights are taken.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is a folder, cannot be read without running its code, or holds no dict from layer name to tensor.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not a weights file; give the .pth or .safetensors file")
    if not path.is_file():
        raise FileNotFoundError(
            f'there is no weights file {path}; give "imagenet" or the path of a .pth or .safetensors file'
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        if swells(path):
            raise ValueError("its records are larger than the file")
        with safe_globals(_PLAIN), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # What torch has to say of a file is said below.
            loaded = torch.load(path, weights_only=True, map_location="cpu")
    except ImportError as error:
        raise ValueError(f"{path} needs the package safetensors: pip install safetensors") from error
    except Exception as error:  # Damaged files raise a dozen different types.
        raise ValueError(_why_unread(path, error)) from error
    state = _unwrap(loaded)
    if not state:
        held = f"it has {', '.join(map(str, [*loaded][:8]))}" if isinstance(loaded, dict) else type(loaded).__name__
        raise ValueError(
            f"{path} holds no flat dict from layer name to tensor, alone or under {', '.join(_WRAPPERS[:4])} ({held}); "
            "save the model's state_dict() alone"
        )
    return state


def _why_unread(path: Path, error: Exception) -> str:
    """One line on what torch says in many."""
    text = " ".join(str(error).split())
    if (start := _text_of(path)) is not None:
        held = f"holds text, {start!r}" if start else "is empty"
        return f"{path} cannot be read as weights: it {held}; was its download cut short or refused?"
    if "TorchScript" in text:
        return f"{path} cannot be read as weights: it holds a TorchScript program; save its state_dict() instead"
    found = re.findall(r"GLOBAL ([\w.]+)", text)
    if found or (_is_pickled(path) and ("Unsupported operand" in text or "Unsupported class" in text)):
        what = f" ({found[0]})" if found else ""
        return (
            f"{path} cannot be read as weights: it holds a whole pickled model or other Python objects{what}, which no "
            "one can read without running code of the file; save the model's state_dict() instead"
        )
    # What unpickling stumbles over in a damaged file, such as KeyError: 101, says nothing to readers.
    known = isinstance(error, ValueError) or type(error).__name__ == "SafetensorError"
    cause = f" ({text})" if known and not isinstance(error, pickle.UnpicklingError) else ""
    return f"{path} cannot be read as weights{cause}; is it damaged or of another format?"


def _is_pickled(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(1) in (b"P", b"\x80")  # A zip archive of torch.save, or its older format.


def _text_of(path: Path) -> str | None:
    """The first line of a file of text, empty where the file is; None of any other file."""
    try:
        with path.open("rb") as file:
            start = file.read(64)
        text = start.decode("utf-8", "strict" if len(start) < 64 else "ignore")
    except (OSError, UnicodeDecodeError):
        return None
    lines = text.strip().splitlines()
    return None if any(not (c.isprintable() or c.isspace()) for c in text) else lines[0] if lines else ""


def _unwrap(loaded: Any, depth: int = 0) -> dict[str, Tensor]:
    """The dict from layer name to tensor in what a training script has saved; empty where there is none."""
    if not isinstance(loaded, dict) or depth > _DEEPEST:
        return {}
    if loaded and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in loaded.items()):
        return dict(loaded)
    for name in _WRAPPERS:
        if found := _unwrap(loaded.get(name), depth + 1):
            return found
    # Parts of a model apart, such as {"backbone": ..., "head": ...}.
    parts = {str(name): _unwrap(part, _DEEPEST) for name, part in loaded.items() if name not in _NO_MODEL}
    return {f"{name}.{key}": value for name, part in parts.items() for key, value in part.items()}


def fit_keys(
    state: Mapping[str, Tensor], wanted: Collection[str], plain: Callable[[str], str] = str
) -> tuple[dict[str, Tensor], list[str]]:
    """A file's weights without the prefix that a wrapper has put before a layer's names, such as `module.`.

    Args:
        state: the file's weights.
        wanted: the names of the layers.
        plain: what is compared of a name in the file.

    Returns:
        The weights under the prefix with which most names are wanted, without it; and the names that stand elsewhere.

    >>> fit_keys({"module.conv.bias": torch.zeros(1), "n_averaged": torch.zeros(1)}, ["conv.bias"])
    ({'conv.bias': tensor([0.])}, ['n_averaged'])
    """
    wanted = set(wanted)
    heads = {"": None} | {
        key[: match.end()]: None for key in state for match in itertools.islice(re.finditer(r"\.", key), _DEEPEST)
    }
    counts = {
        head: sum(plain(key.removeprefix(head)) in wanted for key in state if key.startswith(head)) for head in heads
    }
    best = max(counts, key=lambda head: (counts[head], -len(head)))
    kept = {key.removeprefix(best): value for key, value in state.items() if key.startswith(best)}
    return kept, [key for key in state if not key.startswith(best)]


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
