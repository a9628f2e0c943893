"""The command that repeats a run."""

import dataclasses
import json
import shlex
from typing import Any, TypeVar

from rfield.segmentation.config.options import Config

_AnyConfig = TypeVar("_AnyConfig", bound=Config)


def command_of(command: str, config: Config) -> str:
    """Return the command line of a config: its options that differ from the defaults, in lines of one flag each.

    >>> from rfield.segmentation.config.train import TrainConfig
    >>> print(command_of("train", TrainConfig(data="my data", out="runs/x", crop_size=(129, 65), flip=False)))
    rfield train --data 'my data' --out runs/x \\
      --crop-size 129x65 \\
      --no-flip
    """
    required, words = [], []
    defaults = {
        field.name: config.defaults.get(field.name, field.default)
        for group in config.groups().values()
        for field in dataclasses.fields(group)  # type: ignore[arg-type]
    }
    for name, value in config.flat().items():
        if name in config.fixed or name == "resume":
            continue
        if defaults[name] is dataclasses.MISSING:
            required.append(_flag(name, value))
        elif value is not None and value != defaults[name]:
            words.append(_flag(name, value))
    return " \\\n  ".join([" ".join([f"rfield {command}", *required]), *words])


def without_places(config: _AnyConfig) -> _AnyConfig:
    """Return a config without the files and folders of a machine, for a report that others will read."""
    values = config.flat()
    published = values["weights"] in (None, "imagenet", "random")
    weights = values["weights"] if published else "WEIGHTS"
    storage = {"storage": None} if "storage" in values else {}
    return config.replace(data="DATA", out="OUT", cache=None, weights=weights, **storage)


def _flag(name: str, value: Any) -> str:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    if isinstance(value, list | dict):
        text = json.dumps(value)
    elif isinstance(value, tuple) and type(value) is tuple:  # class weights
        text = ",".join(map(repr, value))
    else:
        text = str(value)
    return f"--{flag} {shlex.quote(text)}" if not text.startswith("-") else f"--{flag}={shlex.quote(text)}"
