"""The flags of the commands that use a trained network or ship it. Imports nothing but Python."""

import dataclasses
from pathlib import Path
from typing import Literal

from rfield.segmentation.config.options import Options, option
from rfield.segmentation.config.values import Numbers, Size, positive


@dataclasses.dataclass
class EvaluateConfig(Options):
    """Scoring a trained network."""

    run: str
    """A run folder, an .onnx file of rfield export, or a model on the Hugging Face Hub (hf:USER/NAME)."""
    data: str | None = None
    """Data set to score on, as in train; any with the same classes. Default: the one that the run was trained on."""
    ignore_class_names: bool = False
    """Score classes by position where `data` has other names for them. Without it, the same names in another order are
    matched, and other names are refused."""
    split: str = "val"
    """Split to score."""
    checkpoint: Literal["last", "best"] = "last"
    """Checkpoint of the run."""
    json: str | None = None
    """File to write the scores to. Default: evaluation-SPLIT.json in the run folder, or beside the .onnx file."""


@dataclasses.dataclass
class PredictConfig(Options):
    """Labelling images."""

    run: str
    """A run folder, an .onnx file of rfield export, or a model on the Hugging Face Hub (hf:USER/NAME)."""
    images: str
    """An image, a folder of images, or a glob in quotes."""
    out: str = "out"
    """Folder for the masks and overlays."""
    checkpoint: Literal["last", "best"] = "last"
    """Checkpoint of the run."""
    memory_budget: float | None = option(None, check=positive)
    """GiB that the maps of one image may take; a larger image is labelled in tiles, with the same result. Default: 2.
    An .onnx file labels whole images."""
    dilations: Numbers | None = option(None, parse=Numbers, check=positive)
    """Dilation of each learned path, such as 2,3,6,12, in place of those that were learned."""
    weights: Literal["final", "search"] = "final"
    """Weights: final, or search, those at the end of the sampled search, which work at all dilations."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.run.endswith(".onnx"):
            return
        if self.memory_budget is not None:
            raise ValueError(f"memory_budget is for run folders: {self.run} labels whole images")
        if self.dilations is not None or self.weights != "final":
            raise ValueError(f"dilations and weights are for run folders: {self.run} has fixed dilations")


@dataclasses.dataclass
class FuseConfig(Options):
    """Turning a trained network into a plain one."""

    run: str
    """A run folder."""
    out: str = dataclasses.field(kw_only=True)
    """Folder to make: a run folder for predict and evaluate, with the weights in model.safetensors."""
    mode: Literal["resize", "dilation"] = "resize"
    """What replaces a regulator that is not snapped: resize (fixed resizes, exact) or dilation (the nearest integer
    dilations). After a search has ended, both give the same."""
    checkpoint: Literal["last", "best"] = "last"
    """Checkpoint of the run."""
    data: str | None = None
    """Data set to score both networks on, as in train. Default: nothing is scored."""
    ignore_class_names: bool = False
    """As in evaluate."""
    split: str = "val"
    """Split to score."""


@dataclasses.dataclass
class ExportConfig(Options):
    """Writing a trained network to a file for other runtimes."""

    run: str
    """A run folder; learned layers are fused first."""
    out: str = dataclasses.field(kw_only=True)
    """File to make: .onnx, or .pt2 for torch.export. An earlier one is replaced."""
    size: Size | None = option(None, parse=Size)
    """The only image size in px that the file takes. Default: any size, if the network has no fixed resizes."""
    mode: Literal["resize", "dilation"] = "resize"
    """As in fuse."""
    checkpoint: Literal["last", "best"] = "last"
    """Checkpoint of the run."""
    int8: bool = False
    """Compute in 8-bit integers (.onnx), calibrated on training images of `data`."""
    data: str | None = None
    """Data set to calibrate and score int8 on, as in train."""
    ignore_class_names: bool = False
    """As in evaluate."""
    split: str = "val"
    """Split to score."""
    calibration_images: int = option(32, check=positive)
    """Number of training images to calibrate int8 on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if Path(self.out).suffix not in (".onnx", ".pt2"):
            raise ValueError(f"out must end in .onnx or .pt2, got {self.out}")
        if self.int8 and (self.data is None or Path(self.out).suffix != ".onnx"):
            raise ValueError("int8 needs data to be calibrated on, and an .onnx file as out")


@dataclasses.dataclass
class PushConfig(Options):
    """Uploading a trained network to the Hugging Face Hub."""

    run: str
    """A run folder; learned layers are fused first."""
    repo_id: str
    """Name of the model on the Hub, USER/NAME."""
    checkpoint: Literal["last", "best"] = "last"
    """Checkpoint of the run."""
    private: bool = False
    """Make the repository private, if it is new."""
    space: bool = False
    """Upload a Space, the page of rfield show for everybody, in place of a model."""


@dataclasses.dataclass
class ReportConfig(Options):
    """Writing a report of what was found."""

    path: str
    """The folder that train, demo, tune, sweep, reproduce or inspect wrote to, finished or not."""
    out: str | None = None
    """File to write; an earlier one is replaced. Default: report.html in the folder."""
    public: bool = False
    """Leave out images, file names and folders of the data, for a report that others will read."""
