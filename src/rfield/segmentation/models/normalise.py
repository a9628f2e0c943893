"""Turn the data transforms' normalisation into the one that a backbone's weights were trained with."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rfield.segmentation.conventions import IMAGENET_MEAN, IMAGENET_STD


class InputNormalisation(nn.Module):
    """Renormalises images from ImageNet's mean and deviation to others.

    It stands before the first convolution and is not folded into it, so that the padding zeros mean what they meant in
    the training of the weights. Its two buffers are saved with the network.

    Args:
        mean: per channel, of images from 0 to 1.
        std: per channel.

    Raises:
        ValueError: a deviation is not positive, or there are not three of either.

    Example:
        >>> grey = (0.5 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
        >>> InputNormalisation((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))(grey.reshape(1, 3, 1, 1)).abs().max().item() < 1e-6
        True
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(f"a normalisation has three means and three positive deviations, got {mean} and {std}")
        ours, theirs = torch.tensor(IMAGENET_STD, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
        between = torch.tensor(IMAGENET_MEAN, dtype=torch.float64) - torch.tensor(mean, dtype=torch.float64)
        self.register_buffer("scale", (ours / theirs).float().reshape(3, 1, 1))
        self.register_buffer("shift", (between / theirs).float().reshape(3, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        """Map Tensor[N, 3, H, W] to the same size."""
        return image * self.scale + self.shift
