import math
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rfield.segmentation.data import load_dataset
from rfield.segmentation.training.losses import (
    class_weights,
    cross_entropy,
    make_loss,
    median_frequency_weights,
    norm_over_processes,
)

K = 5
WEIGHTS = (0.5, 1.0, 2.0, 0.0, 3.0)
KINDS: list[dict[str, Any]] = [
    {"kind": "cross_entropy"},
    {"kind": "cross_entropy", "class_weights": WEIGHTS},
    {"kind": "cross_entropy", "label_smoothing": 0.1},
    {"kind": "cross_entropy", "class_weights": WEIGHTS, "label_smoothing": 0.1},
    {"kind": "focal"},
    {"kind": "focal", "class_weights": WEIGHTS},
    {"kind": "dice"},
    {"kind": "dice", "class_weights": WEIGHTS},
]


def name_of(values: dict[str, Any]) -> str:
    return "-".join(values if values["kind"] == "cross_entropy" and len(values) > 1 else [values["kind"], *values])


def batch(void: float = 0.3) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    mask = torch.randint(K - 1, (2, 6, 7))  # the last class is in no image
    return torch.randn(2, K, 6, 7, dtype=torch.float64) * 3, mask.masked_fill(torch.rand(2, 6, 7) < void, 255)


def direct(logits: Tensor, mask: Tensor, kind: str, class_weights: Any = None, label_smoothing: float = 0.0) -> Tensor:
    """The definitions, pixel by pixel or class by class."""
    weights = torch.tensor(class_weights or [1.0] * K, dtype=torch.float64)
    pixels = [
        (logits[n, :, y, x], int(mask[n, y, x]))
        for n in range(2)
        for y in range(6)
        for x in range(7)
        if mask[n, y, x] != 255
    ]
    if kind == "cross_entropy":
        total = torch.zeros((), dtype=torch.float64)
        for scores, label in pixels:
            target = torch.full((K,), label_smoothing / K, dtype=torch.float64)
            target[label] += 1 - label_smoothing
            total = total - (weights * target * (scores - scores.exp().sum().log())).sum()
        return total / sum(weights[label] for _, label in pixels)
    if kind == "focal":
        of_class = []
        for index in range(K):
            right = [torch.sigmoid(s[index] if label == index else -s[index]) for s, label in pixels]
            of_class.append(torch.stack([-((1 - p) ** 2) * p.log() for p in right]).mean())
    else:
        of_class = []
        for index in range(K):
            chances = torch.stack([scores.softmax(0)[index] for scores, _ in pixels])
            truth = torch.tensor([float(label == index) for _, label in pixels], dtype=torch.float64)
            score = 2 * (chances * truth).sum() / (chances + truth).sum()
            of_class.append((1 - score) * (truth.sum() > 0))
    return (torch.stack(of_class) * weights).sum() / weights.sum()


@pytest.mark.parametrize("values", KINDS, ids=name_of)
def test_equals_its_definition_and_so_does_its_gradient(values: dict[str, Any]) -> None:
    if values["kind"] != "cross_entropy":
        pytest.importorskip("segmentation_models_pytorch")
    logits, mask = batch()
    loss = make_loss(**{"num_classes": K} | values)
    gradients = []
    for function in (loss, lambda logits, mask: direct(logits, mask, **values)):
        leaf = logits.clone().requires_grad_()
        value = function(leaf, mask)
        value.backward()
        gradients.append((value.detach(), leaf.grad))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=1e-9)
    assert gradients[0][1].abs().max() > 1e-4


@pytest.mark.parametrize("values", KINDS, ids=name_of)
def test_pixels_without_a_label_do_not_count(values: dict[str, Any]) -> None:
    if values["kind"] != "cross_entropy":
        pytest.importorskip("segmentation_models_pytorch")
    logits, mask = batch()
    loss = make_loss(**{"num_classes": K} | values)
    leaf = logits.clone().requires_grad_()
    value = loss(leaf, mask)
    value.backward()
    assert leaf.grad is not None
    assert not leaf.grad.movedim(1, -1)[mask == 255].any()
    other = torch.where((mask == 255)[:, None], 7.0, logits)
    torch.testing.assert_close(loss(other, mask), value.detach())


@pytest.mark.parametrize("values", KINDS, ids=name_of)
def test_a_batch_without_labels_is_worth_0(values: dict[str, Any]) -> None:
    if values["kind"] != "cross_entropy":
        pytest.importorskip("segmentation_models_pytorch")
    logits, mask = batch(void=2.0)
    leaf = logits.requires_grad_()
    value = make_loss(**{"num_classes": K} | values)(leaf, mask)
    value.backward()
    assert value == 0
    assert leaf.grad is not None
    assert not leaf.grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("values", KINDS, ids=name_of)
def test_half_precision_logits_have_a_float32_loss(values: dict[str, Any], mixed: bool, dtype: torch.dtype) -> None:
    """Of more pixels than float16 can count."""
    torch.manual_seed(0)
    logits, mask = torch.randn(1, K, 260, 260).to(dtype), torch.randint(K - 1, (1, 260, 260))
    loss = make_loss(num_classes=K, **values)
    with torch.autocast("cpu", dtype, enabled=mixed):
        halved = loss(logits, mask)
    assert halved.dtype == torch.float32
    torch.testing.assert_close(halved, loss(logits.float(), mask), rtol=1e-5, atol=0)


def test_the_norm_is_a_float32() -> None:
    assert norm_over_processes(torch.tensor([3.0, 0.0], dtype=torch.float16)).dtype == torch.float32
    assert norm_over_processes(torch.tensor([3, 0])).tolist() == [3.0, 1.0]


def test_labels_of_no_weight_are_worth_0() -> None:
    logits = torch.randn(1, K, 2, 2)
    assert cross_entropy(logits, torch.full((1, 2, 2), 3), WEIGHTS) == 0


def test_small_weights_are_divided_by_too() -> None:
    logits, mask = torch.randn(1, K, 1, 2), torch.tensor([[[0, 255]]])
    expected = F.cross_entropy(logits[..., 0], mask[..., 0])
    torch.testing.assert_close(cross_entropy(logits, mask, (0.1, 1.0, 1.0, 1.0, 1.0)), expected)


def test_plain_cross_entropy_is_the_sum_over_the_count_bit_for_bit() -> None:
    logits, mask = batch()
    logits = logits.float()
    expected = F.cross_entropy(logits, mask, ignore_index=255, reduction="sum") / (mask != 255).sum()
    assert torch.equal(make_loss("cross_entropy", K)(logits, mask), expected)
    torch.testing.assert_close(
        cross_entropy(logits, mask, WEIGHTS, 0.1),
        F.cross_entropy(logits, mask, torch.tensor(WEIGHTS), ignore_index=255, label_smoothing=0.1),
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "cross_entropy", "class_weights": (1.0,)}, "one number a class: the data has 5, got 1"),
        ({"kind": "dice", "class_weights": (1.0, 1.0, 1.0, 1.0, -1.0)}, "must not be negative, nor all 0"),
        ({"kind": "focal", "class_weights": (0.0,) * 5}, "must not be negative, nor all 0"),
        ({"kind": "focal", "label_smoothing": 0.1}, "label_smoothing goes with the loss cross_entropy, not focal"),
    ],
)
def test_wrong_arguments(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_loss(num_classes=K, **values)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch.losses", None)
    with pytest.raises(ValueError, match=r"needs segmentation-models-pytorch: pip install 'rfield\[losses\]'"):
        make_loss("dice", K)
    make_loss("cross_entropy", K)


def test_median_frequency() -> None:
    masks = [torch.tensor([[0, 0, 0, 1], [2, 2, 255, 255]]), torch.tensor([[0, 3]]), torch.tensor([[255]])]
    # Frequencies 4/8, 1/6, 2/6 and 1/2; their median 5/12.
    expected = [5 / 12 * 2, 5 / 12 * 6, 5 / 12 * 3, 5 / 12 * 2, 1.0]
    weights = median_frequency_weights(masks, K)
    assert weights == pytest.approx(expected)
    # 8/17 and 9/17, in doubles.
    exact = median_frequency_weights([torch.tensor([0] * 3 + [1] * 7), torch.tensor([0] * 5 + [1] * 2)], 2)
    assert exact == pytest.approx((17 / 16, 17 / 18), rel=1e-14)
    one_pixel = [torch.tensor([[0, 255]]), torch.tensor([[1, 1], [1, 1]])]
    assert median_frequency_weights(one_pixel, 2) == (1.0, 1.0)
    with pytest.raises(ValueError, match="no pixel of the training masks has a label"):
        median_frequency_weights([torch.full((2, 2), 255)], K)


def test_the_weights_of_a_run() -> None:
    dataset = load_dataset("synthetic", "val")
    counted = []
    weights = class_weights("balanced", dataset, lambda done, total: counted.append((done, total)))
    assert weights == median_frequency_weights([dataset[index][1] for index in range(len(dataset))], 4)
    assert weights is not None
    assert all(math.isfinite(weight) and weight > 0 for weight in weights)
    assert counted[-1] == (len(dataset), len(dataset))
    assert class_weights(None, dataset) is None
    assert class_weights([1, 2, 3, 4], dataset) == (1.0, 2.0, 3.0, 4.0)
