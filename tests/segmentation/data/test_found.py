"""Folders, colours and orientations from other sources: what is read, and which errors they have."""

import re
import warnings
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from tests.segmentation.data.test_options import MASKS, columns, make, say

from rfield.segmentation.data import check_data, load_dataset, paths, voc_palette
from rfield.segmentation.data.check_split import quote_yaml
from rfield.segmentation.data.class_groups import class_groups
from rfield.segmentation.data.folder import _near
from rfield.segmentation.data.images import image_files, read_image
from rfield.segmentation.data.sides import unlisted_pairs
from rfield.segmentation.inference.predict import find_images

COLOURS = [0, 0, 0, 250, 0, 0, 0, 250, 0]


def pair(image: Path, mask: Path, values: np.ndarray | None = None) -> None:
    """Write an image and its mask."""
    for path in (image, mask):
        path.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(list(image.name.encode()))
    PIL.Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8)).save(image)
    PIL.Image.fromarray(columns(0, 1) if values is None else values).save(mask)


@pytest.mark.parametrize("layout", ["voc", "folder"])
@pytest.mark.parametrize("palette", [None, COLOURS])
def test_with_a_reduced_zero_the_classes_keep_their_colours(
    tmp_path: Path, layout: str, palette: list[int] | None
) -> None:
    config = make(tmp_path / "data", layout, columns(0, 1, 2), "a\nb" if layout == "folder" else None)
    if palette is not None:
        mask = PIL.Image.fromarray(columns(0, 1, 2))
        mask.putpalette(palette)
        mask.save(tmp_path / "data" / MASKS[layout])
    wanted = voc_palette()[1:3] if palette is None else [(250, 0, 0), (0, 250, 0)]
    dataset = load_dataset(say(config, reduce_zero_label=True))
    assert (dataset.palette[:2], len(dataset.palette)) == (wanted, 256)
    assert load_dataset(say(config, ignore=1)).palette[:2] == wanted
    plain = load_dataset(say(config, reduce_zero_label=False, ignore=1))
    assert plain.palette[1:3] == wanted


def test_a_suffix_of_the_config_finds_masks_among_their_images(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        pair(tmp_path / f"data/{split}/{split}.jpg", tmp_path / f"data/{split}/{split}_gt.png")
    (tmp_path / "data/classes.txt").write_text("a\nb\n")
    config = tmp_path / "folder.yaml"
    config.write_text("format: folder\nroot: data\nmask_suffix: _gt\n")
    assert [path.name for path in load_dataset(str(config), "val").mask_paths] == ["val_gt.png"]
    (tmp_path / "data/test/test_gt.png").write_bytes(b"")
    assert {f.split for f in check_data(str(config)) if f.level == "error"} == {"test"}


@pytest.mark.parametrize(
    ("image", "mask", "words"),
    [
        ("train/images/a.jpg", "train/ann/a.png", "no folder of masks .*: train/ann; rename the one .* to .*masks"),
        ("train/images/a.jpg", "masks/train/a.png", "no folder of masks .*found the folders: masks; rename"),
        ("train/images/a.jpg", "train_masks/a.png", "no folder of masks .*found the folders: train_masks; rename"),
        ("train/images/a.jpg", "train/images/a_gt.png", "no other; .*or if NAME_gt are .* `mask_suffix: _gt`"),
        ("train/a.jpg", "train/a_gt.png", "none; .*train holds 2 images and no folder: .* `mask_suffix: _gt`"),
        ("train/JPEGs/a.jpg", "train/PNGs/a.png", "train holds 0 images and JPEGs, PNGs: .* in train/images"),
        ("images/a.jpg", "masks/a.png", "the images in .*images belong to no split; move them to .*images/train"),
        ("train/images/x/a.jpg", "train/masks/x/a.png", "no image .*, but the folder x; move the files .* to .*images"),
    ],
)  # fmt: skip
def test_a_layout_that_is_not_known_is_described(tmp_path: Path, image: str, mask: str, words: str) -> None:
    pair(tmp_path / image, tmp_path / mask)
    (tmp_path / "classes.txt").write_text("a\nb\n")
    with pytest.raises((FileNotFoundError, ValueError), match=words) as caught:
        load_dataset(f"folder:{tmp_path}")
    (finding,) = check_data(f"folder:{tmp_path}", ["train"])
    assert finding.text == str(caught.value)


def test_folders_beside_the_images_are_named_in_order(tmp_path: Path) -> None:
    for name in ("train/images", "train/c", "train/b", "a", "d"):
        (tmp_path / name).mkdir(parents=True)
    names = ("a", "d", "train/b", "train/c")
    assert _near(tmp_path, tmp_path / "train/images") == [tmp_path / name for name in names]


def test_no_advice_to_give_an_empty_suffix(tmp_path: Path) -> None:
    pair(tmp_path / "train/images/a.jpg", tmp_path / "train/masks/a.png")
    pair(tmp_path / "train/images/b.jpg", tmp_path / "train/masks/a_gt.png")
    (tmp_path / "classes.txt").write_text("a\nb\n")
    (tmp_path / "folder.yaml").write_text("format: folder\nroot: .\nmask_suffix: _gt\n")
    texts = [finding.text for finding in check_data(str(tmp_path / "folder.yaml"), ["train"])]
    assert any("masks/a.png is the mask of no image" in text for text in texts)
    assert not [text for text in texts if "`mask_suffix: `" in text]


@pytest.mark.parametrize(
    ("layout", "there", "words"),
    [
        ("cityscapes", "a_0_gtFine_labelTrainIds.png", "there is a_0_gtFine_labelTrainIds.png, which has a similar"),
        ("cityscapes", "a_1_gtFine_labelTrainIds.png", None),
        ("voc", "../masks/a.png", r"\(there is no folder .*, but there is ImageSets, JPEGImages, masks\)"),
    ],
)  # fmt: skip
def test_what_lies_there_instead_is_named(tmp_path: Path, layout: str, there: str, words: str | None) -> None:
    make(tmp_path / "data", layout, columns(7, 8))
    mask = tmp_path / "data" / MASKS[layout]
    (mask.parent / there).parent.mkdir(exist_ok=True)
    mask.rename(mask.parent / there)
    if layout == "cityscapes":
        image = tmp_path / "data/leftImg8bit/train/ulm/a_leftImg8bit.png"
        image.rename(image.with_name("a_0_leftImg8bit.png"))
    else:
        mask.parent.rmdir()
    with pytest.raises(FileNotFoundError, match=words or "is missing") as caught:
        load_dataset(f"{layout}:{tmp_path / 'data'}")
    assert ("there is" in str(caught.value)) == (words is not None)


@pytest.mark.parametrize(
    ("image", "mask", "told"),
    [(1, 1, ""), (3, 1, "a.jpg"), (3, 3, ""), (1, 3, "a.png"), (3, 2, "a.jpg"), (6, 8, "a.jpg"), (6, 6, "")],
)
def test_orientations_of_image_and_mask_are_compared(tmp_path: Path, image: int, mask: int, told: str) -> None:
    pair(tmp_path / "train/images/a.jpg", tmp_path / "train/masks/a.png")
    (tmp_path / "classes.txt").write_text("a\nb\n")
    for path, value in ((tmp_path / "train/images/a.jpg", image), (tmp_path / "train/masks/a.png", mask)):
        exif = PIL.Image.Exif()
        exif[0x0112] = value
        with PIL.Image.open(path) as opened:
            opened.load()
        opened.save(path, exif=exif)
    findings = check_data(f"folder:{tmp_path}", ["train"])
    assert [Path(finding.file).name for finding in findings] == ([told] if told else [])
    other, its = (image, "image") if image == 1 else (mask, "mask")
    words = f"but its {its} has {other if other > 1 else 'none'}, and their sizes do not show"
    assert all(words in finding.text for finding in findings)


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (PIL.Image.fromarray(np.stack([columns(0, 1)] * 3, 2)), "grey values (2 different) saved as RGB, not class in"),
        (
            PIL.Image.fromarray(columns(0, 255) > 0),
            "whose values are class indices; or name the colour of each class in",
        ),
    ],
)
def test_kinds_of_masks_have_their_remedy(tmp_path: Path, mask: PIL.Image.Image, words: str) -> None:
    make(tmp_path / "data", "folder", columns(0, 1), "a\nb")
    mask.save(tmp_path / "data" / MASKS["folder"])
    with pytest.raises(ValueError, match=re.escape(words)):
        load_dataset(f"folder:{tmp_path / 'data'}")[0]


def test_errors_of_a_config_name_it_in_the_check_too(tmp_path: Path) -> None:
    config = make(tmp_path / "data", "folder", columns(0, 1), "a\nb")
    (finding,) = check_data(say(config, colours={"a": [0, 0, 0], "b": [0, 0, 0]}), ["train"])
    assert finding.text.startswith(f"{config}: the colour [0, 0, 0] occurs twice")


def test_a_palette_with_transparency_is_read_without_a_warning(tmp_path: Path) -> None:
    image = PIL.Image.fromarray(columns(0, 1))
    image.putpalette(COLOURS)
    image.save(tmp_path / "a.png", transparency=b"\x00\x80")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(tmp_path / "a.png")[:, 0, -1].tolist() == [250, 0, 0]


def test_names_in_advice_are_yaml() -> None:
    names = ["left hand", "hand_l", "hand, l", "no", "a: b", "Straße", "1"]
    assert [quote_yaml(name) for name in names] == [
        "left hand",
        "hand_l",
        '"hand, l"',
        '"no"',
        '"a: b"',
        "Straße",
        '"1"',
    ]


@pytest.mark.parametrize(
    ("one", "other", "pair"),
    [("lbrow", "rbrow", True), ("lefthand", "right_hand", True), ("lear", "rear", True), ("lamp", "ramp", False)],
)
def test_sides_in_other_spellings(one: str, other: str, pair: bool) -> None:
    assert unlisted_pairs([one, "road", other], []) == ([(one, other)] if pair else [])


def test_a_folder_is_read_once_for_all_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index in range(9):
        pair(tmp_path / f"train/images/{index}.jpg", tmp_path / f"train/masks/{index}_gt.png")
    (tmp_path / "classes.txt").write_text("a\nb\n")
    read: list[Path] = []
    monkeypatch.setattr(paths, "image_files", lambda folder: read.append(folder) or image_files(folder))
    findings = check_data(f"folder:{tmp_path}", ["train"])
    assert sum(f"there is {index}_gt.png: if that is" in f.text for index in range(9) for f in findings) == 9
    assert len(read) == 2


def test_groups_by_a_word_between_underscores(tmp_path: Path) -> None:
    config = make(tmp_path / "data", "folder", columns(0, 1), "left_hand\nright_hand\nroad")
    dataset = load_dataset(str(config))
    assert class_groups([["hand"], ["road"]], 2, dataset) == {"group 1": (0, 1), "group 2": (2,)}


def test_a_glob_leaves_out_what_systems_leave_behind(tmp_path: Path) -> None:
    for name in ("a.JPG", "Thumbs.db", "._a.jpg", "desktop.ini"):
        (tmp_path / name).write_bytes(b"")
    for pattern in (f"{tmp_path}/*", f"{tmp_path}/**", f"{tmp_path}/*a*"):
        assert [path.name for path in find_images(pattern)] == ["a.JPG"]
    assert [path.name for path in find_images(f"{tmp_path}/*.db")] == ["Thumbs.db"]  # as it was asked for
