"""The config of a training run, in groups whose options are flags. Imports nothing but Python."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from rfield.segmentation.config.options import Config, Options, option
from rfield.segmentation.config.values import (
    BRANCH_KINDS,
    Branches,
    Names,
    Range,
    Size,
    ascending,
    below_one,
    loggers,
    not_negative,
    parse_class_weights,
    parse_groups,
    parse_paths,
    positive,
    share,
)

Search = Literal["none", "gradient", "spsa", "sampled"]
Mechanism = Literal["regulator", "dilation"]
Gates = Literal["image", "pixel"]
PathGuidance = Literal["search", "gradient"]
Optimizer = Literal["sgd", "adamw"]
ReportTime = Literal["none", "end", "live"]
Loss = Literal["cross_entropy", "focal", "dice"]


@dataclasses.dataclass
class DataOptions(Options):
    """The images and masks, and how training images are varied."""

    data: str
    """Data set: voc:ROOT, camvid:ROOT, helen:ROOT, cityscapes:ROOT, ade20k:ROOT, pets:ROOT, coco:ROOT, folder:ROOT,
    hf:NAME, scenes, synthetic, or a data config (a .yaml file)."""
    train_split: str = "train"
    """Split to train on."""
    val_split: str = "val"
    """Split to validate on."""
    crop_size: Size = option(Size(321), parse=Size)
    """Size of the training crops in px."""
    scale_range: Range = option(Range((0.5, 1.5)), parse=Range, check=ascending)
    """Range of the random rescaling of training images."""
    flip: bool = True
    """Flip training images horizontally at random."""
    colour_jitter: float = option(0.2, check=not_negative)
    """Strength of the random change of brightness, contrast and saturation, from 0 to 1."""
    skip_bad: bool = False
    """Replace each sample that cannot be read by the next one, and count them. Without it, a quick check of the data
    comes first, and the first unreadable sample ends the run."""


@dataclasses.dataclass
class ModelOptions(Options):
    """The network: backbone and head."""

    model: str = "largefov_vgg16"
    """Network: largefov_vgg16, efficientnet_lite0, small_cnn, or timm:NAME, such as timm:resnet18. For tune also
    FILE.py:NAME: this runs the file, and then calls its function or class NAME without arguments."""
    weights: str | None = None
    """Pretrained weights of the backbone: imagenet (from an installed package, or downloaded), a local .pth or
    .safetensors file, or random. Default: imagenet for efficientnet_lite0 if its package is installed, else random."""
    freeze_backbone: bool = False
    """Train the head alone, on backbone features that are computed once (plain and flipped, without other
    augmentation)."""
    canvas: Size | None = option(None, parse=Size)
    """With freeze_backbone: size in px that images are padded to. Default: the smallest that holds every image."""
    output_stride: int | None = None
    """Input px between neighbouring features: 8 or 16 for efficientnet_lite0; 8, 16 or 32 for timm:NAME, dilated where
    timm can. Default: the model's own, 16 for timm:NAME."""
    dilation: int = option(12, check=positive)
    """Dilation of the head's 3x3 convolution; a search starts there."""
    head_channels: int = option(1024, check=positive)
    """Channels of the head."""
    dropout: float | None = option(None, check=below_one)
    """Dropout in the head. Default: 0 with freeze_backbone, else 0.5, as DeepLab."""
    decoder: bool = False
    """Refine the head's output with a finer feature map, for sharper borders, as DeepLabv3+; not with
    freeze_backbone."""
    paths: int | Literal["auto"] = option(1, parse=parse_paths)
    """Number of parallel paths in the head, each with a receptive field of its own; auto: at most 4, of which a sampled
    search keeps the fewest that are within one standard error of the best."""
    path_norm: bool | None = None
    """Start each path with a batch norm. Default: for several learned paths, and with gates."""
    aspp: Branches | None = option(None, parse=Branches)
    """Fixed dilations of parallel paths, such as 6,12,18,24, as in DeepLab's ASPP; 1x1 is a 1x1 convolution, and pool
    is image pooling. With search none; with gates, the rates that these mix."""
    gates: Gates | None = None
    """Let the input decide the receptive field: the head's convolution runs at the rates of aspp (1,2,4,8 without it)
    with one kernel, mixed by gates that are predicted for each image or each pixel. With search none and one path."""
    extra_paths: Branches | None = option(None, parse=Branches)
    """Further paths that a sampled search may choose in place of dilated ones: 1x1, pool, or 1x1,pool. The run still
    ends with `paths` paths."""
    shared_kernel: Literal["never", "search", "always"] = "never"
    """Whether all paths have the same kernels, with a batch norm of their own: never, search (until the search has
    ended), or always."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decoder and self.freeze_backbone:
            raise ValueError("decoder needs the backbone's finer map, but freeze_backbone keeps its features alone")


@dataclasses.dataclass
class SearchOptions(Options):
    """How the receptive field is learned."""

    search: Search = "sampled"
    """Method: none (the receptive field is fixed), gradient (the paper's), spsa, or sampled (any start will do)."""
    search_share: float | None = option(None, check=share)
    """Share of the steps that the search takes. Default: 0.8 for gradient, 0.5 for spsa, 0.6 for sampled."""
    search_narrowing: bool = True
    """Draw the dilations of a sampled search ever closer to the best one so far; without it, from the whole range."""
    mechanism: Mechanism | None = None
    """What changes the receptive field: regulator (resizes around the convolution) or dilation. Default: regulator for
    gradient, else dilation."""
    factor: float = option(1.0, check=positive)
    """Start of the factor; a larger factor is a smaller receptive field."""
    factor_lr: float | None = option(None, check=positive)
    """Learning rate of the factor's logarithm. Default: 0.02 with adamw, 0.001 with sgd."""
    factor_start: int | None = option(None, check=not_negative)
    """Step from which the factor is learned. Default: a tenth of the steps, since early gradients mislead it."""
    rectangular: bool = False
    """Learn the height and the width of the receptive field separately."""
    class_groups: str | list[Any] | dict[str, Any] | None = option(None, parse=parse_groups)
    """Classes that guide each path: auto (by size), or names such as small=eye,brow/large=skin,hair. Default: no
    guidance."""
    path_weight: float = option(5.0, check=positive)
    """Weight of a path's own classes in its guidance; the others weigh 1."""
    path_guidance: PathGuidance = "search"
    """What is guided: search (each path's receptive field is read with its own classes weighted), or gradient (the
    published layer, which weights all gradients of a path and may diverge)."""
    memory_budget: float = option(2.0, check=positive)
    """GiB that the map inflated by a factor above 1 may take; the factor is held below what would take more."""


@dataclasses.dataclass
class OptimOptions(Options):
    """The steps: how many, at which rates, and the loss."""

    epochs: int = option(30, check=positive)
    """Passes over the training split."""
    max_steps: int | None = option(None, check=positive)
    """Maximum number of steps, if it ends the run before the epochs do."""
    batch_size: int | None = option(None, check=positive)
    """Images in a step, divided evenly among the devices. Default: 8 for each device."""
    optimizer: Optimizer | None = None
    """Optimizer: sgd (momentum 0.9) or adamw. Default: adamw with freeze_backbone, else sgd, as DeepLab."""
    lr: float | None = option(None, check=positive)
    """Learning rate of the backbone, with poly decay of power 0.9. Default: 0.0001 for adamw without a batch norm in
    the paths, else 0.001."""
    head_lr_scale: float = option(10.0, check=positive)
    """Learning rate of the head, as a multiple of the backbone's."""
    weight_decay: float = option(5e-4, check=not_negative)
    """Weight decay of the weights; the factor has none."""
    clip_norm: float | None = option(None, check=not_negative)
    """Maximum norm of the gradient; 0 clips nothing. Default: 1 for sgd, 0 for adamw."""
    loss: Loss = "cross_entropy"
    """Loss: cross_entropy, focal or dice."""
    class_weights: str | tuple[float, ...] | None = option(None, parse=parse_class_weights)
    """Weight of each class in the loss: none, balanced (by the classes' frequencies in the training masks), or one
    number for each class, such as 1,2.5,0.5."""
    label_smoothing: float = option(0.0, check=below_one)
    """Share of a pixel's label that is spread over all classes; with the loss cross_entropy."""
    loss_resolution: Literal["features", "image"] = "features"
    """Where the training loss is computed: on the feature grid (the finer one with a decoder; masks are subsampled),
    or at the pixels of the image."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label_smoothing and self.loss != "cross_entropy":
            raise ValueError(f"label_smoothing goes with the loss cross_entropy, not {self.loss}")


@dataclasses.dataclass
class RunOptions(Options):
    """The run folder, the seed, and the machine."""

    out: str
    """The run folder."""
    seed: int = option(0, check=not_negative)
    """Seed of all randomness."""
    resume: bool = False
    """Continue the run in `out` from its last epoch."""
    save_search_weights: bool = True
    """After a sampled search, keep the weights that work at all dilations, for `rfield predict --weights search`."""
    val_every: int | None = option(None, check=positive)
    """Epochs between validations; the last epoch always ends with one. Default: a fifth of the epochs."""
    precision: Literal["32-true", "16-mixed", "bf16-mixed"] = "32-true"
    """Number format of the computation."""
    workers: int = option(2, check=not_negative)
    """Processes that load images."""
    devices: int = option(1, check=positive)
    """Processes (one for each GPU, or on the CPU) to train on; with torchrun or srun, the number that they started."""
    logger: Names = option(Names(("tensorboard", "csv")), parse=Names, check=loggers)
    """Where losses and scores are logged, one or more with commas: tensorboard, csv (both in the run folder), wandb,
    mlflow."""
    report: ReportTime = "end"
    """When report.html is written in the folder `out`: none, end, or live (for train: after each validation too, and
    the page reloads itself)."""
    cache: str | None = None
    """Folder of the feature cache. Default: the user's cache folder."""


@dataclasses.dataclass(init=False)
class TrainConfig(Config):
    """One training run. Some defaults depend on other options: `resolved` fills them in.

    >>> config = TrainConfig(data="synthetic", out="runs/x", epochs=3)
    >>> config.optim.epochs, config.data.crop_size
    (3, (321, 321))
    """

    data: DataOptions
    model: ModelOptions
    search: SearchOptions
    optim: OptimOptions
    run: RunOptions

    def check(self) -> None:
        if (self.optim.batch_size or 0) % self.run.devices:
            batch, devices = self.optim.batch_size, self.run.devices
            raise ValueError(f"batch_size {batch} cannot be divided evenly among {devices} devices")
        search, rates, paths = self.search.search, self.model.aspp, self.model.paths
        if rates and (search != "none" or paths != 1 or len(rates) < 2 or not {*rates} - {*BRANCH_KINDS}):
            raise ValueError(
                f"aspp {Branches(rates)} must be two or more branches, at least one of them a dilation, with search "
                f"none and one path, got search {search} and {paths} paths"
            )
        if gates := self.model.gates:
            whole = all(isinstance(rate, int) for rate in rates or ()) and len(set(rates or ())) == len(rates or ())
            if search != "none" or paths != 1 or not whole:
                mixed = f", aspp {Branches(rates)}" if rates else ""
                raise ValueError(
                    f"gates {gates} need search none, one path, and in aspp different dilations alone, got search "
                    f"{search}, {paths} paths{mixed}"
                )
        if paths == "auto" and (search != "sampled" or self.search.class_groups or self.model.decoder):
            raise ValueError(
                "paths auto needs search sampled, no class_groups and no decoder, since the paths are chosen by adding "
                "their logits"
            )
        extra = self.model.extra_paths or ()
        if extra and (search != "sampled" or paths == 1 or self.model.decoder or self.search.class_groups):
            raise ValueError(
                f"extra_paths {Branches(extra)} need search sampled, several paths, no class_groups and no decoder, "
                "since the paths are chosen by adding their logits"
            )
        if len(set(extra)) < len(extra) or not {*extra} <= {*BRANCH_KINDS}:
            raise ValueError(f"extra_paths are {' or '.join(BRANCH_KINDS)}, none of them twice, got {Branches(extra)}")
        if self.model.shared_kernel != "never" and paths == 1 and (not rates or gates):
            raise ValueError(f"shared_kernel {self.model.shared_kernel} needs several paths")
        if self.search.class_groups is not None:
            if paths == 1:
                raise ValueError("class_groups guide several paths: give paths too")
        elif self.search.path_guidance == "gradient":
            raise ValueError("path_guidance gradient needs class_groups")

    def resolved(self) -> "TrainConfig":
        """Return the same run with every default that depends on another option filled in.

        >>> TrainConfig(data="synthetic", out="runs/x", freeze_backbone=True).resolved().optim.optimizer
        'adamw'
        """
        model, search, optim, run = self.model, self.search, self.optim, self.run
        frozen = model.freeze_backbone
        has_norm = (model.paths != 1 or model.gates is not None) if model.path_norm is None else model.path_norm
        optimizer = optim.optimizer or ("adamw" if frozen else "sgd")
        adaptive = optimizer == "adamw"
        shares = {"none": None, "gradient": 0.8, "spsa": 0.5, "sampled": 0.6}
        return self.replace(
            search_share=search.search_share or shares[search.search],
            mechanism=search.mechanism or ("regulator" if search.search == "gradient" else "dilation"),
            dropout=(0.0 if frozen else 0.5) if model.dropout is None else model.dropout,
            batch_size=optim.batch_size or 8 * run.devices,
            optimizer=optimizer,
            clip_norm=(0.0 if adaptive else 1.0) if optim.clip_norm is None else optim.clip_norm,
            # The batch norm of paths makes features several times smaller, and so what a step moves.
            lr=optim.lr or (1e-4 if adaptive and not has_norm else 1e-3),
            factor_lr=search.factor_lr or (0.02 if adaptive else 1e-3),
            val_every=run.val_every or max(1, optim.epochs // 5),
        )


def differences(old: dict[str, Any], new: dict[str, Any], ignored: Sequence[str] = ()) -> list[str]:
    """Return the keys whose values differ, each as `key: old -> new`.

    >>> differences({"epochs": 3, "out": "a"}, {"epochs": 5, "out": "b"}, ignored=["out"])
    ['epochs: 3 -> 5']
    """
    return [
        f"{key}: {old.get(key)} -> {new.get(key)}" for key in new if key not in ignored and old.get(key) != new.get(key)
    ]
