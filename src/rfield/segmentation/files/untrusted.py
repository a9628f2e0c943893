"""The one place that reads files which a stranger may have made: YAML, JSON, archives, weights.

They give plain values and tensors, or an error that names the file; no code in them is run.
"""

import argparse
import json
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # YAML and JSON are read without torch.
    from torch import Tensor

_DEEPEST_YAML = 50
_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
# The names under which training scripts save a model's weights: the likeliest first, running averages last.
_WRAPPERS = (
    *("state_dict", "model_state_dict", "model_state", "model", "network_state_dict", "network", "net", "weights"),
    *("params", "module", "student", "ema_state_dict", "state_dict_ema", "model_ema", "ema", "params_ema", "teacher"),
)
_NO_MODEL = ("optimizer", "optimizer_state_dict", "lr_scheduler", "scheduler", "scaler", "optimizer_states")
# Harmless classes that training scripts save beside the weights.
_PLAIN: list[Any] = [argparse.Namespace]
_DEEPEST_WRAPPER = 3


def read_json(path: Path) -> Any:
    """Return the value in a JSON file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not JSON, or nested too deeply.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged or not JSON: {error}") from error


def read_yaml(path: Path) -> Any:
    """Return the value in a YAML file; its tags make no objects.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not YAML, has an alias, or is nested more than 50 deep.
    """
    import yaml  # Local: checkpoints and the command line's help work without it.

    try:
        text = path.read_text(encoding="utf-8")
        check_yaml(text)
        return yaml.safe_load(text)
    except OSError:
        raise
    except Exception as error:  # A value that does not fit its tag raises one of a dozen types.
        raise ValueError(f"{path} is not valid YAML: {error}") from error


def check_yaml(text: str) -> None:
    """Refuse YAML that is nested too deep for a parser's stack, or that grows when its aliases are expanded.

    Raises:
        ValueError: it has an alias, or is nested more than 50 deep.

    >>> check_yaml("a: [1, 2]")
    >>> check_yaml("a: &all [1, 2]\\nb: [*all, *all]")
    Traceback (most recent call last):
    ValueError: aliases, such as *all, are not read: write the value itself
    """
    import yaml

    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"aliases, such as *{event.anchor}, are not read: write the value itself")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST_YAML:
            raise ValueError(f"it is nested more than {_DEEPEST_YAML} deep")


def is_zip_bomb(path: Path) -> bool:
    """Return whether a file is a zip archive whose contents are larger than the file; PyTorch compresses nothing."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return sum(record.file_size for record in archive.infolist()) > path.stat().st_size


def read_weights(path: Path, published: str = "imagenet") -> dict[str, "Tensor"]:
    """Return the tensors of a .safetensors file or a file of `torch.save`, by name.

    Dicts that training scripts put around a state dict are unwrapped: `{"state_dict": ...}`, `{"model": ...}` and
    others. If a file holds weights and their running average, under the usual names, the weights are returned.

    Args:
        path: the file.
        published: the word that stands for the library's published weights, for the error of a missing file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is a folder, cannot be read without running its code, or holds no dict from layer name to tensor.
    """
    import torch
    from torch.serialization import safe_globals

    if path.is_dir():
        raise ValueError(f"{path} is a folder, not a weights file; give the .pth or .safetensors file")
    if not path.is_file():
        raise FileNotFoundError(
            f'there is no weights file {path}; give "{published}" or the path of a .pth or .safetensors file'
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        if is_zip_bomb(path):
            raise ValueError("its records are larger than the file")
        with safe_globals(_PLAIN), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `_why_unread` says it in one line.
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
    """Return torch's error about a file, which has many lines, as one line."""
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
    # An unpickler's error on a damaged file, such as KeyError: 101, means nothing to a user.
    known = isinstance(error, ValueError) or type(error).__name__ == "SafetensorError"
    cause = f" ({text})" if known and not isinstance(error, pickle.UnpicklingError) else ""
    return f"{path} cannot be read as weights{cause}; is it damaged or of another format?"


def _is_pickled(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(1) in (b"P", b"\x80")  # A zip archive of torch.save, or its older format.


def _text_of(path: Path) -> str | None:
    """Return the first line of a text file, "" for an empty file, and None for any other file."""
    try:
        with path.open("rb") as file:
            start = file.read(64)
        text = start.decode("utf-8", "strict" if len(start) < 64 else "ignore")
    except (OSError, UnicodeDecodeError):
        return None
    lines = text.strip().splitlines()
    return None if any(not (c.isprintable() or c.isspace()) for c in text) else lines[0] if lines else ""


def _unwrap(loaded: Any, depth: int = 0) -> dict[str, "Tensor"]:
    """Return the dict from layer name to tensor in what a training script has saved; empty if there is none."""
    from torch import Tensor

    if not isinstance(loaded, dict) or depth > _DEEPEST_WRAPPER:
        return {}
    if loaded and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in loaded.items()):
        return dict(loaded)
    for name in _WRAPPERS:
        if found := _unwrap(loaded.get(name), depth + 1):
            return found
    # Parts of a model apart, such as {"backbone": ..., "head": ...}.
    parts = {str(name): _unwrap(part, _DEEPEST_WRAPPER) for name, part in loaded.items() if name not in _NO_MODEL}
    return {f"{name}.{key}": value for name, part in parts.items() for key, value in part.items()}


@contextmanager
def no_pickles() -> Iterator[None]:
    """Make `torch.load` read tensors only while the block runs, even where a library allows pickles."""
    before = os.environ.get(_WEIGHTS_ONLY)
    os.environ[_WEIGHTS_ONLY] = "1"
    try:
        yield
    finally:
        os.environ.pop(_WEIGHTS_ONLY)
        if before is not None:
            os.environ[_WEIGHTS_ONLY] = before
