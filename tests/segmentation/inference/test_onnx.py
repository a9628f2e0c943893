"""ONNX files of `rfield export` are opened with their notes."""

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from rfield.segmentation.inference.onnx import load_onnx


def write_file(path: Path, height: Any, width: Any, **notes: str) -> None:
    """An ONNX file of one channel: the largest of the image's."""
    make, kind = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    node = onnx.helper.make_node("ReduceMax", ["image"], ["logits"], axes=[1])
    ends = [make("image", kind, (1, 3, height, width))], [make("logits", kind, (1, 1, height, width))]
    graph = onnx.helper.make_graph([node], "x", *ends)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8)
    onnx.helper.set_model_props(model, {"class_names": '["a"]', "palette": "[[0, 0, 9]]", "size": "null"} | notes)
    onnx.save(model, path)


def test_files_are_opened_with_their_notes(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    for height, width, expected in (("H", 8, None), (6, "W", None), (6, 8, (6, 8))):
        write_file(path, height, width)
        assert load_onnx(path).fixed_size == expected
    model, image = load_onnx(path), torch.randn(1, 3, 6, 8)
    assert (model.class_names, model.palette, model.size) == (("a",), [(0, 0, 9)], None)
    assert torch.equal(model(image), image.amax(1, keepdim=True))
    for size in ((6, 9), (7, 8)):
        with pytest.raises(
            ValueError, match=f"an image of {size[0]}x{size[1]} px, but .* accepts only 6x8 px: .* --size"
        ):
            model(torch.randn(1, 3, *size))
    write_file(path, "H", "W", size="[12, 20]")
    assert load_onnx(path).size == (12, 20)
    for notes, message in (
        (
            {"class_names": '["a", "b"]', "palette": "[[0, 0, 0], [1, 1, 1]]"},
            "has 2 class names for 1 channel of logits",
        ),
        ({"class_names": "[", "palette": "[]"}, r"is not a file of rfield export \(its metadata lack "),
    ):
        write_file(path, 6, 8, **notes)
        with pytest.raises(ValueError, match=f"model.onnx {message}"):
            load_onnx(path)
    path.write_text("no model")
    with pytest.raises(ValueError, match=r"model\.onnx cannot be read as an ONNX model: "):
        load_onnx(path)
    with pytest.raises(FileNotFoundError, match=r"there is no model .*no\.onnx"):
        load_onnx(tmp_path / "no.onnx")
