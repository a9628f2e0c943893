"""Turn a network with learned layers into one of torch's own modules, with the original state-dict keys."""

from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from rfield.layers import (
    AdaptiveConv2d,
    GatedConv2d,
    ImageAdaptiveRegulator,
    LearnedFactor,
    ReceptiveFieldRegulator,
    WeightedGradient,
)
from rfield.layers.adaptive_conv import copy_state_hooks, has_hooks, preserve_state, share_parametrizations
from rfield.layers.dilation import padding_for_dilation, round_dilation, set_dilation
from rfield.receptive_field.probe import copy_model
from rfield.receptive_field.theoretical import is_pointwise

Mode = Literal["resize", "dilation"]
_Replaced = AdaptiveConv2d | GatedConv2d | ReceptiveFieldRegulator | WeightedGradient


def fuse(model: nn.Module, mode: Mode = "resize") -> nn.Module:
    """Return a copy of a model without rfield's layers, which can be saved, loaded and run without rfield.

    An `AdaptiveConv2d` becomes an `nn.Conv2d` with its dilation, rounded per axis, and the matching padding. After a
    search the dilation is an integer, and the copy computes the same as the model in eval mode; dilations that an
    unfinished search tries are ignored. A `ReceptiveFieldRegulator` is replaced by the module inside, either between
    two resizes of fixed factors, or dilated. A `WeightedGradient` becomes an identity.

    A `GatedConv2d` whose gates have become one-hot, so that it uses the same rate for all inputs
    (`GatedConv2d.one_hot`: a mean gate of at least 0.99 over the last training batches), becomes an `nn.Conv2d` at that
    rate, with the batch norm in its weight and bias; the outputs change a little, as the other gates were not exactly
    0. Any other becomes the same sum in torch's own operations, as a `torch.fx.GraphModule` with the keys of the layer.

    The state-dict keys are those that the model had before `adapt` and `regulate`. So the weights can be loaded
    strictly into the model that its own library builds, after `set_dilations(model, dilations(fused))`. All other
    modules are copied, also rfield's networks and heads.

    Args:
        model: on one device, not wrapped (pass `.module` of a DistributedDataParallel or AveragedModel).
        mode: what replaces a regulator that is not snapped. `resize`: resizes by plain torch operations in a
            `torch.fx.GraphModule`; exact. `dilation`: convolutions at the nearest integer dilations, if the part
            consists of convolutions and pointwise layers; faster, but only approximately the same.

    Raises:
        ValueError: if `torch.fx` cannot trace a regulated part (`resize`), a regulated part contains other layers
            (`dilation`), a layer to replace has hooks, or there is an `ImageAdaptiveRegulator`.

    Example:
        >>> layer = AdaptiveConv2d(8, 8, 3, padding=4, dilation=4, factor=2.0)
        >>> fuse(nn.Sequential(layer))[0]
        Conv2d(8, 8, kernel_size=(3, 3), stride=(1, 1), padding=(2, 2), dilation=(2, 2))
    """
    if mode not in ("resize", "dilation"):
        raise ValueError(f"mode must be 'resize' or 'dilation', got {mode!r}")
    plain = copy_model(model)
    holder = nn.ModuleDict({"model": plain})
    modules = dict(holder.named_modules(remove_duplicate=False))
    fused: dict[int, nn.Module] = {}
    # From the inside out, so that the layers inside a regulator are replaced before the regulator.
    for name in sorted(modules, key=lambda name: -name.count(".")):
        module = modules[name]
        if isinstance(module, ImageAdaptiveRegulator):
            raise ValueError(
                f"{name.removeprefix('model.')}: an ImageAdaptiveRegulator inflates each image by a factor of its own, "
                "which no plain layer can: use GatedConv2d with gates='image'"
            )
        if isinstance(module, _Replaced):
            if id(module) not in fused:
                try:
                    fused[id(module)] = _plain(module, mode)
                except ValueError as error:
                    raise ValueError(f"{name.removeprefix('model.')}: {error}") from error
            parent, _, child = name.rpartition(".")
            setattr(holder.get_submodule(parent), child, fused[id(module)])
    return holder["model"]


def dilations(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return the dilations (height, width) of a plain model's convolutions, except 1x1 ones, by their names.

    Example:
        >>> dilations(nn.Sequential(nn.Conv2d(8, 8, 3, dilation=2), nn.Conv2d(8, 8, 1)))
        {'0': (2, 2)}
    """
    return {
        name: (module.dilation[0], module.dilation[1])
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1
    }


def set_dilations(model: nn.Module, values: dict[str, tuple[int, int]]) -> None:
    """Set the dilations of a plain model's convolutions in place, with the paddings that keep their output sizes.

    To load a fused model's weights into the model that its own library builds:
    `set_dilations(stock, dilations(fused)); stock.load_state_dict(fused.state_dict())`.

    Args:
        model: contains `nn.Conv2d`s of the names in `values`.
        values: (height, width) for each convolution to set, by its name.

    Raises:
        ValueError: if there is no such convolution, or its padding cannot follow.

    Example:
        >>> conv = nn.Conv2d(8, 8, 3, padding=4, dilation=4)
        >>> set_dilations(nn.Sequential(conv), {"0": (2, 3)}), conv.padding
        (None, (2, 3))
    """
    modules = dict(model.named_modules())
    for name, dilation in values.items():
        conv = modules.get(name)
        if not isinstance(conv, nn.Conv2d):
            raise ValueError(f"the model has no convolution {name!r} to dilate by {tuple(dilation)}")
        set_dilation(conv, (int(dilation[0]), int(dilation[1])))


def fixed_resize(module: nn.Module, factor: tuple[float, float]) -> fx.GraphModule:
    """Return a module between the two resizes of a regulator with a fixed factor, in torch's own operations.

    Args:
        module: maps Tensor[N, C, h, w] to Tensor[N, K, h, w]. The result has its parameters and children, under the
            same names.
        factor: (height, width) of the resize.

    Returns:
        A module that maps Tensor[N, C, h, w] and an output size (H, W) to Tensor[N, K, H, W]. The default size, (0, 0),
        stands for (h, w).

    Raises:
        ValueError: if `torch.fx` cannot trace the module's forward.

    Example:
        >>> fixed_resize(nn.Conv2d(8, 4, 3, padding=1), (1.5, 1.5))(torch.rand(1, 8, 7, 9), (13, 17)).shape
        torch.Size([1, 4, 13, 17])
    """
    tensors = [tensor for tensor in module.parameters() if tensor.is_floating_point()]
    dtype = torch.promote_types(tensors[0].dtype, torch.float32) if tensors else torch.float32
    resized = _graft(_FixedResize(module, factor, dtype), module)
    resized.meta["factor"] = factor  # copies keep `meta`, and lose other attributes
    return resized


def restore_fused(model: nn.Module, record: dict[str, Any]) -> None:
    """Give a plain model the dilations and resizes of a fused one, in place.

    Args:
        model: as built without learned layers.
        record: `dilations`: (height, width) by the names of convolutions; `resizes`: factors (height, width) by the
            names of parts.

    Raises:
        ValueError: if the model has no such part, or as `set_dilations` and `fixed_resize` do.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=4, dilation=4))
        >>> restore_fused(model, {"dilations": {"0": [2, 2]}, "resizes": {}})
        >>> dilations(model)
        {'0': (2, 2)}
    """
    set_dilations(model, record["dilations"])
    for name, (height, width) in record["resizes"].items():
        parent, _, child = name.rpartition(".")
        try:
            part = model.get_submodule(name)
        except AttributeError as error:
            raise ValueError(f"the model has no part {name!r} to resize") from error
        setattr(model.get_submodule(parent), child, fixed_resize(part, (height, width)))


class _FixedResize(nn.Module):
    """The module that `fixed_resize` traces; fx records integer arithmetic on sizes and tensor methods."""

    def __init__(self, part: nn.Module, factor: tuple[float, float], dtype: torch.dtype) -> None:
        super().__init__()
        self.part = part
        self.factor = factor
        self.dtype = dtype

    def forward(self, input: Tensor, output_size: Any = (0, 0)) -> Tensor:
        grid = (input.shape[2], input.shape[3])
        size = [traceable_resized_size(grid[axis], self.factor[axis]) for axis in (0, 1)]
        rows, columns = (
            self._matrix(self._count(input, size[axis]) / self.factor[axis], grid[axis]) for axis in (0, 1)
        )
        inflated = rows.matmul(input.to(self.dtype)).matmul(columns.t()).to(input.dtype)
        output = self.part.forward(inflated)
        matrices = []
        for axis in (0, 1):
            # 0 stands for the grid's own size. An axis of one px, before or after, may have any scale.
            target = output_size[axis] + grid[axis] * (output_size[axis] < 1)
            scale = (target - 1 + (target < 2)) / (grid[axis] - 1 + (grid[axis] < 2))
            # In float32, the precision of the learned factor.
            ratio = (input.new_ones(1, dtype=torch.float32) * scale / self.factor[axis]).to(self.dtype)
            matrices.append(self._matrix(self._count(input, target) / ratio, size[axis]))
        resized: Tensor = matrices[0].matmul(output.to(self.dtype)).matmul(matrices[1].t()).to(output.dtype)
        return resized

    def _count(self, input: Tensor, size: int) -> Tensor:
        """Return 0, 1, ... size - 1; fx does not record `torch.arange` of a traced size."""
        return input.new_ones(size, dtype=self.dtype).cumsum(0) - 1

    def _matrix(self, position: Tensor, source: int) -> Tensor:
        """Return the bilinear weights of samples at `position`, as `rfield.ops.matrices.sampling_matrix` does."""
        pixel = self._count(position, source)
        return (1 - (position.clamp(max=source - 1).unsqueeze(1) - pixel).abs()).clamp(min=0)


def traceable_resized_size(size: int, factor: float) -> int:
    """Return `rfield.ops.resized_size` by integer operations only, which `torch.fx` can trace.

    Example:
        >>> traceable_resized_size(41, 0.63), traceable_resized_size(1, 7.0)
        (27, 1)
    """
    numerator, denominator = factor.as_integer_ratio()
    # ceil(x - 1e-4) = -floor(1e-4 - x)
    return -((denominator - (size - 1) * numerator * 10_000) // (denominator * 10_000)) + 1


class _Cropped(nn.Module):
    """Crop the input, in place of a negative padding, and then run a convolution."""

    def __init__(self, part: nn.Conv2d, crop: tuple[int, int]) -> None:
        super().__init__()
        self.part = part
        self.crop = crop

    def forward(self, input: Tensor) -> Tensor:
        for axis, crop in zip((2, 3), self.crop, strict=True):
            if crop:
                input = input.narrow(axis, crop, input.shape[axis] - 2 * crop)
        output: Tensor = self.part.forward(input)
        return output


class _TopTracer(fx.Tracer):
    """Trace only the forward of the module itself, not those of the layers that it calls."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _graft(root: nn.Module, part: nn.Module) -> fx.GraphModule:
    """Return a module with the forward of `root`, whose child is `part`, and the parameters and children of `part`."""
    modes = {module: module.training for module in part.modules()}
    part.eval()  # the trace is that of the eval mode, whatever the mode later
    try:
        graph = _TopTracer().trace(root)
    except Exception as error:  # Tracing runs the part's own code.
        raise ValueError(
            f"the forward of {type(part).__name__} cannot be traced ({error}): regulate a part of it, or use "
            "mode='dilation'"
        ) from error
    finally:
        for module, training in modes.items():
            module.training = training
    graph._tracer_cls = fx.Tracer  # pickled with the graph, and must be loaded without rfield
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            node.target = node.target.removeprefix("part.")
    result = fx.GraphModule(part, graph, class_name=parametrize.type_before_parametrizations(part).__name__)
    # Also those that the forward does not use, so that no state-dict key is lost.
    for name, parameter in part.named_parameters(recurse=False):
        result.register_parameter(name, parameter)
    for name, buffer in part.named_buffers(recurse=False):
        result.register_buffer(name, buffer, persistent=name not in part._non_persistent_buffers_set)
    for name, child in part.named_children():
        result.add_module(name, child)
    copy_state_hooks(part, result)
    return result


def _plain(module: _Replaced, mode: Mode) -> nn.Module:
    """Return the module that replaces one of rfield's layers."""
    if has_hooks(module):
        raise ValueError(
            f"the {type(module).__name__} has hooks, which the plain layer would lose: remove them; the fused model "
            "may have them"
        )
    if isinstance(module, AdaptiveConv2d):
        with preserve_state(module):
            plain = _plain_conv(module)
        shared = set(module.modules())
        for part in plain.modules():
            if part not in shared:
                part.training = module.training
        return plain
    if isinstance(module, GatedConv2d):
        return _plain_gated(module)
    if isinstance(module, WeightedGradient):
        return _identity()
    factor = _factors(module)
    if module.snapped:
        module.apply_snap()
    elif mode == "dilation":
        _dilate(module.module, factor)
    elif factor != (1.0, 1.0):
        if has_hooks(module.module):
            raise ValueError(
                "the regulated part has hooks, which the fused one would lose: remove them, or use mode='dilation'"
            )
        return fixed_resize(module.module, factor)
    return module.module


def _factors(layer: LearnedFactor) -> tuple[float, float]:
    height, width = layer.factor.expand(2).tolist()
    return height, width


def _plain_conv(layer: AdaptiveConv2d) -> nn.Module:
    """Return an `nn.Conv2d` at the integer dilation nearest to the learned one, with the same parameters."""
    dilation = layer.nearest_dilation(layer.effective_dilation)
    padding = padding_for_dilation(layer, dilation)
    conv = nn.Conv2d(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        layer.stride,
        (max(padding[0], 0), max(padding[1], 0)),
        dilation,
        layer.groups,
        layer.bias is not None,
        device="meta",
    )
    for name in ("weight", "bias"):
        value = getattr(layer, name)
        if value is not None:
            setattr(conv, name, value if isinstance(value, nn.Parameter) else nn.Parameter(value))
    share_parametrizations(layer, conv)
    if min(padding) >= 0:
        return conv
    return _graft(_Cropped(conv, (max(-padding[0], 0), max(-padding[1], 0))), conv)


def _plain_gated(layer: GatedConv2d) -> nn.Module:
    """Return an `nn.Conv2d` at the one rate that all inputs choose, or else the layer's own sum."""
    if layer.one_hot is None:
        plain = _graft(layer, layer)
        plain.meta["dilation"] = layer.dilation  # copies keep `meta`, and lose other attributes
        plain.meta["kernel_size"], plain.meta["stride"] = layer.kernel_size, layer.stride
        return plain
    with preserve_state(layer):
        weight, bias = layer.folded(layer.one_hot)
    rate = layer.rates[layer.one_hot]
    shape = (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding_at(rate), rate)
    conv = nn.Conv2d(*shape, layer.groups, bias is not None, device="meta")
    conv.weight = nn.Parameter(weight)
    conv.bias = None if bias is None else nn.Parameter(bias)
    return conv.train(layer.training)


def _identity() -> fx.GraphModule:
    """Return an identity that ignores a second argument, the mask."""
    graph = fx.Graph()
    input = graph.placeholder("input")
    graph.placeholder("mask", default_value=None)
    graph.output(input)
    return fx.GraphModule(nn.Module(), graph, class_name="Identity")


def _dilate(module: nn.Module, factor: tuple[float, float]) -> None:
    """Divide the dilations of a regulated module by the factor (height, width), rounded, in place."""
    for name, layer in module.named_modules():
        if "parametrizations" in name.split("."):  # they act on weights, not on maps
            continue
        if isinstance(layer, nn.Conv2d):
            if max(layer.kernel_size) > 1:
                height, width = (round_dilation(d / f) for d, f in zip(layer.dilation, factor, strict=True))
                set_dilation(layer, (height, width))
        elif not (list(layer.children()) or is_pointwise(layer) or isinstance(layer, nn.Sequential)):
            raise ValueError(
                f"{name or 'it'} is a {type(layer).__name__}, and only convolutions and layers that see one pixel "
                "can be dilated instead of resized: use mode='resize'"
            )
