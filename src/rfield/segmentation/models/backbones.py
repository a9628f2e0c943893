"""Backbones: the layers before the head, from an image to a map of features, and their ImageNet weights.

Every backbone is corner-anchored: feature p is centred on input pixel p * stride, so an image side of
k * stride + 1 px gives exactly k + 1 features.
"""

import math
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from rfield.layers import AdaptiveConv2d
from rfield.segmentation.files.untrusted import no_pickles, read_weights
from rfield.segmentation.models.weights import fit_keys, state_dict_mismatches

_VGG16_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class Backbone(nn.Module):
    """A chain of layers that turns images into features.

    Convolutions start from Kaiming's normal initialisation for ReLU (He et al., ICCV 2015), biases from 0.

    Args:
        layers: the named layers, in the order of execution.
        out_channels: number of feature channels C.
        stride: input px between neighbouring features.
        nominal_receptive_field_px: the receptive field in px that publications state for this backbone, if it
            differs from the exact one; else None.
        normalise: maps images that are normalised by ImageNet's mean and deviation to those that the weights were
            trained on; None if they are the same.
        fine: the layer that gives a finer map (its name in `layers`, or in a Sequential that is one of them, such as
            `blocks.1`), the map's channels and its stride; None if there is no finer map.

    Attributes:
        fine_channels, fine_stride: of the finer map; 0 if there is none.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> backbone = Backbone(nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1)), out_channels=8, stride=2)
        >>> backbone(torch.zeros(1, 3, 9, 5)).shape
        torch.Size([1, 8, 5, 3])
    """

    def __init__(
        self,
        layers: nn.Sequential,
        out_channels: int,
        stride: int,
        nominal_receptive_field_px: float | None = None,
        normalise: nn.Module | None = None,
        fine: tuple[str, int, int] | None = None,
    ) -> None:
        super().__init__()
        self.normalise = normalise
        self.layers = layers
        self.out_channels = out_channels
        self.stride = stride
        self.nominal_receptive_field_px = nominal_receptive_field_px
        self.fine_layer, self.fine_channels, self.fine_stride = fine or ("", 0, 0)
        for module in layers.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def chain(self) -> list[nn.Module]:
        """Return the modules in the order of execution."""
        return [self.layers]

    def forward(self, image: Tensor) -> Tensor:
        """Map Tensor[N, 3, k * stride + 1, l * stride + 1] to features Tensor[N, C, k + 1, l + 1]."""
        if self.normalise is not None:
            image = self.normalise(image)
        features: Tensor = self.layers(image)
        return features

    def pyramid(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return the finer map and the features of the same images.

        Returns:
            Tensor[N, fine_channels, k * r + 1, l * r + 1] with r = stride / fine_stride, and what `forward` gives.

        Raises:
            ValueError: there is no finer map.
        """
        if not self.fine_stride:
            raise ValueError(f"this backbone has no map finer than its features of stride {self.stride}")
        features = image if self.normalise is None else self.normalise(image)
        for name, layer in self._steps():
            features = layer(features)
            if name == self.fine_layer:
                fine = features
        return fine, features

    def set_field(self, size: float, local: float) -> None:
        """Set the receptive field of layers for which no rule exists, such as residual blocks and squeeze-excite.

        Args:
            size: in px, as `rfield.receptive_field.probe.probe_window` measures it; infinite with global layers.
            local: in px without global layers; 1 is recorded if it is infinite too.
        """
        self.receptive_field = (size, size)
        if math.isinf(size):
            self.nominal_receptive_field_px = local if math.isfinite(local) else 1.0

    def _steps(self) -> Iterator[tuple[str, nn.Module]]:
        for name, layer in self.layers.named_children():
            if isinstance(layer, nn.Sequential):
                yield from ((f"{name}.{inner}", module) for inner, module in layer.named_children())
            else:
                yield name, layer


def largefov_vgg16_backbone() -> Backbone:
    """Make the conv layers of DeepLab-LargeFOV's VGG16 (Chen et al., ICLR 2015): stride 8, 512 channels.

    The 13 3x3 convolutions of VGG16 with DeepLab's 3x3 max pools of padding 1; pool4 and pool5 have stride 1, and
    conv5_1..conv5_3 are dilated by 2 instead. A 321 px side gives 41 features. The exact receptive field is 227 px;
    DeepLab's average pool after pool5, which would add 16 px of blur to it, is left out.

    The figures of Wei et al., CVPR 2017 use 212 px, the receptive field of plain VGG16 and its 2x2 pools: the
    `nominal_receptive_field_px`.

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
    fine = ("relu3_3", 256, 4)
    return Backbone(nn.Sequential(layers), out_channels=512, stride=8, nominal_receptive_field_px=212.0, fine=fine)


def small_cnn_backbone(channels: int = 32) -> Backbone:
    """Make three 3x3 convolutions, stride 4: a backbone for demonstrations and tests with a field of only 15 px.

    So the head determines how far the network sees.

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
    return Backbone(nn.Sequential(layers), out_channels=channels, stride=4, fine=("relu1", channels, 2))


def load_vgg16_weights(
    backbone: Backbone, fc6: nn.Conv2d | AdaptiveConv2d, fc7: nn.Conv2d, weights: str | Path
) -> None:
    """Copy torchvision's VGG16 weights into a LargeFOV network; all are checked before any is copied.

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
        >>> from rfield.segmentation.models import largefov_vgg16
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder, "vgg16.pth")
        ...     torch.save({"features.0.bias": torch.zeros(64)}, file)
        ...     network = largefov_vgg16(21, head_channels=16, weights=file)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: ...vgg16.pth does not fit VGG16: missing features.0.weight, ...
    """
    state = _imagenet_vgg16() if weights == "imagenet" else read_weights(Path(weights))
    targets: dict[str, Tensor] = {}
    # torchvision numbers the same layers in the same order.
    for index, layer in enumerate(backbone.layers):
        if isinstance(layer, nn.Conv2d) and layer.bias is not None:
            targets |= {f"features.{index}.weight": layer.weight, f"features.{index}.bias": layer.bias}
    shapes = {key: tuple(target.shape) for key, target in targets.items()}
    state, _ = fit_keys(state, shapes)
    whole = any(key.startswith(("classifier.0.", "classifier.3.")) for key in state)
    if whole:
        shapes |= {"classifier.0.weight": (4096, 512 * 7 * 7), "classifier.0.bias": (4096,)}
        shapes |= {"classifier.3.weight": (4096, 4096), "classifier.3.bias": (4096,)}

    faults = state_dict_mismatches(state, shapes, {"classifier.6.weight", "classifier.6.bias"})
    if faults:
        raise ValueError(
            f"{weights} does not fit VGG16: {', '.join(faults)}; give a file with the keys of "
            "torchvision.models.vgg16(), its conv layers alone (features.N) or whole"
        )
    if whole and fc6.out_channels > 4096:
        raise ValueError(
            f"{weights} has 4096 channels to fill fc6 and fc7 from, but head_channels is {fc6.out_channels}; "
            "use at most 4096, or a file with the conv layers alone"
        )
    with torch.no_grad():
        for key, target in targets.items():
            target.copy_(state[key])
        if whole:
            _subsample_fc(state, fc6, fc7)


def _subsample_fc(state: dict[str, Tensor], fc6: nn.Conv2d | AdaptiveConv2d, fc7: nn.Conv2d) -> None:
    """Fill fc6 and fc7 from torchvision's fully connected layers, see `load_vgg16_weights`."""
    kept = torch.arange(fc6.out_channels) * 4096 // fc6.out_channels
    fc6.weight.copy_(state["classifier.0.weight"].reshape(4096, 512, 7, 7)[kept, :, ::3, ::3])
    fc7.weight.copy_(state["classifier.3.weight"][kept][:, kept, None, None])
    for layer, key in ((fc6, "classifier.0.bias"), (fc7, "classifier.3.bias")):
        if layer.bias is not None:
            layer.bias.copy_(state[key][kept])


def _imagenet_vgg16() -> dict[str, Tensor]:
    from torchvision.models import VGG16_Weights  # Local: a network without these weights does without it.

    try:
        with no_pickles():
            return dict(VGG16_Weights.IMAGENET1K_V1.get_state_dict(progress=True, check_hash=True))
    except OSError as error:
        raise FileNotFoundError(
            f"the ImageNet weights of VGG16 could not be downloaded ({error}); give the path of a local file"
        ) from error
