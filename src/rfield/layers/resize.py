"""The two resizes around a regulated module (Wei et al., CVPR 2017, Sec. 3.2)."""

import torch
from torch import Tensor, nn

from rfield.ops import resize_bilinear, resized_size
from rfield.ops.values import positive_values


class Inflation2d(nn.Module):
    """Enlarge a feature map by `factor`, so that the same kernels cover less of the image.

    Example:
        >>> Inflation2d()(torch.rand(1, 8, 5, 5), torch.tensor([1.5])).shape
        torch.Size([1, 8, 7, 7])
    """

    def forward(self, input: Tensor, factor: Tensor) -> Tensor:
        """Resize `input` by `factor`.

        Args:
            input: Tensor[N, C, h, w], features.
            factor: Tensor[1] or Tensor[2] (height, width), positive.

        Returns:
            Tensor[N, C, h', w'] with `h' = resized_size(h, factor)`.

        Raises:
            ValueError: for an empty map, or as `resize_bilinear` does.
        """
        if input.dim() != 4 or 0 in input.shape:
            raise ValueError(f"input must be a map (N, C, h, w) that is not empty, got shape {tuple(input.shape)}")
        size = inflated_size((input.shape[2], input.shape[3]), positive_values("factor", factor))
        return resize_bilinear(input, factor, size)


class Interpolation2d(nn.Module):
    """Resize an inflated map to a fixed size: that of the feature map, or that of the labels.

    Example:
        >>> inflated = torch.rand(1, 21, 7, 7)
        >>> Interpolation2d()(inflated, torch.tensor([1.5]), grid_size=(5, 5), output_size=(33, 33)).shape
        torch.Size([1, 21, 33, 33])
    """

    def forward(
        self, input: Tensor, factor: Tensor, grid_size: tuple[int, int], output_size: tuple[int, int]
    ) -> Tensor:
        """Resize `input` by `total_scale / factor`, where `total_scale = (H - 1) / (h - 1)` per axis.

        Args:
            input: Tensor[N, K, h', w'], a map inflated by `factor`.
            factor: Tensor[1] or Tensor[2] (height, width), positive.
            grid_size: (h, w) of the map before its inflation.
            output_size: (H, W) of the result.

        Returns:
            Tensor[N, K, H, W].

        Raises:
            ValueError: as `resize_bilinear` does.
        """
        total_scale = torch.tensor(
            # An axis of one px, before or after, is sampled at position 0 whatever the scale.
            [
                (size - 1) / (grid - 1) if size > 1 and grid > 1 else 1.0
                for size, grid in zip(output_size, grid_size, strict=True)
            ],
            dtype=factor.dtype,
            device=factor.device,
        )
        return resize_bilinear(input, total_scale / factor, output_size)


def inflated_size(grid_size: tuple[int, int], factor: list[float]) -> tuple[int, int]:
    """Return the size (h', w') of a map of (h, w) px inflated by one factor, or by one per axis.

    Example:
        >>> inflated_size((41, 41), [0.5, 2.0])
        (21, 81)
    """
    return resized_size(grid_size[0], factor[0]), resized_size(grid_size[1], factor[-1])
