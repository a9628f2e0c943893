"""The flags of the commands that work on data sets alone. Imports nothing but Python."""

import dataclasses
from typing import Literal

from rfield.segmentation.config.options import Options, option
from rfield.segmentation.config.values import Names, not_negative, positive


@dataclasses.dataclass
class CheckDataConfig(Options):
    """Finding what would spoil a training, before it."""

    data: str
    """Data set to check, as in train: voc:ROOT, camvid:ROOT, helen:ROOT, cityscapes:ROOT, ade20k:ROOT, pets:ROOT,
    coco:ROOT, folder:ROOT, hf:NAME, scenes, synthetic, or a data config (a .yaml file)."""
    splits: Names | None = option(None, parse=Names)
    """Splits to check, such as train,val. Default: train and val, and test if there is one."""
    json: str | None = None
    """File to write the findings to as well."""
    workers: int | None = option(None, check=positive)
    """Threads. Default: one for each core."""


@dataclasses.dataclass
class ConvertConfig(Options):
    """Converting other data to a layout that is read."""

    format: Literal["masks", "celebamask", "lapa"]
    """Kind of the source: masks (images with masks of colours, or with LabelMe files), celebamask (CelebAMask-HQ) or
    lapa (LaPa)."""
    source: str
    """Folder of the data."""
    target: str
    """Folder to make, for --data folder:TARGET (masks) or --data helen:TARGET."""
    colours: str | None = None
    """YAML or CSV file that gives each class its colour, for masks. Without it the colours found are listed, and
    nothing is written. LabelMe files need none."""
    val: float = 0.2
    """Share of the images for validation, for masks whose folders do not name a split val."""
    seed: int = option(0, check=not_negative)
    """Seed of the choice of these images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.val < 1:
            raise ValueError(f"val must lie between 0 and 1, got {self.val:g}")
        if self.format != "masks" and (self.colours, self.val, self.seed) != (None, 0.2, 0):
            raise ValueError(
                f"colours, val and seed are options of masks; {self.format} has classes and splits of its own"
            )


@dataclasses.dataclass
class DownloadConfig(Options):
    """Downloading a public data set."""

    name: Literal["voc2012", "oxford-pets", "camvid", "ade20k", "cityscapes", "helen", "celebamask-hq", "lapa"]
    """Name of the data set. The last four must be downloaded by hand; the command says where and how."""
    root: str
    """Folder to download to: the data get the folder ROOT/NAME and the data config ROOT/NAME.yaml."""
