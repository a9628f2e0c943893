"""The regulator with a factor of its own for each image, predicted from the image's features."""

import math

import torch
from torch import Tensor, nn

from rfield.layers.dilation import remove_rounding_error_tensor
from rfield.layers.regulator import check_keeps_size, largest_dilation
from rfield.layers.resize import Inflation2d, Interpolation2d


class ImageAdaptiveRegulator(nn.Module):
    """A module whose receptive field is a number that each image decides (image-adaptive inflation).

    A small network predicts the effective dilation from the image's globally pooled features. As in
    `ReceptiveFieldRegulator`, the input is inflated by the factor, the module runs, and its output is interpolated
    back; the exact gradient of the factor trains the network. Maps of different sizes cannot be one batch, so that the
    module runs once for each size among the inflated maps; a batch norm inside sees the images of one size at a time.

    The size of the inflated map depends on the image's content, so that `rfield.fuse` and exports to ONNX refuse the
    layer. `GatedConv2d` has neither limit.

    Args:
        module: maps Tensor[N, C, h, w] to Tensor[N, K, h, w]; it contains a convolution of more than one pixel.
        in_channels: channels C.
        least: effective dilation that predictions stay above.
        greatest: effective dilation that they stay below. Default: twice the largest dilation inside `module`, at least
            twice `least`. The predictions start at the largest dilation, or at the geometric mean of both bounds if
            that lies outside.

    Attributes:
        base_dilation: the largest dilation inside `module`, in px of its input map.
        predictor: maps Tensor[N, C, h, w] to Tensor[N, 1].

    Raises:
        ValueError: if `module` has no such convolution, or the bounds are not 0 < least < greatest; in `forward` for a
            module that changes the map's size, and for an empty map.

    Example:
        >>> conv = nn.Conv2d(8, 21, 3, padding=6, dilation=6)
        >>> head = ImageAdaptiveRegulator(conv, in_channels=8)
        >>> images = torch.rand(2, 8, 41, 41)
        >>> head(images).shape, head.dilations(images).tolist()
        (torch.Size([2, 21, 41, 41]), [6.0, 6.0])
    """

    def __init__(self, module: nn.Module, in_channels: int, least: float = 1.0, greatest: float | None = None) -> None:
        super().__init__()
        if not any(isinstance(layer, nn.Conv2d) and max(layer.kernel_size) > 1 for layer in module.modules()):
            raise ValueError("no convolution in the module sees more than one pixel: there is nothing to regulate")
        self.base_dilation = max(largest_dilation(module))
        greatest = 2 * max(self.base_dilation, least) if greatest is None else greatest
        if not 0 < least < greatest < math.inf:
            raise ValueError(f"the effective dilations need 0 < least < greatest, got {least:g} and {greatest:g}")
        self.least, self.greatest = least, greatest
        self.module = module
        self.inflation = Inflation2d()
        self.interpolation = Interpolation2d()
        hidden = max(in_channels // 16, 32)
        last = nn.Linear(hidden, 1)
        self.predictor = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(in_channels, hidden), nn.ReLU(inplace=True), last
        )
        share = math.log(self.base_dilation / least) / math.log(greatest / least)
        nn.init.zeros_(last.weight)
        nn.init.constant_(last.bias, math.log(share / (1 - share)) if 0 < share < 1 else 0.0)

    def dilations(self, input: Tensor) -> Tensor:
        """Return the effective dilation of each image of Tensor[N, C, h, w], Tensor[N], in px of the map."""
        predicted = self.predictor(input)[:, 0]
        share = predicted.to(torch.promote_types(predicted.dtype, torch.float32)).sigmoid()
        return remove_rounding_error_tensor(self.least * (share * math.log(self.greatest / self.least)).exp())

    def forward(self, input: Tensor, output_size: tuple[int, int] | None = None) -> Tensor:
        """Run the module with the receptive field that each image decides.

        Args:
            input: Tensor[N, C, h, w].
            output_size: (H, W) to interpolate to, in px. Default: (h, w).

        Returns:
            Tensor[N, K, H, W].
        """
        if input.dim() != 4 or 0 in input.shape:
            raise ValueError(f"input must be a map (N, C, h, w) that is not empty, got shape {tuple(input.shape)}")
        images, factors = (each.chunk(len(input)) for each in (input, self.base_dilation / self.dilations(input)))
        inflated = [self.inflation(image, factor) for image, factor in zip(images, factors, strict=True)]
        by_size: dict[torch.Size, list[int]] = {}
        for place, each in enumerate(inflated):
            by_size.setdefault(each.shape, []).append(place)
        grid_size = (input.shape[2], input.shape[3])
        outputs: dict[int, Tensor] = {}
        for places in by_size.values():
            batch = torch.cat([inflated[place] for place in places])
            output = self.module(batch)
            check_keeps_size(batch, output)
            for place, part in zip(places, output.chunk(len(places)), strict=True):
                outputs[place] = self.interpolation(part, factors[place], grid_size, output_size or grid_size)
        return torch.cat([outputs[place] for place in range(len(outputs))])

    def extra_repr(self) -> str:
        return f"base_dilation={self.base_dilation:g}, least={self.least:g}, greatest={self.greatest:g}"
