"""Export a trained network to ONNX or torch.export, and keep the file only if its results match the network's."""

import contextlib
import dataclasses
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, fx, nn

from rfield import __version__
from rfield.segmentation.conventions import IMAGENET_MEAN, IMAGENET_STD
from rfield.segmentation.files.atomic import atomic_path
from rfield.segmentation.inference.onnx import load_onnx
from rfield.segmentation.models import ParsingNetwork
from rfield.segmentation.runs import Run
from rfield.surgery.fuse import Mode, fuse

MAX_DIFFERENCE = 1e-3
"""Maximum difference of two logits, divided by the range of all, between the exported network and the original."""
MIN_AGREEMENT = 0.999
"""Minimum share of pixels that both must label alike."""

# No side is a multiple of a stride plus 1; otherwise padding and crop would be traced as no-ops.
_TRACED = (98, 131)
_OTHER = (70, 61)
# Every side is a multiple of a stride plus 1.
_WHOLE = (97, 129)


@dataclasses.dataclass(frozen=True)
class Exported:
    """An exported file, and how well it matches the network."""

    path: Path
    size: tuple[int, int] | None
    """The only (height, width) in px that it accepts; None for any."""
    difference: float
    """Largest difference of two logits over the range of all."""
    agreement: float
    """Share of pixels with the same label."""


def export_run(run: Run, out: str | Path, size: tuple[int, int] | None = None, mode: Mode = "resize") -> Exported:
    """Write a run's network, fused, as an ONNX (.onnx) or torch.export (.pt2) file for batches of any size.

    The input `image` is float32 [N, 3, H, W], normalised by ImageNet's mean and deviation; the output `logits` is
    [N, K, H, W]. The file's metadata (`rfield.json` in a .pt2 file) has the class names, the palette, the
    normalisation and the working size. The file gets its name only if the results of ONNX Runtime, or of the loaded
    program, match the network's on images of several sizes, alone and in a batch.

    Args:
        run: the trained network.
        out: the file to create; an earlier one is replaced.
        size: the only (height, width) in px to accept. None means any size, or the run's working size if the network
            has resizes of fixed factors, because graphs cannot express their size arithmetic.
        mode: see `rfield.fuse`.

    Raises:
        ValueError: if the network cannot be exported or differs, if a size is needed, or if a package is missing.
        OSError: if the file cannot be written.
    """
    out = Path(out)
    # Tracing works on a copy on the CPU; the caller's network stays on its device.
    network = fuse(run.network, mode).cpu().eval()
    if not isinstance(network, ParsingNetwork):
        raise ValueError(f"{type(network).__name__} is not a network of rfield.segmentation.models")
    size = size or _needed_size(run, network)
    batches = _batches(network, size)
    notes = _notes(run)
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(out) as partial:
        program = _trace(network if out.suffix == ".onnx" else _Cropping(network), batches[0], dynamic=size is None)
        if out.suffix == ".onnx":
            write_onnx(program, notes, partial)
        else:
            _write_program(program, notes, partial)
        difference, agreement = compare(network, read_exported(partial), batches)
        _judge(out, difference, agreement)
    return Exported(out, size, difference, agreement)


def write_onnx(program: torch.export.ExportedProgram, notes: dict[str, str], path: Path) -> None:
    """Write a traced network and its metadata as one ONNX file.

    Raises:
        ValueError: if it cannot be translated, or a package is missing.
    """
    try:
        with quiet_exporters():
            onnx = torch.onnx.export(
                program, input_names=["image"], output_names=["logits"], dynamo=True, verbose=False
            )
    except ImportError as error:
        raise ValueError(f"ONNX needs a package ({error}): pip install 'rfield[export]'") from error
    except Exception as error:  # the exporter has many types of exceptions
        raise ValueError(f"the network cannot be translated to ONNX: {error}") from error
    if onnx is None:
        raise ValueError("the network cannot be translated to ONNX")
    onnx.model.metadata_props.update(notes)
    onnx.save(str(path))


def _write_program(program: torch.export.ExportedProgram, notes: dict[str, str], path: Path) -> None:
    try:
        with quiet_exporters():
            torch.export.save(program, path, extra_files={"rfield.json": json.dumps(notes)})
    except OSError:
        raise
    except Exception as error:  # such as size arithmetic that the format cannot express
        cause = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise ValueError(
            f"the traced network cannot be saved as .pt2 ({cause}); try .onnx or --size HEIGHTxWIDTH"
        ) from error


def read_exported(path: Path) -> Callable[[Tensor], Tensor]:
    """Return a function that runs a file: images Tensor[N, 3, H, W] to logits Tensor[N, K, H, W]."""
    if path.suffix == ".onnx":
        return load_onnx(path)
    loaded = torch.export.load(path).module()
    return lambda images: loaded(images)


def compare(
    network: Callable[[Tensor], Tensor], exported: Callable[[Tensor], Tensor], batches: list[Tensor]
) -> tuple[float, float]:
    """Return the largest difference of two logits over their range, and the share of pixels with the same label.

    >>> network = torch.nn.Conv2d(3, 4, 1)
    >>> compare(network, lambda images: network(images), [torch.randn(1, 3, 5, 5)])
    (0.0, 1.0)
    """
    difference, same, pixels = 0.0, 0, 0
    with torch.no_grad():
        for images in batches:
            wanted, got = network(images), exported(images)
            if got.shape != wanted.shape:
                return float("inf"), 0.0
            spread = float(wanted.max() - wanted.min()) or 1.0
            # NaN counts as infinite, because it compares with nothing.
            gap = float((got - wanted).abs().max().nan_to_num(nan=float("inf"))) / spread
            difference = max(difference, gap)
            same += int((got.argmax(1) == wanted.argmax(1)).sum())
            pixels += wanted[:, 0].numel()
    return difference, same / pixels


def _judge(out: Path, difference: float, agreement: float) -> None:
    if not (difference < MAX_DIFFERENCE and agreement > MIN_AGREEMENT):
        raise ValueError(
            f"{out} was not kept: its logits differ from the network's by {difference:.2g} of their range (at most "
            f"{MAX_DIFFERENCE:g}), and {agreement:.2%} of the pixels get the same label (more than {MIN_AGREEMENT:.1%})"
        )


class _Cropping(nn.Module):
    """A network whose logits are cropped into new memory.

    A view could be contiguous or not, and torch.export would require every image to be like the traced one.
    """

    def __init__(self, network: ParsingNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        padded = self.network.pad(image)
        logits = self.network.logits(padded, output_size=(padded.shape[-2], padded.shape[-1]))
        for axis in (2, 3):
            logits = logits.index_select(axis, torch.arange(image.shape[axis], device=logits.device))
        return logits


def _needed_size(run: Run, network: ParsingNetwork) -> tuple[int, int] | None:
    """Return the size that the network needs its images to have, or None for any."""
    if not any(isinstance(module, fx.GraphModule) and "factor" in module.meta for module in network.modules()):
        return None
    size = run.size or run.config.model.canvas
    if size is None:
        raise ValueError(
            "the regulator's resizes are exported for one size of image: give --size HEIGHTxWIDTH, or --mode dilation "
            "for the nearest dilations and any size"
        )
    return size


def _batches(network: ParsingNetwork, size: tuple[int, int] | None) -> list[Tensor]:
    """Return images for tracing and comparing: batches of two and one, of several sizes if any size is accepted."""
    generator = torch.Generator().manual_seed(0)
    least = network.min_size
    # One size below the size to which images are padded, if there is one, and one above.
    other = _OTHER if max(least) <= min(_OTHER) else (least[0] + 9, least[1] + 6)
    sizes = [_TRACED, other, _WHOLE] if size is None else [size, size]
    return [torch.randn(2 - index % 2, 3, *each, generator=generator) for index, each in enumerate(sizes)]


def _trace(network: nn.Module, images: Tensor, dynamic: bool) -> torch.export.ExportedProgram:
    axes = (0, 2, 3) if dynamic else (0,)
    try:
        with quiet_exporters():
            return torch.export.export(
                network, (images,), dynamic_shapes={"image": dict.fromkeys(axes, torch.export.Dim.DYNAMIC)}
            )
    except Exception as error:  # tracing runs the backbone's own code
        hint = "; try --size HEIGHTxWIDTH" if dynamic else ""
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"the network cannot be traced by torch.export ({first}){hint}") from error


def _notes(run: Run) -> dict[str, str]:
    """Return the metadata that a user of the file needs, as JSON, because ONNX metadata are text."""
    values = {
        "class_names": run.class_names,
        "palette": run.palette,
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "size": run.size,
        "rfield": __version__,
    }
    return {name: json.dumps(value) for name, value in values.items()}


@contextlib.contextmanager
def quiet_exporters() -> Iterator[None]:
    """Silence the exporters' logging, warnings and stdout within the block."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
