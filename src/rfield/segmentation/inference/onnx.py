"""Label images and score data sets with an ONNX file of `rfield export`, through ONNX Runtime."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rfield.segmentation.conventions import Progress
from rfield.segmentation.data import ParsingDataset, evaluation_transform, match_classes
from rfield.segmentation.inference.predict import label_images, score
from rfield.segmentation.runs import read_classes
from rfield.text import counted


@dataclasses.dataclass(frozen=True)
class OnnxModel:
    """A network in ONNX Runtime, with the metadata of its file."""

    path: Path
    session: Any
    class_names: tuple[str, ...]
    palette: list[tuple[int, int, int]]
    size: tuple[int, int] | None
    """(height, width) in px to which images are resized first, if the data set had a size."""
    fixed_size: tuple[int, int] | None
    """The only (height, width) in px that the network accepts; None for any."""

    def __call__(self, images: Tensor) -> Tensor:
        """Map normalised float32 images Tensor[N, 3, H, W] to logits Tensor[N, K, H, W], on the CPU.

        Raises:
            ValueError: if the network does not accept images of this size.
        """
        self.check_size(images)
        values = self.session.run(["logits"], {"image": images.detach().cpu().contiguous().numpy()})
        return torch.from_numpy(values[0])

    def check_size(self, images: Tensor) -> None:
        """Raise a ValueError if the network does not accept images of this size."""
        height, width = images.shape[-2:]
        if self.fixed_size not in (None, (height, width)):
            side, other = self.fixed_size or (0, 0)
            raise ValueError(
                f"an image of {height}x{width} px, but {self.path} accepts only {side}x{other} px: resize images "
                f"to that size, or export the run with --size {height}x{width}"
            )


def load_onnx(path: str | Path) -> OnnxModel:
    """Open an ONNX file of `rfield export`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not an ONNX file of rfield's, or onnxruntime is missing.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no model {path}")
    try:
        import onnxruntime  # imported here, because run folders do not need it
    except ImportError as error:
        raise ValueError(f"{path} needs the package onnxruntime: pip install 'rfield[export]'") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime has many types of exceptions
        raise ValueError(f"{path} cannot be read as an ONNX model: {error}") from error
    notes = session.get_modelmeta().custom_metadata_map
    try:
        texts = {name: json.loads(notes[name]) for name in ("class_names", "palette", "size")}
        shape = session.get_inputs()[0].shape
        fixed = (shape[2], shape[3]) if isinstance(shape[2], int) and isinstance(shape[3], int) else None
    except (KeyError, IndexError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not a file of rfield export (its metadata lack {error})") from error
    class_names, palette, size = read_classes(texts, path)
    channels = session.get_outputs()[0].shape[1]
    if isinstance(channels, int) and channels != len(class_names):
        raise ValueError(
            f"{path} has {counted(len(class_names), 'class name')} for {counted(channels, 'channel')} of logits"
        )
    return OnnxModel(path, session, class_names, palette, size, fixed)


def predict_onnx(model: OnnxModel, images: Sequence[Path], out: Path) -> Iterator[Path]:
    """Label images, see `rfield.segmentation.inference.predict.label_images`."""
    yield from label_images(lambda image: model(image[None])[0], model.palette, model.size, images, out)


def evaluate_onnx(
    model: OnnxModel, dataset: ParsingDataset, progress: Progress, ignore_names: bool = False
) -> dict[str, Any]:
    """Score whole images, see `rfield.segmentation.inference.predict.evaluate`.

    Raises:
        ValueError: if the data set has other classes (see `rfield.segmentation.data.match_classes`), or the network
            does not accept the size of an image.
    """
    dataset = match_classes(dataset, model.class_names, ignore_names)
    transform = evaluation_transform()

    def label(index: int) -> tuple[Tensor, Tensor]:
        image, mask = transform(*dataset[index])
        try:
            return model(image[None])[0], mask
        except ValueError as error:
            raise ValueError(f"{dataset.ids[index]}: {error}") from error

    return score(label, len(model.class_names), dataset, progress)
