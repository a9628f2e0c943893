import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rfield.layers import WeightedGradient, weight_gradient


def oracle(grad_output: Tensor, mask: Tensor, classes: list[int], weight: float) -> Tensor:
    """The input's gradient, pixel by pixel."""
    grad_input = grad_output.clone()
    n, k, h, w = grad_output.shape
    rows, columns = mask.shape[1:]
    for image in range(n):
        for y in range(h):
            for x in range(w):
                label = mask[
                    image, round(y * (rows - 1) / (h - 1)) if h > 1 else 0,
                    round(x * (columns - 1) / (w - 1)) if w > 1 else 0,
                ]  # fmt: skip
                for channel in range(k):
                    if int(label) in classes:
                        grad_input[image, channel, y, x] *= weight
    return grad_input


@settings(deadline=None, max_examples=40)
@given(
    size=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    of=st.tuples(st.integers(1, 17), st.integers(1, 17)),
    weight=st.sampled_from([0.0, 0.5, 1.0, 5.0]),
    seed=st.integers(0, 99),
)
def test_gradient_is_the_oracles(size: tuple[int, int], of: tuple[int, int], weight: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.randint(0, 4, (2, *of), generator=generator)
    mask[mask == 3] = 255
    input = torch.randn(2, 3, *size, generator=generator, requires_grad=True)
    grad_output = torch.randn(2, 3, *size, generator=generator)
    output = weight_gradient(input, mask, [1, 2], weight)
    assert torch.equal(output, input)
    output.backward(grad_output)
    assert torch.equal(input.grad, oracle(grad_output, mask, [1, 2], weight))


def test_places_on_long_axes_are_exact() -> None:
    mask, input = torch.arange(40001)[None, None] % 7, torch.zeros(1, 1, 1, 39991, requires_grad=True)
    weight_gradient(input, mask, [3], 5.0).sum().backward()
    nearest = torch.tensor([(2 * place * 40000 + 39990) // (2 * 39990) for place in range(39991)])
    assert torch.equal(input.grad.flatten(), torch.where(nearest % 7 == 3, 5.0, 1.0))


def test_void_weighs_one_even_if_a_class_set_is_large() -> None:
    input = torch.zeros(1, 1, 1, 2, requires_grad=True)
    mask = torch.tensor([[[255, 0]]])
    weight_gradient(input, mask, range(11), 3.0).sum().backward()
    assert input.grad.flatten().tolist() == [1.0, 3.0]
    for classes in ({0, 999}, ()):
        weight_gradient(input, mask.byte(), classes, 3.0).sum().backward()
    assert input.grad.flatten().tolist() == [3.0, 7.0]


def test_is_the_identity_in_eval_mode_and_without_a_mask() -> None:
    assert WeightedGradient([2, 0], 5.0).classes == (0, 2)
    layer, input = WeightedGradient([0], 5.0), torch.rand(1, 1, 2, 2, requires_grad=True)
    for output in (layer(input), layer.eval()(input, torch.zeros(1, 2, 2, dtype=torch.long))):
        assert torch.equal(output, input)
        assert torch.autograd.grad(output.sum(), input)[0].eq(1).all()


def test_under_autocast_and_in_low_precision() -> None:
    mask = torch.tensor([[[0, 1], [1, 0]]])
    input = torch.zeros(1, 2, 2, 2, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = weight_gradient(F.conv2d(input, torch.eye(2)[:, :, None, None]), mask, [1], 5.0)
    assert output.dtype == torch.bfloat16
    output.sum().backward()
    assert input.grad[0, 0].tolist() == [[1.0, 5.0], [5.0, 1.0]]


@pytest.mark.slow
def test_compiles() -> None:
    layer = nn.ModuleList([nn.Conv2d(1, 2, 1), WeightedGradient([1], 5.0)])
    mask = torch.tensor([[[0, 1], [1, 0]]])

    def run(input: Tensor) -> Tensor:
        return layer[1](layer[0](input), mask)

    gradients = []
    for function in (run, torch.compile(run, backend="aot_eager", fullgraph=True)):
        layer.zero_grad()
        function(torch.ones(1, 1, 2, 2)).square().sum().backward()
        gradients.append(layer[0].weight.grad.clone())
    assert torch.allclose(*gradients)


@pytest.mark.parametrize(
    ("input", "mask", "weight"),
    [
        (torch.zeros(1, 2, 2), torch.zeros(1, 2, 2, dtype=torch.long), 1.0),
        (torch.zeros(2, 1, 2, 2), torch.zeros(1, 2, 2, dtype=torch.long), 1.0),
        (torch.zeros(1, 1, 2, 2), torch.zeros(1, 2, 2, dtype=torch.long), -1.0),
        (torch.zeros(1, 1, 2, 2), torch.zeros(1, 2, 2, dtype=torch.long), float("inf")),
        (torch.zeros(1, 1, 2, 2), torch.zeros(1, 0, 2, dtype=torch.long), 1.0),
    ],
)
def test_bad_input(input: Tensor, mask: Tensor, weight: float) -> None:
    with pytest.raises(ValueError, match="got"):
        weight_gradient(input, mask, [0], weight)


def test_has_no_joint_rest_point() -> None:
    """Two summed paths, two classes, weight 5: the paths' logits drift apart without bound, and their sum does not.

    A pixel has class 0 in half of the cases, whatever is seen; each path is one bias a class. The sum is at rest at
    (0, 0); path 1 wants more of class 0, path 2 more of class 1.
    """

    def drift(weight: float, steps: int) -> float:
        paths = [torch.zeros(1, 2, 1, 1, requires_grad=True) for _ in range(2)]
        mask = torch.tensor([0, 1]).repeat(4)[:, None, None]
        for _ in range(steps):
            logits = [weight_gradient(path.expand(8, 2, 1, 1), mask, [own], weight) for own, path in enumerate(paths)]
            F.cross_entropy(logits[0] + logits[1], mask).backward()
            for path in paths:
                path.data -= 0.5 * path.grad
                path.grad = None
        assert float((paths[0] + paths[1]).detach().abs().max()) < 1e-5
        return float((paths[0] - paths[1]).detach().abs().max())

    assert drift(1.0, 200) < 1e-5
    assert drift(5.0, 200) > 50
    assert drift(5.0, 400) == pytest.approx(2 * drift(5.0, 200), rel=0.05)
