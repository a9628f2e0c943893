"""No path from the image cancels another: layers whose gradients have both signs, or that select elements."""

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from rfield import fuse, regulate
from rfield.receptive_field.absolute_gradient import UnknownFieldError, without_cancellation
from rfield.receptive_field.gradient_rules import of_weights
from rfield.receptive_field.per_layer import layer_receptive_fields
from rfield.receptive_field.probe import probe_receptive_field, probe_window
from rfield.receptive_field.theoretical import theoretical_receptive_field

INF = math.inf


class Two(nn.Module):
    """A function of the outputs of two convolutions, which see 3x3 px and 7x7 px, and of the image."""

    def __init__(self, function: Callable[[Tensor, Tensor, Tensor], Tensor], channels: int = 3) -> None:
        super().__init__()
        self.near = nn.Conv2d(3, channels, 3, padding=1)
        self.far = nn.Conv2d(3, channels, 3, padding=3, dilation=3)
        self.function = function

    def forward(self, image: Tensor) -> Tensor:
        return self.function(self.near(image), self.far(image), image)


def fields(model: nn.Module) -> tuple[float, ...]:
    """Return the receptive field, measured on strips of 64 px, a size that all layers here divide."""
    return tuple(probe_window(model, axis, thickness=64, lengths=[64]).size for axis in (0, 1))


def in_place(name: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def change(near: Tensor, far: Tensor, image: Tensor) -> Tensor:
        getattr(near, name)(far)
        return near

    return change


SIGNS = torch.tensor([1.0, -2.0, 1.0], dtype=torch.float64)
ONE: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "softmax": lambda near, far, image: near.softmax(1),
    "log_softmax": lambda near, far, image: F.log_softmax(near, dim=1),
    "gumbel_softmax": lambda near, far, image: F.gumbel_softmax(near, dim=1),
    "centred": lambda near, far, image: near - near.mean(1, keepdim=True),
    "centred in place": lambda near, far, image: near.sub_(near.mean(1, keepdim=True)),
    "normalize": lambda near, far, image: F.normalize(near),
    "normalised by hand": lambda near, far, image: near / near.norm(dim=1, keepdim=True),
    "linalg": lambda near, far, image: near / torch.linalg.vector_norm(near, dim=1, keepdim=True),
    "std": lambda near, far, image: near.std(1, keepdim=True),
    "var_mean": lambda near, far, image: torch.var_mean(near, dim=1, keepdim=True)[0],
    "layer_norm": lambda near, far, image: F.layer_norm(near.permute(0, 2, 3, 1), (3,)).permute(0, 3, 1, 2),
    "negative": lambda near, far, image: near + -near,
    "times -1": lambda near, far, image: near + near * -1,
    "times a tensor": lambda near, far, image: near + near.mul_(torch.tensor(-1.0)),
    "add_ alpha of itself": lambda near, far, image: near.add_(near.clone(), alpha=-1),
    "divided by -1": lambda near, far, image: near + near / -1,
    "one minus": lambda near, far, image: (1 - near) + near,
    "einsum": lambda near, far, image: torch.einsum("nchw,c->nhw", near, SIGNS)[:, None],
    "matmul": lambda near, far, image: (near.movedim(1, 3) @ SIGNS)[:, None],
    "linear": lambda near, far, image: F.linear(near.movedim(1, 3), SIGNS[None]).movedim(3, 1),
    "lower precision": lambda near, far, image: near.float() - near.half(),
    "a matrix of lower precision": lambda near, far, image: torch.eye(near.shape[2]).matmul(near.float()),
    "a kernel of lower precision": lambda near, far, image: F.conv2d(near.float(), torch.ones(1, 3, 1, 1)),
    "glu": lambda near, far, image: F.glu(torch.cat([near, near], 1), 1),
    "ReLU changed afterwards": lambda near, far, image: (F.relu(near).add_(far), near)[1],
    "leaky ReLU changed afterwards": lambda near, far, image: (F.leaky_relu(near, 0.1).add_(far), near)[1],
    "RReLU changed afterwards": lambda near, far, image: (F.rrelu(near, 0.1, 0.3, True).add_(far), near)[1],
    "dropout changed afterwards": lambda near, far, image: (F.dropout(near, 0.5, True).add_(far), near)[1],
    "defined above 1 alone": lambda near, far, image: torch.arccosh(near),
    "a long product": lambda near, far, image: functools.reduce(lambda x, _: x * x, range(40), near[:, :1] * 1e300),
    "msort": lambda near, far, image: torch.msort(near),
    "quantile": lambda near, far, image: torch.quantile(near, 0.5, 1, keepdim=True),
}
BOTH: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "-": lambda near, far, image: near - far,
    "torch.sub": lambda near, far, image: torch.sub(near, far),
    "subtract by keyword": lambda near, far, image: torch.subtract(input=near, other=far),
    "rsub": lambda near, far, image: torch.rsub(near, far),
    "alpha": lambda near, far, image: torch.add(near, far, alpha=-1),
    "add_ alpha": lambda near, far, image: near.add_(far, alpha=-1),
    **{name: in_place(name) for name in ("sub_", "__isub__", "subtract_", "div_", "__itruediv__", "mul_", "__imul__")},
    "into zeros": lambda near, far, image: torch.zeros_like(far).sub_(far),
    "written": lambda near, far, image: near.index_copy_(1, torch.tensor([1]), far[:, :1] - far[:, 1:2]),
    "like channels": lambda near, far, image: far[:, :1] - far[:, 1:2],
    "cross": lambda near, far, image: torch.cross(near, far, dim=1),
    "cosine_similarity": lambda near, far, image: F.cosine_similarity(near, far)[:, None],
    "lerp": lambda near, far, image: torch.lerp(near, far, 0.5),
    "addcmul": lambda near, far, image: torch.addcmul(image, near, far, value=-1),
    "powers": lambda near, far, image: near**2 - far**3,
    "abs": lambda near, far, image: (near - far).abs(),
    "maximum": lambda near, far, image: torch.maximum(near, far),
    "max": lambda near, far, image: torch.max(near, far),
    "min": lambda near, far, image: far.min(near),
    "where": lambda near, far, image: torch.where(near > 0, near, far),
    "max of channels": lambda near, far, image: torch.cat([near, far], 1).max(1, keepdim=True)[0],
    "amax": lambda near, far, image: torch.stack([near, far]).amax(0),
    "median": lambda near, far, image: torch.cat([near, far], 1).median(1)[0][:, None],
    "sort": lambda near, far, image: torch.cat([near, far], 1).sort(1).values[:, :1],
    "topk": lambda near, far, image: torch.cat([near, far], 1).topk(2, dim=1).values,
    "prod": lambda near, far, image: torch.stack([near, far]).prod(0),
    "ReLU in place": lambda near, far, image: (F.relu(near, inplace=True).add_(far), near)[1],
    "ReLU in place by position": lambda near, far, image: (F.relu(near, True).add_(far), near)[1],
    "a view like another, written": lambda near, far, image: (near.view_as(far).add_(far), near)[1],
    "dropout in place by position": lambda near, far, image: (F.dropout(near, 0.5, True, True).add_(far), near)[1],
}


@pytest.mark.parametrize(
    ("function", "field"),
    [*((function, 3) for function in ONE.values()), *((function, 7) for function in BOTH.values())],
    ids=[*ONE, *BOTH],
)
def test_no_path_cancels_another(function: Callable[[Tensor, Tensor, Tensor], Tensor], field: int) -> None:
    assert fields(Two(function)) == (field, field)


def test_a_selection_of_one_channel_does_not_depend_on_chance() -> None:
    for function in (torch.maximum, torch.min, lambda one, other: torch.cat([one, other], 1).amax(1, keepdim=True)):
        assert fields(Two(lambda near, far, image, choose=function: choose(far, near), channels=1)) == (7, 7)  # type: ignore[misc]


def test_the_caller_s_random_numbers_are_left_alone() -> None:
    model, state = nn.Sequential(Standardised(3, 3, 3), nn.Softmax(1)), torch.get_rng_state()
    assert fields(model) == (3, 3)
    assert torch.equal(torch.get_rng_state(), state)


def test_views_of_uniform_weights_stay_uniform() -> None:
    one, other = torch.tensor(1.0).expand(3, 2), torch.tensor(1.0).expand(3, 2)
    assert all(part.stride() == (0, 0) for part in of_weights(torch.broadcast_tensors, (one, other), {}))
    assert of_weights(torch.sub, (one, one.mean()), {}).abs().min() > 0


def test_an_argument_that_has_no_part_in_the_result() -> None:
    one, other = (torch.ones(3, requires_grad=True) for _ in range(2))
    without_cancellation(lambda one, other: -one, (one, other), {}, -one).sum().backward()
    assert one.grad is not None
    assert bool((one.grad > 0).all())
    assert other.grad is None


def test_like_branches_and_attention_over_channels() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.like = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, image: Tensor) -> Tensor:
            pixels = (self.conv(image) - self.like(image)).movedim(1, 3).unsqueeze(-1)
            attention = (pixels @ pixels.mT).softmax(-1)
            return (attention @ pixels).squeeze(-1).movedim(3, 1)

    assert fields(Attends()) == (3, 3)


class Standardised(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(input, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Masked(nn.Conv2d):
    """Sees one row, to the left of the pixel."""

    def forward(self, input: Tensor) -> Tensor:
        mask = torch.zeros_like(self.weight)
        mask[:, :, 1, :2] = 1
        return F.conv2d(input, self.weight * mask, self.bias)


class Fixed(nn.Module):
    def __init__(self, kernel: list[list[float]]) -> None:
        super().__init__()
        self.register_buffer("kernel", torch.tensor(kernel).expand(3, 1, -1, -1))

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, self.kernel, groups=3)  # type: ignore[arg-type]


class Opposite(nn.Module):
    """Two kernels, one of which is the negative of the other; with or without zeros."""

    def __init__(self, kernel: list[list[float]]) -> None:
        super().__init__()
        one = torch.tensor(kernel).expand(1, 3, -1, -1)
        self.register_buffer("kernels", torch.cat([one, -one]))

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, self.kernels)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("model", "field"),
    [
        (Opposite([[1.0, 2.0, 3.0]]), (1, 3)),
        (Opposite([[1.0, 0.0, 3.0]]), (1, 3)),
        (nn.ConvTranspose2d(3, 4, 3, padding=1), (3, 3)),
        (Standardised(3, 4, 3), (3, 3)),
        (nn.Sequential(Standardised(3, 4, 3), nn.Softmax(1), Standardised(4, 4, (1, 5))), (3, 7)),
        (Masked(3, 4, 3), (1, 2)),
        (parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), (3, 3)),
        (parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)), (3, 3)),
        (parametrizations.orthogonal(nn.Conv2d(3, 4, 3)), (3, 3)),
        (Fixed([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]]), (3, 3)),
        (Fixed([[-1.0, 0.0, 1.0]]), (1, 3)),
        (nn.Sequential(Fixed([[1.0, -1.0]]), Fixed([[1.0], [-1.0]])), (2, 2)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_kernels_of_either_sign(model: nn.Module, field: tuple[int, int]) -> None:
    assert fields(model) == field


def test_torch_s_old_weight_norm() -> None:
    with pytest.warns(FutureWarning):
        conv = nn.utils.weight_norm(nn.Conv2d(3, 4, 3))
    assert fields(conv) == (3, 3)


class Unpooled(nn.Module):
    def __init__(self, kernel: int, stride: int, padding: int, by_function: bool = False) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(kernel, stride, padding, return_indices=True)
        self.unpool = nn.MaxUnpool2d(kernel, stride, padding)
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.by_function = by_function

    def forward(self, image: Tensor) -> Tensor:
        pooled, indices = self.pool(image)
        if self.by_function:
            pool = self.pool
            return F.max_unpool2d(
                self.conv(pooled), indices, pool.kernel_size, pool.stride, pool.padding, list(image.shape[2:])
            )
        unpooled: Tensor = self.unpool(self.conv(pooled), indices, output_size=image.shape)
        return unpooled


@pytest.mark.parametrize(
    ("pool", "field"),
    [
        (nn.MaxPool2d(3, 1, dilation=4), (9, 9)),
        (nn.MaxPool2d((2, 3), 2, padding=1, dilation=(3, 5)), (4, 11)),
        (nn.MaxPool2d(3, 2, padding=1, dilation=2, ceil_mode=True), (5, 5)),
        (nn.AvgPool2d(3, 2, padding=1, ceil_mode=True, count_include_pad=False), (3, 3)),
        (nn.LPPool2d(1.5, (2, 3), stride=1, ceil_mode=True), (2, 3)),
    ],
    ids=str,
)
def test_pools(pool: nn.Module, field: tuple[int, int]) -> None:
    assert fields(pool) == field
    assert theoretical_receptive_field(pool) == field
    layer, output = layer_receptive_fields(pool)
    assert (layer.field, output.field) == (field, field)


def test_pools_by_function() -> None:
    for pool in (F.max_pool2d, torch.max_pool2d):
        assert fields(Two(lambda near, far, image, pool=pool: pool(image, 3, 1, 1, 2))) == (5, 5)  # type: ignore[misc]
    assert fields(Two(lambda near, far, image: F.max_pool2d(image, (3, 1), 1, dilation=3, return_indices=True)[0])) == (
        7,
        1,
    )
    assert fields(
        Two(lambda near, far, image: F.max_pool3d(image[:, :, None], (1, 3, 3), 1, 0, (1, 2, 3))[:, :, 0])
    ) == (
        5,
        7,
    )


def test_unpooling() -> None:
    # A window of 2 px, and by the convolution one more on each side.
    assert fields(Unpooled(2, 2, 0)) == fields(Unpooled(2, 2, 0, by_function=True)) == (6, 6)
    layers = layer_receptive_fields(Unpooled(2, 2, 0))
    assert [(layer.name, layer.field, layer.stride) for layer in layers] == [
        ("pool", (2, 2), (2, 2)),
        ("conv", (6, 6), (2, 2)),
        ("unpool", (6, 6), (1, 1)),
        ("output", (6, 6), (1, 1)),
    ]
    # Windows of 3 px overlap: the central pixel, 32, lies in one window only, which starts at 31.
    assert fields(Unpooled(3, 2, 1)) == (7, 7)


@pytest.mark.parametrize(
    ("function", "field"),
    [
        (lambda near, far, image: F.pixel_shuffle(torch.cat([near] * 4, 1), 2), 3),
        (lambda near, far, image: F.conv2d(F.pixel_unshuffle(image, 2), torch.ones(1, 12, 3, 3).double()), 6),
        (lambda near, far, image: F.unfold(image, 3).unflatten(2, (62, 62)), 3),
        (lambda near, far, image: F.fold(F.unfold(near, 3, dilation=2), (64, 64), 3, dilation=2), 3),
        (lambda near, far, image: F.interpolate(near, scale_factor=2, mode="bilinear"), 4),
        (lambda near, far, image: F.interpolate(near, scale_factor=2, mode="bicubic"), 6),
        (lambda near, far, image: torch.roll(near, 1, 3) - near, (3, 4)),
        (lambda near, far, image: torch.diff(near, dim=2), (4, 3)),
        (lambda near, far, image: F.batch_norm(near, None, None, training=True), INF),
        (lambda near, far, image: F.batch_norm(near, near[0, :, 0, 0], near[0, :, 0, 0], training=True), INF),
        (lambda near, far, image: torch.sort(near).values, (3, INF)),
        (lambda near, far, image: torch.topk(near, 2).values, (3, INF)),
        (lambda near, far, image: F.layer_norm(near, near.shape[1:]), INF),
        (lambda near, far, image: F.conv2d(image, near.mean((2, 3))[..., None, None].expand(3, 3, 3, 3) - 1), INF),
        (lambda near, far, image: torch.fft.ifft2(torch.fft.fft2(near)).real, INF),
    ],
)
def test_rearranged_maps(function: Any, field: float | tuple[int, int]) -> None:
    assert fields(Two(function)) == (field if isinstance(field, tuple) else (field, field))


@pytest.mark.parametrize(
    "function",
    [
        lambda near, far, image: F.layer_norm(near, near.shape[1:]),
        lambda near, far, image: F.batch_norm(near, None, None, training=True),
        lambda near, far, image: F.group_norm(near, 3),
        lambda near, far, image: near + near.mean(),
        lambda near, far, image: near * torch.sum(near, (-1, -2), keepdim=True),
    ],
)
def test_what_is_global_leaves_the_local_field(function: Any) -> None:
    window = probe_window(Two(function), axis=0, thickness=64, lengths=[64])
    assert (window.size, window.local) == (INF, 3)


@pytest.mark.parametrize(
    ("model", "error"),
    [
        (nn.FractionalMaxPool2d(3, output_ratio=0.5), "places drawn at random"),
        (Two(lambda near, far, image: F.grid_sample(image, near[:, :2].movedim(1, 3))), "depends on the image"),
        (Two(lambda near, far, image: near.detach()), "no gradient reaches the image"),
        (Two(lambda near, far, image: near * 0), "no gradient reaches the image"),
        (
            Two(lambda near, far, image: torch.einsum("nchw,c->nhw", near, SIGNS / 0)[None]),
            "einsum has no finite gradient",
        ),
    ],
)
def test_what_cannot_be_probed_is_an_error_of_one_line(model: nn.Module, error: str) -> None:
    for probe in (probe_receptive_field, layer_receptive_fields):
        with pytest.raises(ValueError, match=error) as caught:
            probe(model)
        assert "\n" not in str(caught.value)


def test_a_deformable_convolution_is_an_error() -> None:
    ops = pytest.importorskip("torchvision.ops")

    class Deformed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.offset = ops.DeformConv2d(3, 4, 3, padding=1), nn.Conv2d(3, 18, 3, padding=1)

        def forward(self, image: Tensor) -> Tensor:
            output: Tensor = self.conv(image, self.offset(image))
            return output

    with pytest.raises(UnknownFieldError, match="where deform_conv2d reads depends on the image"):
        layer_receptive_fields(Deformed())


def test_a_fused_resize_is_probed_as_the_regulator_that_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Sequential(nn.Conv2d(4, 4, 3, padding=3, dilation=3)))
    regulate(model, "1", factor=1.37)
    assert fields(fuse(model)) == fields(model)


class Checkpointed(Two):
    def forward(self, image: Tensor) -> Tensor:
        output: Tensor = checkpoint(self.far, self.near(image), use_reentrant=False)
        return output


def test_gradient_checkpointing_is_an_error_that_says_so() -> None:
    model = Checkpointed(torch.add)
    for probe in (probe_receptive_field, layer_receptive_fields):
        with pytest.raises(ValueError, match=r"^the model runs parts .* turn its gradient checkpointing off$"):
            probe(model)
