import os
import re
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from rfield.segmentation.data import CAMVID_CLASSES, CamVidDataset, load_dataset

PREFIX = "/SegNet/CamVid/"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two training pairs and one of val, of 12x16 px (height x width), with the tutorial's own lists."""
    root = tmp_path / "CamVid"
    random = np.random.default_rng(0)
    for split, names in {"train": ("a", "b"), "val": ("c",)}.items():
        for folder in (split, f"{split}annot"):
            (root / folder).mkdir(parents=True)
        for name in names:
            image = random.integers(0, 256, (12, 16, 3), dtype=np.uint8)
            PIL.Image.fromarray(image).save(root / split / f"{name}.png")
            mask = random.integers(0, 12, (12, 16), dtype=np.uint8)
            PIL.Image.fromarray(mask).save(root / f"{split}annot" / f"{name}.png")
        lines = [f"{PREFIX}{split}/{name}.png {PREFIX}{split}annot/{name}.png\n" for name in names]
        (root / f"{split}.txt").write_text("".join(lines))
    return root


def test_samples_are_the_files_pixels_and_void_has_no_label(root: Path) -> None:
    dataset = CamVidDataset(root)
    assert (len(dataset), dataset.ids, dataset.class_names) == (2, ["a", "b"], CAMVID_CLASSES)
    assert dataset.num_classes == 11
    image, mask = dataset[1]
    assert np.array_equal(image.permute(1, 2, 0), PIL.Image.open(root / "train/b.png"))
    stored = np.array(PIL.Image.open(root / "trainannot/b.png"))
    assert (stored == 11).any()
    assert np.array_equal(mask, np.where(stored == 11, 255, stored))
    assert dataset.sizes() == [(12, 16)] * 2
    assert load_dataset(f"camvid:{root}", "val").ids == ["c"]


def test_the_palette_is_camvids(root: Path) -> None:
    palette = CamVidDataset(root).palette
    assert (len(palette), palette[3], palette[8], palette[255]) == (256, (128, 64, 128), (64, 0, 128), (0, 0, 0))
    # A slip in any number of the table changes a sum.
    assert np.sum(palette[:11], axis=0).tolist() == [1148, 936, 1182]


@pytest.mark.parametrize("prefix", [PREFIX, "", "./"])
def test_lists_with_and_without_the_tutorials_folder(root: Path, prefix: str) -> None:
    expected = CamVidDataset(root)
    (root / "train.txt").write_text(
        f"{prefix}train/a.png\t{prefix}trainannot/a.png\r\n\r\n{prefix}train/b.png {prefix}trainannot/b.png"
    )
    dataset = CamVidDataset(root)
    assert dataset.ids == expected.ids
    assert all((one == other).all() for one, other in zip(dataset[1], expected[1], strict=True))


def test_class_names_may_be_others_but_11(root: Path) -> None:
    (root / "classes.txt").write_text("\n".join(f"class {number}" for number in range(11)))
    assert CamVidDataset(root).class_names[10] == "class 10"
    (root / "classes.txt").write_text("\n".join([*CAMVID_CLASSES, "void"]))
    with pytest.raises(ValueError, match=r"classes.txt holds 12 class names, but .* name the 11, without void"):
        CamVidDataset(root)


@pytest.mark.parametrize(
    "entry", ["../outside.png", f"{PREFIX}../outside.png", "train/../../outside.png", "train/link.png", "OUTSIDE"]
)
def test_list_entries_may_not_leave_the_root(root: Path, entry: str) -> None:
    outside = root.parent / "outside.png"
    PIL.Image.new("RGB", (16, 12)).save(outside)
    (root / "train/link.png").symlink_to(outside)
    entry = entry.replace("OUTSIDE", str(outside))
    (root / "train.txt").write_text(f"{entry} trainannot/a.png")
    with pytest.raises(ValueError, match=r"train.txt names '.*', a file outside .*CamVid; remove that line"):
        CamVidDataset(root)


def test_a_folder_may_be_a_link(root: Path) -> None:
    (root / "train").rename(root.parent / "images")
    (root / "train").symlink_to(root.parent / "images")
    assert len(CamVidDataset(root)) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train/a.png", "has the line 'train/a.png'; a line names an image and its mask"),
        ("a b c", "has the line 'a b c'"),
        ("\n \n", "is empty; each of its lines"),
    ],
)
def test_lists_that_are_not_understood(root: Path, text: str, message: str) -> None:
    (root / "train.txt").write_text(text)
    with pytest.raises(ValueError, match=f"train.txt {message}"):
        CamVidDataset(root)


def test_what_is_missing_is_named(root: Path) -> None:
    (root / "._train.txt").write_bytes(b"\0")  # left behind by macOS, never a list
    with pytest.raises(FileNotFoundError, match=r"no list test.txt in .*CamVid; the lists are: train, val$"):
        CamVidDataset(root, "test")
    with pytest.raises(FileNotFoundError, match=r"nowhere is not a folder; give the one that holds train.txt"):
        CamVidDataset(root / "nowhere")
    (root / "trainannot/b.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"trainannot/b.png is missing \(1 of the 4 files of the split 'train'"):
        CamVidDataset(root)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (
            PIL.Image.new("L", (16, 12), 12),
            r"holds the value 12 \(192 px\), which no class has; .*11 means no label",
        ),
        (PIL.Image.new("L", (12, 16)), "16x12 px .* but its image is 12x16"),
        (PIL.Image.new("RGB", (16, 12)), "holds colours .*, not class indices: a palette mask .*saved as RGB"),
    ],
)
def test_masks_that_do_not_fit(root: Path, mask: PIL.Image.Image, message: str) -> None:
    mask.save(root / "trainannot/a.png")
    with pytest.raises(ValueError, match=f"trainannot/a.png .*{message}"):
        CamVidDataset(root)[0]


def test_damaged_files_are_named(root: Path) -> None:
    (root / "train/a.png").write_bytes(b"no image")
    with pytest.raises(OSError, match=re.escape(str(root / "train/a.png"))):
        CamVidDataset(root)[0]


def test_fingerprint_changes_with_the_list_the_names_and_any_file(root: Path) -> None:
    seen = [CamVidDataset(root).fingerprint(), CamVidDataset(root, "val").fingerprint()]
    for path in ("train/a.png", "trainannot/b.png"):
        os.utime(root / path, ns=(0, 0))
        seen.append(CamVidDataset(root).fingerprint())
    (root / "classes.txt").write_text("\n".join(f"class {number}" for number in range(11)))
    seen.append(CamVidDataset(root).fingerprint())
    assert len(set(seen)) == 5
    assert CamVidDataset(root).fingerprint() == seen[-1]


@pytest.mark.shared
@pytest.mark.parametrize(("split", "length"), [("train", 367), ("val", 101)])
def test_camvid(shared: Path, split: str, length: int) -> None:
    dataset = CamVidDataset(shared / "data/camvid", split)
    assert len(dataset) == length
    assert dataset.class_names == CAMVID_CLASSES
    assert set(dataset.sizes()) == {(360, 480)}
    for index in range(0, length, 20):
        image, mask = dataset[index]
        assert (image.shape, mask.shape) == ((3, 360, 480), (360, 480))
        road = mask == 3
        assert road[180:].sum() >= road[:180].sum()
