"""Find receptive fields that do not suit the size of the images, and say what to change.

The rates of a pyramid (ASPP) that fit are those of Chen et al., *Rethinking Atrous Convolution for Semantic Image
Segmentation*, 2017 (DeepLabv3): 6, 12, 18 at output stride 16 and 12, 24, 36 at 8, for training images of 513 px. Their
section 3.3 shows that a rate near the map's side makes a 3x3 convolution a 1x1 convolution. That stock models have
rates too large for their stride is reported for segmentation_models_pytorch (issue 390) and torchvision (issue 7956).
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

from rfield.layers.dilation import Pair, round_dilation
from rfield.receptive_field.per_layer import LayerField
from rfield.search.curve import dilation_grid
from rfield.text import format_pair, format_size

# DeepLabv3 has the rates 6, 12, 18 for training images of 513 px at stride 16.
_DEEPLAB_RATE, _DEEPLAB_MAP = 6, 513 / 16
# The stages of a backbone may have this many layers of one rate.
_MOST_NAMES = 3


@dataclasses.dataclass(frozen=True)
class Advice:
    """Something that does not suit the images, and what to do.

    Attributes:
        text: what is wrong, in one line.
        code: what to do, as a line of Python for a `model` and its `images`.
    """

    text: str
    code: str

    def __str__(self) -> str:
        return f"{self.text}\n  {self.code}"


@dataclasses.dataclass(frozen=True)
class Pyramid:
    """Parallel dilated convolutions, such as those of an atrous spatial pyramid.

    Attributes:
        name: of the module that contains them, or their own names.
        layers: in ascending order of their rates.
    """

    name: str
    layers: tuple[LayerField, ...]

    @property
    def rates(self) -> list[float]:
        return [_rate(layer) for layer in self.layers]

    def fits(self, size: tuple[int, int]) -> bool:
        """Return whether no rate is larger than DeepLabv3's, scaled to the map of images of (height, width) px."""
        return all(rate <= most for rate, most in zip(self.rates, self.fitting(size)["deeplabv3"], strict=True))

    def fitting(self, size: tuple[int, int]) -> dict[str, list[int]]:
        """Return the rates that fit images of (height, width) px: DeepLabv3's, scaled, and log-spaced ones."""
        sides = (side / step for side, step in zip(size, _input_stride(self.layers[0]), strict=True))
        return fitting_rates(min(sides), len(self.layers))

    def describe(self, size: tuple[int, int]) -> str:
        """Return one line: the rates, and those that fit images of (height, width) px."""
        scaled, spaced = (", ".join(map(str, rates)) for rates in self.fitting(size).values())
        map_size = format_size(_map_size(self.layers[0], size))
        return (
            f"pyramid {self.name}: rates {', '.join(map(_number, self.rates))} on a map of {map_size} px; rates that "
            f"fit it are {scaled} (DeepLabv3's, scaled to the map) or {spaced} (log-spaced)"
        )


def fitting_rates(map_side: float, count: int) -> dict[str, list[int]]:
    """Return the rates of a pyramid of `count` branches that fit a map, by the rule that gives them.

    `deeplabv3`: the rates of Chen et al. (2017), in proportion to the map. `log-spaced`: from 1 to half of the map.

    Args:
        map_side: shorter side of the image over the stride of the map.
        count: number of dilated branches.

    Example:
        >>> fitting_rates(512 / 16, 3), fitting_rates(512 / 8, 3)["deeplabv3"]
        ({'deeplabv3': [6, 12, 18], 'log-spaced': [1, 4, 16]}, [12, 24, 36])
    """
    unit = _DEEPLAB_RATE * map_side / _DEEPLAB_MAP
    spaced = dilation_grid(1.0, max(1.0, math.ceil(map_side) // 2), count, whole=True)
    return {
        "deeplabv3": [round_dilation(unit * place) for place in range(1, count + 1)],
        # A small map has fewer rates than branches.
        "log-spaced": [int(rate) for rate in spaced] + [int(spaced[-1])] * (count - len(spaced)),
    }


def outer_taps_on_map(layer: LayerField, size: tuple[int, int]) -> float | None:
    """Return the share of a dilated convolution's outer taps that lie on the map, on average over its positions.

    None for layers that are not dilated or do not pad, and where the map's size is not known.

    Args:
        layer: of `rfield.receptive_field.per_layer.layer_receptive_fields`.
        size: (height, width) of the images in px.

    Example:
        >>> from torch import nn
        >>> from rfield.receptive_field.per_layer import layer_receptive_fields
        >>> (layer, _) = layer_receptive_fields(nn.Conv2d(3, 8, 3, padding=6, dilation=6))
        >>> outer_taps_on_map(layer, (8, 8)), outer_taps_on_map(layer, (6, 6))
        (0.15625, 0.0)
    """
    if not _is_dilated(layer) or not _pads_known_map(layer):
        return None
    reads = _tap_reads(layer, size)
    taps = math.prod(map(len, reads))
    # The centre of an odd kernel always lies on the map; an even kernel has none.
    centre = int(all(len(each) % 2 for each in reads))
    return (math.prod(map(sum, reads)) - centre) / (taps - centre)


def find_pyramids(layers: Sequence[LayerField]) -> list[Pyramid]:
    """Return the groups of two or more dilated convolutions that are parallel.

    They are in one `nn.ModuleList` or `nn.ModuleDict` and none of them reads another one's output, or they read maps of
    the same field and stride, as branches do that are added or concatenated.

    Args:
        layers: of `rfield.receptive_field.per_layer.layer_receptive_fields`.
    """
    groups: dict[object, list[LayerField]] = {}
    for layer in filter(_is_dilated, layers):
        field = _input_field(layer)
        listed = layer.parallel and not any(_reads(layer, other) for other in groups.get(layer.parallel, []))
        if listed or math.isfinite(max(field)):
            groups.setdefault(layer.parallel if listed else (field, _input_stride(layer)), []).append(layer)
    return [
        Pyramid(_common_name(group), tuple(sorted(group, key=_rate))) for group in groups.values() if len(group) > 1
    ]


def field_advice(layers: Sequence[LayerField], size: tuple[int, int]) -> list[Advice]:
    """Return what does not suit images of a given size, and what to do, each as a line of code.

    That is: dilated layers that see more than the image, dilated layers most of whose taps read zeros, layers whose
    map is so small that they act as a 1x1 convolution, and an output that sees less than a tenth of the image's area.
    A pyramid whose rates are no larger than DeepLabv3's, scaled to its map, counts as suitable.

    Args:
        layers: of `rfield.receptive_field.per_layer.layer_receptive_fields`; the last one is the model's output.
        size: (height, width) of the images in px.

    Example:
        >>> from torch import nn
        >>> from rfield.receptive_field.per_layer import layer_receptive_fields
        >>> layers = nn.Sequential(nn.Conv2d(3, 8, 3, stride=8, padding=1), nn.Conv2d(8, 8, 3, padding=9, dilation=9))
        >>> print(*field_advice(layer_receptive_fields(layers), (100, 100)), sep="\\n")
        1: rate 9 at output stride 8 sees 1.5 x the image (147 of 100 px)
          rfield.set_dilations(model, {'1': (5, 5)})
        1: rate 9 on a map of 13x13 px reads padding with 71 % of its taps
          rfield.set_dilations(model, {'1': (5, 5)})
    """
    pyramids = find_pyramids(layers)
    suitable = {layer.name for pyramid in pyramids if pyramid.fits(size) for layer in pyramid.layers}
    dilated = [layer for layer in layers if _is_dilated(layer) and layer.name not in suitable]
    fitting = {layer.name: _single_rate(layer, size) for layer in dilated}
    for pyramid in pyramids:
        fitting |= zip((layer.name for layer in pyramid.layers), pyramid.fitting(size)["deeplabv3"], strict=True)
    found = []
    for group in _groups(dilated, pyramids):
        axis = max((0, 1), key=lambda axis: max(layer.local[axis] for layer in group) / size[axis])
        wide = [layer for layer in group if size[axis] < layer.local[axis] < math.inf]
        if wide:
            found.append(Advice(_width_text(group, wide, axis, size[axis]), _code(group, fitting)))
    found += [Advice(text, _code([layer], fitting)) for layer in dilated for text in _padding_texts(layer, size)]
    return found + _small_maps(layers, size) + _short_sight(layers, size)


def _is_dilated(layer: LayerField) -> bool:
    return bool(layer.kernel and max(layer.kernel) > 1 and max(layer.dilation or (1,)) > 1)


def _rate(layer: LayerField) -> float:
    return max(layer.dilation or (1.0,))


def _input_stride(layer: LayerField) -> Pair:
    """Return the input px between neighbours of a layer's input map."""
    spacing, dilation = layer.tap_spacing or (1.0, 1.0), layer.dilation or (1.0, 1.0)
    return spacing[0] / dilation[0], spacing[1] / dilation[1]


def _input_field(layer: LayerField) -> Pair:
    """Return the field of a pixel of a layer's input map, without layers that see the whole image."""
    kernel, spacing = layer.kernel or (1, 1), layer.tap_spacing or (1.0, 1.0)
    height, width = (round(layer.local[axis] - (kernel[axis] - 1) * spacing[axis], 3) for axis in (0, 1))
    return height, width


def _reads(layer: LayerField, other: LayerField) -> bool:
    """Return whether a layer's input map depends on another layer's output, by their fields.

    Where a field is not known, layers of different rates count as parallel.
    """
    if not math.isfinite(max(*layer.local, *other.local)):
        return _rate(layer) == _rate(other)
    return all(inner >= outer for inner, outer in zip(_input_field(layer), other.local, strict=True))


def _map_size(layer: LayerField, size: tuple[int, int]) -> tuple[int, int]:
    """Return (height, width) of a layer's input map, for images of a given size."""
    height, width = (math.ceil(side / step) for side, step in zip(size, _input_stride(layer), strict=True))
    return height, width


def _pads_known_map(layer: LayerField) -> bool:
    return layer.pads and math.isfinite(max(layer.tap_spacing or (1.0,)))


def _tap_reads(layer: LayerField, size: tuple[int, int]) -> list[list[float]]:
    """Return for each axis the share of the positions at which each tap lies on the map."""
    kernel, dilation = layer.kernel or (1, 1), layer.dilation or (1.0, 1.0)
    return [
        # A tap at a distance of a times the map's side lies on the map at a share of 1 - a of all positions.
        [max(0.0, 1 - abs(tap - (taps - 1) / 2) * rate / side) for tap in range(taps)]
        for taps, rate, side in zip(kernel, dilation, _map_size(layer, size), strict=True)
    ]


def _groups(dilated: Sequence[LayerField], pyramids: Sequence[Pyramid]) -> list[list[LayerField]]:
    """Return the pyramids' layers, and the other layers of one rate and stride."""
    groups: dict[object, list[LayerField]] = {}
    owner = {layer.name: index for index, pyramid in enumerate(pyramids) for layer in pyramid.layers}
    for layer in dilated:
        groups.setdefault(owner.get(layer.name, (layer.dilation, layer.stride)), []).append(layer)
    return list(groups.values())


def _common_name(group: Sequence[LayerField]) -> str:
    """Return the name of the innermost module that contains all layers of a group, or their own names."""
    parts = zip(*(layer.name.split(".") for layer in group), strict=False)
    common = [each[0] for each in itertools.takewhile(lambda each: len(set(each)) == 1, parts)]
    return ".".join(common) or ", ".join(layer.name for layer in group)


def _single_rate(layer: LayerField, size: tuple[int, int]) -> int:
    """Return the largest rate up to the present one that fits a layer's map and whose field fits the image."""
    kernel, start, step = layer.kernel or (1, 1), _input_field(layer), _input_stride(layer)
    for rate in range(int(_rate(layer)), 1, -1):
        spacing = (rate * step[0], rate * step[1])
        local = (start[0] + (kernel[0] - 1) * spacing[0], start[1] + (kernel[1] - 1) * spacing[1])
        tried = dataclasses.replace(layer, dilation=(rate, rate), tap_spacing=spacing, local=local)
        if all(local[axis] <= size[axis] for axis in (0, 1)) and not _padding_texts(tried, size):
            return rate
    return 1


def _code(layers: Sequence[LayerField], rates: Mapping[str, int]) -> str:
    """Return the line of Python that gives layers the rates that fit."""
    if any(layer.kind == "AdaptiveConv2d" or not float(_rate(layer)).is_integer() for layer in layers):
        return "search = rfield.SampledSearch(model, loss_fn, steps=1000, held_out=batches)"
    changed = [layer for layer in layers if rates[layer.name] != _rate(layer)] or layers
    names = list(dict.fromkeys(layer.name.partition("#")[0] for layer in changed))
    if any(layer.kind != "Conv2d" or not layer.pads for layer in layers):
        # Those that pad by themselves, such as timm's Conv2dSame.
        return "; ".join(f"model.get_submodule({name!r}).dilation = {(rates[name],) * 2}" for name in names)
    chosen = {rates[name] for name in names}
    if len(chosen) == 1 and len(names) > _MOST_NAMES:
        return f"rfield.set_dilations(model, dict.fromkeys({names}, {(*chosen,) * 2}))"
    return f"rfield.set_dilations(model, {{{', '.join(f'{name!r}: {(rates[name],) * 2}' for name in names)}}})"


def _width_text(group: Sequence[LayerField], wide: Sequence[LayerField], axis: int, side: int) -> str:
    """Return that the `wide` layers of a group of parallel ones see more than the image's side in px."""
    rates = sorted({_rate(layer) for layer in group})
    names = _common_name(group) if len(rates) > 1 else " to ".join(dict.fromkeys((wide[0].name, wide[-1].name)))
    widest = max(wide, key=lambda layer: layer.local[axis])
    field = widest.local[axis]
    see = "rates {} at output stride {} see" if len(rates) > 1 else "rate {} at output stride {} sees"
    seeing = see.format("/".join(map(_number, rates)), _number(widest.stride[axis]))
    return f"{names}: {seeing} {field / side:.1f} x the image ({_number(field)} of {side} px)"


def _padding_texts(layer: LayerField, size: tuple[int, int]) -> list[str]:
    """Return that most of a dilated layer's taps read padding, or nothing."""
    if not _pads_known_map(layer):
        return []
    which = f"{layer.name}: rate {_number(_rate(layer))} on a map of {format_size(_map_size(layer, size))} px"
    if _acts_as_pointwise(layer, size):
        return [f"{which} acts as a 1x1 convolution, its outer taps never reach the map"]
    reads = _tap_reads(layer, size)
    inside = math.prod(sum(each) / len(each) for each in reads)
    return [f"{which} reads padding with {100 * (1 - inside):.0f} % of its taps"] if inside < 0.5 else []


def _acts_as_pointwise(layer: LayerField, size: tuple[int, int]) -> bool:
    return all(sum(read > 0 for read in each) <= 1 for each in _tap_reads(layer, size))


def _small_maps(layers: Sequence[LayerField], size: tuple[int, int]) -> list[Advice]:
    """Return the plain convolutions whose map is one px, one advice for each size of the map."""
    groups: dict[Pair, list[LayerField]] = {}
    for layer in layers:
        is_plain = (
            layer.kind != "" and "Conv" in layer.kind and max(layer.kernel or (1,)) > 1 and not _is_dilated(layer)
        )
        if is_plain and _pads_known_map(layer) and _acts_as_pointwise(layer, size):
            groups.setdefault(_input_stride(layer), []).append(layer)
    found = []
    for stride, group in groups.items():
        kernel = [max((layer.kernel or (1, 1))[axis] for layer in group) for axis in (0, 1)]
        names = " to ".join(dict.fromkeys((group[0].name, group[-1].name)))
        act = "act as 1x1 convolutions" if len(group) > 1 else "acts as a 1x1 convolution"
        wanted = tuple(max(size[axis], math.ceil(kernel[axis] * stride[axis])) for axis in (0, 1))
        on = f"kernel {format_pair(map(float, kernel))} on a map of {format_size(_map_size(group[0], size))} px"
        found.append(
            Advice(
                f"{names}: {on} {act}, the images are too small for stride {format_pair(stride)}",
                f"images = torch.nn.functional.interpolate(images, size={wanted})",
            )
        )
    return found


def _short_sight(layers: Sequence[LayerField], size: tuple[int, int]) -> list[Advice]:
    """Return that the output sees less than a tenth of the image, or nothing."""
    output = layers[-1]
    seen = math.prod(min(extent / side, 1.0) for extent, side in zip(output.local, size, strict=True))
    if seen >= 0.1 or not math.isfinite(max(output.field)):
        return []
    of = f"{format_size(output.local)} of {format_size(size)} px"
    convs = [layer for layer in layers if layer.kind == "Conv2d" and layer.pads and max(layer.kernel or (1,)) > 1]
    code = "images = torch.nn.functional.interpolate(images, scale_factor=0.5)"
    if convs:
        # The last one on the coarsest map, where a tap reaches farthest.
        coarsest = max(max(_input_stride(layer)) for layer in convs)
        name = [layer.name for layer in convs if max(_input_stride(layer)) == coarsest][-1].partition("#")[0]
        code = f"rfield.adapt(model, {name!r})"
    return [Advice(f"the output sees {100 * seen:.2g} % of the image ({of})", code)]


def _number(value: float) -> str:
    return f"{value:.4g}"
