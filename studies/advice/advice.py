"""Advice on the receptive fields of 17 models of four libraries, at three sizes of images.

    PYTHONPATH=. python studies/advice/advice.py studies/advice/advice.json

The models are those of studies/matrix, with random weights; nothing is downloaded. The file holds the layers that the
advice reads (those with a kernel of more than one pixel, and the output), and the advice for each size. Layers in it
are kept, the advice is made anew.
"""

import argparse
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import torch

from rfield.receptive_field.advice import field_advice, find_pyramids
from rfield.receptive_field.per_layer import LayerField, layer_receptive_fields

SIZES = ((96, 96), (256, 256), (513, 513))


def plain(layer: LayerField) -> list[Any]:
    """Return a layer's values, with null for infinite ones."""

    def finite(value: Any) -> Any:
        if isinstance(value, tuple):
            return [finite(each) for each in value]
        return None if isinstance(value, float) and math.isinf(value) else value

    return [finite(value) for value in dataclasses.astuple(layer)]


def restored(values: list[Any]) -> LayerField:
    """Return the layer of `plain`'s values; only strides, spacings and fields can be infinite."""
    kernel, dilation, spacing = (None if values[place] is None else tuple(values[place]) for place in (2, 3, 5))
    stride, field, local = (tuple(math.inf if side is None else side for side in values[place]) for place in (4, 6, 7))
    spacing = spacing and tuple(math.inf if side is None else side for side in spacing)
    return LayerField(values[0], values[1], kernel, dilation, stride, spacing, field, local, *values[8:])


def advise(layers: list[LayerField]) -> dict[str, Any]:
    """Return what the library says about layers."""
    return {
        "pyramids": [pyramid.name for pyramid in find_pyramids(layers)],
        "advice": {
            "x".join(map(str, size)): [dataclasses.astuple(each) for each in field_advice(layers, size)]
            for size in SIZES
        },
    }


def main() -> None:
    from studies.matrix.matrix import MODELS

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    found = json.loads(out.read_text()) if out.is_file() else {}
    for name, (build, side, _) in MODELS.items():
        if name not in found:
            torch.manual_seed(0)
            layers = layer_receptive_fields(build().eval(), size=(side, side))
            found[name] = {"layers": [plain(each) for each in layers if each.kernel is None or max(each.kernel) > 1]}
        found[name] |= advise([restored(values) for values in found[name]["layers"]])
        rows = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in found.items())
        out.write_text(f"{{\n{rows}\n}}\n")
        print(name, {size: len(each) for size, each in found[name]["advice"].items()}, flush=True)


if __name__ == "__main__":
    main()
