import pytest
import torch
from torchvision.transforms.v2 import functional as transforms

from rfield.segmentation.data import transforms as data_transforms
from rfield.segmentation.models import normalise
from rfield.segmentation.models.normalise import InputNormalisation


def test_undoes_the_normalisation_of_the_data_transforms_and_applies_its_own() -> None:
    assert normalise.IMAGENET_MEAN == data_transforms.IMAGENET_MEAN
    assert normalise.IMAGENET_STD == data_transforms.IMAGENET_STD
    pixels = torch.rand(2, 3, 5, 7)
    mean, std = [0.1, 0.5, 0.9], [0.5, 0.25, 1.0]
    image = transforms.normalize(pixels, list(normalise.IMAGENET_MEAN), list(normalise.IMAGENET_STD))
    torch.testing.assert_close(InputNormalisation(mean, std)(image), transforms.normalize(pixels, mean, std))


def test_its_buffers_are_saved_with_the_network() -> None:
    assert set(InputNormalisation((0.5,) * 3, (0.5,) * 3).state_dict()) == {"scale", "shift"}


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        ((0.5,), (0.5,)),
        ((0.5,) * 3, (0.5,) * 2),
        ((0.5,) * 2, (0.5,) * 3),
        ((0.5,) * 3, (0.5, 0.0, 0.5)),
        ((0.5,) * 3, (-1.0,) * 3),
    ],
)
def test_wrong_numbers(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="three means and three positive deviations"):
        InputNormalisation(mean, std)
