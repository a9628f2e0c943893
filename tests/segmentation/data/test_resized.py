import numpy as np
import PIL.Image
import pytest
import torch
from torchvision.tv_tensors import Image, Mask

from rfield.segmentation.data import HELEN_CLASSES, ParsingDataset, ResizedDataset, SyntheticCues
from rfield.segmentation.data.resized import resize_mask


class OneSample(ParsingDataset):
    class_names = HELEN_CLASSES
    palette = ((1, 2, 3),) * 256
    mirrored_classes = ((2, 3),)

    def __init__(self, image: torch.Tensor, mask: torch.Tensor, name: str = "one") -> None:
        self.sample = (Image(image), Mask(mask))
        self.ids = [name]

    def __getitem__(self, index: int) -> tuple[Image, Mask]:
        return self.sample

    def fingerprint(self) -> str:
        return self.ids[0]

    def sizes(self) -> list[tuple[int, int]]:
        return [tuple(self.sample[1].shape)]


@pytest.mark.parametrize("size", [(21, 70), (80, 33), (40, 60), (2, 3)])
def test_the_image_is_pillows_bilinear_and_the_mask_keeps_its_labels(size: tuple[int, int]) -> None:
    """Pillow's bilinear filter grows with the reduction, an independent implementation of antialiasing."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, 40, 60), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 11, (40, 60), dtype=torch.uint8, generator=generator)
    resized, mask = ResizedDataset(OneSample(image, labels), size)[0]
    assert (type(resized), resized.dtype, type(mask), mask.dtype) == (Image, torch.uint8, Mask, torch.uint8)
    pil_image = PIL.Image.fromarray(image.permute(1, 2, 0).numpy())
    expected = np.asarray(pil_image.resize(size[::-1], PIL.Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(resized.permute(1, 2, 0).numpy().astype(int) - expected).max() <= 1
    rows = [int((row + 0.5) * 40 / size[0]) for row in range(size[0])]
    columns = [int((column + 0.5) * 60 / size[1]) for column in range(size[1])]
    assert torch.equal(mask.as_subclass(torch.Tensor), labels[rows][:, columns])
    assert torch.equal(mask, resize_mask(Mask(labels), size))


def test_everything_else_is_the_other_data_sets() -> None:
    inner = OneSample(torch.zeros(3, 4, 6, dtype=torch.uint8), torch.zeros(4, 6, dtype=torch.uint8))
    dataset = ResizedDataset(inner, (8, 3))
    assert (dataset.class_names, dataset.palette, dataset.ids) == (inner.class_names, inner.palette, inner.ids)
    assert dataset.mirrored_classes == ((2, 3),)
    assert (len(dataset), dataset.sizes()) == (1, [(8, 3)])


def test_fingerprint_changes_with_the_size_and_the_samples() -> None:
    inner = SyntheticCues("val", length=1)
    fingerprints = {
        inner.fingerprint(),
        ResizedDataset(inner, (8, 3)).fingerprint(),
        ResizedDataset(inner, (3, 8)).fingerprint(),
        ResizedDataset(SyntheticCues("val", length=1, seed=1), (8, 3)).fingerprint(),
    }
    assert len(fingerprints) == 4
    assert ResizedDataset(inner, (8, 3)).fingerprint() in fingerprints


@pytest.mark.parametrize("size", [(0, 5), (5,), (5, 5, 5), (5.0, 5), 5, "5x5", None])
def test_wrong_sizes(size: object) -> None:
    with pytest.raises(ValueError, match=r"size must be \[height, width\] in whole px, both above 0; got"):
        ResizedDataset(SyntheticCues(), size)  # type: ignore[arg-type]
