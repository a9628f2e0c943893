import colorsys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from torchvision.tv_tensors import Image, Mask

from rfield.segmentation.data import (
    AugmentedDataset,
    EpochSampler,
    SyntheticCues,
    VOCDataset,
    evaluation_transform,
    training_transform,
)

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def position_sample(height: int, width: int) -> tuple[Image, Mask]:
    """Red and green encode the original position of a pixel; the mask holds the same row number."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    image = torch.stack([rows, columns, torch.zeros_like(rows)]).to(torch.uint8)
    return Image(image), Mask(rows.to(torch.uint8))


def pixels(image: torch.Tensor) -> torch.Tensor:
    return (image * STD[:, None, None] + MEAN[:, None, None]) * 255


@pytest.mark.parametrize("size", [(40, 90), (90, 40), (33, 33), (10, 12), (100, 100)])
def test_training_samples_have_the_crop_size_and_plain_types(size: tuple[int, int]) -> None:
    transform = training_transform((65, 49), scale_range=(0.5, 1.5), flip=True, colour_jitter=0.4)
    for _ in range(5):
        image, mask = transform(*position_sample(*size))
        assert (type(image), image.shape, image.dtype) == (torch.Tensor, (3, 65, 49), torch.float32)
        assert (type(mask), mask.shape, mask.dtype) == (torch.Tensor, (65, 49), torch.int64)
        assert image.isfinite().all()


def test_padding_is_zero_and_255_and_keeps_the_whole_image() -> None:
    for _ in range(5):
        image, mask = training_transform((65, 49), scale_range=(1, 1), colour_jitter=0.5)(*position_sample(40, 30))
        outside = mask == 255
        assert outside.sum() == 65 * 49 - 40 * 30
        assert (image[:, outside] == 0).all()
        assert mask[~outside].bincount().tolist() == [30] * 40


def test_crop_and_flip_move_image_and_mask_together() -> None:
    flipped = set()
    for _ in range(20):
        image, mask = training_transform((20, 24), scale_range=(1, 1))(*position_sample(40, 60))
        rows, columns, _ = pixels(image).round().long()
        assert torch.equal(rows, mask)
        steps = columns.diff(dim=1).unique().tolist()
        assert steps in ([1], [-1])
        flipped.add(steps[0])
    assert flipped == {1, -1}
    image, _ = training_transform((20, 24), scale_range=(1, 1), flip=False)(*position_sample(40, 60))
    assert (pixels(image)[1].diff(dim=1) > 0).all()


def test_a_mirrored_mask_has_classes_exchanged() -> None:
    image, mask = position_sample(4, 6)
    transform = training_transform((4, 6), scale_range=(1, 1), mirrored_classes=[(0, 3)])
    seen = set()
    for _ in range(20):
        mirrored, labels = transform(image, mask)
        is_mirrored = bool(pixels(mirrored)[1, 0, 0] > pixels(mirrored)[1, 0, 5])
        seen.add(is_mirrored)
        assert labels[:, 0].tolist() == ([3, 1, 2, 0] if is_mirrored else [0, 1, 2, 3])
        assert (labels == labels[:, :1]).all()
    assert seen == {False, True}
    assert mask[:, 0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("scale", [0.5, 0.7, 1.3, 2.0])
def test_a_scaled_mask_stays_on_its_image(scale: float) -> None:
    """The mask takes the nearest row: at most half a row from the image's interpolated one, without a drift."""
    size = (round(120 * scale), round(80 * scale))
    image, mask = training_transform(size, scale_range=(scale, scale), flip=False)(*position_sample(120, 80))
    off = (mask - pixels(image)[0])[4:-4]
    assert off.abs().max() <= 0.5 + 0.51  # and the image's rounding to whole grey levels
    assert off.mean().abs() < 0.2 + 0.3 * (scale in (0.5,))  # the nearest of two equally near rows is the lower


def test_scale_is_drawn_within_its_range() -> None:
    shares = []
    for _ in range(50):
        _, mask = training_transform((200, 200))(*position_sample(100, 100))
        shares.append((mask != 255).sum().item() ** 0.5 / 100)
    assert min(shares) >= 0.5
    assert max(shares) <= 1.5
    assert max(shares) - min(shares) > 0.7


def test_colour_jitter_changes_colours_alone() -> None:
    """The mask and the positions of the pixels do not change: equal pixels stay equal, others stay different."""
    rows = torch.arange(40)[:, None].expand(40, 60)
    sample = Image(torch.stack([60 + 2 * rows, 90 + rows, 150 - rows]).to(torch.uint8)), Mask(rows.to(torch.uint8))
    plain, plain_mask = training_transform((40, 60), (1, 1), flip=False)(*sample)
    image, mask = training_transform((40, 60), (1, 1), flip=False, colour_jitter=0.5)(*sample)
    assert torch.equal(mask, plain_mask)
    assert not torch.equal(image, plain)
    assert torch.equal(image, image[:, :, :1].expand_as(image))
    assert len(image[:, :, 0].unique(dim=1).T) > 20
    for _ in range(3):  # 0 changes nothing
        assert torch.equal(training_transform((40, 60), (1, 1), flip=False, colour_jitter=0.0)(*sample)[0], plain)


def jittered(colours: list[tuple[int, int, int]], jitter: float, draws: int = 150) -> np.ndarray:
    """The colours of an image of two halves after each draw, 0..255: [draws, halves, 3]."""
    transform = training_transform((1, 2), (1, 1), flip=False, colour_jitter=jitter)
    image = Image(torch.tensor(colours, dtype=torch.uint8).T[:, None])
    return np.stack(
        [pixels(transform(image, Mask(torch.zeros(1, 2, dtype=torch.uint8)))[0])[:, 0].T.numpy() for _ in range(draws)]
    )


def test_jitter_turns_the_hue_by_a_quarter_of_it() -> None:
    start = colorsys.rgb_to_hsv(110, 80, 60)[0]
    seen = jittered([(110, 80, 60)] * 2, 0.4)[:, 0]
    turns = np.array([(colorsys.rgb_to_hsv(*colour)[0] - start + 0.5) % 1 - 0.5 for colour in seen])
    assert -0.12 < turns.min() < -0.08
    assert 0.08 < turns.max() < 0.12


def test_jitter_changes_brightness_contrast_and_saturation() -> None:
    grey = jittered([(100, 100, 100)] * 2, 0.4)[..., 0]
    assert 59 < grey.min() < 66
    assert 134 < grey.max() < 141
    halves = jittered([(80, 80, 80), (120, 120, 120)], 0.4)[..., 0]
    spread = (halves[:, 1] - halves[:, 0]) / halves.mean(1) / 0.4  # brightness leaves it
    assert 0.55 < spread.min() < 0.67
    assert 1.33 < spread.max() < 1.45
    colours = jittered([(110, 80, 60)] * 2, 0.4)[:, 0]
    chroma = (colours.max(1) - colours.min(1)) / colours.mean(1)
    assert chroma.min() / chroma.max() < 0.4  # contrast alone: 0.6 / 1.4


@pytest.mark.parametrize("size", [(1, 40), (40, 1), (1, 1), (3, 40), (40, 3)])
def test_a_scaled_image_keeps_a_pixel(size: tuple[int, int]) -> None:
    image, mask = training_transform((5, 5), scale_range=(0.1, 0.1))(*position_sample(*size))
    assert (image.shape, mask.shape) == ((3, 5, 5), (5, 5))
    assert (mask != 255).any()


def test_evaluation_transform_only_normalises() -> None:
    image, mask = position_sample(7, 9)
    normal, labels = evaluation_transform()(image, mask)
    assert torch.allclose(pixels(normal), image.as_subclass(torch.Tensor).float(), atol=1e-3)
    assert (type(labels), labels.dtype) == (torch.Tensor, torch.int64)
    assert torch.equal(labels, mask.long())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop_size": (5, 0)}, r"crop_size .* got \(5, 0\)"),
        ({"scale_range": (1.0, float("inf"))}, "scale_range"),
        ({"colour_jitter": 1.1}, "colour_jitter must be from 0 to 1, got 1.1"),
        ({"scale_range": (0, 1)}, r"scale_range .* got \(0, 1\)"),
        ({"scale_range": (1.5, 0.5)}, r"scale_range .* got \(1.5, 0.5\)"),
        ({"colour_jitter": -0.1}, "colour_jitter must be from 0 to 1, got -0.1"),
    ],
)
def test_wrong_options_are_worded_errors(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        training_transform(**{"crop_size": (5, 5), **options})
    training_transform((1, 1), scale_range=(2.0, 2.0), colour_jitter=1.0)


@pytest.fixture
def augmented() -> AugmentedDataset:
    dataset = SyntheticCues("train", size=(33, 33), distance=8, length=12)
    return AugmentedDataset(dataset, training_transform((25, 41), colour_jitter=0.3), seed=1)


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_a_sample_depends_on_seed_epoch_and_index_alone(augmented: AugmentedDataset, num_workers: int) -> None:
    expected = {index: augmented[2, index] for index in range(12)}
    sampler = EpochSampler(augmented, seed=1)
    sampler.set_epoch(2)
    order = [index for _, index in sampler]
    loader = DataLoader(augmented, batch_size=4, sampler=sampler, num_workers=num_workers)
    torch.manual_seed(num_workers)
    images, masks = (torch.cat(parts) for parts in zip(*loader, strict=True))
    for position, index in enumerate(order):
        assert torch.equal(images[position], expected[index][0])
        assert torch.equal(masks[position], expected[index][1])


def test_samples_differ_between_epochs_and_seeds(augmented: AugmentedDataset) -> None:
    other = AugmentedDataset(augmented.dataset, augmented.transform, seed=2)
    image = augmented[0, 3][0]
    assert not torch.equal(image, augmented[1, 3][0])
    assert not torch.equal(image, other[0, 3][0])
    with pytest.raises(ValueError, match="seed must be 0 or more, got -1"):
        AugmentedDataset(augmented.dataset, v2.Identity(), seed=-1)


def test_drawing_a_sample_leaves_the_callers_random_state(augmented: AugmentedDataset) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    _ = augmented[0, 0]
    assert torch.equal(torch.rand(3), expected)


def test_sampler_orders() -> None:
    sampler = EpochSampler(range(7), seed=4)
    orders = []
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        assert list(sampler) == list(sampler)
        assert [number for number, _ in sampler] == [epoch] * 7
        orders.append([index for _, index in sampler])
    assert orders[0] != orders[1]
    assert [sorted(order) for order in orders] == [list(range(7))] * 2
    assert len(sampler) == 7


def test_processes_share_the_samples() -> None:
    parts = [list(EpochSampler(range(8), num_replicas=2, rank=rank)) for rank in (0, 1)]
    assert sorted(index for part in parts for _, index in part) == list(range(8))
    uneven = EpochSampler(range(3), num_replicas=2, rank=1)
    assert (len(uneven), uneven.seed, uneven.held_out, uneven.seen) == (2, 0, frozenset(), (0, 0))


@pytest.mark.shared
def test_real_images_are_augmented(shared: Path) -> None:
    dataset = VOCDataset(shared / "data/msrc21_voc")
    image, mask = AugmentedDataset(dataset, training_transform((321, 321), colour_jitter=0.2), seed=0)[0, 0]
    assert (image.shape, mask.shape) == ((3, 321, 321), (321, 321))
    assert set(mask.unique().tolist()) <= {*range(21), 255}


def test_held_out_samples_are_replaced_and_come_back() -> None:
    sampler = EpochSampler(range(10), seed=3)
    sampler.set_epoch(2)
    whole = list(sampler)
    sampler.held_out = frozenset({1, 4})
    part = list(sampler)
    assert len(part) == len(whole) == 10
    assert {index for _, index in part} == set(range(10)) - {1, 4}
    assert all(new == old for new, old in zip(part, whole, strict=True) if old[1] not in {1, 4})
    sampler.held_out = frozenset()
    assert list(sampler) == whole


def test_other_samples_stand_in_at_other_epochs() -> None:
    """No sample may be seen twice as often as others during a training."""
    sampler = EpochSampler(range(6), shuffle=False)
    sampler.held_out = frozenset({2, 5})
    stand_ins = []
    for epoch in range(4):
        sampler.set_epoch(epoch)
        order = [index for _, index in sampler]
        assert [order[index] for index in (0, 1, 3, 4)] == [0, 1, 3, 4]
        stand_ins.append((order[2], order[5]))
    assert stand_ins == [(3, 1), (4, 3), (0, 4), (1, 0)]  # seen are 0, 1, 3, 4: numbers 2, 3, 0, 1 and 1, 2, 3, 0


def test_what_was_seen_of_an_epoch_is_left_out_of_it_alone() -> None:
    sampler = EpochSampler(range(5), seed=2)
    whole = list(sampler)
    sampler.seen = (0, 2)
    assert list(sampler) == whole[2:]
    sampler.set_epoch(1)
    assert len(list(sampler)) == 5


def test_seeds_give_other_orders_and_draws() -> None:
    orders = {tuple(index for _, index in EpochSampler(range(12), seed=seed)) for seed in range(4)}
    assert len(orders) == 4
    assert [index for _, index in EpochSampler(range(4), shuffle=False)] == [0, 1, 2, 3]
