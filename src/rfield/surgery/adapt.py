"""Make receptive fields in an existing model learnable: replace convolutions, or wrap one of its parts, in place."""

import difflib
import fnmatch
import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, overload

from torch import nn

from rfield.layers import (
    AdaptiveConv2d,
    GatedConv2d,
    ImageAdaptiveRegulator,
    LearnedFactor,
    ReceptiveFieldRegulator,
)
from rfield.layers.adaptive_conv import reason_not_adaptable
from rfield.layers.gated import DEFAULT_RATES, Gates, reason_not_gateable
from rfield.text import counted, format_size

Select = str | Sequence[str] | Callable[[str, nn.Conv2d], bool]
Share = Literal["parallel", "layer", "stage"]
_WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "OptimizedModule")
_ENCODERS = ("encoder", "backbone")


@overload
def adapt(
    model: nn.Module, select: Select | None = None, share: Share | None = None, axes: Literal[1, 2] = 1
) -> list[AdaptiveConv2d]: ...


@overload
def adapt(
    model: nn.Module, select: Select | None = None, *, gates: Gates, rates: Sequence[int] | None = None
) -> list[GatedConv2d]: ...


def adapt(
    model: nn.Module,
    select: Select | None = None,
    share: Share | None = None,
    axes: Literal[1, 2] = 1,
    gates: Gates | None = None,
    rates: Sequence[int] | None = None,
) -> list[AdaptiveConv2d] | list[GatedConv2d]:
    """Make the dilation of convolutions learnable, in place; call it before making the optimizer or wrapping the model.

    Each selected `nn.Conv2d` becomes an `AdaptiveConv2d` with the same parameters under the same state-dict keys, and
    one more key, `log_factor`. After a search there is a second one, `snapped`, the integer dilation. The model
    computes the same as before until the factor changes. Train it with any search of `rfield`, and turn it back into a
    model of plain convolutions with `rfield.fuse`.

    With `gates`, each becomes a `GatedConv2d` instead: the same kernel at several rates, mixed by gates that the input
    decides. These train with the other weights, without a search, and the model computes something else from the start.

    Args:
        model: any module that contains `nn.Conv2d`s.
        select: which convolutions to adapt; 1x1 convolutions never are, since they have no dilation.
            None: those with a dilation above 1. A name or an `fnmatch` pattern, or several: those that match, and all
            inside a module that matches (`"backbone.layer4"`: the whole stage). A function `(name, conv) -> bool`:
            those for which it returns True.
        share: which convolutions share a factor, so that the ratios of their dilations stay the same.
            None: none. `parallel`: those in the same `nn.ModuleList` or `nn.ModuleDict` (the innermost one), which
            contains parallel branches such as those of an atrous spatial pyramid. `layer`: those in the same block,
            that is, the innermost module whose class has its own `forward` (a bottleneck, or the whole pyramid).
            `stage`: those in the same outermost module with a number in its name (`backbone.layer4`, `classifier.0`),
            or, if there is none, in the same child of the model. For any other sharing, call `share_factor` on the
            layers returned.
        axes: 1 for square receptive fields, 2 for one factor along the height and one along the width.
        gates: `image` or `pixel`: what has gates of its own, see `GatedConv2d`.
        rates: with `gates`, the rates that are mixed, such as a set that a search has found. Default: 1, 2, 4, 8.

    Returns:
        The new layers, in the order of the model's modules.

    Raises:
        ValueError: if no convolution is selected, a pattern matches nothing, the model or a part of it is wrapped
            (DistributedDataParallel, `fully_shard`, `torch.compile`), or a convolution selected by name or function
            cannot be adapted: an even kernel, a padding other than zeros, hooks, or its own forward; with `gates` also
            a padding other than dilation * (kernel - 1) / 2. The model is then unchanged. Among the convolutions
            selected by default, these are left out with a warning. Another warning says which of them belong to an
            encoder or backbone, which is often pretrained.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=4, dilation=4))
        >>> adapt(model)[0].effective_dilation
        (4.0, 4.0)
        >>> sorted(model.state_dict())
        ['0.bias', '0.weight', '1.bias', '1.log_factor', '1.weight']
    """
    if share not in (None, "parallel", "layer", "stage"):
        raise ValueError(f"share must be None, 'parallel', 'layer' or 'stage', got {share!r}")
    if axes not in (1, 2):
        raise ValueError(f"axes must be 1 or 2, got {axes!r}")
    refuse_wrapped(model)
    if isinstance(model, nn.Conv2d):
        raise ValueError("the model is itself a convolution: use AdaptiveConv2d.from_conv or GatedConv2d.from_conv")
    if gates and (share or axes != 1):
        raise ValueError(f"gates {gates!r} learn no factor: leave share and axes out, got share={share!r}, axes={axes}")
    if rates is not None and not gates:
        raise ValueError("rates need gates: 'image' or 'pixel'")
    gated = {part for layer in model.modules() if isinstance(layer, GatedConv2d) for part in layer.modules()}
    convs = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and m not in gated}
    selected = _adaptable(model, convs, select, reason_not_gateable if gates else reason_not_adaptable)
    if gates:
        gating = {name: GatedConv2d.from_conv(convs[name], rates or DEFAULT_RATES, gates) for name in selected}
        _replace_all(model, convs, gating)
    else:
        layers = {name: AdaptiveConv2d.from_conv(convs[name], (1.0,) * axes) for name in selected}
        owners: dict[str, AdaptiveConv2d] = {}
        for name, layer in layers.items():
            if share:
                layer.share_factor(owners.setdefault(_group(model, name, share), layer))
        _replace_all(model, convs, layers)
    if select is None and (note := _encoder_note(selected)):
        warnings.warn(note, stacklevel=2)
    return list(gating.values()) if gates else list(layers.values())


def _replace_all(model: nn.Module, convs: dict[str, nn.Conv2d], layers: Mapping[str, nn.Module]) -> None:
    """Replace convolutions by layers of the same names, in place."""
    by_conv = {id(convs[name]): layer for name, layer in layers.items()}
    # A convolution may be registered under several names.
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) in by_conv:
            _replace(model, name, by_conv[id(module)])


def regulate(
    model: nn.Module,
    name: str,
    axes: Literal[1, 2] = 1,
    factor: float = 1.0,
    min_factor: float | None = None,
    max_factor: float | None = None,
    memory_budget: int = 2 * 2**30,
) -> ReceptiveFieldRegulator:
    """Wrap one part of a model in a `ReceptiveFieldRegulator`, in place; call it before making the optimizer.

    The part's state-dict keys become `NAME.module.*`; all others stay. `rfield.fuse` removes the regulator.

    Args:
        model: any module.
        name: of the part, as in `model.named_modules()`; the part maps Tensor[N, C, h, w] to Tensor[N, K, h, w].
        axes: 1 for square receptive fields, 2 for one factor along the height and one along the width.
        factor, min_factor, max_factor, memory_budget: see `ReceptiveFieldRegulator`.

    Returns:
        The regulator.

    Raises:
        ValueError: if there is no such part, it cannot be called, or it contains learned layers already.

    Example:
        >>> model = nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 3, padding=4, dilation=4))
        >>> regulate(model, "1", factor=2.0).effective_dilation
        (2.0, 2.0)
    """
    refuse_wrapped(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    if not name or name not in modules:
        parts = [key for key in modules if key]
        similar = difflib.get_close_matches(name, parts, cutoff=0.4) or parts[:3]
        raise ValueError(f"the model has no part {name!r}; is it {' or '.join(map(repr, similar))}?")
    module = modules[name]
    if type(module).forward is nn.Module.forward:
        raise ValueError(f"{name!r} is a {type(module).__name__}, which cannot be called: regulate one of its parts")
    if any(isinstance(part, LearnedFactor | GatedConv2d | ImageAdaptiveRegulator) for part in module.modules()):
        raise ValueError(f"{name!r} holds a learned receptive field already")
    if any(isinstance(modules[ancestor], ReceptiveFieldRegulator) for ancestor in _ancestors(name)):
        raise ValueError(f"{name!r} is inside a regulator already")
    if all(max(conv.kernel_size) == 1 for conv in module.modules() if isinstance(conv, nn.Conv2d)):
        warnings.warn(
            f"no convolution in {name!r} sees more than one pixel, so that its receptive field hardly depends on the "
            "factor: regulate the layers before it, too",
            stacklevel=2,
        )
    start = (factor,) * axes
    regulator = ReceptiveFieldRegulator(module, start, min_factor, max_factor, memory_budget)
    for parameter in itertools.chain(module.parameters(), module.buffers()):
        regulator._move_factor(parameter.device)
        break
    # Only the new modules: inside the part a norm may be in eval mode on purpose.
    for part in (regulator, regulator.inflation, regulator.interpolation):
        part.training = module.training
    for other, part in modules.items():
        if part is module:
            _replace(model, other, regulator)
    return regulator


def refuse_wrapped(model: nn.Module) -> None:
    """Raise ValueError if a model or a part of it is wrapped or compiled, which must come after `adapt`."""
    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind in _WRAPPERS or kind.startswith("FSDP") or module._compiled_call_impl is not None:
            what = repr(name) if name else "the model"
            how = f"wrapped in {kind}" if module._compiled_call_impl is None else "compiled"
            raise ValueError(
                f"{what} is {how}: adapt the plain model, then make the optimizer, then wrap it; compile it after the "
                "search"
            )


def _encoder_note(names: Sequence[str]) -> str | None:
    """Return a sentence that says which of the adapted convolutions belong to an encoder, or None."""
    parts = {name: name.split(".")[:-1] for name in names}
    encoded = [name for name in names if {*_ENCODERS} & {*parts[name]}]
    if not encoded:
        return None
    path = parts[encoded[0]]
    depth = 1 + min(path.index(part) for part in _ENCODERS if part in path)
    encoder = ".".join(path[:depth])
    others = [*dict.fromkeys(".".join(parts[name][:depth]) for name in names if name not in encoded)]
    chosen = others[0] if len(others) == 1 else others
    leave = f"leave them out by select={chosen!r}" if others else "name others by select="
    are = "is" if len(encoded) == 1 else "are"
    return (
        f"{counted(len(encoded), 'convolution')} of {encoder!r}, which is often pretrained, {are} among the "
        f"{len(names)} that adapt made learnable; {leave}"
    )


def _adaptable(
    model: nn.Module, convs: dict[str, nn.Conv2d], select: Select | None, reason_not: Callable[[nn.Module], str | None]
) -> list[str]:
    """Return the names of the selected convolutions; raise ValueError, or warn, for those that cannot be adapted."""
    selected = _selected(convs, select)
    regulated = {
        id(conv)
        for regulator in model.modules()
        if isinstance(regulator, ReceptiveFieldRegulator | ImageAdaptiveRegulator)
        for conv in regulator.modules()
    }
    for name in list(selected):
        reason = "it is inside a regulator" if id(convs[name]) in regulated else reason_not(convs[name])
        if reason and select is not None:
            raise ValueError(f"the convolution {name} cannot be adapted: {reason}")
        if reason:
            warnings.warn(f"the convolution {name} is left as it is: {reason}", stacklevel=3)
            selected.remove(name)
    if not selected:
        raise ValueError(_nothing_to_adapt(convs))
    return selected


def _selected(convs: dict[str, nn.Conv2d], select: Select | None) -> list[str]:
    """Return the names of the convolutions that `select` means, see `adapt`."""
    larger = [name for name, conv in convs.items() if max(conv.kernel_size) > 1]
    if select is None:
        return [name for name in larger if max(convs[name].dilation) > 1]
    if not isinstance(select, str) and callable(select):
        return [name for name in larger if select(name, convs[name])]
    patterns = [select] if isinstance(select, str) else list(select)
    matches = {
        pattern: [
            name for name in larger if any(fnmatch.fnmatchcase(part, pattern) for part in (name, *_ancestors(name)[1:]))
        ]
        for pattern in patterns
    }
    for pattern, found in matches.items():
        if not found:
            similar = difflib.get_close_matches(pattern, larger, cutoff=0.4)
            hint = f"is it {' or '.join(similar)}?" if similar else _nothing_to_adapt(convs)
            raise ValueError(f"{pattern!r} names no convolution of more than one pixel; {hint}")
    return [name for name in larger if any(name in found for found in matches.values())]


def _nothing_to_adapt(convs: dict[str, nn.Conv2d]) -> str:
    """Return an error message that names the convolutions that could be selected."""
    candidates = [
        f"{name} (kernel {format_size(conv.kernel_size)}, dilation {max(conv.dilation)})"
        for name, conv in convs.items()
        if max(conv.kernel_size) > 1 and reason_not_adaptable(conv) is None
    ]
    if not candidates:
        return "nothing to adapt: the model has no nn.Conv2d of more than one pixel that could be adapted"
    more = f" and {len(candidates) - 8} more" if len(candidates) > 8 else ""
    return f"nothing to adapt; name convolutions by select=; those that can be: {', '.join(candidates[:8])}{more}"


def _ancestors(name: str) -> list[str]:
    """Return the names of the modules that contain a module, from the model itself inward."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts))]


def _group(model: nn.Module, name: str, share: Share) -> str:
    """Return the name of the module whose convolutions share a factor with this one."""
    ancestors = _ancestors(name)
    if share == "stage":
        numbered = [part for part in ancestors if any(letter.isdigit() for letter in part.rpartition(".")[2])]
        return numbered[0] if numbered else ancestors[min(1, len(ancestors) - 1)]
    for part in reversed(ancestors):
        forward = type(model.get_submodule(part)).forward
        is_list = forward is nn.Module.forward
        if is_list if share == "parallel" else not is_list and forward is not nn.Sequential.forward:
            return part
    # Without a list around it, a convolution has its own factor; without a block, the model is the block.
    return name if share == "parallel" else ""


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
