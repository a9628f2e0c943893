"""The flags of the commands that use a trained network or bring it to its users. Imports nothing but Python."""

import dataclasses
from pathlib import Path
from typing import Literal

from rfield.segmentation.config.train import parse_size


@dataclasses.dataclass
class EvaluateConfig:
    """Scoring a trained network."""

    run: str = dataclasses.field(metadata={"positional": True})
    """A run folder, an .onnx file of rfield export, or a model on the Hugging Face Hub (hf:USER/NAME)."""
    data: str | None = None
    """What to score on, as in train; any data of the same classes. Default: what the run was trained on."""
    ignore_class_names: bool = False
    """Score classes by position where `data` has other names for them; the same names in another order are matched
    otherwise."""
    split: str = "val"
    """Split to score."""
    checkpoint: Literal["last", "best"] = "last"
    """Which of the run's checkpoints."""
    json: str | None = None
    """Where to write the scores. Default: evaluation-SPLIT.json in the run folder, or beside the file."""


@dataclasses.dataclass
class PredictConfig:
    """Labelling images."""

    run: str = dataclasses.field(metadata={"positional": True})
    """A run folder, an .onnx file of rfield export, or a model on the Hugging Face Hub (hf:USER/NAME)."""
    images: str = dataclasses.field(metadata={"positional": True})
    """An image, a folder of images, or a glob in quotes."""
    out: str = "out"
    """Folder for the masks and overlays."""
    checkpoint: Literal["last", "best"] = "last"
    """Which of the run's checkpoints."""
    memory_budget: float | None = None
    """GiB that the maps of one image may take; a larger image is labelled in tiles, with the same result. Default: 2.
    An .onnx file labels whole images."""

    def __post_init__(self) -> None:
        if self.memory_budget is not None and not self.memory_budget > 0:
            raise ValueError(f"memory_budget must be positive, got {self.memory_budget}")
        if self.memory_budget is not None and self.run.endswith(".onnx"):
            raise ValueError(f"memory_budget is for run folders: {self.run} labels whole images")


@dataclasses.dataclass
class FuseConfig:
    """Turning a trained network into a plain one."""

    run: str = dataclasses.field(metadata={"positional": True})
    """A run folder."""
    out: str = dataclasses.field(kw_only=True)
    """The folder to make: a run folder for predict and evaluate, with the weights in model.safetensors."""
    mode: Literal["resize", "dilation"] = "resize"
    """What becomes of a regulator that is not snapped: resize (fixed resizes, exact) or dilation (the nearest whole
    dilations). After a search has ended both give the same."""
    checkpoint: Literal["last", "best"] = "last"
    """Which of the run's checkpoints."""
    data: str | None = None
    """What to score both networks on, as in train. Default: nothing is scored."""
    ignore_class_names: bool = False
    """As in evaluate."""
    split: str = "val"
    """Split to score."""


@dataclasses.dataclass
class ExportConfig:
    """Bringing a trained network into a file for other runtimes."""

    run: str = dataclasses.field(metadata={"positional": True})
    """A run folder; learned layers are fused first."""
    out: str = dataclasses.field(kw_only=True)
    """The file to make: .onnx, or .pt2 for torch.export. An earlier one is replaced."""
    size: tuple[int, int] | None = dataclasses.field(default=None, metadata={"parse": parse_size})
    """The one (height, width) of image that the file takes. Default: any size, where the network has no fixed
    resizes."""
    mode: Literal["resize", "dilation"] = "resize"
    """As in fuse."""
    checkpoint: Literal["last", "best"] = "last"
    """Which of the run's checkpoints."""
    int8: bool = False
    """Compute in whole numbers of 8 bits (.onnx), calibrated on training images of `data`."""
    data: str | None = None
    """What to calibrate and score int8 on, as in train."""
    ignore_class_names: bool = False
    """As in evaluate."""
    split: str = "val"
    """Split to score."""
    calibration_images: int = 32
    """How many training images int8 is calibrated on."""

    def __post_init__(self) -> None:
        self.size = None if self.size is None else parse_size(self.size)
        if Path(self.out).suffix not in (".onnx", ".pt2"):
            raise ValueError(f"out must end in .onnx or .pt2, got {self.out}")
        if self.int8 and (self.data is None or Path(self.out).suffix != ".onnx"):
            raise ValueError("int8 needs data to be calibrated on, and an .onnx file as out")
        if self.calibration_images < 1:
            raise ValueError(f"calibration_images must be positive, got {self.calibration_images}")


@dataclasses.dataclass
class PushConfig:
    """Bringing a trained network to the Hugging Face Hub."""

    run: str = dataclasses.field(metadata={"positional": True})
    """A run folder; learned layers are fused first."""
    repo_id: str = dataclasses.field(metadata={"positional": True})
    """The model's name on the Hub, USER/NAME."""
    checkpoint: Literal["last", "best"] = "last"
    """Which of the run's checkpoints."""
    private: bool = False
    """Make the repository private, if it is new."""
