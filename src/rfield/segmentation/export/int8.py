"""Export a network that computes with 8-bit integers."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rfield.segmentation.conventions import Progress
from rfield.segmentation.data import ParsingDataset, evaluation_transform, match_classes
from rfield.segmentation.export.onnx import Exported, export_run, quiet_exporters
from rfield.segmentation.files.atomic import atomic_path
from rfield.segmentation.inference.onnx import evaluate_onnx, load_onnx
from rfield.segmentation.runs import Run
from rfield.surgery.fuse import Mode


def export_int8(
    run: Run,
    out: str | Path,
    images: ParsingDataset,
    count: int,
    dataset: ParsingDataset,
    size: tuple[int, int] | None,
    mode: Mode,
    progress: Progress,
    ignore_names: bool = False,
) -> tuple[Exported, float, float]:
    """Write a run's network as ONNX (see `export_run`), and quantise its convolutions.

    Args:
        run, size, mode: see `export_run`.
        out: the .onnx file to create; an earlier one is replaced.
        images: the data set to calibrate on.
        count: number of its images that are used, evenly spaced.
        dataset: the data set to score.
        progress: called with (images done, all images).
        ignore_names: see `rfield.segmentation.data.match_classes`.

    Returns:
        The result of `export_run`, before quantisation; the mean IoU before and after it.

    Raises:
        ValueError: as `export_run` and `quantise` do, or if the data set has other classes, see
            `rfield.segmentation.data.match_classes`.
    """
    dataset = match_classes(dataset, run.class_names, ignore_names)
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, atomic_path(out) as small:
        plain = Path(folder, "plain.onnx")
        made = export_run(run, plain, size, mode)
        quantise(plain, small, images, count)
        before, after = (
            evaluate_onnx(load_onnx(path), dataset, progress, ignore_names)["miou"] for path in (plain, small)
        )
    return made, before, after


def quantise(source: Path, out: Path, images: ParsingDataset, count: int) -> None:
    """Write an ONNX file of `export_run` with the convolutions in 8 bits.

    The range of an activation is measured on the images (static quantisation); weights have one range for each channel.
    All other operations, such as the resizes, stay in float32.

    Args:
        source: the file to quantise.
        out: the file to create.
        images: the data set to calibrate on.
        count: number of its images that are used, evenly spaced.

    Raises:
        ValueError: if the network does not accept the size of an image, or the file cannot be quantised.
    """
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    batches = list(_calibration(source, images, count))
    prepared = out.with_name(f"{out.stem}.prepared.onnx")
    try:
        with quiet_exporters():
            quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
            quantization.quantize_static(
                str(prepared),
                str(out),
                _Reader(batches),
                op_types_to_quantize=["Conv"],
                per_channel=True,
                # 7 bits for weights, because sums of 8-bit products overflow on processors without VNNI.
                reduce_range=True,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
            )
    except Exception as error:  # the quantiser has many types of exceptions
        raise ValueError(f"the network cannot be quantised: {error}") from error
    finally:
        prepared.unlink(missing_ok=True)
    model = onnx.load(out)
    del model.metadata_props[:]
    model.metadata_props.extend(onnx.load(source).metadata_props)
    onnx.save(model, out)


class _Reader:
    """Give the quantiser its inputs, one by one."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = iter(batches)

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self.batches, None)
        return None if batch is None else {"image": batch}


def _calibration(source: Path, images: ParsingDataset, count: int) -> Iterator[Any]:
    model = load_onnx(source)
    transform = evaluation_transform()
    chosen = np.linspace(0, len(images) - 1, min(count, len(images))).round().astype(int).tolist()
    for index in chosen:
        image = transform(*images[index])[0][None]
        try:
            model.check_size(image)
        except ValueError as error:
            raise ValueError(f"{images.ids[index]}: {error}") from error
        yield image.numpy()
