"""A decoder for sharper borders: it joins a head's features with a finer map of the backbone."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfield.segmentation.models.backbones import Backbone

# As in DeepLabv3+: channels of the head's features, of the finer map and of the convolutions that join them.
_CONTEXT, _FINE, _JOINED = 256, 48, 256


class Decoder(nn.Module):
    """DeepLabv3+'s decoder (Chen et al., ECCV 2018): logits on the grid of a finer map.

    The head gives features instead of logits, interpolated to the finer grid; the finer map is reduced to few
    channels, so that it does not outweigh them; two 3x3 convolutions join both. Only the reduction has a batch norm,
    since the features of backbones differ much in size. The head's features have none: they depend on its dilation,
    and the running statistics over a search's many dilations would fit none of them.

    Args:
        in_channels: of the head's features, C.
        fine_channels: of the finer map, F.
        num_classes: classes K.
        ratio: the features' stride over the finer map's.

    Example:
        >>> decoder = Decoder(in_channels=16, fine_channels=8, num_classes=5, ratio=2)
        >>> fine, context = torch.randn(2, 8, 17, 9), torch.randn(2, 16, 17, 9)
        >>> decoder(fine, context).shape, decoder(fine, context, output_size=(65, 33)).shape
        (torch.Size([2, 5, 17, 9]), torch.Size([2, 5, 65, 33]))
    """

    def __init__(self, in_channels: int, fine_channels: int, num_classes: int, ratio: float) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.ratio = ratio
        self.reduce = nn.Sequential(
            nn.Conv2d(fine_channels, _FINE, 1, bias=False), nn.BatchNorm2d(_FINE), nn.ReLU(inplace=True)
        )
        self.join = nn.Sequential(
            nn.Conv2d(in_channels + _FINE, _JOINED, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(_JOINED, _JOINED, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(_JOINED, num_classes, 1),
        )
        last = self.join[-1]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                if module is last:
                    nn.init.normal_(module.weight, std=0.01)  # As fc8 of a head without decoder.
                else:
                    nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def start(self, head: nn.Module) -> None:
        """Initialise a head's last layers for features; initialised for logits, their outputs would be near 0."""
        for name, module in head.named_modules():
            if isinstance(module, nn.Conv2d) and name.endswith("fc8"):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def chain(self) -> list[nn.Module]:
        """Return the modules in the order of execution, from the head's features on."""
        return [nn.Upsample(scale_factor=self.ratio), self.join]

    def forward(self, fine: Tensor, context: Tensor, output_size: tuple[int, int] | None = None) -> Tensor:
        """Map both to logits.

        Args:
            fine: the backbone's finer map, Tensor[N, F, h, w].
            context: the head's features on the same grid, Tensor[N, C, h, w].
            output_size: height and width (H, W) of the logits; `None` keeps the grid. Corners coincide.

        Returns:
            Tensor[N, K, H, W].
        """
        logits: Tensor = self.join(torch.cat([F.relu(context), self.reduce(fine)], dim=1))
        if output_size is None:
            return logits
        return F.interpolate(logits, size=output_size, mode="bilinear", align_corners=True)


def output_layers(backbone: Backbone, num_classes: int, decoder: bool) -> tuple[int, Decoder | None]:
    """Return how many channels a head should give, and the decoder that makes logits of them, or None.

    Raises:
        ValueError: the backbone has no finer map.

    >>> from rfield.segmentation.models.backbones import small_cnn_backbone
    >>> output_layers(small_cnn_backbone(), 5, decoder=False)
    (5, None)
    """
    if not decoder:
        return num_classes, None
    if not backbone.fine_stride:
        raise ValueError(
            f"this backbone has no map finer than its features of stride {backbone.stride}, which a decoder needs"
        )
    ratio = backbone.stride / backbone.fine_stride
    return _CONTEXT, Decoder(_CONTEXT, backbone.fine_channels, num_classes, ratio)
