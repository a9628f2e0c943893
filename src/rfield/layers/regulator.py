"""A receptive field learned by one number: the regulator (Wei et al., CVPR 2017, Sec. 3)."""

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rfield.layers.resize import Inflation2d, Interpolation2d, inflated_size

Pair = tuple[float, float]


class ReceptiveFieldRegulator(nn.Module):
    """Makes the receptive field of any fully convolutional module a learned number.

    The input is inflated by `factor`, the module runs on the inflated map, and its output is interpolated back. A
    larger factor means a smaller receptive field: the module's kernels cover `1 / factor` as much of the image. The
    parameter is `log_factor`, so the factor is positive by construction; in training it is clamped to its range
    before each forward, which leaves the optimizer's state alone. Keep it out of weight decay:
    `rfield.parameter_groups` does.

    Args:
        module: maps Tensor[N, C, h, w] to Tensor[N, K, h, w].
        factor: where the factor starts: a number, or (height, width) for one factor an axis.
        min_factor: lower bound. Default: what keeps `effective_dilation` at or below the map's size.
        max_factor: upper bound. Default: what keeps `effective_dilation` at or above 1.
        memory_budget: bytes that the inflated map may take. In training the factor is held below it, with a warning;
            elsewhere a larger map is an error.

    Attributes:
        log_factor: Parameter[1] or Parameter[2], the logarithm of the factor.
        dilation: (height, width), the largest dilation inside `module`.
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
        super().__init__()
        start = _as_factors("factor", factor)
        for name, bound in (("min_factor", min_factor), ("max_factor", max_factor)):
            if bound is not None:
                _as_factors(name, bound)
        if (min_factor or 0.0) > min(start) or (max_factor or math.inf) < max(start):
            raise ValueError(f"factor {factor} lies outside [min_factor, max_factor] = [{min_factor}, {max_factor}]")
        self.module = module
        self.inflation = Inflation2d()
        self.interpolation = Interpolation2d()
        self.log_factor = nn.Parameter(torch.tensor(start, dtype=torch.float32).log())
        self.min_factor = min_factor
        self.max_factor = max_factor
        self.memory_budget = memory_budget
        self.dilation = _largest_dilation(module)
        self.record_gradients = False
        self._start = start
        self._grad_inflation: Tensor | None = None
        self._grad_interpolation: Tensor | None = None

    @property
    def factor(self) -> Tensor:
        """The present factor, Tensor[1] or Tensor[2], detached."""
        return self.log_factor.detach().exp()

    @property
    def effective_dilation(self) -> Pair:
        """`dilation / factor` as (height, width), in feature px."""
        factor = self.factor.tolist()
        return self.dilation[0] / factor[0], self.dilation[1] / factor[-1]

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
        if self.training:
            self.clamp_factor_(grid_size)
        self._hold_memory_budget(input)
        factor = self.log_factor.exp()
        for_inflation = for_interpolation = factor
        if self.record_gradients and factor.requires_grad:
            for_inflation, for_interpolation = factor.clone(), factor.clone()
            for_inflation.register_hook(self._add_grad_inflation)  # type: ignore[no-untyped-call]
            for_interpolation.register_hook(self._add_grad_interpolation)  # type: ignore[no-untyped-call]
        inflated = self.inflation(input, for_inflation)
        output = self.module(inflated)
        if output.shape[2:] != inflated.shape[2:]:
            raise ValueError(
                f"the regulated module must keep the map's size, but turned {tuple(inflated.shape)} into "
                f"{tuple(output.shape)}: give its convolutions stride 1 and padding = dilation * (kernel - 1) / 2"
            )
        resized: Tensor = self.interpolation(output, for_interpolation, grid_size, output_size or grid_size)
        return resized

    def factor_bounds(self, grid_size: tuple[int, int]) -> tuple[Pair, Pair]:
        """The range of the factor on a map of `grid_size` = (h, w): ((min_h, min_w), (max_h, max_w)).

        The default range is widened to hold a factor that was set by hand.
        """
        start = (self._start[0], self._start[-1])
        lower = tuple(min(d / size, s) for d, size, s in zip(self.dilation, grid_size, start, strict=True))
        upper = tuple(max(d, s) for d, s in zip(self.dilation, start, strict=True))
        if self.min_factor is not None:
            lower = (self.min_factor, self.min_factor)
        if self.max_factor is not None:
            upper = (self.max_factor, self.max_factor)
        return (lower[0], lower[1]), (upper[0], upper[1])

    @torch.no_grad()
    def clamp_factor_(self, grid_size: tuple[int, int]) -> None:
        """Brings the factor back into its range, in place."""
        lower, upper = self.factor_bounds(grid_size)
        if self.log_factor.numel() == 1:  # One factor must suit both axes: the looser bound of each side.
            lower, upper = (min(lower),) * 2, (max(upper),) * 2
        axes = self.log_factor.numel()
        self.log_factor.clamp_(
            self.log_factor.new_tensor(lower[:axes]).log(), self.log_factor.new_tensor(upper[:axes]).log()
        )

    @torch.no_grad()
    def set_factor(self, factor: float | Sequence[float]) -> None:
        """Sets the factor in place: a number, or (height, width) where there is one factor an axis."""
        values = _as_factors("factor", factor)
        if len(values) > self.log_factor.numel():
            raise ValueError(f"this regulator has one factor for both axes, got {len(values)} values: {values}")
        self._start = values
        self.log_factor.copy_(self.log_factor.new_tensor(values).log().expand_as(self.log_factor))

    def freeze_factor(self, frozen: bool = True) -> None:
        """Stops (or with `frozen=False` resumes) the factor's learning."""
        self.log_factor.requires_grad_(not frozen)

    def share_factor(self, other: "ReceptiveFieldRegulator") -> None:
        """Uses the very same parameter as `other` from now on. Do this before the optimizer is made."""
        self.log_factor = other.log_factor
        self._start = other._start

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

    def extra_repr(self) -> str:
        factor = ", ".join(f"{value:.4g}" for value in self.factor.tolist())
        return f"factor=({factor}), min_factor={self.min_factor}, max_factor={self.max_factor}"

    def _add_grad_inflation(self, grad: Tensor) -> None:
        previous = self._grad_inflation
        self._grad_inflation = grad.detach() if previous is None else previous + grad.detach()

    def _add_grad_interpolation(self, grad: Tensor) -> None:
        previous = self._grad_interpolation
        self._grad_interpolation = grad.detach() if previous is None else previous + grad.detach()

    def _hold_memory_budget(self, input: Tensor) -> None:
        n, c, h, w = input.shape
        factor = self.factor
        if not bool(factor.isfinite().all()):
            raise ValueError(f"the factor is {factor.tolist()}: the training has diverged; lower the factor's rate")
        height, width = inflated_size((h, w), factor.tolist())
        needed = n * c * height * width * input.element_size()
        if needed <= self.memory_budget:
            return
        message = (
            f"inflating {tuple(input.shape)} by {[round(value, 3) for value in factor.tolist()]} takes "
            f"{needed / 2**20:.0f} MiB, over the budget of {self.memory_budget / 2**20:.0f} MiB"
        )
        if not (self.training and self.log_factor.requires_grad):
            raise ValueError(f"{message}: raise memory_budget, or use a smaller batch, map or factor")
        side = math.sqrt(self.memory_budget / needed)
        shrink = min((math.floor(size * side) - 1) / (size - 1) for size in (height, width) if size > 1)
        if shrink <= 0:
            raise ValueError(f"{message}, and no factor fits it: raise memory_budget or use a smaller batch")
        warnings.warn(f"{message}: the factor is held at {shrink:.3g} of it", stacklevel=3)
        with torch.no_grad():
            self.log_factor.add_(math.log(shrink))


def _as_factors(name: str, value: float | Sequence[float]) -> tuple[float, ...]:
    values = tuple(float(v) for v in value) if isinstance(value, Sequence) else (float(value),)
    if len(values) not in (1, 2) or not all(math.isfinite(v) and v > 0 for v in values):
        raise ValueError(f"{name} must be one positive finite number or two (height, width), got {value}")
    return values


def _largest_dilation(module: nn.Module) -> Pair:
    """(height, width): the largest dilation of any convolution that sees more than one pixel along the axis."""
    largest = [1, 1]
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            for axis in range(2):
                if layer.kernel_size[axis] > 1:
                    largest[axis] = max(largest[axis], layer.dilation[axis])
    return float(largest[0]), float(largest[1])
