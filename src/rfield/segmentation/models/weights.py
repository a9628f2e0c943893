"""Weights of a file, compared with the layers that they are for."""

import itertools
import re
from collections.abc import Callable, Collection, Mapping

from torch import Tensor

# Prefixes before a layer's name have at most this many dots.
_DEEPEST = 3


def state_dict_mismatches(
    state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], optional: Collection[str]
) -> list[str]:
    """Return what is wrong with a file's weights: keys that are missing or unknown, and shapes that differ.

    Args:
        state: the file's weights.
        shapes: the layers' shapes, by key.
        optional: further keys that the file may hold.
    """
    faults = [f"missing {key}" for key in shapes if key not in state]
    faults += [f"unknown {key}" for key in state if key not in shapes and key not in optional]
    return faults + [
        f"{key} has shape {tuple(state[key].shape)} instead of {shape}"
        for key, shape in shapes.items()
        if key in state and tuple(state[key].shape) != shape
    ]


def fit_keys(
    state: Mapping[str, Tensor], wanted: Collection[str], plain: Callable[[str], str] = str
) -> tuple[dict[str, Tensor], list[str]]:
    """Remove the prefix that a wrapper has put before the layers' names, such as `module.`.

    Args:
        state: the file's weights.
        wanted: the names of the layers.
        plain: maps a name in the file to what is compared with `wanted`.

    Returns:
        The weights under the prefix that fits most of the wanted names, without the prefix; and the other names.

    >>> import torch
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
