import numpy as np
import pytest
import torch

from rfield.segmentation.data import SyntheticCues


def test_the_label_is_told_by_the_blobs_at_the_distance() -> None:
    """Except for the blobs' soft edges and the noise, only the image at the distance determines the label."""
    dataset = SyntheticCues("train", size=(97, 129), distance=24, length=20)

    def agreement(distance: int) -> float:
        right = []
        for image, mask in dataset:
            red, green, _ = (image > 127).int()
            told = 2 * red[:-distance, distance:] + green[distance:, :-distance]
            truth = mask[:-distance, :-distance]
            right.append((told == truth)[truth != 255].float().mean().item())
        return float(np.mean(right))

    assert agreement(24) > 0.9
    assert agreement(12) < 0.6
    assert agreement(36) < 0.6
    assert abs(agreement(48) - 0.25) < 0.1  # chance


def test_pixels_without_a_cue_have_no_label() -> None:
    _, mask = SyntheticCues("val", size=(65, 97), distance=16)[0]
    assert (mask[:49, :81] <= 3).all()
    assert (mask[49:] == 255).all()
    assert (mask[:, 81:] == 255).all()


def test_classes_are_balanced() -> None:
    masks = torch.stack([mask for _, mask in SyntheticCues("train", length=100)])
    shares = torch.bincount(masks[masks != 255].long(), minlength=4) / (masks != 255).sum()
    assert ((shares > 0.2) & (shares < 0.3)).all()


def test_samples_depend_on_seed_split_and_index_alone() -> None:
    dataset = SyntheticCues("train", seed=3)
    _ = dataset[0]
    image, mask = dataset[5]
    again = SyntheticCues("train", seed=3, length=7)[5]
    assert torch.equal(image, again[0])
    assert torch.equal(mask, again[1])
    assert torch.equal(SyntheticCues("train", seed=3, length=7)[-2][0], image)
    for other in (dataset[6], SyntheticCues("val", seed=3)[5], SyntheticCues("train", seed=4)[5]):
        assert not torch.equal(image, other[0])


def test_the_first_sample_never_changes() -> None:
    """Published figures were measured on this data set, so it must not change."""
    dataset = SyntheticCues()
    assert (dataset.split, dataset.size, dataset.distance, dataset.seed) == ("train", (129, 129), 48, 0)
    image, mask = dataset[0]
    assert image.float().mean((1, 2)).tolist() == pytest.approx([146.46, 162.70, 125.95], abs=0.02)
    assert image.float().std((1, 2)).tolist() == pytest.approx([70.01, 64.20, 70.72], abs=0.02)
    assert image.float().diff(dim=2).std().item() == pytest.approx(28.62, abs=0.02)
    assert torch.bincount(mask[mask != 255].long()).tolist() == pytest.approx([576, 2337, 1084, 2564], abs=5)
    assert dataset.palette[:4] == [(38, 44, 74), (64, 176, 166), (214, 93, 77), (247, 201, 72)]


def test_lengths_names_and_sizes() -> None:
    dataset = SyntheticCues("train")
    assert [len(SyntheticCues(split)) for split in ("train", "val", "test")] == [200, 40, 40]
    assert len(SyntheticCues("val", length=3)) == 3
    assert len(SyntheticCues("val", size=(2, 2), distance=1, length=1)) == 1
    assert len(set(dataset.ids)) == 200
    assert dataset.sizes() == [(129, 129)] * 200
    assert len(dataset.palette) == 256
    assert len(set(dataset.palette[:4])) == 4
    with pytest.raises(IndexError):
        dataset[200]


def test_fingerprint_follows_the_parameters() -> None:
    assert SyntheticCues().fingerprint() == SyntheticCues().fingerprint()
    variants = [
        SyntheticCues(),
        SyntheticCues("val", length=200),
        SyntheticCues(size=(129, 97)),
        SyntheticCues(distance=40),
        SyntheticCues(length=10),
        SyntheticCues(seed=1),
    ]
    assert len({variant.fingerprint() for variant in variants}) == len(variants)


def test_best_dilation() -> None:
    assert SyntheticCues(distance=48).best_dilation(4) == 12
    assert SyntheticCues(distance=48).best_dilation(32) == 1.5
    with pytest.raises(ValueError, match="stride must be above 0, got 0"):
        SyntheticCues().best_dilation(0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "trainval"}, "no split 'trainval'; it has train, val, test"),
        ({"size": (129,)}, r"size must be \(height, width\).*got \(129,\)"),
        ({"size": 129}, r"size must be \(height, width\).*got 129"),
        ({"size": (0, 9)}, r"size must be \(height, width\)"),
        ({"distance": 129}, "from 1 to 128, less than both sides of the 129x129 images; got 129"),
        ({"distance": 0}, "distance must be a whole number"),
        ({"distance": 4.5}, "distance must be a whole number .*got 4.5"),
        ({"length": 0}, "length must be a whole number of samples from 1 to 1000000; got 0"),
        ({"length": 1_000_001}, "got 1000001"),
        ({"length": True}, "got True"),
        ({"distance": 9, "size": (10, 9)}, "from 1 to 8"),
        ({"length": 10**25}, "length must be a whole number of samples from 1 to 1000000; got 10000"),
        ({"seed": -1}, "seed must be a whole number, 0 or more; got -1"),
    ],
)
def test_wrong_parameters_are_worded_errors(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SyntheticCues(**options)
