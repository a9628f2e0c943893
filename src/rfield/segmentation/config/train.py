"""What a run is made of: dataclasses whose fields are the command line's flags. Imports nothing but Python."""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

Search = Literal["none", "gradient", "spsa", "sampled"]
Mechanism = Literal["regulator", "dilation"]
PathGuidance = Literal["search", "gradient"]
Optimizer = Literal["sgd", "adamw"]
Loss = Literal["cross_entropy", "focal", "dice"]

# Marks a field that a derived config decides by itself: it has no flag.
_FIXED = {"fixed": True}
# From here on a number is a slip, and would only fail later or fill the memory; 2^31 where nothing is said.
_LIMITS = {"paths": 256}


def parse_size(value: Any) -> tuple[int, int]:
    """(height, width) from `520x640`, `520` or a list of two.

    >>> parse_size("520x640"), parse_size(520), parse_size([520, 640])
    ((520, 640), (520, 520), (520, 640))
    """
    parts = value.lower().split("x") if isinstance(value, str) else value
    if isinstance(parts, int):
        parts = [parts]
    try:
        numbers = [int(part) for part in parts]
    except (TypeError, ValueError, OverflowError):
        numbers = []
    if len(numbers) == 1:
        numbers *= 2
    if len(numbers) != 2 or min(numbers) < 1:
        raise ValueError(f"a size is HEIGHTxWIDTH in px, such as 520x640, got {value!r}")
    return numbers[0], numbers[1]


def parse_range(value: Any) -> tuple[float, float]:
    """(low, high) from `0.5,2` or a list of two.

    >>> parse_range("0.5,2"), parse_range([1, 1])
    ((0.5, 2.0), (1.0, 1.0))
    """
    parts = value.split(",") if isinstance(value, str) else value
    try:
        low, high = (float(part) for part in parts)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"a range is LOW,HIGH, such as 0.5,2, got {value!r}") from None
    return low, high


def parse_ints(value: Any) -> tuple[int, ...]:
    """Whole numbers, none of them twice, from `2,6,14`, one number or a list.

    >>> parse_ints("2,6,14"), parse_ints(3), parse_ints([0, 1])
    ((2, 6, 14), (3,), (0, 1))
    """
    parts = value.split(",") if isinstance(value, str) else [value] if isinstance(value, int) else value
    try:
        numbers = [int(part) for part in parts]
        whole = all(number == float(part) for number, part in zip(numbers, parts, strict=True))
    except (TypeError, ValueError, OverflowError):
        numbers, whole = [], False
    if not whole or not numbers or len(set(numbers)) < len(numbers):
        raise ValueError(f"a list is whole numbers with commas, none of them twice, such as 2,6,14, got {value!r}")
    return tuple(numbers)


def parse_groups(value: Any) -> Any:
    """Class groups from `auto`, `small=eye,brow/large=skin,hair` (the names may be missing), JSON, a list or a dict.

    >>> parse_groups("small=eye,brow/large=skin"), parse_groups("eye,brow/skin"), parse_groups("auto")
    ({'small': ['eye', 'brow'], 'large': ['skin']}, [['eye', 'brow'], ['skin']], 'auto')
    """
    if not isinstance(value, str):
        groups = value
    elif value == "auto":
        return value
    else:
        try:
            groups = json.loads(value)
        except (json.JSONDecodeError, RecursionError):
            parts = [part.rpartition("=") for part in value.split("/")]
            lists = [[name.strip() for name in names.split(",")] for _, _, names in parts]
            names = [name.strip() for name, _, _ in parts]
            groups = dict(zip(names, lists, strict=True)) if all(names) else lists
    members = list(groups.values()) if isinstance(groups, dict) else groups
    if not isinstance(members, list) or not all(
        isinstance(group, list) and group and all(isinstance(name, str) and name for name in group) for group in members
    ):
        raise ValueError(f"class groups are auto or lists of names, such as small=eye,brow/large=skin, got {value!r}")
    return groups


def parse_class_weights(value: Any) -> str | tuple[float, ...] | None:
    """Class weights from `none`, `balanced`, `1,2.5,0.5` or a list of numbers.

    >>> parse_class_weights("1,2.5"), parse_class_weights("balanced"), parse_class_weights("none")
    ((1.0, 2.5), 'balanced', None)
    """
    if value in (None, "none", "balanced"):
        return "balanced" if value == "balanced" else None
    try:
        weights = tuple(float(part) for part in (value.split(",") if isinstance(value, str) else value))
    except (TypeError, ValueError, OverflowError):
        weights = ()
    if not weights or not all(math.isfinite(weight) and weight >= 0 for weight in weights):
        raise ValueError(f"class weights are none, balanced, or one number a class, such as 1,2.5,0.5, got {value!r}")
    return weights


def _parsed(default: Any, parse: Callable[[Any], Any]) -> Any:
    """A field whose text on the command line goes through `parse`."""
    return dataclasses.field(default=default, metadata={"parse": parse})


@dataclasses.dataclass
class TrainConfig:
    """One training run. A default of null is filled in by `resolved`."""

    data: str
    """What to train on: voc:ROOT, camvid:ROOT, helen:ROOT, cityscapes:ROOT, folder:ROOT, synthetic, or a data config
    (a .yaml file)."""
    out: str
    """The run folder."""
    model: str = "largefov_vgg16"
    """The network: largefov_vgg16, efficientnet_lite0, small_cnn, or timm:NAME, such as timm:resnet18."""
    weights: str | None = None
    """Pretrained weights of the backbone: imagenet (from an installed package, or downloaded), a local .pth or
    .safetensors file, or random. Default: imagenet for efficientnet_lite0 if its package is installed, else random."""
    output_stride: int | None = None
    """Input px between neighbouring features: 8 or 16 for efficientnet_lite0; 8, 16 or 32 for timm:NAME, dilated where
    timm can. Default: the model's own, 16 for timm:NAME."""
    dilation: int = 12
    """Dilation of the head's 3x3 convolution, where the receptive field starts."""
    paths: int = 1
    """Paths side by side in the head, each with a receptive field of its own."""
    class_groups: str | list[Any] | dict[str, Any] | None = dataclasses.field(
        default=None, metadata={"parse": parse_groups}
    )
    """The classes that each path is guided to: auto (by size), or names such as small=eye,brow/large=skin,hair.
    Default: no guidance."""
    path_weight: float = 5.0
    """How much more a path's own classes weigh than others in its guidance."""
    path_guidance: PathGuidance = "search"
    """What is guided: search (each path's receptive field is read with its own classes weighted), or gradient (the
    published layer, on all gradients of a path; it may diverge)."""
    aspp: tuple[int, ...] | None = _parsed(None, parse_ints)
    """Fixed dilations of parallel paths, such as 6,12,18,24, as in DeepLab's ASPP; with search none."""
    rectangular: bool = False
    """Learn the receptive field's height and width apart."""
    head_channels: int = 1024
    """Width of the head."""
    decoder: bool = False
    """Refine the head's output with a finer feature map, for sharper borders, as DeepLabv3+; not with
    freeze_backbone."""
    dropout: float | None = None
    """Dropout in the head. Default: 0 with freeze_backbone, else 0.5, as DeepLab."""
    search: Search = "sampled"
    """How the receptive field is learned: none (fixed), gradient (the paper's), spsa, or sampled (from any start)."""
    search_share: float | None = None
    """Share of the steps that the search takes. Default: 0.8 for gradient, 0.5 for spsa, 0.6 for sampled."""
    search_narrowing: bool = True
    """Draw a sampled search's dilations ever closer to the best read so far; without it, from the whole range."""
    mechanism: Mechanism | None = None
    """What realises the receptive field. Default: regulator (resampling) for gradient, else dilation."""
    factor: float = 1.0
    """Where the factor starts; larger factor, smaller receptive field."""
    factor_lr: float | None = None
    """Learning rate of the factor's logarithm. Default: 0.02 with adamw, 0.001 with sgd."""
    factor_start: int | None = None
    """Step from which the factor learns. Default: a tenth of the steps, since early gradients lead it astray."""
    freeze_backbone: bool = False
    """Train the head alone, on backbone features computed once (plain and flipped; no other augmentation)."""
    canvas: tuple[int, int] | None = _parsed(None, parse_size)
    """With freeze_backbone: size that images are padded to. Default: the smallest that holds every image."""
    cache: str | None = None
    """Folder of the feature cache. Default: the user's cache folder."""
    train_split: str = "train"
    """Split to train on."""
    val_split: str = "val"
    """Split to validate on."""
    epochs: int = 30
    """Passes over the training split."""
    max_steps: int | None = None
    """Stop after this many steps, whatever the epochs say."""
    batch_size: int | None = None
    """Images a step, dealt evenly to the devices. Default: 8 a device."""
    optimizer: Optimizer | None = None
    """sgd (momentum 0.9) or adamw. Default: adamw with freeze_backbone, else sgd, as DeepLab."""
    lr: float | None = None
    """Learning rate of the backbone; poly decay with power 0.9. Default: 0.0001 for adamw with one path, else 0.001."""
    head_lr_scale: float = 10.0
    """Learning rate of the head over the backbone's."""
    weight_decay: float = 5e-4
    """Weight decay of the weights; the factor has none."""
    clip_norm: float | None = None
    """Largest norm of the gradient; 0 clips nothing. Default: 1 for sgd, 0 for adamw."""
    loss: Loss = "cross_entropy"
    """What is minimised: cross_entropy, focal or dice."""
    class_weights: str | tuple[float, ...] | None = _parsed(None, parse_class_weights)
    """How much each class counts in the loss: none, balanced (by the classes' frequencies in the training masks), or
    one number a class, such as 1,2.5,0.5."""
    label_smoothing: float = 0.0
    """Share of a pixel's label that is spread over all classes, with the loss cross_entropy."""
    loss_resolution: Literal["features", "image"] = "features"
    """Where the training loss is taken: on the feature grid (with a decoder on its finer one; masks subsampled), or at
    the image's own pixels."""
    crop_size: tuple[int, int] = _parsed((321, 321), parse_size)
    """Training crop."""
    scale_range: tuple[float, float] = _parsed((0.5, 1.5), parse_range)
    """Random rescaling of training images."""
    flip: bool = True
    """Random horizontal flips."""
    colour_jitter: float = 0.2
    """Strength of the random change of brightness, contrast and saturation."""
    precision: Literal["32-true", "16-mixed", "bf16-mixed"] = "32-true"
    """Numbers to compute with."""
    memory_budget: float = 2.0
    """GiB that the map inflated by a factor above 1 may take; the factor is held below what would take more."""
    workers: int = 2
    """Processes that load images."""
    devices: int = 1
    """Processes (GPUs, or CPU processes) to train on; with torchrun or srun, as many as these have started."""
    val_every: int | None = None
    """Epochs between validations; the last epoch always ends with one. Default: a fifth of the epochs."""
    seed: int = 0
    """All randomness derives from it."""
    resume: bool = False
    """Continue the run in `out` from its last epoch."""
    skip_bad: bool = False
    """Leave out samples that cannot be read, each replaced by the next one, and count them; without it the first one
    ends the run, and a quick check of the data comes before it."""

    def __post_init__(self) -> None:
        self._check_paths()
        positive = ("dilation", "paths", "path_weight", "head_channels", "factor", "epochs", "head_lr_scale", "devices")
        optional = ("batch_size", "search_share", "factor_lr", "lr", "max_steps", "val_every")
        for name in (*positive, "memory_budget", *optional):
            value, limit = getattr(self, name), _LIMITS.get(name, 2**31)
            if value is None and name in optional:
                continue
            if value is None or not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
            if not value < limit:
                raise ValueError(f"{name} must be less than {limit}, got {value}")
        for name in ("weight_decay", "clip_norm", "colour_jitter", "workers", "factor_start", "seed"):
            if not (getattr(self, name) or 0) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.search_share is not None and self.search_share > 1:
            raise ValueError(f"search_share must be at most 1, got {self.search_share}")
        if (self.batch_size or 0) % self.devices:
            raise ValueError(f"batch_size {self.batch_size} cannot be dealt evenly to {self.devices} devices")
        if not 0 <= (self.dropout or 0.0) < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {self.label_smoothing}")
        if self.label_smoothing and self.loss != "cross_entropy":
            raise ValueError(f"label_smoothing goes with the loss cross_entropy, not {self.loss}")
        if self.decoder and self.freeze_backbone:
            raise ValueError("decoder needs the backbone's finer map, but freeze_backbone keeps its features alone")
        self.class_weights = parse_class_weights(self.class_weights)
        self.crop_size = parse_size(self.crop_size)
        self.canvas = None if self.canvas is None else parse_size(self.canvas)
        self.scale_range = parse_range(self.scale_range)
        if not 0 < self.scale_range[0] <= self.scale_range[1]:
            raise ValueError(f"scale_range must be LOW,HIGH with 0 < LOW <= HIGH, got {self.scale_range}")

    def _check_paths(self) -> None:
        self.aspp = None if self.aspp is None else parse_ints(self.aspp)
        if self.aspp and (self.search != "none" or self.paths != 1 or min(self.aspp) < 1 or len(self.aspp) < 2):
            raise ValueError(
                f"aspp {list(self.aspp)} must be two or more positive rates, with search none and one path, got search "
                f"{self.search} and {self.paths} paths"
            )
        if self.class_groups is not None:
            self.class_groups = parse_groups(self.class_groups)
            if self.paths == 1:
                raise ValueError("class_groups guide several paths: give paths too")
        elif self.path_guidance == "gradient":
            raise ValueError("path_guidance gradient needs class_groups")

    def resolved(self) -> "TrainConfig":
        """The same run with every default that depends on another field filled in.

        >>> TrainConfig(data="synthetic", out="runs/x", freeze_backbone=True).resolved().optimizer
        'adamw'
        """
        optimizer = self.optimizer or ("adamw" if self.freeze_backbone else "sgd")
        adaptive = optimizer == "adamw"
        shares = {"none": None, "gradient": 0.8, "spsa": 0.5, "sampled": 0.6}
        return dataclasses.replace(
            self,
            search_share=self.search_share or shares[self.search],
            mechanism=self.mechanism or ("regulator" if self.search == "gradient" else "dilation"),
            dropout=(0.0 if self.freeze_backbone else 0.5) if self.dropout is None else self.dropout,
            batch_size=self.batch_size or 8 * self.devices,
            optimizer=optimizer,
            clip_norm=(0.0 if adaptive else 1.0) if self.clip_norm is None else self.clip_norm,
            # The batch norm of several paths makes features several times smaller, and so what a step moves.
            lr=self.lr or (1e-4 if adaptive and self.paths == 1 else 1e-3),
            factor_lr=self.factor_lr or (0.02 if adaptive else 1e-3),
            val_every=self.val_every or max(1, self.epochs // 5),
        )

    def plain(self) -> dict[str, Any]:
        """The fields in plain types, as YAML and checkpoints hold them."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(self).items()
            if name != "resume"
        }


@dataclasses.dataclass
class SweepConfig(TrainConfig):
    """One training run for every dilation and seed; whatever is no list here is the same in all of them."""

    out: str
    """The folder for the run folders and the results."""
    dilations: tuple[int, ...] = _parsed((1, 2, 4, 6, 8, 10, 12, 14, 18, 24), parse_ints)
    """Dilations to train at, such as 2,6,14."""
    seeds: tuple[int, ...] = _parsed((0,), parse_ints)
    """Seeds to train each of them with, such as 0,1,2."""
    jobs: int = 1
    """Runs at a time, each with its share of the processor's cores."""
    storage: str | None = None
    """Where the trials are kept: the URL of a database, such as postgresql+psycopg://USER@HOST/DATABASE, that several
    machines may share (the study is named after the last part of `out`). Default: the file study.journal in `out`."""
    search: Search = "none"
    """How the receptive field is learned: none, for a grid of fixed ones; a search, to compare starts."""
    dilation: int = dataclasses.field(default=TrainConfig.dilation, metadata=_FIXED)
    seed: int = dataclasses.field(default=TrainConfig.seed, metadata=_FIXED)
    devices: int = dataclasses.field(default=TrainConfig.devices, metadata=_FIXED)
    resume: bool = dataclasses.field(default=TrainConfig.resume, metadata=_FIXED)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.dilations, self.seeds = parse_ints(self.dilations), parse_ints(self.seeds)
        if min(self.dilations) < 1:
            raise ValueError(f"dilations must be positive, got {min(self.dilations)}")
        if min(self.seeds) < 0:
            raise ValueError(f"seeds must not be negative, got {min(self.seeds)}")
        if self.jobs < 1:
            raise ValueError(f"jobs must be positive, got {self.jobs}")

    def plain(self) -> dict[str, Any]:
        """The fields in plain types, for a file: without the database's password."""
        return {**super().plain(), "storage": self.storage and without_password(self.storage)}

    def run_config(self, out: str, dilation: int, seed: int, search: Search) -> TrainConfig:
        """One of the runs; resumed if its folder holds a part of it."""
        shared = {field.name: getattr(self, field.name) for field in dataclasses.fields(TrainConfig)}
        own = {"out": out, "dilation": dilation, "seed": seed, "search": search, "resume": True}
        return TrainConfig(**shared | own)


@dataclasses.dataclass
class TuneConfig(SweepConfig):
    """What receptive field should a network have? Backbone frozen, start-free search, one page of answer."""

    epochs: int = 10
    """Passes over the training split."""
    seeds: tuple[int, ...] = _parsed((0, 1, 2), parse_ints)
    """Seeds to repeat the search with; the answer's spread is over them."""
    present_dilation: int | None = None
    """The network's dilation now, which the gain is reckoned from. Default: the model's own."""
    verify: bool = False
    """Train a grid of fixed dilations too, and compare."""
    dilations: tuple[int, ...] = _parsed((1, 2, 4, 6, 8, 10, 12, 14, 18, 24), parse_ints)
    """With verify: the dilations of the grid; the recommended and the present one are added."""
    search_share: float | None = 1.0
    """Share of the steps that the search takes; only its curve is wanted, so all of them."""
    search_narrowing: bool = dataclasses.field(default=False, metadata=_FIXED)
    freeze_backbone: bool = dataclasses.field(default=True, metadata=_FIXED)
    search: Search = dataclasses.field(default="sampled", metadata=_FIXED)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.present_dilation is not None and self.present_dilation < 1:
            raise ValueError(f"present_dilation must be positive, got {self.present_dilation}")


@dataclasses.dataclass
class ReproduceConfig(SweepConfig):
    """The experiments of Wei et al. (CVPR 2017): the grid by hand, and learning from two bad starts."""

    epochs: int = 10
    """Passes over the training split."""
    dilations: tuple[int, ...] = _parsed((2, 4, 6, 8, 10, 12, 14, 18, 24), parse_ints)
    """Dilations of the grid; those of the bad starts, 14 (436 px) and 6 (308 px), are added."""
    freeze_backbone: bool = True
    """Train the head alone, on backbone features computed once; the paper trains the backbone too."""
    images: int = 4
    """Images of the validation split in the panels."""
    search: Search = dataclasses.field(default="none", metadata=_FIXED)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.images < 1:
            raise ValueError(f"images must be positive, got {self.images}")


@dataclasses.dataclass
class DemoConfig:
    """Learning a receptive field whose best value is known."""

    out: str = "runs/demo"
    """The run folder; an earlier demo in it is replaced."""
    dilation: int = 8
    """Dilation to start from; the best one is 12."""
    epochs: int = 15
    """Passes over the training images."""
    seed: int = 0
    """All randomness derives from it."""


def counted(number: int, noun: str) -> str:
    """A number of things, in words.

    >>> counted(1, "image"), counted(2, "image"), counted(0, "class")
    ('1 image', '2 images', '0 classes')
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}{'es' if noun.endswith('s') else 's'}"


def without_password(url: str) -> str:
    """A database's URL for others to see.

    >>> without_password("postgresql+psycopg://ann:secret@db/sweeps"), without_password("sqlite:///sweep.db")
    ('postgresql+psycopg://ann:***@db/sweeps', 'sqlite:///sweep.db')
    """
    return re.sub(r"(://[^/@:]*):[^/@]*@", r"\1:***@", url)


def differences(old: dict[str, Any], new: dict[str, Any], ignored: Sequence[str] = ()) -> list[str]:
    """The keys whose values differ, each as `key: old -> new`.

    >>> differences({"epochs": 3, "out": "a"}, {"epochs": 5, "out": "b"}, ignored=["out"])
    ['epochs: 3 -> 5']
    """
    return [
        f"{key}: {old.get(key)} -> {new.get(key)}" for key in new if key not in ignored and old.get(key) != new.get(key)
    ]
