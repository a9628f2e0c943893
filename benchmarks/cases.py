"""What is timed against what. The cases of a group do equal work; ratios are to the first case."""

from collections.abc import Iterator
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import DeformConv2d

from benchmarks.steps import steps
from benchmarks.timing import Case, Group, training_step, without_gradient
from rfield import AdaptiveConv2d, GatedConv2d, ReceptiveFieldRegulator, fuse
from rfield.ops import resize_bilinear, resized_size
from rfield.segmentation.models import HeadSpec, SinglePathHead, largefov_vgg16

_FORMATS = ("contiguous", "channels-last")
_DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _map(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, channels_last: bool = False) -> Tensor:
    values = torch.randn(shape, device=_DEVICE, dtype=dtype)
    return values.contiguous(memory_format=torch.channels_last) if channels_last else values


def resize(quick: bool = False) -> Iterator[Group]:
    """Resize with the factor's gradient, beside `F.grid_sample` and ATen's upsampling, which has no such gradient."""
    maps = [(1, 21, 41, 41), (1, 128, 41, 41), (1, 512, 41, 41), (8, 64, 41, 41), (1, 64, 65, 65), (1, 256, 65, 65)]
    maps += [(1, 64, 128, 256), (1, 256, 128, 256)]
    for shape, factor in product(maps[:1] if quick else maps, (0.63,) if quick else (0.5, 0.63, 0.8, 1.0, 1.25, 2.0)):
        batch, channels, height, width = shape
        if batch * channels * height * width * factor**2 > 2e7:
            continue
        for channels_last in (False, True):
            input = _map(shape, channels_last=channels_last).requires_grad_()
            scale = torch.tensor([factor], device=_DEVICE, requires_grad=True)
            size = (resized_size(height, factor), resized_size(width, factor))
            ways = {
                "rfield": (lambda i=input, s=scale, o=size: resize_bilinear(i, s, o), [input, scale]),
                "grid_sample": (lambda i=input, s=scale, o=size: _grid_sample(i, s, o), [input, scale]),
                "ATen bilinear, no factor gradient": (
                    lambda i=input, o=size: F.interpolate(i, o, mode="bilinear", align_corners=True),
                    [input],
                ),
            }
            size = " x ".join(map(str, shape[1:] if batch == 1 else shape))
            name = f"{size}, f = {factor:g}, {_FORMATS[channels_last]}"
            yield Group(f"resize, forward: {name}", {k: without_gradient(f) for k, (f, _) in ways.items()})
            yield Group(f"resize, training: {name}", {k: training_step(f, leaves) for k, (f, leaves) in ways.items()})


def _grid_sample(input: Tensor, scale: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize as a spatial transformer does (Jaderberg et al., NeurIPS 2015)."""
    rows, columns = (
        torch.arange(target, device=input.device) / scale * (2 / max(source - 1, 1)) - 1
        for target, source in zip(size, input.shape[2:], strict=True)
    )
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij")[::-1], -1).expand(input.shape[0], -1, -1, -1)
    return F.grid_sample(input, grid, padding_mode="border", align_corners=True)


class _Deformable(nn.Module):
    """torchvision's deformable convolution, its offsets fixed (`static`) or predicted from the input."""

    def __init__(self, conv: nn.Conv2d, static: bool) -> None:
        super().__init__()
        arguments = (conv.in_channels, conv.out_channels, 3, 1, conv.padding, conv.dilation)
        self.conv = DeformConv2d(*arguments)
        self.offset = (
            None if static else nn.Conv2d(conv.in_channels, 18, 3, padding=conv.padding, dilation=conv.dilation)
        )

    def forward(self, input: Tensor) -> Tensor:
        offset = (
            input.new_full((input.shape[0], 18, *input.shape[2:]), 0.3) if self.offset is None else self.offset(input)
        )
        return self.conv(input, offset)


class _WeightedDilations(nn.Module):
    """RF-Next (Gao et al., TPAMI 2022): one kernel at several dilations, summed by weights that are learned."""

    def __init__(self, conv: nn.Conv2d, dilations: tuple[int, ...]) -> None:
        super().__init__()
        self.conv = conv
        self.dilations = dilations
        self.rates = nn.Parameter(torch.ones(len(dilations)))

    def forward(self, input: Tensor) -> Tensor:
        share = self.rates.abs() / self.rates.abs().sum()
        outputs = (
            share[index] * F.conv2d(input, self.conv.weight, None, 1, dilation, dilation)
            for index, dilation in enumerate(self.dilations)
        )
        return sum(outputs) + self.conv.bias[:, None, None]


def convolution(quick: bool = False) -> Iterator[Group]:
    """Run one dilated 3x3 convolution whose dilation is learned in several ways."""
    shapes = [(1, 64, 128, 33, 33), (8, 512, 128, 41, 41), (8, 512, 1024, 41, 41), (1, 512, 1024, 65, 65)]
    shapes += [(1, 256, 128, 128, 256)]
    for shape, channels_last in product(shapes[:1] if quick else shapes, (False, True)):
        batch, channels, out_channels, height, width = shape
        input = _map((batch, channels, height, width), channels_last=channels_last).requires_grad_()
        plain = nn.Conv2d(channels, out_channels, 3, padding=6, dilation=6).to(_DEVICE)
        drawn, between, learned = (AdaptiveConv2d.from_conv(plain) for _ in range(3))
        drawn.dilation_override = (6.0, 6.0)
        between.set_factor(6 / 6.4)
        between.freeze_factor()
        learned.set_factor(6 / 6.4)
        modules: dict[str, nn.Module] = {
            "nn.Conv2d": plain,
            "AdaptiveConv2d, integer drawn": drawn,
            "AdaptiveConv2d, bilinear taps": between,
            "AdaptiveConv2d, bilinear taps, learned": learned,
            "deform_conv2d, fixed offsets": _Deformable(plain, static=True),
            "deform_conv2d, predicted offsets": _Deformable(plain, static=False),
            "RF-Next, three dilations": _WeightedDilations(plain, (5, 6, 7)),
        }
        if _dcls() is not None and not channels_last and batch * channels * out_channels <= 64 * 128:
            modules["DCLS, kernel of 13 x 13"] = _dcls()(
                channels, out_channels, kernel_count=9, padding=6, dilated_kernel_size=13
            )
        modules = {name: module.to(_DEVICE) for name, module in modules.items()}
        name = f"batch {batch}, {channels} -> {out_channels}, {height} x {width}, {_FORMATS[channels_last]}"
        runs = {key: (lambda m=module, i=input: m(i)) for key, module in modules.items()}
        inferences = {key: without_gradient(run) for key, run in runs.items()}
        steps = {
            key: training_step(run, [input, *(p for p in modules[key].parameters() if p.requires_grad)])
            for key, run in runs.items()
        }
        for doing, cases in (("inference", inferences), ("training", steps)):
            yield Group(f"convolution, {doing}: {name}", cases)
            if quick or (channels_last and batch == 8):
                # The kernels of the others have only float32 on a CPU.
                plain_or_ours = {key: case for key, case in cases.items() if not key.startswith(("deform", "DCLS"))}
                lowered = {key: _autocast(case) for key, case in plain_or_ours.items()}
                yield Group(f"convolution, {doing}: {name}, bfloat16", lowered)


def gates(quick: bool = False) -> Iterator[Group]:
    """Run a 3x3 convolution at four rates, mixed by gates, beside four convolutions and a deformable one."""
    shapes = [(1, 64, 64, 33), (8, 112, 64, 17), (8, 512, 128, 41)]
    for batch, channels, out_channels, side in shapes[:1] if quick else shapes:
        input = _map((batch, channels, side, side), channels_last=True).requires_grad_()
        plain = nn.Conv2d(channels, out_channels, 3, padding=4, dilation=4)
        modules: dict[str, nn.Module] = {
            "nn.Conv2d": plain,
            "GatedConv2d of four rates, image": GatedConv2d.from_conv(plain, gates="image"),
            "GatedConv2d of four rates, pixel": GatedConv2d.from_conv(plain, gates="pixel"),
            "deform_conv2d, predicted offsets": _Deformable(plain, static=False),
        }
        modules = {name: module.to(_DEVICE) for name, module in modules.items()}
        runs = {key: (lambda m=module, i=input: m(i)) for key, module in modules.items()}
        inferences = {key: without_gradient(run) for key, run in runs.items()}
        steps = {key: training_step(run, [input, *modules[key].parameters()]) for key, run in runs.items()}
        for doing, cases in (("inference", inferences), ("training", steps)):
            cases["four nn.Conv2d"] = _together([cases["nn.Conv2d"]] * 4)
            for module in modules.values():
                module.train(doing == "training")
            yield Group(f"gates, {doing}: batch {batch}, {channels} -> {out_channels}, {side} x {side}", cases)


def _dcls() -> type[nn.Module] | None:
    try:
        from DCLS.construct.modules import Dcls2d
    except ImportError:
        return None
    return Dcls2d


def _autocast(run: Case) -> Case:
    def lowered() -> object:
        with torch.autocast(_DEVICE.type, torch.bfloat16):
            return run()

    return lowered


def _head(width: int, mechanism: str | None = None, factor: float = 1.0) -> nn.Module:
    torch.manual_seed(0)
    made = SinglePathHead(512, 21, HeadSpec(6, width, 0.0, mechanism is not None, mechanism or "regulator"))
    for module in made.modules():
        if isinstance(module, ReceptiveFieldRegulator | AdaptiveConv2d):
            module.set_factor(factor)
    return made.to(_DEVICE, memory_format=torch.channels_last)


def head(quick: bool = False) -> Iterator[Group]:
    """Train a LargeFOV head: bare, in a regulator at several factors, and as an ASPP of four rates."""
    shapes = [(1, 128, 33)] if quick else [(8, 128, 41), (4, 1024, 41)]
    for (batch, width, side), frozen in product(shapes, (False, True)):
        # A trained backbone needs the gradient of its features; with a frozen one only the factor does.
        features = _map((batch, 512, side, side), channels_last=True).requires_grad_(not frozen)
        heads = {"bare": _head(width)}
        heads |= {
            f"regulator, f = {factor:g}": _head(width, "regulator", factor) for factor in (1.0, 0.8, 0.63, 0.5, 1.25)
        }
        heads["adaptive convolution, learned"] = _head(width, "dilation", 1.05)
        backbone = "frozen" if frozen else "trained"
        name = f"head, training: batch {batch}, 512 -> {width}, {side} x {side}, backbone {backbone}"
        runs = {key: (lambda m=module, i=features: m(i)) for key, module in heads.items()}
        steps = {key: training_step(run, [features, *heads[key].parameters()]) for key, run in runs.items()}
        steps["four heads, as ASPP"] = _together([steps["bare"]] * 4)
        yield Group(name, steps)
        if width == 128 and not frozen:
            yield Group(f"{name}, bfloat16", {key: _autocast(step) for key, step in steps.items()})


def network(quick: bool = False) -> Iterator[Group]:
    """Train and run a whole LargeFOV VGG16: fixed, in a regulator, with learned dilations."""
    batch, side = (1, 65) if quick else (2, 161)
    images = _map((batch, 3, side, side), channels_last=True)
    networks = {}
    for key, mechanism in {"fixed": None, "regulator": "regulator", "adaptive convolution": "dilation"}.items():
        torch.manual_seed(0)
        regulate = {"regulate": mechanism is not None, "mechanism": mechanism or "dilation"}
        made = largefov_vgg16(21, dilation=6, head_channels=128, dropout=0.0, **regulate)
        networks[key] = made.to(_DEVICE, memory_format=torch.channels_last)
        for module in made.modules():
            if isinstance(module, ReceptiveFieldRegulator | AdaptiveConv2d):
                module.set_factor(1 / 1.05)
    name = f"batch {batch}, {side} x {side} px"
    runs = {key: (lambda m=made: m.logits(m.pad(images))) for key, made in networks.items()}
    leaves = {key: [p for p in made.parameters() if p.requires_grad] for key, made in networks.items()}
    steps = {key: training_step(run, leaves[key]) for key, run in runs.items()}
    inferences = {key: without_gradient(run) for key, run in runs.items()}
    for doing, cases in (("training", steps), ("inference", inferences)):
        yield Group(f"network, {doing}: {name}", cases)
        yield Group(f"network, {doing}: {name}, bfloat16", {key: _autocast(case) for key, case in cases.items()})


def _together(steps: list[Case]) -> Case:
    def run() -> None:
        for step in steps:
            step()

    return run


def fused(quick: bool = False) -> Iterator[Group]:
    """Run a fused head and the same head built of plain convolutions."""
    for batch, side in [(1, 33)] if quick else [(1, 41), (8, 41), (1, 65)]:
        features = _map((batch, 512, side, side), channels_last=True)
        torch.manual_seed(0)
        learned = SinglePathHead(512, 21, HeadSpec(6, 128, 0.0, True, "dilation")).to(_DEVICE)
        for module in learned.modules():
            if isinstance(module, AdaptiveConv2d):
                module.set_factor(6 / 4)
                module.snap()
        plain = SinglePathHead(512, 21, HeadSpec(4, 128, 0.0, False)).to(_DEVICE)
        cases = {"plain": plain.eval(), "fused": fuse(learned.eval()), "snapped, not fused": learned.eval()}
        cases = {key: module.to(memory_format=torch.channels_last) for key, module in cases.items()}
        runs = {key: without_gradient(lambda m=module, i=features: m(i)) for key, module in cases.items()}
        yield Group(f"head, inference: batch {batch}, 512 -> 128, {side} x {side}", runs)


GROUPS = {
    "resize": resize,
    "convolution": convolution,
    "gates": gates,
    "head": head,
    "network": network,
    "fused": fused,
    "step": steps,
}
