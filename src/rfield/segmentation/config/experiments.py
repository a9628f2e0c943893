"""The configs of the commands that train several networks, or one for show. Imports nothing but Python."""

import dataclasses
import re
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, Literal

from rfield.segmentation.config.options import Config, Options, option
from rfield.segmentation.config.train import Search, TrainConfig
from rfield.segmentation.config.values import Integers, Names, not_negative, positive


@dataclasses.dataclass
class GridOptions(Options):
    """The runs: their dilations and seeds, and how they are worked off."""

    dilations: Integers = option(Integers((1, 2, 4, 6, 8, 10, 12, 14, 18, 24)), parse=Integers, check=positive)
    """Dilations to train at, such as 2,6,14."""
    seeds: Integers = option(Integers(0), parse=Integers, check=not_negative)
    """Seeds to train each dilation with, such as 0,1,2."""
    jobs: int = option(1, check=positive)
    """Runs at a time, each with its share of the processor's cores."""
    storage: str | None = None
    """Where the trials are kept: the URL of a database, such as postgresql+psycopg://USER@HOST/DATABASE, that several
    machines may share (the study is named after the last part of `out`). Default: the file study.journal in `out`."""


@dataclasses.dataclass
class TuneOptions(GridOptions):
    """The searches, and the grid that verifies them."""

    dilations: Integers = option(GridOptions.dilations, parse=Integers, check=positive)
    """With verify: dilations of the grid; the recommended and the present dilation are added."""
    seeds: Integers = option(Integers((0, 1, 2)), parse=Integers, check=not_negative)
    """Seeds to repeat the search with; the answer's spread is over them."""
    present_dilation: int | None = option(None, check=positive)
    """The network's dilation now; the gain is measured against it. Default: the model's own."""
    verify: bool = False
    """Train a grid of fixed dilations too, and compare."""
    select: Names | None = option(None, parse=Names)
    """With a model FILE.py:NAME: names or patterns of the convolutions to learn. Default: those with a dilation above
    1."""
    share: Literal["parallel", "layer", "stage"] | None = None
    """With a model FILE.py:NAME: which convolutions keep the ratios of their dilations: the parallel ones of a list,
    those of a layer or of a stage. Default: none."""


@dataclasses.dataclass
class ReproduceOptions(GridOptions):
    """The grid, and the pictures."""

    dilations: Integers = option(Integers((2, 4, 6, 8, 10, 12, 14, 18, 24)), parse=Integers, check=positive)
    """Dilations of the grid; those of the bad starts, 14 (436 px) and 6 (308 px), are added."""
    images: int = option(4, check=positive)
    """Validation images in each picture."""


@dataclasses.dataclass(init=False)
class SweepConfig(Config):
    """One training run for every dilation and seed. `train` holds what they share; its `out` is the folder of all."""

    train: TrainConfig
    grid: GridOptions

    defaults: ClassVar[Mapping[str, Any]] = {"search": "none"}
    fixed: ClassVar[Collection[str]] = ("dilation", "seed", "devices", "resume", "gates")

    def check(self) -> None:
        if self.train.run.report == "live":
            raise ValueError("report live is for train; the reports of other commands are written at the end")

    def plain(self) -> dict[str, Any]:
        """Return all values in plain types, for a file: without the database's password."""
        return {**super().plain(), "storage": self.grid.storage and without_password(self.grid.storage)}

    def run_config(self, out: str, dilation: int, seed: int, search: Search) -> TrainConfig:
        """Return the config of one run, which is resumed if its folder holds a part of it; it writes no report."""
        return self.train.replace(out=out, dilation=dilation, seed=seed, search=search, resume=True, report="none")


@dataclasses.dataclass(init=False)
class TuneConfig(SweepConfig):
    """Search for the receptive field that a network should have, with its backbone frozen."""

    grid: TuneOptions

    # Only the curve of the search counts: it takes all steps, and reads the whole range.
    defaults: ClassVar[Mapping[str, Any]] = {
        "search": "sampled",
        "search_share": 1.0,
        "search_narrowing": False,
        "freeze_backbone": True,
        "epochs": 10,
    }
    fixed: ClassVar[Collection[str]] = (
        *(*SweepConfig.fixed, "search", "search_narrowing", "freeze_backbone", "aspp", "extra_paths"),
        *("save_search_weights",),
    )

    def check(self) -> None:
        super().check()
        if self.train.model.paths != 1 and (self.grid.verify or self.train.search.class_groups):
            raise ValueError("tune of several paths has neither verify nor class_groups")

    def run_config(self, out: str, dilation: int, seed: int, search: Search) -> TrainConfig:
        config = super().run_config(out, dilation, seed, search)
        # A set is found in windows that become narrower, and the logits of several paths at once.
        return config.replace(search_narrowing=True) if config.model.paths != 1 else config


@dataclasses.dataclass(init=False)
class ReproduceConfig(SweepConfig):
    """The experiments of Wei et al. (CVPR 2017): the grid by hand, and learning from two bad starts."""

    grid: ReproduceOptions

    # The paper trains the backbone too.
    defaults: ClassVar[Mapping[str, Any]] = {"search": "none", "freeze_backbone": True, "epochs": 10}
    fixed: ClassVar[Collection[str]] = (*SweepConfig.fixed, "search")


@dataclasses.dataclass
class DemoConfig(Options):
    """Learning a receptive field from a bad start, on the images that the package ships."""

    out: str = "runs/demo"
    """The run folder; an earlier demo in it is replaced."""
    dilation: int = option(1, check=positive)
    """Dilation to start from, and that of the network before."""
    epochs: int = option(40, check=positive)
    """Passes over the training images."""
    seed: int = option(0, check=not_negative)
    """Seed of all randomness."""
    report: Literal["none", "end"] = "end"
    """When report.html is written in the folder `out`: none, or end."""


def without_password(url: str) -> str:
    """Return a database's URL without its password.

    >>> without_password("postgresql+psycopg://ann:secret@db/sweeps"), without_password("sqlite:///sweep.db")
    ('postgresql+psycopg://ann:***@db/sweeps', 'sqlite:///sweep.db')
    """
    return re.sub(r"(://[^/@:]*):[^/@]*@", r"\1:***@", url)
