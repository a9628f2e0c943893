"""A receptive field learned by one number: the regulator (Wei et al., CVPR 2017, Sec. 3)."""

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rfield.layers.factor import LearnedFactor, Pair, round_dilation, set_dilation
from rfield.layers.resize import Inflation2d, Interpolation2d, inflated_size
from rfield.ops.sampling import read_values


class ReceptiveFieldRegulator(LearnedFactor):
    """Makes the receptive field of any fully convolutional module a learned number.

    The input is inflated by `factor`, the module runs on the inflated map, and its output is interpolated back. A
    larger factor means a smaller receptive field: the module's kernels cover `1 / factor` as much of the image.

    Args:
        module: maps Tensor[N, C, h, w] to Tensor[N, K, h, w].
        factor: where the factor starts: a number, or (height, width) for one factor an axis.
        min_factor: lower bound. Default: what keeps `effective_dilation` at or below the map's size.
        max_factor: upper bound. Default: what keeps `effective_dilation` at or above 1.
        memory_budget: bytes that the inflated map may take. In training and in a search the factor is held below it,
            with a warning; elsewhere a larger map is an error.

    Attributes:
        base_dilation: (height, width), the largest dilation inside `module`.
        record_gradients: set it to True to have `pop_factor_gradients` report the factor's gradient term by term.

    Raises:
        ValueError: for factors or bounds that are not positive and finite, and in `forward` for a wrong rank, an
            empty map, or a module that changes the map's size.

    >>> head = ReceptiveFieldRegulator(nn.Conv2d(8, 21, 3, padding=12, dilation=12), factor=1.5)
    >>> head(torch.rand(2, 8, 41, 41)).shape
    torch.Size([2, 21, 41, 41])
    >>> head(torch.rand(2, 8, 41, 41), output_size=(321, 321)).shape
    torch.Size([2, 21, 321, 321])
    >>> head.effective_dilation
    (8.0, 8.0)
    """

    def __init__(
        self,
        module: nn.Module,
        factor: float | Sequence[float] = 1.0,
        min_factor: float | None = None,
        max_factor: float | None = None,
        memory_budget: int = 2 * 2**30,
    ) -> None:
        super().__init__(_largest_dilation(module), factor, min_factor, max_factor)
        self.module = module
        self.inflation = Inflation2d()
        self.interpolation = Interpolation2d()
        self.memory_budget = memory_budget
        self._warned_of_budget = False
        self.record_gradients = False
        self._convs = [
            (conv, (conv.dilation[0], conv.dilation[1]))
            for conv in module.modules()
            if isinstance(conv, nn.Conv2d) and max(conv.kernel_size) > 1
        ]
        self._grad_inflation: Tensor | None = None
        self._grad_interpolation: Tensor | None = None

    def forward(self, input: Tensor, output_size: tuple[int, int] | None = None) -> Tensor:
        """Runs the module with the regulated receptive field.

        Args:
            input: Tensor[N, C, h, w].
            output_size: (H, W) to interpolate to; None goes back to the grid (h, w).

        Returns:
            Tensor[N, K, H, W].
        """
        if input.dim() != 4 or 0 in input.shape:
            raise ValueError(f"input must be a map (N, C, h, w) that is not empty, got shape {tuple(input.shape)}")
        grid_size = (input.shape[2], input.shape[3])
        self._record_map_size(grid_size)
        snapped = self.snapped
        if snapped:
            # Copied from another regulator, as a running average of the weights is, the buffer may have come alone.
            self.apply_snap()
        # The size on the meta device does not depend on the factor, which has no value there.
        resizes = not snapped and not input.is_meta
        factor = self._present_factor(input) if resizes else torch.ones_like(self.log_factor)
        for_inflation = for_interpolation = factor
        if self.record_gradients and factor.requires_grad:
            for_inflation, for_interpolation = factor.clone(), factor.clone()
            for_inflation.register_hook(self._add_grad_inflation)  # type: ignore[no-untyped-call]
            for_interpolation.register_hook(self._add_grad_interpolation)  # type: ignore[no-untyped-call]
        inflated = self.inflation(input, for_inflation) if resizes else input
        output: Tensor = self.module(inflated)
        if output.shape[2:] != inflated.shape[2:]:
            raise ValueError(
                f"the regulated module must keep the map's size, but turned {tuple(inflated.shape)} into "
                f"{tuple(output.shape)}: give its convolutions stride 1 and padding = dilation * (kernel - 1) / 2"
            )
        if not resizes and output_size in (None, grid_size):
            return output
        resized: Tensor = self.interpolation(output, for_interpolation, grid_size, output_size or grid_size)
        return resized

    def pop_factor_gradients(self) -> tuple[Tensor, Tensor]:
        """The factor's gradient in its two terms, summed over the backward passes since the last call.

        Needs `record_gradients = True`. Their sum is dL/d(factor) = `log_factor.grad / factor`.

        Returns:
            (grad_factor_inflation, grad_factor_interpolation), each of the factor's shape.

        Raises:
            RuntimeError: if no recorded backward has run.
        """
        if self._grad_inflation is None or self._grad_interpolation is None:
            raise RuntimeError("no gradients recorded: set record_gradients = True before the forward, then backward")
        gradients = self._grad_inflation, self._grad_interpolation
        self._grad_inflation = self._grad_interpolation = None
        return gradients

    def _add_grad_inflation(self, grad: Tensor) -> None:
        previous = self._grad_inflation
        self._grad_inflation = grad.detach() if previous is None else previous + grad.detach()

    def _add_grad_interpolation(self, grad: Tensor) -> None:
        previous = self._grad_interpolation
        self._grad_interpolation = grad.detach() if previous is None else previous + grad.detach()

    def snap(self) -> None:
        """Ends the learning: dilated convolutions take whole dilations, and no resizing is left.

        The largest takes the whole dilation nearest to its effective one, halves up, and the others follow in
        proportion, each rounded in the same way. Where the module has no dilated convolution, the factor is frozen
        and the resizes stay.
        """
        if self.snaps:
            super().snap()
        else:
            self.freeze_factor()

    @property
    def snaps(self) -> bool:
        """Whether the module has a dilation to snap."""
        return max(self.base_dilation) > 1

    def _set_snapped_dilation(self, dilation: tuple[int, int]) -> None:
        super()._set_snapped_dilation(dilation)
        self.apply_snap()

    def apply_snap(self) -> None:
        """Gives the convolutions the dilations that a snapped regulator stands for, or else their own."""
        realised = self.effective_dilation if self.snapped else self.base_dilation
        ratio = [value / base for value, base in zip(realised, self.base_dilation, strict=True)]
        for conv, (height, width) in self._convs:
            set_dilation(conv, (round_dilation(height * ratio[0]), round_dilation(width * ratio[1])))

    def _present_factor(self, input: Tensor) -> Tensor:
        """The factor to inflate by, Tensor[1] or Tensor[2], within the memory budget."""
        if self.dilation_override is not None:
            held = [base / dilation for base, dilation in zip(self.base_dilation, self.dilation_override, strict=True)]
            factor = self.log_factor.new_tensor(held)
        else:
            factor = self.log_factor.exp()
        shrink = self._within_budget(input, read_values("factor", factor))
        if shrink == 1.0:
            return factor
        if self.dilation_override is not None or not self._learns:
            return factor * shrink
        with torch.no_grad():
            self.log_factor.add_(math.log(shrink))
        return self.log_factor.exp()

    @property
    def _learns(self) -> bool:
        return self.training and self.log_factor.requires_grad

    def _within_budget(self, input: Tensor, factor: list[float]) -> float:
        """What to multiply the factor by to keep the inflated map within `memory_budget`."""
        if not all(math.isfinite(value) for value in factor):
            raise ValueError(f"the factor is {factor}: the training has diverged; lower the factor's learning rate")
        n, c, h, w = input.shape
        height, width = inflated_size((h, w), factor)
        needed = n * c * height * width * input.element_size()
        if needed <= self.memory_budget:
            return 1.0
        message = (
            f"inflating {tuple(input.shape)} by {[round(value, 3) for value in factor]} takes "
            f"{needed / 2**20:.0f} MiB, over the budget of {self.memory_budget / 2**20:.0f} MiB"
        )
        if not (self._learns or self.in_search or self.dilation_override is not None):
            raise ValueError(f"{message}: raise memory_budget, or use a smaller batch, map or factor")
        sizes = [size for size in (height, width) if size > 1]  # An axis of one pixel stays one.
        side = (self.memory_budget / needed) ** (1 / max(1, len(sizes)))
        shrink = min(((math.floor(size * side) - 1) / (size - 1) for size in sizes), default=0)
        if shrink <= 0:
            raise ValueError(f"{message}, and no factor fits it: raise memory_budget or use a smaller batch")
        if not self._warned_of_budget:  # Once: a factor that wants to grow meets its bound at every step.
            self._warned_of_budget = True
            warnings.warn(
                f"{message}: the factor is held at {shrink:.3g} of it; raise memory_budget, or use a smaller batch, "
                "map or dilation",
                stacklevel=4,
            )
        return shrink


def _largest_dilation(module: nn.Module) -> Pair:
    """(height, width): the largest dilation of any convolution that sees more than one pixel along the axis."""
    largest = [1, 1]
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            for axis in range(2):
                if layer.kernel_size[axis] > 1:
                    largest[axis] = max(largest[axis], layer.dilation[axis])
    return float(largest[0]), float(largest[1])
