"""The base class of all layers with a learned receptive field: the factor, its range, and its state."""

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rfield.layers.dilation import ROUNDING_ERROR, Pair, integer_range, remove_rounding_error, round_dilation
from rfield.ops.values import read_values


class LearnedFactor(nn.Module):
    """Base class of layers with a learned factor f > 0, which divides a dilation: `effective_dilation = dilation / f`.

    The parameter is `log_factor`, so that the factor is always positive. In training it is clamped to its range before
    each forward; the optimizer's state does not change. Keep it out of weight decay, as `rfield.parameter_groups` does.

    `log_factor` has float32 precision at least: `half()`, `bfloat16()` and `to(dtype)` cast the other parameters only,
    because the smallest change in bfloat16 is 0.4 % of a dilation; `double()` casts it, too. Layers that share a factor
    still share it after they are cast, moved or loaded, also by `load_state_dict(assign=True)` and `to_empty`.

    Args:
        dilation: (height, width) at factor 1, in px of the layer's input map.
        factor: start value: a number, or (height, width) for one factor per axis.
        min_factor: lower bound. Default: the factor at which `effective_dilation` equals the map's size.
        max_factor: upper bound. Default: the factor at which `effective_dilation` is 1.

    Attributes:
        log_factor: Parameter[1] or Parameter[2], the logarithm of the factor.
        snapped_dilation: integer Tensor[2], the dilation (height, width) at which `snap` has fixed the layer; zeros
            before. Each layer has its own, also where a factor is shared. A state dict contains it as `snapped` once
            the layer is snapped.
        dilation_override: the effective dilation that a search makes the layer run at instead of the learned one, or
            None.
        map_size: (h, w) of the last input map, or None.
        in_search: whether an unfinished search has frozen the factor and sets it itself.
        rounds: whether a search runs the layer at integer dilations, where it is fast and exact.

    Raises:
        ValueError: for factors or bounds that are not positive and finite, or a factor outside its bounds.
    """

    rounds = False
    snapped_dilation: Tensor
    # Whether `snapped_dilation` was made on the meta device and has no value yet.
    _uninitialized = False
    # Under `nn.DataParallel`, the layer that this one is a replica of.
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
        # A buffer, because a moving average of the model copies buffers and must run at this dilation, too.
        self.register_buffer("snapped_dilation", torch.zeros(2, dtype=torch.int64), persistent=False)
        self._uninitialized = self.snapped_dilation.is_meta
        self.dilation_override: Pair | None = None
        self.map_size: tuple[int, int] | None = None
        self.in_search = False
        self._start = start
        self._shares = False

    @property
    def snapped(self) -> bool:
        """Whether `snap` has fixed the layer at an integer dilation."""
        self._check_initialized()
        return not self.snapped_dilation.is_meta and bool(self.snapped_dilation.any())

    @property
    def snaps(self) -> bool:
        """Whether `snap` fixes the layer at an integer dilation."""
        return True

    @property
    def factor(self) -> Tensor:
        """The current factor, Tensor[1] or Tensor[2], detached; under FSDP2 gathered from all processes.

        For a snapped layer it is the factor that belongs to its integer dilation.
        """
        learned = _full_tensor(self.log_factor.detach()).exp()
        if not self.snapped:
            return learned
        values = learned.new_tensor(self.base_dilation) / self.snapped_dilation
        return values if values[0] != values[1] else values[: learned.numel()]

    @property
    def effective_dilation(self) -> Pair:
        """`dilation / factor` as (height, width), in px of the layer's input map."""
        if self.snapped:
            height, width = self.snapped_dilation.tolist()
            return float(height), float(width)
        factor = read_values("factor", self.factor)
        height, width = self.base_dilation
        return remove_rounding_error(height / factor[0]), remove_rounding_error(width / factor[-1])

    @property
    def realised_dilation(self) -> Pair:
        """The dilation that the next forward runs at: `dilation_override`, or else `effective_dilation`."""
        return self.effective_dilation if self.dilation_override is None else self.dilation_override

    def factor_bounds(self, map_size: tuple[int, int]) -> tuple[Pair, Pair]:
        """Return the factor's range on a map of (h, w) px: ((min_h, min_w), (max_h, max_w)).

        The default range is extended to include the factor that the layer, or a search, started from.
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
        """Clamp the factor in place to its range on a map of (h, w) px."""
        lower, upper = self.factor_bounds(map_size)
        axes = self.log_factor.numel()
        if axes == 1:  # one factor for both axes gets the wider range of the two
            lower, upper = (min(lower),) * 2, (max(upper),) * 2
        value = _full_tensor(self.log_factor)
        inside = value.clamp(value.new_tensor(lower[:axes]).log(), value.new_tensor(upper[:axes]).log())
        # A factor at its bound may lie outside by a rounding error; leave it.
        self._write_log_factor(torch.where((inside - value).abs() > ROUNDING_ERROR, inside, value))

    @torch.no_grad()
    def set_factor(self, factor: float | Sequence[float]) -> None:
        """Set the factor in place: a number, or (height, width) if the layer has one factor per axis.

        The range does not change. A snapped layer is no longer snapped afterwards.

        Raises:
            ValueError: for factors that are not positive and finite, or two values for a layer with one factor.
        """
        values = _as_factors("factor", factor)
        if len(values) > self.log_factor.numel():
            raise ValueError(f"this layer has one factor for both axes, got {len(values)} values: {values}")
        if self._uninitialized or self.snapped:
            self._set_snapped_dilation((0, 0))
        current = _full_tensor(self.log_factor)
        self._write_log_factor(current.new_tensor(values).log().expand_as(current))

    def extend_range(self, start: Sequence[float]) -> None:
        """Extend the default range to include a search's start factor, one number or (height, width)."""
        self._start = _as_factors("start", start)

    def nearest_dilation(self, dilation: Sequence[float]) -> tuple[int, int]:
        """Return the integer dilation (height, width) nearest to one, within `min_factor` and `max_factor`.

        Halves are rounded up. Bounds with no integer dilation between them are ignored.
        """
        nearest = []
        for value, base in zip(dilation, self.base_dilation, strict=True):
            least = 1.0 if self.max_factor is None else base / self.max_factor
            greatest = float(sys.maxsize) if self.min_factor is None else base / self.min_factor
            nearest.append(round_dilation(value))
            if bounds := integer_range(least, greatest):
                nearest[-1] = min(max(nearest[-1], bounds[0]), bounds[1])
        return nearest[0], nearest[1]

    def _move_factor(self, device: torch.device) -> None:
        """Move the factor to the device of the layer's weights."""
        # A new parameter, because an existing one cannot be moved to the meta device.
        self.log_factor = nn.Parameter(self.log_factor.detach().to(device), self.log_factor.requires_grad)
        self.snapped_dilation = self.snapped_dilation.to(device)
        self._uninitialized = self.snapped_dilation.is_meta

    def _write_log_factor(self, value: Tensor) -> None:
        """Set the parameter in place, also where FSDP2 has sharded it over several processes."""
        parameter: Any = self.log_factor
        if hasattr(parameter, "full_tensor"):
            from torch.distributed.tensor import distribute_tensor

            value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
        parameter.copy_(value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A search that overrides the original's dilation does not know the copy, and would never clear the override.
        super().__setstate__({**state, "dilation_override": None})  # type: ignore[no-untyped-call]

    def snap(self) -> None:
        """End the learning: fix the layer at the nearest integer dilation, at least 1, rounding halves up.

        The factor is frozen. Layers that share it are snapped one by one, each to its own dilation.
        """
        self._set_snapped_dilation(self.nearest_dilation(self.effective_dilation))
        self.freeze_factor()

    @torch.no_grad()
    def copy_snap_to_factor(self) -> None:
        """Set `log_factor` to the value that belongs to the snapped dilation, for code that reads only `log_factor`.

        Snap all layers that share the parameter first.
        """
        current = _full_tensor(self.log_factor)
        self._write_log_factor(current.new_tensor(self.factor.tolist()[: current.numel()]).log())

    def _set_snapped_dilation(self, dilation: tuple[int, int]) -> None:
        """Fix the layer at a dilation (height, width), or with zeros make it follow its factor again."""
        self.snapped_dilation.copy_(torch.tensor(dilation))
        self._uninitialized = self.snapped_dilation.is_meta

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LearnedFactor":
        original, gradient = self.log_factor, self.log_factor.grad
        factor_was_meta, snap_was_meta = original.is_meta, self.snapped_dilation.is_meta

        def keep_precision(tensor: Tensor) -> Tensor:
            applied = fn(tensor)
            if tensor is not original and tensor is not gradient:
                return applied
            dtype = _at_least_float32(applied.dtype)
            if dtype != applied.dtype:
                return tensor.to(applied.device, dtype)
            # Of several layers that share the factor, the first has moved it already; `to_empty` would erase it again.
            return tensor if (applied.device, dtype) == (tensor.device, tensor.dtype) else applied

        super()._apply(keep_precision, recurse)  # type: ignore[no-untyped-call]
        self._keep_parameter(original)
        if factor_was_meta and not original.is_meta:
            with torch.no_grad():
                self._write_log_factor(original.new_tensor(self._start).log().expand_as(original))
        if snap_was_meta and not self.snapped_dilation.is_meta:
            self.snapped_dilation.zero_()
        self._uninitialized = self.snapped_dilation.is_meta or (self._uninitialized and not snap_was_meta)
        return self

    def _keep_parameter(self, original: nn.Parameter) -> None:
        """Restore the original parameter, which other layers may share, with the value of its replacement."""
        replacement = self.log_factor
        if replacement is original and original.dtype == _at_least_float32(original.dtype):
            return
        value = replacement.detach().to(_at_least_float32(replacement.dtype)).clone()
        if value.device != original.device:
            original.grad = None
        if hasattr(original, "full_tensor") or original.is_meta != value.is_meta:
            torch.utils.swap_tensors(original, nn.Parameter(value, original.requires_grad))  # type: ignore[no-untyped-call]
        else:
            original.data = value
        self.log_factor = original

    def freeze_factor(self, frozen: bool = True) -> None:
        """Stop, or with `frozen=False` resume, the learning of the factor; a snapped layer resumes at its dilation."""
        if not frozen and self.snapped:
            self.set_factor(self.factor.tolist()[: self.log_factor.numel()])
        self.log_factor.requires_grad_(not frozen)
        self.in_search = False
        if frozen:
            self.log_factor.grad = None  # an optimizer with momentum would keep applying it

    def share_factor(self, other: "LearnedFactor") -> None:
        """Use the same parameter as `other` from now on. Call this before the optimizer is made."""
        self.log_factor = other.log_factor
        self._start = other._start
        self._shares = True

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._shares and not keep_vars:
            # safetensors, and so transformers, refuse to save two keys that share memory.
            destination[f"{prefix}log_factor"] = destination[f"{prefix}log_factor"].clone()
        if self.snapped:
            dilation = self.snapped_dilation
            destination[f"{prefix}snapped"] = dilation if keep_vars else dilation.detach().clone()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        original, dilation = self.log_factor, state_dict.pop(f"{prefix}snapped", None)
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
        self._keep_parameter(original)

    def extra_repr(self) -> str:
        values = [] if self.log_factor.is_meta else self.factor.tolist()
        factor = ", ".join(f"{value:.4g}" for value in values) or "?"
        return f"factor=({factor}), min_factor={self.min_factor}, max_factor={self.max_factor}"

    def _record_map_size(self, input: Tensor) -> tuple[int, int]:
        """Record and return the input map's size (h, w), and clamp the factor; every forward calls this first."""
        if input.dim() != 4 or 0 in input.shape:
            raise ValueError(f"input must be a map (N, C, h, w) that is not empty, got shape {tuple(input.shape)}")
        self._check_initialized()
        map_size = self.map_size = (input.shape[2], input.shape[3])
        if self._replica_of is not None:
            self._replica_of.map_size = map_size
        if self.training and self.log_factor.requires_grad:
            self.clamp_factor_(map_size)
        return map_size

    def _check_initialized(self) -> None:
        """Raise ValueError if the layer left the meta device without a value: its buffer is arbitrary memory then."""
        if self._uninitialized and not self.snapped_dilation.is_meta:
            raise ValueError(
                "a learned layer was made on the meta device and filled without load_state_dict, as from_pretrained "
                "of transformers does, so that its dilation is not known: call load_state_dict with the saved state, "
                "or set_factor on each layer; or else fuse before saving, and adapt after loading"
            )

    def _replicate_for_data_parallel(self) -> "LearnedFactor":
        replica: LearnedFactor = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica.__dict__["_replica_of"] = self  # not by setattr, which would make it a submodule
        return replica


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype, raised to float32 if it is a shorter float."""
    return torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else dtype


def _full_tensor(value: Tensor) -> Tensor:
    """Return the tensor, gathered from all processes if FSDP2 has sharded it."""
    # Only a DTensor has this method; importing its class takes a second.
    full: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return full


def _as_factors(name: str, value: float | Sequence[float]) -> tuple[float, ...]:
    """Return one or two factors as a tuple; raise ValueError if they are not positive and finite."""
    values = tuple(float(v) for v in value) if isinstance(value, Sequence) else (float(value),)
    if len(values) not in (1, 2) or not all(math.isfinite(v) and v > 0 for v in values):
        raise ValueError(f"{name} must be one positive finite number or two (height, width), got {value}")
    return values
