import os
import re
import zipfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from rfield.segmentation.data import CITYSCAPES_CLASSES, CityscapesDataset, load_dataset

IMAGE = "leftImg8bit/train/aachen/aachen_000001_000019_leftImg8bit.png"
MASK = "gtFine/train/aachen/aachen_000001_000019_gtFine_labelIds.png"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three training images of two cities and one of val, of 12x16 px (height x width)."""
    root = tmp_path / "cityscapes"
    random = np.random.default_rng(0)
    for split, city, number in (
        ("train", "ulm", 0),
        ("train", "aachen", 1),
        ("train", "aachen", 0),
        ("val", "bonn", 0),
    ):
        for folder in ("leftImg8bit", "gtFine"):
            (root / folder / split / city).mkdir(parents=True, exist_ok=True)
        name = f"{split}/{city}/{city}_{number:06d}_000019"
        image = random.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        PIL.Image.fromarray(image).save(root / f"leftImg8bit/{name}_leftImg8bit.png")
        label_ids = random.integers(0, 34, (12, 16), dtype=np.uint8)
        PIL.Image.fromarray(label_ids).save(root / f"gtFine/{name}_gtFine_labelIds.png")
        PIL.Image.fromarray(label_ids).save(root / f"gtFine/{name}_gtFine_instanceIds.png")
    return root


def test_label_ids_become_train_ids(root: Path) -> None:
    dataset = CityscapesDataset(root)
    assert dataset.ids == ["aachen_000000_000019", "aachen_000001_000019", "ulm_000000_000019"]
    image, mask = dataset[1]
    assert (image.dtype, image.shape, mask.dtype, mask.shape) == (torch.uint8, (3, 12, 16), torch.uint8, (12, 16))
    assert np.array_equal(image.permute(1, 2, 0), PIL.Image.open(root / IMAGE))
    # Written out again, to notice an error in reading torchvision's table.
    scored = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
    expected = [
        [scored.index(id) if id in scored else 255 for id in row] for row in np.array(PIL.Image.open(root / MASK))
    ]
    assert np.array_equal(mask, expected)
    assert set(mask.unique().tolist()) > {0, 18, 255}
    assert dataset.sizes() == [(12, 16)] * 3
    assert load_dataset(f"cityscapes:{root}", "val").ids == ["bonn_000000_000019"]


def test_the_19_classes_and_their_colours(root: Path) -> None:
    dataset = CityscapesDataset(root)
    assert (dataset.num_classes, dataset.class_names) == (19, CITYSCAPES_CLASSES)
    assert (CITYSCAPES_CLASSES[0], CITYSCAPES_CLASSES[11], CITYSCAPES_CLASSES[18]) == ("road", "person", "bicycle")
    palette = dataset.palette
    assert (len(palette), palette[0], palette[13], palette[255]) == (256, (128, 64, 128), (0, 0, 142), (0, 0, 0))
    assert len(set(palette[:19])) == 19


def test_other_files_beside_the_images_do_not_matter(root: Path) -> None:
    (root / "leftImg8bit/train/aachen/Thumbs.db").write_bytes(b"")
    assert len(CityscapesDataset(root)) == 3


def test_what_is_missing_is_named(root: Path) -> None:
    with pytest.raises(ValueError, match="Cityscapes has no split 'minival'; it has train, val, test"):
        CityscapesDataset(root, "minival")
    with pytest.raises(FileNotFoundError, match=r"nowhere/leftImg8bit/train is not a folder; unpack leftImg8bit_train"):
        CityscapesDataset(root / "nowhere")
    (root / "leftImg8bit/test").mkdir()
    with pytest.raises(FileNotFoundError, match=r"gtFine/test is not a folder; unpack gtFine_trainvaltest.zip"):
        CityscapesDataset(root, "test")
    (root / "gtFine/test").mkdir()
    with pytest.raises(FileNotFoundError, match=r"leftImg8bit/test holds no image CITY/ID_leftImg8bit.png"):
        CityscapesDataset(root, "test")
    (root / MASK).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{MASK} is missing \(1 of the 3 masks of the split 'train'\)"):
        CityscapesDataset(root)


def test_reading_unpacks_no_archive(root: Path) -> None:
    for name in ("leftImg8bit_trainvaltest", "gtFine_trainvaltest"):
        with zipfile.ZipFile(root / f"{name}.zip", "w") as archive:
            archive.writestr(f"{name.split('_')[0]}/test/x/x.png", b"")
    with pytest.raises(FileNotFoundError, match="leftImg8bit/test is not a folder"):
        CityscapesDataset(root, "test")
    assert not (root / "gtFine/test").exists()


def test_a_file_among_the_cities_is_named(root: Path) -> None:
    (root / "leftImg8bit/train/readme.txt").write_text("")
    with pytest.raises(OSError, match=r"cannot be read as Cityscapes .*readme.txt.* one folder for each city"):
        CityscapesDataset(root)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (
            PIL.Image.new("L", (16, 12), 34),
            r"holds the value 34 \(192 px\), which no class has; Cityscapes",
        ),
        (
            PIL.Image.new("L", (16, 12), 255),
            r"holds the value 255 \(192 px\), which no class has; Cityscapes",
        ),
        (PIL.Image.new("L", (12, 16)), "16x12 px .* but its image is 12x16"),
        (PIL.Image.new("RGB", (16, 12)), "holds colours .*, not class indices: a palette mask .*saved as RGB"),
    ],
)
def test_masks_that_do_not_fit(root: Path, mask: PIL.Image.Image, message: str) -> None:
    mask.save(root / MASK)
    with pytest.raises(ValueError, match=f"{MASK} .*{message}"):
        CityscapesDataset(root)[1]


@pytest.mark.parametrize("name", [IMAGE, MASK])
def test_damaged_files_are_named(root: Path, name: str) -> None:
    path = root / name
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(OSError, match=re.escape(str(path))):
        CityscapesDataset(root)[1]


def test_fingerprint_changes_with_any_file(root: Path) -> None:
    seen = [CityscapesDataset(root).fingerprint(), CityscapesDataset(root, "val").fingerprint()]
    for path in (IMAGE, MASK):
        os.utime(root / path, ns=(0, 0))
        seen.append(CityscapesDataset(root).fingerprint())
    assert len(set(seen)) == 4
    assert CityscapesDataset(root).fingerprint() == seen[-1]


def test_a_folder_may_be_a_link_but_a_file_may_not_lead_outside(root: Path) -> None:
    image, mask = root / IMAGE, root / MASK
    image.parent.rename(root.parent / "images")
    image.parent.symlink_to(root.parent / "images")
    assert len(CityscapesDataset(root)) == 3
    mask.rename(root.parent / "outside.png")
    mask.symlink_to(root.parent / "outside.png")
    with pytest.raises(ValueError, match=f"{mask} is a link to a file outside {root}; put the file itself there"):
        CityscapesDataset(root)
