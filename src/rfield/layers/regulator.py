"""The regulator, which makes the receptive field of a module one learned number (Wei et al., CVPR 2017, Sec. 3)."""

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rfield.layers.dilation import Pair, round_dilation, set_dilation
from rfield.layers.factor import LearnedFactor
from rfield.layers.resize import Inflation2d, Interpolation2d, inflated_size
from rfield.ops.values import read_values


class ReceptiveFieldRegulator(LearnedFactor):
    """A module whose receptive field is a learned number (Wei et al., CVPR 2017, Sec. 3).

    The input is inflated by `factor`, the module runs on the inflated map, and its output is interpolated back. A
    larger factor means a smaller receptive field: the module's kernels cover `1 / factor` times as many px of the image
    along each axis.

    Args:
        module: maps Tensor[N, C, h, w] to Tensor[N, K, h, w].
        factor: start value: a number, or (height, width) for one factor per axis.
        min_factor: lower bound. Default: the factor at which `effective_dilation` equals the map's size.
        max_factor: upper bound. Default: the factor at which `effective_dilation` is 1.
        memory_budget: maximum bytes of the inflated map. In training and in a search, a factor that needs more is
            reduced, with a warning; otherwise it raises an error.

    Attributes:
        base_dilation: (height, width), the largest dilation inside `module` along each axis, in px of its input map.
        record_gradients: set it to True before the forward to use `pop_factor_gradients`.

    Raises:
        ValueError: for factors or bounds that are not positive and finite, and in `forward` for a wrong rank, an
            empty map, a module that changes the map's size, or a map over the memory budget.

    Example:
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
        super().__init__(largest_dilation(module), factor, min_factor, max_factor)
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
        self._grad_factor_inflation: Tensor | None = None
        self._grad_factor_interpolation: Tensor | None = None

    def forward(self, input: Tensor, output_size: tuple[int, int] | None = None) -> Tensor:
        """Run the module with the regulated receptive field.

        Args:
            input: Tensor[N, C, h, w].
            output_size: (H, W) to interpolate to, in px. Default: (h, w).

        Returns:
            Tensor[N, K, H, W].
        """
        grid_size = self._record_map_size(input)
        snapped = self.snapped
        if snapped:
            # A moving average of the model may have copied only the buffer from another regulator.
            self.apply_snap()
        # On the meta device the factor has no value to compute a size from.
        resizes = not snapped and not input.is_meta
        factor = self._current_factor(input) if resizes else torch.ones_like(self.log_factor)
        for_inflation = for_interpolation = factor
        if self.record_gradients and factor.requires_grad:
            for_inflation, for_interpolation = factor.clone(), factor.clone()
            for_inflation.register_hook(self._add_grad_factor_inflation)  # type: ignore[no-untyped-call]
            for_interpolation.register_hook(self._add_grad_factor_interpolation)  # type: ignore[no-untyped-call]
        inflated = self.inflation(input, for_inflation) if resizes else input
        output: Tensor = self.module(inflated)
        check_keeps_size(inflated, output)
        if not resizes and output_size in (None, grid_size):
            return output
        resized: Tensor = self.interpolation(output, for_interpolation, grid_size, output_size or grid_size)
        return resized

    def pop_factor_gradients(self) -> tuple[Tensor, Tensor]:
        """Return the two terms of the factor's gradient, summed over the backward passes since the last call.

        They are recorded if `record_gradients` is True. Their sum is dL/d(factor) = `log_factor.grad / factor`.

        Returns:
            (grad_factor_inflation, grad_factor_interpolation), each of the factor's shape.

        Raises:
            RuntimeError: if no backward has been recorded.
        """
        if self._grad_factor_inflation is None or self._grad_factor_interpolation is None:
            raise RuntimeError("no gradients recorded: set record_gradients = True before the forward, then backward")
        gradients = self._grad_factor_inflation, self._grad_factor_interpolation
        self._grad_factor_inflation = self._grad_factor_interpolation = None
        return gradients

    def _add_grad_factor_inflation(self, grad: Tensor) -> None:
        previous = self._grad_factor_inflation
        self._grad_factor_inflation = grad.detach() if previous is None else previous + grad.detach()

    def _add_grad_factor_interpolation(self, grad: Tensor) -> None:
        previous = self._grad_factor_interpolation
        self._grad_factor_interpolation = grad.detach() if previous is None else previous + grad.detach()

    def snap(self) -> None:
        """End the learning: give the dilated convolutions integer dilations, and stop resizing.

        The largest dilation becomes the integer nearest to its effective one, rounding halves up; the others follow in
        proportion, rounded in the same way. If the module has no dilated convolution, the factor is frozen and the
        resizes remain.
        """
        if self.snaps:
            super().snap()
        else:
            self.freeze_factor()

    @property
    def snaps(self) -> bool:
        """Whether the module has a dilation above 1 to snap."""
        return max(self.base_dilation) > 1

    def _set_snapped_dilation(self, dilation: tuple[int, int]) -> None:
        super()._set_snapped_dilation(dilation)
        self.apply_snap()

    def apply_snap(self) -> None:
        """Set the convolutions to the snapped dilations, or to the original ones if the layer is not snapped."""
        target = self.effective_dilation if self.snapped else self.base_dilation
        ratio = [value / base for value, base in zip(target, self.base_dilation, strict=True)]
        for conv, (height, width) in self._convs:
            set_dilation(conv, (round_dilation(height * ratio[0]), round_dilation(width * ratio[1])))

    def _current_factor(self, input: Tensor) -> Tensor:
        """Return the factor to inflate by, Tensor[1] or Tensor[2], reduced to fit the memory budget."""
        if self.dilation_override is not None:
            values = [base / value for base, value in zip(self.base_dilation, self.dilation_override, strict=True)]
            factor = self.log_factor.new_tensor(values)
        else:
            factor = self.log_factor.exp()
        shrink = self._budget_scale(input, read_values("factor", factor))
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

    def _budget_scale(self, input: Tensor, factor: list[float]) -> float:
        """Return a number, at most 1, to multiply the factor by so that the inflated map fits `memory_budget`."""
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
        sizes = [size for size in (height, width) if size > 1]  # an axis of one pixel is not inflated
        side = (self.memory_budget / needed) ** (1 / max(1, len(sizes)))
        shrink = min(((math.floor(size * side) - 1) / (size - 1) for size in sizes), default=0)
        if shrink <= 0:
            raise ValueError(f"{message}, and no factor fits it: raise memory_budget or use a smaller batch")
        if not self._warned_of_budget:  # warn once: a factor at this bound exceeds it at every step
            self._warned_of_budget = True
            warnings.warn(
                f"{message}: the factor is held at {shrink:.3g} of it; raise memory_budget, or use a smaller batch, "
                "map or dilation",
                stacklevel=4,
            )
        return shrink


def check_keeps_size(inflated: Tensor, output: Tensor) -> None:
    """Raise ValueError if a regulated module has changed the size of its map."""
    if output.shape[2:] != inflated.shape[2:]:
        raise ValueError(
            f"the regulated module must keep the map's size, but turned {tuple(inflated.shape)} into "
            f"{tuple(output.shape)}: give its convolutions stride 1 and padding = dilation * (kernel - 1) / 2"
        )


def largest_dilation(module: nn.Module) -> Pair:
    """Return the largest dilation (height, width) of all convolutions whose kernel is larger than 1 along the axis."""
    largest = [1, 1]
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            for axis in range(2):
                if layer.kernel_size[axis] > 1:
                    largest[axis] = max(largest[axis], layer.dilation[axis])
    return float(largest[0]), float(largest[1])
