import os
import re
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from rfield.segmentation.data import FolderDataset, load_dataset, voc_palette


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three training pairs and one of val, of 12x16 px (height x width), with three classes."""
    root = tmp_path / "own"
    random = np.random.default_rng(0)
    for split, names in {"train": ("a.jpg", "b.JPEG", "c.png"), "val": ("d.jpg",)}.items():
        for folder in ("images", "masks"):
            (root / split / folder).mkdir(parents=True)
        for name in names:
            image = random.integers(0, 256, (12, 16, 3), dtype=np.uint8)
            PIL.Image.fromarray(image).save(root / split / "images" / name)
            mask = random.choice([0, 1, 2, 255], (12, 16)).astype(np.uint8)
            PIL.Image.fromarray(mask).save(root / split / "masks" / f"{Path(name).stem}.png")
    (root / "classes.txt").write_text("road\ncar\nsky\n")
    return root


def test_samples_are_the_files_pixels(root: Path) -> None:
    dataset = FolderDataset(root)
    assert (dataset.ids, dataset.num_classes, dataset.class_names) == (["a", "b", "c"], 3, ("road", "car", "sky"))
    image, mask = dataset[2]
    assert (image.dtype, image.shape, mask.dtype, mask.shape) == (torch.uint8, (3, 12, 16), torch.uint8, (12, 16))
    assert np.array_equal(image.permute(1, 2, 0), PIL.Image.open(root / "train/images/c.png"))
    assert np.array_equal(mask, PIL.Image.open(root / "train/masks/c.png"))
    assert set(mask.unique().tolist()) == {0, 1, 2, 255}
    assert dataset.sizes() == [(12, 16)] * 3
    assert load_dataset(f"folder:{root}", "val").ids == ["d"]


def test_palette_masks_bring_their_colours(root: Path) -> None:
    assert FolderDataset(root).palette == voc_palette()
    mask = PIL.Image.open(root / "train/masks/a.png")
    mask.putpalette([level for index in range(256) for level in (index, 50, 70)])
    mask.save(root / "train/masks/a.png")
    dataset = FolderDataset(root)
    assert (len(dataset.palette), dataset.palette[1]) == (256, (1, 50, 70))
    assert np.array_equal(dataset[0][1], mask)


def test_other_files_do_not_matter(root: Path) -> None:
    (root / "train/images/notes.txt").write_text("")
    (root / "train/masks/.gitkeep").write_text("")
    assert len(FolderDataset(root)) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n", "holds 0 class names; it needs 1 to 255 different ones, one a line"),
        ("road\ncar\nroad", r"holds 3 class names, some of them twice: \['road'\]"),
    ],
)
def test_class_names_that_do_not_fit(root: Path, text: str, message: str) -> None:
    (root / "classes.txt").write_text(text)
    with pytest.raises(ValueError, match=f"classes.txt {message}"):
        FolderDataset(root)


def test_what_is_missing_is_named(root: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere is not a folder; give the one that holds classes.txt"):
        FolderDataset(root / "nowhere")
    for split in ("test", "../own/train", ""):
        with pytest.raises(FileNotFoundError, match=rf"no folder {split}/images in .*own; .* splits: train, val"):
            FolderDataset(root, split)
    (root / "train/masks/b.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"masks/b.png is missing, the mask of .*b.JPEG \(1 of 3 images have"):
        FolderDataset(root)
    (root / "train/images/b.JPEG").rename(root / "train/images/b.gif")
    (root / "train/images/c.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"masks/c.png is the mask of no image in .*images \(1 of 2 masks"):
        FolderDataset(root)
    (root / "classes.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"classes.txt is missing; it must name the classes, one a line"):
        FolderDataset(root)


def test_two_images_of_one_name(root: Path) -> None:
    PIL.Image.new("RGB", (16, 12)).save(root / "train/images/c.jpg")
    with pytest.raises(ValueError, match=r"c.jpg and .*c.png would have the same mask"):
        FolderDataset(root)


def test_an_empty_split(root: Path) -> None:
    for path in (*(root / "val/images").iterdir(), *(root / "val/masks").iterdir()):
        path.unlink()
    with pytest.raises(ValueError, match=r"val/images holds no image \(.jpg, .jpeg, .png, "):
        FolderDataset(root, "val")


# As many colours as a palette holds.
RAMP = np.stack([np.arange(256, dtype=np.uint8).reshape(16, 16)] * 2 + [np.zeros((16, 16), np.uint8)], 2)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (PIL.Image.new("L", (16, 12), 3), r"holds the value 3 \(192 px\), which no class has; .*classes.txt"),
        (PIL.Image.new("L", (12, 16)), "16x12 px .* but its image is 12x16"),
        (PIL.Image.new("RGB", (16, 12)), "holds colours .*, not class indices: a palette mask .*saved as RGB"),
        (PIL.Image.fromarray(RAMP), r"holds colours \(256 different\)"),
        (PIL.Image.fromarray(RAMP.repeat(2, 0) + np.eye(32, 16, dtype=np.uint8)[..., None]), "holds colours, not"),
        (PIL.Image.new("I;16", (16, 12)), "Pillow mode 'I;16'"),
    ],
)
def test_masks_that_do_not_fit(root: Path, mask: PIL.Image.Image, message: str) -> None:
    mask.save(root / "train/masks/b.png")
    with pytest.raises(ValueError, match=f"masks/b.png .*{message}"):
        FolderDataset(root)[1]


@pytest.mark.parametrize("name", ["train/images/c.png", "train/masks/c.png"])
def test_damaged_files_are_named(root: Path, name: str) -> None:
    path = root / name
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(OSError, match=re.escape(str(path))):
        FolderDataset(root)[2]


def test_fingerprint_changes_with_the_names_and_any_file(root: Path) -> None:
    seen = [FolderDataset(root).fingerprint(), FolderDataset(root, "val").fingerprint()]
    for path in ("train/images/a.jpg", "train/masks/b.png"):
        os.utime(root / path, ns=(0, 0))
        seen.append(FolderDataset(root).fingerprint())
    (root / "classes.txt").write_text("road\ncar\nroof\n")
    seen.append(FolderDataset(root).fingerprint())
    assert len(set(seen)) == 5
    assert FolderDataset(root).fingerprint() == seen[-1]


def test_a_folder_may_be_a_link_but_a_file_may_not_lead_outside(root: Path) -> None:
    image, mask = root / "train/images/c.png", root / "train/masks/c.png"
    image.parent.rename(root.parent / "images")
    image.parent.symlink_to(root.parent / "images")
    assert len(FolderDataset(root)) == 3
    mask.rename(root.parent / "outside.png")
    mask.symlink_to(root.parent / "outside.png")
    with pytest.raises(ValueError, match=f"{mask} is a link to a file outside {root}; put the file itself there"):
        FolderDataset(root)
