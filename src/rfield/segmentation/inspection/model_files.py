"""Build a model from a user's own Python file: FILE.py:NAME on the command line. This runs the file."""

import difflib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn


def build_from_file(file: str, name: str) -> nn.Module:
    """Run a Python file, and return what its function or class NAME makes when it is called without arguments.

    The file can import modules beside it and in the current folder. It has all rights of the user: call this only for
    a file that the user named.

    Args:
        file: path of the Python file.
        name: of a function or class without required arguments, or of a model.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file cannot be run, or NAME is missing, needs arguments, fails, or makes no model.
    """
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if not name:
        raise ValueError(f"{file} names no model: give {file}:NAME, a function or class without arguments")
    module = _run(path)
    if not hasattr(module, name):
        own = [key for key, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
        near = difflib.get_close_matches(name, own, n=3) or own
        hint = f"it has {', '.join(near[:8])}" if near else "it has no function or class"
        raise ValueError(f"{path} has no {name}; {hint}")
    found = getattr(module, name)
    if not isinstance(found, nn.Module):
        _check_callable(file, name, found)
        found = _called(f"{file}:{name} cannot be called", found)
    if not isinstance(found, nn.Module):
        raise ValueError(f"{file}:{name} makes a {type(found).__name__}, and not an nn.Module")
    return found


def _run(path: Path) -> ModuleType:
    """Return the file as a module."""
    for folder in (Path.cwd(), path.resolve().parent):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    spec = importlib.util.spec_from_file_location(f"_model_file_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    _called(f"{path} cannot be run", spec.loader.exec_module, module)
    return module


def _check_callable(file: str, name: str, found: Any) -> None:
    if not callable(found):
        raise ValueError(f"{file}:{name} is a {type(found).__name__}, and not a function, class or nn.Module")
    try:
        parameters = inspect.signature(found).parameters.values()
    except ValueError:  # of some built-in classes
        return
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [each.name for each in parameters if each.default is each.empty and each.kind not in optional]
    if needed:
        raise ValueError(
            f"{file}:{name} needs {', '.join(needed)}: name a function that calls it, "
            f"such as `def build(): return {name}(...)`"
        )


def _called(failure: str, function: Callable[..., Any], *args: Any) -> Any:
    """Call a function of the user; its errors, of any type, become one line."""
    try:
        return function(*args)
    except (Exception, SystemExit) as error:
        reason = next(iter(str(error).strip().splitlines()), "")
        raise ValueError(f"{failure}: {type(error).__name__}: {reason}") from error
