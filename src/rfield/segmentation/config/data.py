"""The flags of the commands that work on data sets alone. Imports nothing but Python."""

import dataclasses
from typing import Any, Literal


def parse_names(value: Any) -> tuple[str, ...]:
    """Names, none of them twice, from `train,val` or a list.

    >>> parse_names("train,val"), parse_names(["test"])
    (('train', 'val'), ('test',))
    """
    parts = value.split(",") if isinstance(value, str) else value
    names = tuple(part.strip() for part in parts if isinstance(part, str)) if isinstance(parts, list | tuple) else ()
    if not names or not all(names) or len(set(names)) < len(parts):
        raise ValueError(f"a list is names with commas, none of them twice, such as train,val, got {value!r}")
    return names


@dataclasses.dataclass
class CheckDataConfig:
    """Finding what would ruin a training, before it."""

    data: str = dataclasses.field(metadata={"positional": True})
    """What to check, as in train: voc:ROOT, camvid:ROOT, helen:ROOT, cityscapes:ROOT, folder:ROOT, synthetic, or a data
    config (a .yaml file)."""
    splits: tuple[str, ...] | None = dataclasses.field(default=None, metadata={"parse": parse_names})
    """Splits to check, such as train,val. Default: train and val, and test where there is one."""
    json: str | None = None
    """Where to write the findings too."""
    workers: int | None = None
    """Threads. Default: one for each core."""

    def __post_init__(self) -> None:
        self.splits = None if self.splits is None else parse_names(self.splits)
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers must be positive, got {self.workers}")


@dataclasses.dataclass
class ConvertConfig:
    """Bringing another data set of faces into the layout of Helen."""

    format: Literal["celebamask", "lapa"] = dataclasses.field(metadata={"positional": True})
    """What the source is: celebamask (CelebAMask-HQ) or lapa (LaPa)."""
    source: str = dataclasses.field(metadata={"positional": True})
    """The folder of the data set as it was downloaded."""
    target: str = dataclasses.field(metadata={"positional": True})
    """The folder to make, for --data helen:TARGET."""
