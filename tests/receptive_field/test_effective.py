"""The effective receptive field, compared with closed forms."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfield.receptive_field.effective import Measure, contribution_squares, effective_receptive_field, random_images


def test_a_linear_network_s_field_is_its_kernel() -> None:
    torch.manual_seed(0)
    first, second = nn.Conv2d(2, 3, 3, bias=False), nn.Conv2d(3, 1, 3, dilation=2)
    kernel = torch.zeros(2, 7, 7)  # both layers together: 1 + 2 + 4 px
    with torch.no_grad():
        for row in range(3):
            for column in range(3):
                part = torch.einsum("m,mchw->chw", second.weight[0, :, row, column], first.weight)
                kernel[:, 2 * row : 2 * row + 3, 2 * column : 2 * column + 3] += part
    field = effective_receptive_field(nn.Sequential(first, second), torch.randn(3, 2, 11, 13))
    assert field.shape == (11, 13)
    expected = torch.zeros(11, 13)
    expected[2:9, 3:10] = kernel.abs().sum(0)
    torch.testing.assert_close(field, expected)


def test_nonlinearities_count_as_they_are_and_images_are_averaged() -> None:
    layers = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1, bias=False), nn.ReLU(inplace=True))
    nn.init.ones_(layers[0].weight)
    dark, light = -torch.ones(1, 5, 5), torch.ones(1, 5, 5)
    field = effective_receptive_field(layers, [dark, light, light])
    expected = torch.zeros(5, 5)
    expected[1:4, 1:4] = 2 / 3
    torch.testing.assert_close(field, expected)
    # The values are absolute.
    nn.init.constant_(layers[0].weight, -1.0)
    torch.testing.assert_close(effective_receptive_field(layers, [dark, dark, light]), expected)
    nn.init.ones_(layers[0].weight)
    # No active unit; an infinite gradient at one pixel; no path from the image.
    edge = light.clone()
    edge[0, 1, 1] = 0.0
    mean = nn.AvgPool2d(3, stride=1)
    for model in (layers, Ending(lambda image: mean(image.sqrt())), Ending(Tensor.detach), Ending(torch.ones_like)):
        with pytest.raises(ValueError, match="no finite gradient"):
            effective_receptive_field(model, [dark if model is layers else edge])


class Ending(nn.Module):
    def __init__(self, ending: Callable[[Tensor], Tensor], conv: nn.Conv2d | None = None) -> None:
        super().__init__()
        # An integer parameter, which is not a weight.
        self.steps = nn.Parameter(torch.tensor([3]), requires_grad=False)
        self.conv, self.ending = conv, ending

    def forward(self, image: Tensor) -> Tensor:
        return self.ending(image if self.conv is None else self.conv(image))


@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
def test_a_sum_over_channels_that_never_changes_is_an_error(precision: torch.dtype) -> None:
    endings: dict[str, Callable[[Tensor], Tensor]] = {
        "softmax": lambda logits: logits.softmax(1),
        "sharp": lambda logits: (logits * 10).softmax(1),
        "centred": lambda logits: logits - logits.mean(1, keepdim=True),
        "layer norm": lambda logits: F.layer_norm(logits.movedim(1, 3), (7,)).movedim(3, 1),
    }
    for seed in range(3):
        torch.manual_seed(seed)
        image = torch.randn(1, 3, 9, 9)
        conv = nn.Conv2d(3, 7, 3, padding=1).to(precision)
        for ending in endings.values():
            with pytest.raises(ValueError, match="always have the same sum, as after a softmax"), torch.no_grad():
                effective_receptive_field(Ending(ending, conv), image)
        measures: list[tuple[Callable[[Tensor], Tensor], Measure]]
        measures = [(lambda logits: logits.log_softmax(1), "luo"), (endings["centred"], "replknet")]
        for ending, measure in measures:
            field = effective_receptive_field(Ending(ending, conv), image, measure)
            assert int((field > 0).sum()) == 9 or (measure == "replknet" and field.max() > 1e-3)


@pytest.mark.parametrize(("left", "constant"), [(1e-2, False), (1e-5, False), (1e-7, True)])
def test_a_small_sum_over_channels_is_measured(left: float, constant: bool) -> None:
    conv = nn.Conv2d(1, 2, 1, bias=False)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([1.0, left - 1.0])[:, None, None, None] / 1024)
    if constant:
        with pytest.raises(ValueError, match="always have the same sum"):
            effective_receptive_field(conv, torch.ones(1, 1, 1, 1))
        return
    field = effective_receptive_field(conv, torch.ones(1, 1, 1, 1))
    assert float(field) * 1024 == pytest.approx(left, rel=0.02)


def test_the_model_runs_in_eval_mode() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))
    model[1].running_mean.fill_(3.0)
    model[1].running_var.fill_(9.0)
    image = torch.randn(1, 1, 7, 7)
    kernel = (model[0].weight / (9.0 + 1e-5) ** 0.5).sum(0)[0].abs().detach()
    for mode in (True, False):
        torch.testing.assert_close(effective_receptive_field(model.train(mode), image)[2:5, 2:5], kernel)
        assert model[1].training is model[2].training is mode


def test_the_model_stays_as_it_was() -> None:
    model = nn.Sequential(nn.ReLU(inplace=True), nn.BatchNorm2d(1), nn.Dropout(0.5))
    images = random_images((4, 4), count=2, channels=1)
    kept = [image.clone() for image in random_images((4, 4), count=2, channels=1)]
    given = list(images)
    noise = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(next(iter(random_images((4, 5), count=1))), noise)
    assert effective_receptive_field(model, given).sum() > 0
    assert model.training
    assert model[2].training
    assert model[1].num_batches_tracked == 0
    assert model[1].weight.requires_grad
    assert model[1].weight.grad is None
    assert all(torch.equal(one, other) for one, other in zip(given, kept, strict=True))


def test_replknet_s_measure_takes_what_is_positive() -> None:
    conv = nn.Conv2d(1, 2, (1, 3), bias=False)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([[1.0, 2.0, -1.0], [0.0, -1.0, -4.0]]).reshape(2, 1, 1, 3))
    image = torch.ones(1, 1, 3)
    assert effective_receptive_field(conv, [image]).tolist() == [[1.0, 1.0, 5.0]]
    # The second channel is negative: its gradient is left out, and so is the first's negative one.
    assert effective_receptive_field(conv, [image], "replknet").tolist() == [[1.0, 2.0, 0.0]]


def test_images_of_two_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="one size, got 5x5 and 5x7 px"):
        effective_receptive_field(nn.Conv2d(1, 1, 3), [torch.zeros(1, 5, 5), torch.zeros(1, 5, 7)])
    with pytest.raises(ValueError, match="no finite gradient"):
        effective_receptive_field(nn.Conv2d(1, 1, 3), [])


def test_squares_of_a_flat_field() -> None:
    squares = contribution_squares(torch.ones(9, 9, requires_grad=True))
    assert [square.share for square in squares] == [0.2, 0.3, 0.5, 0.99]
    # 20 % of 81 px is in 5x5, 30 % in 5x5 (25 of 24.3), 50 % in 7x7, 99 % in all.
    assert [(square.side, round(square.area_ratio * 81)) for square in squares] == [(5, 25), (5, 25), (7, 49), (9, 81)]


def test_squares_of_images_of_even_and_unequal_sides() -> None:
    field = torch.zeros(4, 12)
    field[0, 0] = 1.0
    (square,) = contribution_squares(field, [0.5])
    # The corner is 6 px from (2, 6): all rows and columns lie inside.
    assert (square.side, square.area_ratio) == (13, 1.0)
    field[2, 6] = 3.0
    assert [square.side for square in contribution_squares(field, [0.75, 0.76])] == [1, 13]
    # More than float32 can represent.
    field[2, 6] = 2.0**24
    assert [square.side for square in contribution_squares(field, [1.0])] == [13]


def test_compressed_squares() -> None:
    field = torch.tensor([[0.0, 0.0, 0.0], [9.0, 99.0, 0.0], [0.0, 0.0, 0.0]])
    # log10(1 + x): 1 and 2 of 3, instead of 9 and 99 of 108.
    assert [square.side for square in contribution_squares(field, [0.7])] == [1]
    assert [square.side for square in contribution_squares(field, [0.66, 0.67], compress=True)] == [1, 3]


@pytest.mark.parametrize(
    "scores",
    [torch.zeros(3, 3), torch.tensor([[1.0, -1.0]]), torch.tensor([[1.0, torch.nan, torch.inf]]), torch.ones(3)],
)
def test_bad_scores(scores: Tensor) -> None:
    with pytest.raises(ValueError, match="scores must be"):
        contribution_squares(scores)
    for share in (0.0, 1.5):
        with pytest.raises(ValueError, match="shares must be"):
            contribution_squares(torch.ones(3, 3), [0.5, share])
