"""timm's networks as backbones, on the corner-anchored grid."""

import dataclasses
import difflib
import math
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfield.receptive_field.probe import Window, probe_window
from rfield.segmentation.conventions import IMAGENET_MEAN, IMAGENET_STD
from rfield.segmentation.files.untrusted import no_pickles, read_weights
from rfield.segmentation.models.backbones import Backbone
from rfield.segmentation.models.normalise import InputNormalisation
from rfield.segmentation.models.weights import fit_keys, state_dict_mismatches

_STRIDES = (8, 16, 32)
# Sizes in px, along the longer side, at which the field is probed, before the stride's own share is added.
_PROBE_LENGTHS = (256, 512, 1024, 2048, 4096)


@dataclasses.dataclass(frozen=True)
class _Placement:
    """How a timm network's maps are placed on the grid, where feature p is centred on px p * stride."""

    before: int
    """Px of padding left and above the image, in addition to the network's own."""
    after: int
    """Px of padding right and below."""
    fine_start: int
    """The first feature of the finer map that is kept."""
    offset: float
    """Px from p * stride to the centre of the field of feature p."""
    field: float
    """Receptive field in px."""
    local_field: float
    """The same without squeeze-excite, attention and other global layers."""


class TimmBackbone(Backbone):
    """A timm network that gives one feature map, and a finer one for a decoder.

    For image sides of k * stride + 1 px it gives k + 1 features, like every backbone. Networks with odd kernels and
    symmetric padding (ResNet, MobileNet, EfficientNet, RegNet) do so by themselves and are exactly corner-anchored.
    The fields of networks with patches or even kernels (ConvNeXt, DenseNet, VGG) lie to the right and below: the image
    is padded by stride - 1 px more, split such that feature p is centred on px p * stride, within half a px. Where
    paths of different alignment are summed (the pooled shortcuts of ResNet-D) the offset may be larger; it is in
    `offset_px`. All this is measured by gradients when the network is built.

    Args:
        net: timm's network, with `features_only`.
        options: those of `timm.create_model` that make it so, besides.
        name: its name.
        stride: input px between neighbouring features.

    Attributes:
        receptive_field: (height, width) in px; infinite with squeeze-excite, attention or other global layers.
        nominal_receptive_field_px: if infinite, the field without these layers, or 1 px if that is unknown, so that
            run files record a finite number to which the head's dilation adds.
        offset_px: px from p * stride to the centre of the field of feature p.

    Raises:
        ValueError: the network's map of this stride cannot be put on the grid.
    """

    def __init__(self, net: nn.Module, options: dict[str, Any], name: str, stride: int) -> None:
        info: Any = net.feature_info
        strides, channels = info.reduction(), info.channels()
        super().__init__(nn.Sequential(), channels[-1], stride, normalise=_normalisation(net))
        self.net = net
        self.options = options
        self.name = name
        finer = [index for index, other in enumerate(strides) if other < stride]
        fours = [index for index in finer if strides[index] == 4]
        if finer:
            index = fours[-1] if fours else min(finer, key=lambda index: strides[index])
            self.fine_channels, self.fine_stride = channels[index], strides[index]
        self._fine_index = index if finer else None
        self._channels_last = str(getattr(net, "output_fmt", "NCHW")).endswith("NHWC")
        self.placement = _place(self, name)
        self.set_field(self.placement.field, self.placement.local_field)
        self.offset_px = self.placement.offset

    def maps(self, image: Tensor) -> list[Tensor]:
        """Return the finer map, if there is one, and the features, as timm gives them."""
        if self.normalise is not None:
            image = self.normalise(image)
        maps = self.net(image)
        wanted = [maps[-1]] if self._fine_index is None else [maps[self._fine_index], maps[-1]]
        return [part.permute(0, 3, 1, 2) for part in wanted] if self._channels_last else wanted

    def forward(self, image: Tensor) -> Tensor:
        """Map Tensor[N, 3, k * stride + 1, l * stride + 1] to features Tensor[N, C, k + 1, l + 1]."""
        return self.maps(self._padded(image))[-1]

    def pyramid(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return the finer map and the features; their corners coincide."""
        if self._fine_index is None:
            return super().pyramid(image)
        fine, features = self.maps(self._padded(image))
        start, ratio = self.placement.fine_start, self.stride // self.fine_stride
        height, width = ((size - 1) * ratio + 1 for size in features.shape[2:])
        return fine[:, :, start : start + height, start : start + width], features

    def _padded(self, image: Tensor) -> Tensor:
        before, after = self.placement.before, self.placement.after
        return F.pad(image, (before, after, before, after)) if before or after else image


def timm_backbone(name: str, output_stride: int = 16) -> TimmBackbone:
    """Make a backbone of a network of timm, with random weights, dilated to the wanted stride where timm can.

    The features are the last map of that stride; layers after it are left out. Images come normalised by ImageNet's
    mean and deviation, as for every backbone; a network trained otherwise has them renormalised inside.

    Args:
        name: timm's, with the tag of the weights if wanted, such as `resnet18.a1_in1k`.
        output_stride: input px between neighbouring features: 8, 16 or 32.

    Raises:
        ValueError: timm has no such network, or none with such features.

    Example:
        >>> backbone = timm_backbone("resnet10t", output_stride=8)
        >>> backbone(torch.zeros(1, 3, 33, 17)).shape, backbone.pyramid(torch.zeros(1, 3, 33, 17))[0].shape
        (torch.Size([1, 512, 5, 3]), torch.Size([1, 64, 9, 5]))
    """
    if output_stride not in _STRIDES:
        raise ValueError(f"timm:{name} has an output_stride of 8, 16 or 32, got {output_stride!r}")
    return TimmBackbone(*_create(name, output_stride), name, output_stride)


def load_timm_weights(backbone: TimmBackbone, weights: str | Path) -> None:
    """Copy weights into a backbone; all are checked before any is copied.

    Args:
        backbone: from `timm_backbone`.
        weights: "imagenet" (timm's own, downloaded), or a local .pth or .safetensors file with timm's keys.

    Raises:
        FileNotFoundError: there is no such file, or the download failed.
        ValueError: the file cannot be read, or keys are missing or of another shape; names them.
    """
    if weights != "imagenet":
        _load(backbone.net, backbone.name, weights)
        return
    try:
        with no_pickles():
            net = timm.create_model(backbone.name, features_only=True, pretrained=True, **backbone.options)
    except Exception as error:  # Each of timm's sources has its own types.
        raise FileNotFoundError(
            f"the weights of timm:{backbone.name} cannot be downloaded ({_first_line(error)}); give the path of a "
            "local file"
        ) from error
    backbone.net.load_state_dict(net.state_dict())


def _create(name: str, stride: int) -> tuple[nn.Module, dict[str, Any]]:
    """Return timm's network up to its last map of the stride, and the options of `timm.create_model` for it."""
    if not timm.is_model(name):
        near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() has them all."
        raise ValueError(f"timm has no network {name!r}; {hint}")
    options: dict[str, Any] = {} if stride == 32 else {"output_stride": stride}
    try:
        net: Any = timm.create_model(name, features_only=True, **options)
    except Exception:  # Each network raises its own type; without dilation it may work.
        options = {}
        try:
            net = timm.create_model(name, features_only=True)
        except Exception as error:
            raise ValueError(
                f"timm:{name} gives no feature maps (timm's features_only): {_first_line(error)}"
            ) from error
    strides: list[int] = net.feature_info.reduction()
    has = ", ".join(str(other) for other in sorted(set(strides)))
    if not options and stride < 32 and max(strides) > stride:
        raise ValueError(
            f"timm:{name} cannot be dilated to an output_stride of {stride}, its maps have strides {has}; "
            f"give --output-stride {max(strides)}, or another network"
        )
    if stride not in strides:
        raise ValueError(f"timm:{name} has no map of output_stride {stride}, its maps have strides {has}")
    last = max(index for index, other in enumerate(strides) if other == stride)
    if last < len(strides) - 1:
        options["out_indices"] = tuple(range(last + 1))
        net = timm.create_model(name, features_only=True, **options)
    return net, options


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _normalisation(net: nn.Module) -> InputNormalisation | None:
    """Return what renormalises images from ImageNet's mean and deviation to the network's own, or None."""
    config: Any = getattr(net, "pretrained_cfg", None) or {}
    mean, std = tuple(config.get("mean", IMAGENET_MEAN)), tuple(config.get("std", IMAGENET_STD))
    return None if (mean, std) == (IMAGENET_MEAN, IMAGENET_STD) else InputNormalisation(mean, std)


def _load(net: nn.Module, name: str, weights: str | Path) -> None:
    """Copy a file's weights; all are checked before any is copied. The file may hold further layers."""
    wanted = {_plain(key) for key in net.state_dict()}
    state, _ = fit_keys(read_weights(Path(weights)), wanted, lambda key: key.replace(".", "_"))
    # features_only changes the separators in some names, and wraps others.
    flat = {key.replace(".", "_"): key for key in state}
    targets, shapes = {}, {}
    for key, target in net.state_dict().items():
        if key.rpartition(".")[2] == "num_batches_tracked":
            continue
        plain = _plain(key)
        targets[flat.get(plain, plain)] = target
        shapes[flat.get(plain, plain)] = tuple(target.shape)
    faults = state_dict_mismatches(state, shapes, state)
    if faults:
        shown = ", ".join(faults[:5]) + (f" and {len(faults) - 5} more" if len(faults) > 5 else "")
        raise ValueError(f"{weights} does not fit timm:{name}: {shown}; give a file with timm's keys for it")
    with torch.no_grad():
        for key, target in targets.items():
            target.copy_(state[key])


def _plain(key: str) -> str:
    return key.removeprefix("model.").removeprefix("body.").replace(".", "_")


# Measuring takes a second or more, and one process may build the same network several times.
_PLACEMENTS: dict[tuple[str, int], _Placement] = {}


def _place(backbone: TimmBackbone, name: str) -> _Placement:
    """Return the padding with which k * stride + 1 px give k + 1 features, centred on the grid."""
    key = (name, backbone.stride)
    if key not in _PLACEMENTS:
        _PLACEMENTS[key] = _measure(backbone, name)
    return _PLACEMENTS[key]


def _measure(backbone: TimmBackbone, name: str) -> _Placement:
    found, why = [], ""
    for more in (0, backbone.stride - 1):
        try:
            counts = [_count(backbone, steps * backbone.stride + 1 + more) for steps in (2, 5)]
        except Exception as error:  # Networks of fixed or even sizes raise their own types.
            why = why or _first_line(error)
            continue
        if counts != [3, 6]:
            why = why or f"it gives {counts[0]} and {counts[1]} features where 3 and 6 are due"
            continue
        found.append(_placement(backbone, more))
        if abs(found[-1].offset) <= backbone.stride / 4:
            break
    if not found:
        raise ValueError(f"timm:{name} cannot be a backbone for images of any size: {why}")
    return min(found, key=lambda placement: abs(placement.offset))


def _placement(backbone: TimmBackbone, more: int) -> _Placement:
    """Return how `more` px of padding are split."""
    stride = backbone.stride

    def offset(window: Window, step: int) -> float:
        measured = window.centre - window.position * step
        if not (math.isfinite(window.local) and abs(measured) <= step):
            # The field of attention has no centre: assume that a network fits without padding, and has patches with it.
            return (step - 1) / 2 if more else 0.0
        return round(measured, 3)  # The same on every machine.

    options: dict[str, Any] = {
        "thickness": stride + 1 + more,
        "lengths": [length + 1 + more for length in _PROBE_LENGTHS],
    }
    window = probe_window(_Map(backbone, -1), 1, **options)
    before = min(max(math.ceil(offset(window, stride) - 0.5), 0), more)
    start = 0
    if backbone.fine_stride and more:
        fine = probe_window(_Map(backbone, 0), 1, **options)
        away = before - offset(fine, backbone.fine_stride)
        start = min(max(round(away / backbone.fine_stride), 0), more // backbone.fine_stride)
    return _Placement(before, more - before, start, offset(window, stride) - before, window.size, window.local)


class _Map(nn.Module):
    """One of a backbone's maps."""

    def __init__(self, backbone: TimmBackbone, index: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.index = index

    def forward(self, image: Tensor) -> Tensor:
        return self.backbone.maps(image)[self.index]


@torch.no_grad()
def _count(backbone: TimmBackbone, side: int) -> int:
    training = backbone.training
    try:
        features = backbone.eval().maps(torch.zeros(1, 3, side, side))[-1]
    finally:
        backbone.train(training)
    return features.shape[3] if features.shape[2] == features.shape[3] else 0
