"""The flags of the commands that work on data sets alone. Imports nothing but Python."""

import dataclasses
from typing import Literal

from rfield.segmentation.config.options import Options, option
from rfield.segmentation.config.values import Names, positive


@dataclasses.dataclass
class CheckDataConfig(Options):
    """Finding what would spoil a training, before it."""

    data: str
    """Data set to check, as in train: voc:ROOT, camvid:ROOT, helen:ROOT, cityscapes:ROOT, folder:ROOT, synthetic, or a
    data config (a .yaml file)."""
    splits: Names | None = option(None, parse=Names)
    """Splits to check, such as train,val. Default: train and val, and test if there is one."""
    json: str | None = None
    """File to write the findings to as well."""
    workers: int | None = option(None, check=positive)
    """Threads. Default: one for each core."""


@dataclasses.dataclass
class ConvertConfig(Options):
    """Converting another data set of faces to the layout of Helen."""

    format: Literal["celebamask", "lapa"]
    """Format of the source: celebamask (CelebAMask-HQ) or lapa (LaPa)."""
    source: str
    """Folder of the data set as it was downloaded."""
    target: str
    """Folder to make, for --data helen:TARGET."""
