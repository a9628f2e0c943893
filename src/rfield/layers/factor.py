"""What every layer with a learned receptive field has: the factor, its range, and how it is set, shared and held."""

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rfield.ops.sampling import read_values

Pair = tuple[float, float]

# exp(log(f)) is not f to the last bit.
_SLACK = 1e-6


class LearnedFactor(nn.Module):
    """A positive factor f that divides a dilation: `effective_dilation = dilation / f`.

    The parameter is `log_factor`, so the factor is positive by construction. In training it is clamped to its range
    before each forward, which leaves the optimizer's state alone. Keep it out of weight decay:
    `rfield.parameter_groups` does.

    `log_factor` has float32 at least: `half()`, `bfloat16()` and `to(dtype)` cast the other parameters and leave it at
    that, since a step of bfloat16 is 0.4 % of a dilation; `double()` raises it. Layers that share it go on sharing it
    whatever they are cast, moved or loaded to, also by `load_state_dict(assign=True)` and `to_empty`.

    Args:
        dilation: (height, width) at factor 1, in px of the layer's input map.
        factor: where the factor starts: a number, or (height, width) for one factor an axis.
        min_factor: lower bound. Default: what keeps `effective_dilation` at or below the map's size.
        max_factor: upper bound. Default: what keeps `effective_dilation` at or above 1.

    Attributes:
        log_factor: Parameter[1] or Parameter[2], the logarithm of the factor.
        snapped_dilation: integer Tensor[2], the whole dilation (height, width) that `snap` has left the layer at; zeros
            before. Each layer has its own, also where a factor is shared. A state dict holds it as `snapped`, once
            there is one.
        dilation_override: the effective dilation that a search makes the layer run at instead of the learned one, or
            None.
        map_size: (h, w) of the last map seen, or None.
        in_search: whether a search that has not ended has the factor frozen, and sets it by itself.
        rounds: whether a search runs the layer at integer dilations, where it is cheap and exact.

    Raises:
        ValueError: for factors or bounds that are not positive and finite, or a factor outside its bounds.
    """

    rounds = False
    snapped_dilation: Tensor
    # Whether the buffer has been on the meta device, and rfield has not filled it since.
    _uninitialized = False
    # The layer that this one is a replica of, under `nn.DataParallel`.
    _replica_of: "LearnedFactor | None" = None

    def __init__(
        self,
        dilation: Pair,
        factor: float | Sequence[float] = 1.0,
        min_factor: float | None = None,
        max_factor: float | None = None,
    ) -> None:
        super().__init__()
        start = _as_factors("factor", factor)
        for name, bound in (("min_factor", min_factor), ("max_factor", max_factor)):
            if bound is not None:
                _as_factors(name, bound)
        if (min_factor or 0.0) > min(start) or (max_factor or math.inf) < max(start):
            raise ValueError(f"factor {factor} lies outside [min_factor, max_factor] = [{min_factor}, {max_factor}]")
        self.log_factor = nn.Parameter(torch.tensor(start, dtype=torch.float32).log())
        self.base_dilation = dilation
        self.min_factor = min_factor
        self.max_factor = max_factor
        # A buffer, so that running averages of the weights, which copy buffers, run at it too.
        self.register_buffer("snapped_dilation", torch.zeros(2, dtype=torch.int64), persistent=False)
        self._uninitialized = self.snapped_dilation.is_meta
        self.dilation_override: Pair | None = None
        self.map_size: tuple[int, int] | None = None
        self.in_search = False
        self._start = start
        self._shares = False

    @property
    def snapped(self) -> bool:
        """Whether `snap` has ended the learning at a whole dilation."""
        self._check_initialized()
        return not self.snapped_dilation.is_meta and bool(self.snapped_dilation.any())

    @property
    def snaps(self) -> bool:
        """Whether `snap` leaves a whole dilation."""
        return True

    @property
    def factor(self) -> Tensor:
        """The present factor, Tensor[1] or Tensor[2], detached; under FSDP2 gathered from all processes.

        That of a snapped layer is the one that stands for its whole dilation.
        """
        learned = _whole(self.log_factor.detach()).exp()
        if not self.snapped:
            return learned
        values = learned.new_tensor(self.base_dilation) / self.snapped_dilation
        return values if values[0] != values[1] else values[: learned.numel()]

    @property
    def effective_dilation(self) -> Pair:
        """The dilation over the factor as (height, width), in px of the layer's input map."""
        if self.snapped:
            height, width = self.snapped_dilation.tolist()
            return float(height), float(width)
        factor = read_values("factor", self.factor)
        height, width = self.base_dilation
        return remove_rounding_error(height / factor[0]), remove_rounding_error(width / factor[-1])

    @property
    def realised_dilation(self) -> Pair:
        """The dilation that a forward runs at now: what a search holds, or else the effective one."""
        return self.effective_dilation if self.dilation_override is None else self.dilation_override

    def factor_bounds(self, map_size: tuple[int, int]) -> tuple[Pair, Pair]:
        """The range of the factor on a map of (h, w): ((min_h, min_w), (max_h, max_w)).

        The default range is widened to hold the factor that the layer, or a search, has started from.
        """
        start = (self._start[0], self._start[-1])
        lower = tuple(min(d / size, s) for d, size, s in zip(self.base_dilation, map_size, start, strict=True))
        upper = tuple(max(d, s) for d, s in zip(self.base_dilation, start, strict=True))
        if self.min_factor is not None:
            lower = (self.min_factor, self.min_factor)
        if self.max_factor is not None:
            upper = (self.max_factor, self.max_factor)
        return (lower[0], lower[1]), (upper[0], upper[1])

    @torch.no_grad()
    def clamp_factor_(self, map_size: tuple[int, int]) -> None:
        """Brings the factor back into its range, in place."""
        lower, upper = self.factor_bounds(map_size)
        axes = self.log_factor.numel()
        if axes == 1:  # One factor must suit both axes: the looser bound of each side.
            lower, upper = (min(lower),) * 2, (max(upper),) * 2
        value = _whole(self.log_factor)
        inside = value.clamp(value.new_tensor(lower[:axes]).log(), value.new_tensor(upper[:axes]).log())
        # A start at a bound, as another precision has it, stays as it is.
        self._write(torch.where((inside - value).abs() > _SLACK, inside, value))

    @torch.no_grad()
    def set_factor(self, factor: float | Sequence[float]) -> None:
        """Sets the factor in place: a number, or (height, width) where there is one factor an axis.

        Its range stays. A snapped layer takes the new factor as it is, and is snapped no longer.
        """
        values = _as_factors("factor", factor)
        if len(values) > self.log_factor.numel():
            raise ValueError(f"this layer has one factor for both axes, got {len(values)} values: {values}")
        if self._uninitialized or self.snapped:
            self._set_snapped_dilation((0, 0))
        present = _whole(self.log_factor)
        self._write(present.new_tensor(values).log().expand_as(present))

    def extend_range(self, start: Sequence[float]) -> None:
        """Has the default range hold this factor, where a search starts; one number or (height, width)."""
        self._start = _as_factors("start", start)

    def nearest_dilation(self, dilation: Sequence[float]) -> tuple[int, int]:
        """The whole dilation (height, width) next to one, halves up, within `min_factor` and `max_factor`.

        Bounds that no whole dilation lies between are passed over.
        """
        nearest = []
        for value, base in zip(dilation, self.base_dilation, strict=True):
            least = 1.0 if self.max_factor is None else base / self.max_factor
            greatest = float(sys.maxsize) if self.min_factor is None else base / self.min_factor
            low, high = integer_range(least, greatest) or (1, sys.maxsize)
            nearest.append(min(max(round_dilation(value), low), high))
        return nearest[0], nearest[1]

    def _move_factor(self, device: torch.device) -> None:
        """Brings the factor to the device of the weights."""
        # Made anew: a parameter cannot be moved to torch's meta device.
        self.log_factor = nn.Parameter(self.log_factor.detach().to(device), self.log_factor.requires_grad)
        self.snapped_dilation = self.snapped_dilation.to(device)
        self._uninitialized = self.snapped_dilation.is_meta

    def _write(self, value: Tensor) -> None:
        """Sets the parameter in place, also where FSDP2 has dealt it to several processes."""
        parameter: Any = self.log_factor
        if hasattr(parameter, "full_tensor"):
            from torch.distributed.tensor import distribute_tensor

            value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
        parameter.copy_(value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy takes no part in the search that holds the original at some dilation.
        super().__setstate__({**state, "dilation_override": None})  # type: ignore[no-untyped-call]

    def snap(self) -> None:
        """Ends the learning: the layer stays at the whole dilation that is nearest, halves up, and at least 1.

        The factor is frozen. Layers that share it are snapped one by one, each to its own dilation.
        """
        self._set_snapped_dilation(self.nearest_dilation(self.effective_dilation))
        self.freeze_factor()

    @torch.no_grad()
    def copy_snap_to_factor(self) -> None:
        """Brings the parameter to what a snapped layer runs at, for those who read it alone.

        Of layers that share it, this is the parameter of all, so snap them first.
        """
        present = _whole(self.log_factor)
        self._write(present.new_tensor(self.factor.tolist()[: present.numel()]).log())

    def _set_snapped_dilation(self, dilation: tuple[int, int]) -> None:
        """Snaps the layer to a dilation, or with zeros has it follow its factor."""
        self.snapped_dilation.copy_(torch.tensor(dilation))
        self._uninitialized = self.snapped_dilation.is_meta

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LearnedFactor":
        own, gradient = self.log_factor, self.log_factor.grad
        no_value, no_snap = own.is_meta, self.snapped_dilation.is_meta

        def keep_precision(tensor: Tensor) -> Tensor:
            applied = fn(tensor)
            if tensor is not own and tensor is not gradient:
                return applied
            dtype = _at_least_float32(applied.dtype)
            if dtype != applied.dtype:
                return tensor.to(applied.device, dtype)
            # The first of several layers may have moved it; what `to_empty` gives to the next one has no value.
            return tensor if (applied.device, dtype) == (tensor.device, tensor.dtype) else applied

        super()._apply(keep_precision, recurse)  # type: ignore[no-untyped-call]
        self._keep_parameter(own)
        if no_value and not own.is_meta:
            with torch.no_grad():
                self._write(own.new_tensor(self._start).log().expand_as(own))
        if no_snap and not self.snapped_dilation.is_meta:
            self.snapped_dilation.zero_()
        self._uninitialized = self.snapped_dilation.is_meta or (self._uninitialized and not no_snap)
        return self

    def _keep_parameter(self, own: nn.Parameter) -> None:
        """Gives the factor's own parameter, which others hold too, the value of what has taken its place."""
        taken = self.log_factor
        if taken is own and own.dtype == _at_least_float32(own.dtype):
            return
        value = taken.detach().to(_at_least_float32(taken.dtype)).clone()
        if value.device != own.device:
            own.grad = None
        if hasattr(own, "full_tensor") or own.is_meta != value.is_meta:
            torch.utils.swap_tensors(own, nn.Parameter(value, own.requires_grad))  # type: ignore[no-untyped-call]
        else:
            own.data = value
        self.log_factor = own

    def freeze_factor(self, frozen: bool = True) -> None:
        """Stops (or with `frozen=False` resumes) the factor's learning; a snapped layer resumes where it is."""
        if not frozen and self.snapped:
            self.set_factor(self.factor.tolist()[: self.log_factor.numel()])
        self.log_factor.requires_grad_(not frozen)
        self.in_search = False
        if frozen:
            self.log_factor.grad = None  # Which an optimizer with a momentum would go on applying.

    def share_factor(self, other: "LearnedFactor") -> None:
        """Uses the very same parameter as `other` from now on. Do this before the optimizer is made."""
        self.log_factor = other.log_factor
        self._start = other._start
        self._shares = True

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._shares and not keep_vars:
            # Two keys with one memory are what safetensors, and with it transformers, refuse to save.
            destination[f"{prefix}log_factor"] = destination[f"{prefix}log_factor"].clone()
        if self.snapped:
            dilation = self.snapped_dilation
            destination[f"{prefix}snapped"] = dilation if keep_vars else dilation.detach().clone()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        own, dilation = self.log_factor, state_dict.pop(f"{prefix}snapped", None)
        if f"{prefix}log_factor" in state_dict and (self._uninitialized or self.snapped_dilation.is_meta):
            self.snapped_dilation = torch.zeros(2, dtype=torch.int64, device=state_dict[f"{prefix}log_factor"].device)
            self._uninitialized = self.snapped_dilation.is_meta
        if dilation is None:
            if self.snapped and f"{prefix}log_factor" in state_dict:
                self._set_snapped_dilation((0, 0))
        elif dilation.shape != (2,) or dilation.is_floating_point() or not bool((dilation > 0).all()):
            errors: list[str] = args[-1]
            errors.append(f"{prefix}snapped must be two whole dilations (height, width), got {dilation}")
        else:
            self._set_snapped_dilation((int(dilation[0]), int(dilation[1])))
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._keep_parameter(own)

    def extra_repr(self) -> str:
        values = [] if self.log_factor.is_meta else self.factor.tolist()
        factor = ", ".join(f"{value:.4g}" for value in values) or "?"
        return f"factor=({factor}), min_factor={self.min_factor}, max_factor={self.max_factor}"

    def _record_map_size(self, map_size: tuple[int, int]) -> None:
        """Called by every forward with the size of its map."""
        self._check_initialized()
        self.map_size = map_size
        if self._replica_of is not None:
            self._replica_of.map_size = map_size
        if self.training and self.log_factor.requires_grad:
            self.clamp_factor_(map_size)

    def _check_initialized(self) -> None:
        """Refuses a layer that others have brought from the meta device: its buffer holds any number then."""
        if self._uninitialized and not self.snapped_dilation.is_meta:
            raise ValueError(
                "a learned layer was made on the meta device and filled without load_state_dict, as from_pretrained "
                "of transformers does, so that its dilation is not known: call load_state_dict with the saved state, "
                "or set_factor on each layer; or else fuse before saving, and adapt after loading"
            )

    def _replicate_for_data_parallel(self) -> "LearnedFactor":
        replica: LearnedFactor = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica.__dict__["_replica_of"] = self  # Not as a part of it.
        return replica


def remove_rounding_error(dilation: float) -> float:
    """The dilation itself, or the whole one that it misses by what exp(log(f)) is off.

    >>> remove_rounding_error(10.9999993), remove_rounding_error(10.9993)
    (11.0, 10.9993)
    """
    nearest = max(1, round(dilation))
    return float(nearest) if abs(dilation - nearest) <= _SLACK * nearest else dilation


def remove_rounding_error_tensor(dilation: Tensor) -> Tensor:
    """`remove_rounding_error` of a tensor, whose gradient stays."""
    fixed = dilation.detach()
    nearest = fixed.round().clamp(min=1)
    return dilation + torch.where((fixed - nearest).abs() <= _SLACK * nearest, nearest - fixed, 0)


def round_dilation(dilation: float) -> int:
    """The whole dilation next to one, halves up, at least 1.

    >>> [round_dilation(value) for value in (0.2, 2.4, 2.5, 3.5)]
    [1, 2, 3, 4]
    """
    return max(1, math.floor(dilation * (1 + _SLACK) + 0.5))


def integer_range(least: float, greatest: float) -> tuple[int, int] | None:
    """The least and the greatest whole dilation between two dilations; None if there is none.

    >>> integer_range(1.4, 5.0), integer_range(2.2, 2.8)
    ((2, 5), None)
    """
    low, high = max(1, math.ceil(least * (1 - _SLACK))), math.floor(greatest * (1 + _SLACK))
    return (low, high) if low <= high else None


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else dtype


def _whole(value: Tensor) -> Tensor:
    """The tensor itself, or what FSDP2 has dealt to several processes, gathered."""
    # A DTensor; its class takes a second to import.
    whole: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return whole


def _as_factors(name: str, value: float | Sequence[float]) -> tuple[float, ...]:
    values = tuple(float(v) for v in value) if isinstance(value, Sequence) else (float(value),)
    if len(values) not in (1, 2) or not all(math.isfinite(v) and v > 0 for v in values):
        raise ValueError(f"{name} must be one positive finite number or two (height, width), got {value}")
    return values


def numeric_padding(conv: nn.Conv2d) -> tuple[int, int]:
    """(height, width) of the zeros around a convolution's input, also where they are given in words."""
    if isinstance(conv.padding, str):
        same = [d * (k - 1) // 2 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        return (same[0], same[1]) if conv.padding == "same" else (0, 0)
    return conv.padding[0], conv.padding[1]


def padding_for_dilation(conv: Any, dilation: tuple[int, int]) -> tuple[int, int]:
    """The padding that keeps a convolution's output where it is, at another dilation; may be negative."""
    height, width = (
        conv.padding[axis] + (dilation[axis] - conv.dilation[axis]) * (conv.kernel_size[axis] - 1) // 2
        for axis in (0, 1)
    )
    return height, width


def set_dilation(conv: nn.Conv2d, dilation: tuple[int, int]) -> None:
    """Sets a convolution's dilation (height, width) in place, and the padding that follows it.

    Raises:
        ValueError: if the dilation is below 1, or the padding would be negative.

    >>> conv = nn.Conv2d(8, 8, 3, padding=4, dilation=4)
    >>> set_dilation(conv, (2, 3))
    >>> conv.padding
    (2, 3)
    """
    if min(dilation) < 1:
        raise ValueError(f"a dilation must be at least 1, got {dilation}")
    if conv.padding != "same":
        conv.padding = numeric_padding(conv)
        padding = padding_for_dilation(conv, dilation)
        if min(padding) < 0:
            raise ValueError(f"a padding of {conv.padding} is too small to follow the dilation to {dilation}")
        conv.padding = padding
    conv.dilation = dilation
    # What torch pads with itself, where it is not with zeros; the last axis first.
    height, width = numeric_padding(conv)
    conv._reversed_padding_repeated_twice = [width, width, height, height]
