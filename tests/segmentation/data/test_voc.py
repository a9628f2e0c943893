import os
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from scipy.io import savemat

from rfield.segmentation.data import VOCDataset, convert_sbd, voc_palette

MakeDevkit = Callable[..., Path]


def write_sbd_mask(path: Path, mask: np.ndarray) -> None:
    """Write a mask as in SBD: a struct GTcls with the fields Boundaries, Segmentation and CategoriesPresent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    boundaries = np.empty((20, 1), object)
    boundaries[:, 0] = [np.zeros(mask.shape, bool)] * 20
    present = np.unique(mask[mask > 0])
    savemat(path, {"GTcls": {"Boundaries": boundaries, "Segmentation": mask, "CategoriesPresent": present}})


def test_samples_are_the_files_pixels(make_devkit: MakeDevkit) -> None:
    root = make_devkit()
    dataset = VOCDataset(root)
    assert (len(dataset), dataset.ids, dataset.class_names) == (2, ["a", "b"], ("road", "car", "sky"))
    image, mask = dataset[1]
    assert (image.dtype, image.shape, mask.dtype, mask.shape) == (torch.uint8, (3, 12, 16), torch.uint8, (12, 16))
    assert np.array_equal(image.permute(1, 2, 0), PIL.Image.open(root / "JPEGImages/b.jpg"))
    assert np.array_equal(mask, PIL.Image.open(root / "SegmentationClass/b.png"))
    assert set(mask.unique().tolist()) == {0, 1, 2, 255}
    assert dataset.sizes() == [(12, 16)] * 2
    assert VOCDataset(root, "val").ids == ["c"]


def test_a_grey_image_is_read_as_rgb(make_devkit: MakeDevkit) -> None:
    root = make_devkit()
    PIL.Image.new("L", (16, 12), 7).save(root / "JPEGImages/a.jpg")
    image, _ = VOCDataset(root)[0]
    assert image.shape == (3, 12, 16)
    assert (image == 7).all()


def test_class_names_are_vocs_without_a_file(make_devkit: MakeDevkit) -> None:
    dataset = VOCDataset(make_devkit(classes=None, values=(0, 20, 255)))
    assert (dataset.num_classes, dataset.class_names[0], dataset.class_names[20]) == (21, "background", "tvmonitor")
    dataset[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [("\n", "holds 0 class names"), ("a\nb\na\n", r"holds 3 class names, some of them twice: \['a'\]")],
)
def test_class_names_that_do_not_fit(make_devkit: MakeDevkit, text: str, message: str) -> None:
    root = make_devkit()
    (root / "classes.txt").write_text(text)
    with pytest.raises(ValueError, match=f"classes.txt {message}"):
        VOCDataset(root)


def test_class_names_from_another_system_and_with_blank_lines(make_devkit: MakeDevkit) -> None:
    root = make_devkit()
    (root / "classes.txt").write_bytes("\ufeffroad\r\nfull moon \r\n\r\nsky\r\n".encode())
    assert VOCDataset(root).class_names == ("road", "full moon", "sky")


def test_palette_is_the_masks_own_filled_up_from_vocs(make_devkit: MakeDevkit) -> None:
    root = make_devkit()
    mask = PIL.Image.open(root / "SegmentationClass/a.png")
    mask.putpalette([1, 2, 3, 4, 5, 6])
    mask.save(root / "SegmentationClass/a.png")
    assert VOCDataset(root).palette == [(1, 2, 3), (4, 5, 6), *voc_palette()[2:]]


def test_grey_masks_are_read_and_have_vocs_palette(make_devkit: MakeDevkit) -> None:
    root = make_devkit()
    values = np.array([[0, 1, 2, 255] * 4] * 12, np.uint8)
    PIL.Image.fromarray(values).save(root / "SegmentationClass/a.png")
    dataset = VOCDataset(root)
    assert dataset.palette == voc_palette()
    assert np.array_equal(dataset[0][1], values)


def test_voc_palette() -> None:
    palette = voc_palette()
    assert (len(palette), palette[15], palette[20], palette[255]) == (
        256,
        (192, 128, 128),  # person
        (0, 64, 128),  # tvmonitor
        (224, 224, 192),  # no label
    )


def write_few_bit_grey_png(path: Path) -> None:
    """16x12 px of 4-bit grey, which Pillow can read but not write."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 16, 12, 4, 0, 0, 0, 0)
    rows = zlib.compress((b"\0" + b"\x01" * 8) * 12)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (PIL.Image.new("RGB", (16, 12)).save, "holds colours .*, not class indices: a palette mask .*saved as RGB"),
        (PIL.Image.new("I;16", (16, 12)).save, "Pillow mode 'I;16'"),
        (PIL.Image.new("1", (16, 12)).save, "Pillow mode '1'"),
        (write_few_bit_grey_png, r"fewer than 8 bits a pixel \(Pillow mode 'L'\)"),
        (PIL.Image.new("L", (12, 16)).save, r"16x12 px \(height x width\) but its image is 12x16"),
        (PIL.Image.new("L", (16, 12), 3).save, r"holds the value 3 \(192 px\), which no class has; correct the mask"),
    ],
)
def test_masks_that_do_not_fit(make_devkit: MakeDevkit, write: Callable[[Path], None], message: str) -> None:
    root = make_devkit()
    write(root / "SegmentationClass/a.png")
    dataset = VOCDataset(root)
    with pytest.raises(ValueError, match=f"a.png .*{message}"):
        dataset[0]
    dataset[1]


@pytest.mark.parametrize("path", ["JPEGImages/b.jpg", "SegmentationClass/b.png"])
def test_damaged_files_are_named(make_devkit: MakeDevkit, path: str) -> None:
    root = make_devkit()
    whole = (root / path).read_bytes()
    for damaged in (b"", b"no image", whole[: len(whole) * 2 // 3]):
        (root / path).write_bytes(damaged)
        with pytest.raises(OSError, match=re.escape(str(root / path))):
            VOCDataset(root)[1]


def test_a_missing_list_is_an_error_only_when_it_is_asked_for(make_devkit: MakeDevkit) -> None:
    root = make_devkit({"train": ["a"]})
    VOCDataset(root)
    (root / "ImageSets/Segmentation/._train.txt").write_bytes(b"\0")  # left behind by macOS, never a list
    with pytest.raises(FileNotFoundError, match=r"split 'val' in .*Segmentation; the lists are: train$"):
        VOCDataset(root, "val")
    with pytest.raises(FileNotFoundError, match="the lists are: none"):
        VOCDataset(root / "JPEGImages", "val")


def test_an_empty_list_is_an_error(make_devkit: MakeDevkit) -> None:
    root = make_devkit()
    (root / "ImageSets/Segmentation/train.txt").write_text("\n\n")
    with pytest.raises(ValueError, match=r"train.txt is empty"):
        VOCDataset(root)


@pytest.mark.parametrize("path", ["JPEGImages/b.jpg", "SegmentationClass/b.png"])
def test_missing_files_are_named(make_devkit: MakeDevkit, path: str) -> None:
    root = make_devkit()
    (root / path).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{path} is missing \(1 of the 2 files of the split 'train'"):
        VOCDataset(root)


def test_list_entries_may_not_leave_the_root(make_devkit: MakeDevkit, tmp_path: Path) -> None:
    root = make_devkit()
    outside = tmp_path / "outside"
    PIL.Image.new("RGB", (16, 12)).save(outside.with_suffix(".jpg"))
    (root / "JPEGImages/link.jpg").symlink_to(outside.with_suffix(".jpg"))
    for entry in ("../../outside", str(outside), "link"):
        (root / "ImageSets/Segmentation/train.txt").write_text(f"a\n{entry}\n")
        with pytest.raises(ValueError, match=f"names '{re.escape(entry)}', a file outside"):
            VOCDataset(root)


def test_a_folder_may_be_a_link_and_names_may_have_folders(make_devkit: MakeDevkit, tmp_path: Path) -> None:
    root = make_devkit()
    (root / "JPEGImages").rename(tmp_path / "images")
    (root / "JPEGImages").symlink_to(tmp_path / "images")
    for folder in ("JPEGImages", "SegmentationClass"):
        (root / folder / "day").mkdir()
        for file in (root / folder).glob("b.*"):
            file.rename(root / folder / "day" / file.name)
    (root / "ImageSets/Segmentation/train.txt").write_text("a\nday/b\n")
    assert len(VOCDataset(root)) == 2


def test_fingerprint_changes_with_the_list_and_with_any_file(make_devkit: MakeDevkit) -> None:
    root = make_devkit()
    original = VOCDataset(root).fingerprint()
    assert VOCDataset(root).fingerprint() == original
    seen = {original, VOCDataset(root, "val").fingerprint()}

    (root / "ImageSets/Segmentation/train.txt").write_text("b\na\n")
    seen.add(VOCDataset(root).fingerprint())
    (root / "ImageSets/Segmentation/train.txt").write_text("a\nb\n")
    assert VOCDataset(root).fingerprint() == original

    for path in ("JPEGImages/b.jpg", "SegmentationClass/a.png"):
        os.utime(root / path, ns=(0, 0))
        seen.add(VOCDataset(root).fingerprint())
    with (root / "JPEGImages/a.jpg").open("ab") as file:
        file.write(b"\0")
    os.utime(root / "JPEGImages/a.jpg", ns=(0, 0))
    seen.add(VOCDataset(root).fingerprint())
    (root / "classes.txt").write_text("street\ncar\nsky\n")
    seen.add(VOCDataset(root).fingerprint())
    assert len(seen) == 7


def test_sbd_masks_become_a_split(make_devkit: MakeDevkit, tmp_path: Path) -> None:
    root = make_devkit({"train": ["own"], "val": ["held"], "sbd": ["new", "newer"]}, classes=None)
    for name in ("new", "newer"):
        (root / f"SegmentationClass/{name}.png").unlink()
    sbd = tmp_path / "sbd"
    masks = {name: np.full((12, 16), value, np.uint8) for value, name in enumerate(("own", "held", "new", "newer"), 1)}
    for name, mask in masks.items():
        write_sbd_mask(sbd / f"cls/{name}.mat", mask)
    (sbd / "train.txt").write_text("own\nnew\n")
    (sbd / "val.txt").write_text("held\nnewer\n")

    for _ in range(2):  # again, over the older ones
        assert convert_sbd(sbd, root) == ["new", "newer", "own"]
    dataset = VOCDataset(root, "train_aug")
    assert dataset.ids == ["new", "newer", "own"]
    assert dataset.palette == voc_palette()
    assert np.array_equal(dataset[0][1], masks["new"])
    assert np.array_equal(dataset[1][1], masks["newer"])
    assert np.array_equal(dataset[2][1], VOCDataset(root, "train")[0][1])  # VOC's own mask, not SBD's

    (sbd / "cls/new.mat").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"new.mat is not a mask of SBD"):
        convert_sbd(sbd, root)
    (sbd / "cls/new.mat").unlink()
    with pytest.raises(FileNotFoundError, match=r"new.mat is listed by SBD but missing"):
        convert_sbd(sbd, root)
    assert len(VOCDataset(root, "train_aug")) == 3  # a failed conversion leaves the older one
    assert not list(root.glob(".Seg*"))


@pytest.mark.shared
@pytest.mark.parametrize(("split", "length"), [("train", 295), ("val", 148)])
def test_msrc21(shared: Path, split: str, length: int) -> None:
    dataset = VOCDataset(shared / "data/msrc21_voc", split)
    assert len(dataset) == length
    assert (dataset.num_classes, dataset.class_names[0], dataset.class_names[20]) == (21, "building", "boat")
    sizes = dataset.sizes()
    assert set(sizes) <= {(213, 320), (240, 320), (320, 213), (320, 240), (235, 320), (239, 320)}
    for index, size in enumerate(sizes):  # reading checks the masks
        image, mask = dataset[index]
        assert image.shape == (3, *size)
        assert mask.shape == size
