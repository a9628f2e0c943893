"""Unusual files: suffixes, dot files, folders, and the errors for pairs that are not found."""

import unicodedata
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from tests.segmentation.data.test_options import FORMATS, IMAGES, MASKS, columns, make, stripes

from rfield.segmentation.data import check_data, convert_lapa, load_dataset
from rfield.segmentation.data.paths import Folders, near_miss

KINDS = [(".PNG", "PNG"), (".JPG", "JPEG"), (".jpeg", "JPEG"), (".tif", "TIFF"), (".TIFF", "TIFF"), (".bmp", "BMP"),
         (".webp", "WEBP")]  # fmt: skip


def sample(root: Path, layout: str) -> str:
    make(root, layout, columns(0, 7, 8, 3), "\n".join("abcdefghijk") if layout == "folder" else None)
    return f"{layout}:{root}"


def save_as(path: Path, suffix: str, kind: str) -> Path:
    with PIL.Image.open(path) as image:
        image.load()
    path.unlink()
    image.save(path.with_suffix(suffix), kind, **({"lossless": True} if kind == "WEBP" else {}))
    return path.with_suffix(suffix)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(("suffix", "kind"), KINDS)
def test_images_of_any_suffix(tmp_path: Path, layout: str, suffix: str, kind: str) -> None:
    spec = sample(tmp_path / "data", layout)
    path = save_as(tmp_path / "data" / IMAGES[layout], suffix, kind)
    dataset = load_dataset(spec)
    assert (dataset.ids, dataset[0][0].shape) == (["a"], (3, 12, 16))
    assert dataset.sizes() == [(12, 16)]
    assert [f for f in check_data(spec, ["train"]) if str(path) in f.text] == []


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(("suffix", "kind"), [(".PNG", "PNG"), (".tif", "TIFF"), (".bmp", "BMP")])
def test_masks_of_any_suffix(tmp_path: Path, layout: str, suffix: str, kind: str) -> None:
    spec = sample(tmp_path / "data", layout)
    before = stripes(spec)
    for path in list((tmp_path / "data" / MASKS[layout]).parent.iterdir()):
        save_as(path, suffix, kind)
    assert stripes(spec) == before
    assert not [f for f in check_data(spec, ["train"]) if f.level == "error"]


@pytest.mark.parametrize("layout", FORMATS)
def test_what_systems_leave_behind_is_left_out(tmp_path: Path, layout: str) -> None:
    spec = sample(tmp_path / "data", layout)
    for folder in {path.parent for path in (tmp_path / "data").rglob("*") if path.is_file()} | {
        tmp_path / "data/leftImg8bit/train"
    }:
        if folder.is_dir():
            for name in ("._a.png", "._a.jpg", "._a_leftImg8bit.png", ".DS_Store", "Thumbs.db", "desktop.ini"):
                (folder / name).write_bytes(b"\0\5\26\7")
    assert load_dataset(spec).ids == ["a"]
    assert not [f for f in check_data(spec, ["train"]) if f.level == "error"]


def test_a_list_prefers_the_file_it_names(tmp_path: Path) -> None:
    spec = sample(tmp_path / "data", "voc")
    own = tmp_path / "data/JPEGImages/a.jpg"
    PIL.Image.new("RGB", (16, 12)).save(own.with_suffix(".png"))
    assert load_dataset(spec).image_paths == [own]
    own.rename(own.with_suffix(".JPEG"))
    with pytest.raises(ValueError, match=r"a.jpg is missing, and a.JPEG and a.png have its name; remove all but"):
        load_dataset(spec)


def test_an_image_is_never_its_own_mask(tmp_path: Path) -> None:
    """If the mask is missing in a common folder, the image has the mask's name."""
    sample(tmp_path / "data", "camvid")
    (tmp_path / "data/train.txt").write_text("train/a.png train/a.tif")
    with pytest.raises(ValueError, match=r"but both are the file .*train/a.png; add the mask"):
        load_dataset(f"camvid:{tmp_path / 'data'}")


@pytest.mark.parametrize("layout", ["voc", "helen", "camvid", "cityscapes"])
def test_another_suffix_is_no_way_out_of_the_root(tmp_path: Path, layout: str) -> None:
    spec = sample(tmp_path / "data", layout)
    image = tmp_path / "data" / IMAGES[layout]
    image.rename(tmp_path / "outside.bmp")
    image.with_suffix(".bmp").symlink_to(tmp_path / "outside.bmp")
    with pytest.raises(ValueError, match="a file outside"):
        load_dataset(spec)
    assert any(f.level == "error" and "a file outside" in f.text for f in check_data(spec, ["train"]))


LAYOUTS = {
    "labels": ("train/images/a.jpg", "train/labels/a.png"),
    "capitals": ("train/Images/a.JPG", "train/Masks/a.PNG"),
    "gt": ("train/img/a.jpg", "train/gt/a.png"),
    "images first": ("images/train/a.jpg", "masks/train/a.png"),
    "annotations": ("images/train/a.jpg", "annotations/train/a.png"),
    "sibling": ("train/a.jpg", "train_masks/a.png"),
    "annot": ("train/a.png", "trainannot/a.png"),
    "suffix": ("train/images/a.jpg", "train/masks/a_mask.png"),
    "sibling with suffix": ("train/a.jpg", "train_labels/a_mask.png"),
    "one folder": ("train/images/a.jpg", "train/images/a_mask.png"),
    "one folder without images": ("train/a.png", "train/a_mask.png"),
}


@pytest.mark.parametrize("names", LAYOUTS.values(), ids=LAYOUTS)
def test_folders_as_people_have_them(tmp_path: Path, names: tuple[str, str]) -> None:
    image, mask = (tmp_path / name for name in names)
    for path in (image, mask):
        path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", (16, 12)).save(image)
    PIL.Image.fromarray(columns(0, 1, 2, 255)).save(mask)
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    spec = f"folder:{tmp_path}"
    dataset = load_dataset(spec)
    assert (dataset.ids, dataset.image_paths, dataset.mask_paths) == (["a"], [image], [mask])
    assert stripes(spec) == [0, 1, 2, 255]
    assert check_data(spec, ["train"]) == []
    with pytest.raises(FileNotFoundError, match=r"no folder val/images in .*; there are the splits: train"):
        load_dataset(spec, "val")


def test_the_test_split_is_checked_wherever_it_lies(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        for folder in ("images", "masks"):
            (tmp_path / folder / split).mkdir(parents=True)
        pixels = np.random.default_rng(len(split)).integers(0, 256, (12, 16, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(tmp_path / f"images/{split}/{split}.png")
        PIL.Image.fromarray(columns(0, 1)).save(tmp_path / f"masks/{split}/{split}.png")
    (tmp_path / "classes.txt").write_text("a\nb\n")
    assert check_data(f"folder:{tmp_path}") == []
    (tmp_path / "masks/test/test.png").write_bytes(b"")
    assert [f.split for f in check_data(f"folder:{tmp_path}")] == ["test"]


def test_two_folders_of_masks_are_not_guessed_between(tmp_path: Path) -> None:
    spec = sample(tmp_path / "data", "folder")
    (tmp_path / "data/train/gt").mkdir()
    assert len(load_dataset(spec)) == 1  # masks goes first
    (tmp_path / "data/train/masks").rename(tmp_path / "data/train/labels")
    with pytest.raises(ValueError, match=r"may lie in .*labels or .*gt; rename the folder that holds them to masks"):
        load_dataset(spec)


def test_two_masks_are_not_guessed_between(tmp_path: Path) -> None:
    spec = sample(tmp_path / "data", "folder")
    mask = tmp_path / "data/train/masks/a.png"
    PIL.Image.new("RGB", (16, 12)).save(mask.with_suffix(".jpg"))  # a preview
    assert load_dataset(spec).mask_paths == [mask]
    mask.rename(mask.with_suffix(".bmp"))
    with pytest.raises(ValueError, match=r"a.bmp and .*a.jpg may be the mask of .*; remove all but one"):
        load_dataset(spec)
    (finding,) = [f for f in check_data(spec, ["train"]) if "may be the mask of" in f.text]
    assert finding.file == str(mask.with_suffix(".bmp")), "the first"


def test_an_image_called_mask_keeps_its_own(tmp_path: Path) -> None:
    spec = sample(tmp_path / "data", "folder")
    folder = tmp_path / "data/train"
    PIL.Image.new("RGB", (16, 12)).save(folder / "images/a_mask.jpg")
    PIL.Image.fromarray(columns(1, 1)).save(folder / "masks/a_mask.png")
    assert [path.name for path in load_dataset(spec).mask_paths] == ["a.png", "a_mask.png"]
    (folder / "masks/a.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"masks/a.png is missing, the mask of .*a.png"):
        load_dataset(spec)


@pytest.mark.parametrize(
    ("there", "words"),
    [
        ("a_label.png", r"\(there is a_label.png: if that is the mask, give `mask_suffix: _label` in a data config\)"),
        ("a.seg.png", r"\(there is a.seg.png: if that is the mask, give `mask_suffix: .seg` in a data config\)"),
        ("mask_a.png", r"\(there is mask_a.png: if that is meant, rename it\)"),
        ("A.png", r"\(there is A.png, whose name is spelled differently: rename it\)"),
        ("ab.png", None),
        (".a.png", None),
    ],
)
@pytest.mark.parametrize("layout", ["voc", "camvid", "folder"])
def test_a_near_miss_is_named(tmp_path: Path, layout: str, there: str, words: str | None) -> None:
    spec = sample(tmp_path / "data", layout)
    mask = tmp_path / "data" / MASKS[layout]
    mask.rename(mask.with_name(there))
    with pytest.raises(FileNotFoundError, match=rf"a.png is missing.*{words or ''}") as caught:
        load_dataset(spec)
    texts = [str(caught.value), *(f.text for f in check_data(spec, ["train"]) if f.file == str(mask))]
    assert [" (there is" in text for text in texts] == [words is not None] * 2


def test_near_misses_of_numbers_and_letters(tmp_path: Path) -> None:
    (tmp_path / "0007.png").write_bytes(b"")
    (tmp_path / unicodedata.normalize("NFD", "maß-é.png")).write_bytes(b"")
    (tmp_path / "b.jpg.png").write_bytes(b"")
    assert "there is 0007.png" in near_miss(tmp_path / "7.png")
    assert near_miss(tmp_path / "70.png") == ""
    assert "whose name is spelled differently" in near_miss(tmp_path / unicodedata.normalize("NFC", "maß_é.png"))
    assert "if that is the mask" in near_miss(tmp_path / "b.png")
    (tmp_path / "list.jpg").write_bytes(b"")
    assert "there is list.jpg: give the name without its suffix" in near_miss(tmp_path / "list.jpg.jpg")
    (tmp_path / "JPEGImage").mkdir()
    (tmp_path / "PEGImages").mkdir()
    assert near_miss(tmp_path / "JPEGImages/a.jpg").endswith("/JPEGImages, but one named PEGImages)")
    assert Folders().find(tmp_path / "nowhere/a.png") == tmp_path / "nowhere/a.png"


def test_faces_are_converted_from_any_suffix(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        for folder in ("images", "labels"):
            (tmp_path / "LaPa" / split / folder).mkdir(parents=True)
        PIL.Image.new("RGB", (16, 12)).save(tmp_path / f"LaPa/{split}/images/{split}.PNG")
        PIL.Image.fromarray(columns(1, 2, 3, 10)).save(tmp_path / f"LaPa/{split}/labels/{split}.BMP")
        (tmp_path / f"LaPa/{split}/images/._{split}.PNG").write_bytes(b"")
    made = convert_lapa(tmp_path / "LaPa", tmp_path / "faces")
    assert made.counts == {"train": 1, "val": 1, "test": 1}
    assert stripes(f"helen:{tmp_path / 'faces'}") == [1, 2, 3, 10]
    mask = tmp_path / "LaPa/val/labels/val.BMP"
    mask.rename(tmp_path / "outside.BMP")
    mask.symlink_to(tmp_path / "outside.BMP")
    with pytest.raises(ValueError, match=r"val.BMP is a link to a file outside .*labels; put the file itself there"):
        convert_lapa(tmp_path / "LaPa", tmp_path / "again")
