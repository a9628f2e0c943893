"""The flags of `rfield inspect`, `show` and `doctor`. Imports nothing but Python."""

import dataclasses
from typing import Literal

from rfield.segmentation.config.options import Options, option
from rfield.segmentation.config.values import Size, not_negative, port_number


@dataclasses.dataclass
class InspectConfig(Options):
    """Measuring what a network sees."""

    model: str
    """Model: FILE.py:NAME, torchvision:NAME, smp:NAME or smp:NAME/ENCODER, timm:NAME, hf:ID, or a run folder.
    FILE.py:NAME runs the file, and then calls its function or class NAME without arguments."""
    out: str | None = None
    """Folder for inspect.json, layers.csv and effective.png. Default: nothing is written."""
    size: Size | None = option(None, parse=Size)
    """Size of the images in px. Default: the median size of the images of data, or 512."""
    data: str | None = None
    """Data set that the size and the images are taken from, as in `rfield train`."""
    split: str = "train"
    """Split of data."""
    weights: str | None = None
    """Weights of a model of torchvision, smp or timm, for the effective field: default (those that the library
    publishes; downloads them), or a .pth or .safetensors file of its state dict, as for FILE.py:NAME too. Default:
    random."""
    images: str | None = None
    """Images to measure the effective field on: a file, a folder or a glob in quotes. Default: those of data, or random
    noise."""
    count: int = option(4, check=not_negative)
    """Maximum number of images; 0 leaves the effective field out."""
    measure: Literal["luo", "replknet"] = "luo"
    """How contributions are counted: luo (absolute values of gradients), or replknet (as RepLKNet's published script
    counts them)."""
    against: str | None = None
    """Another model or run to draw beside it, as the state before. Default: for a run whose receptive field was
    learned, the same weights where its receptive field started."""
    against_weights: str | None = None
    """Weights of the other model, as in weights."""
    seed: int = 0
    """Seed of random weights and images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.against_weights is not None and self.against is None:
            raise ValueError("against_weights needs against, the model that they are of")
        if self.data is not None and self.images is not None:
            raise ValueError("data and images both name images: give one of them")


@dataclasses.dataclass
class ShowConfig(Options):
    """Moving the dilations of a network on a page."""

    run: str
    """A run folder, a model of rfield push (hf:USER/NAME), or, for the field part alone, a model as in inspect."""
    against: str | None = None
    """Another run or model to show beside it."""
    data: str | None = None
    """Data set to choose images from, as in train. Default: that of the run; without a run the shipped images."""
    split: str | None = None
    """Split of data. Default: the one that the run was validated on, or val."""
    weights: str | None = None
    """Weights of a model without a run, as in inspect."""
    checkpoint: Literal["last", "best"] = "last"
    """Checkpoint of the runs."""
    port: int | None = option(None, check=port_number)
    """Port of the page. Default: 7860, or a free one if that is taken."""
    host: str = "127.0.0.1"
    """Address that the page is served at. The default is reached from this machine alone."""


@dataclasses.dataclass
class DoctorConfig(Options):
    """Describing the environment."""
