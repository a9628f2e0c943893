"""Small devkits in the layout of PASCAL VOC, and small ONNX files."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from rfield.segmentation.data import voc_palette


@pytest.fixture
def make_devkit(tmp_path: Path) -> Callable[..., Path]:
    """Write a devkit of images of 12x16 px (height x width) and return its root; `classes` None: no classes.txt."""

    def make(
        lists: dict[str, Sequence[str]] | None = None,
        classes: Sequence[str] | None = ("road", "car", "sky"),
        values: Sequence[int] = (0, 1, 2, 255),
    ) -> Path:
        root = tmp_path / "devkit"
        for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
            (root / folder).mkdir(parents=True)
        if classes is not None:
            (root / "classes.txt").write_text("".join(f"{name}\n" for name in classes))
        random = np.random.default_rng(0)
        for split, names in (lists or {"train": ["a", "b"], "val": ["c"]}).items():
            (root / f"ImageSets/Segmentation/{split}.txt").write_text("".join(f"{name}\n" for name in names))
            for name in names:
                image = PIL.Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8))
                image.save(root / f"JPEGImages/{name}.jpg")
                mask = PIL.Image.fromarray(random.choice(values, (12, 16)).astype(np.uint8))
                mask.putpalette([level for colour in voc_palette() for level in colour])
                mask.save(root / f"SegmentationClass/{name}.png")
        return root

    return make


@pytest.fixture
def onnx_file(tmp_path: Path) -> Callable[[Sequence[str]], Path]:
    """Write an ONNX file as `rfield export` does, but of one layer; an export of a real network takes seconds."""

    def make(class_names: Sequence[str]) -> Path:
        onnx = pytest.importorskip("onnx")
        helper, kind, count = onnx.helper, onnx.TensorProto.FLOAT, len(class_names)
        weights = np.random.default_rng(0).normal(size=(count, 3, 1, 1)).astype(np.float32)
        sides = [
            helper.make_tensor_value_info(name, kind, ("N", channels, "H", "W"))
            for name, channels in (("image", 3), ("logits", count))
        ]
        layer = helper.make_node("Conv", ["image", "weights"], ["logits"])
        graph = helper.make_graph(
            [layer], "network", sides[:1], sides[1:], [onnx.numpy_helper.from_array(weights, "weights")]
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        notes = {"class_names": class_names, "palette": [(level, level, level) for level in range(256)], "size": None}
        helper.set_model_props(model, {name: json.dumps(value) for name, value in notes.items()})
        onnx.save(model, tmp_path / "model.onnx")
        return tmp_path / "model.onnx"

    return make
