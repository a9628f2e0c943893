import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from rfield.segmentation.cli import main
from rfield.segmentation.data import HELEN_CLASSES, HelenDataset, convert_celebamask, convert_lapa
from rfield.segmentation.data.faces import Conversion

Box = tuple[int, int, int, int]  # top, bottom, left, right; in px of a 16x16 mask

# A face as the viewer sees it; the parts are drawn in this order, with skin below all others.
PARTS: dict[str, Box] = {
    "skin": (2, 14, 2, 14),
    "nose": (7, 9, 7, 9),
    "eye_g": (5, 7, 3, 13),
    "l_eye": (5, 7, 3, 6),
    "r_eye": (5, 7, 10, 13),
    "l_brow": (3, 4, 3, 6),
    "r_brow": (3, 4, 10, 13),
    "l_ear": (6, 8, 1, 3),
    "mouth": (10, 13, 5, 11),
    "u_lip": (10, 11, 5, 11),
    "l_lip": (12, 13, 5, 11),
    "hair": (0, 3, 1, 15),
    "hat": (0, 1, 1, 15),
    "cloth": (15, 16, 0, 16),
}
# The same face in Helen's classes, derived by hand.
FACE: list[tuple[str, Box]] = [
    ("face skin", (2, 14, 2, 14)),
    ("nose", (7, 9, 7, 9)),
    ("left eye", (5, 7, 3, 6)),
    ("right eye", (5, 7, 10, 13)),
    ("left brow", (3, 4, 3, 6)),
    ("right brow", (3, 4, 10, 13)),
    ("background", (6, 8, 1, 3)),
    ("inner mouth", (11, 12, 5, 11)),
    ("upper lip", (10, 11, 5, 11)),
    ("lower lip", (12, 13, 5, 11)),
    ("hair", (0, 3, 1, 15)),
    ("background", (0, 1, 1, 15)),
]


def face_mask() -> np.ndarray:
    mask = np.zeros((16, 16), np.uint8)
    for name, (top, bottom, left, right) in FACE:
        mask[top:bottom, left:right] = HELEN_CLASSES.index(name)
    return mask


def exchanged(mask: np.ndarray) -> np.ndarray:
    others = np.arange(256, dtype=np.uint8)
    others[[2, 3, 4, 5]] = [3, 2, 5, 4]
    return others[mask]


def write_image(path: Path, size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", (size, size), (200, 150, 120)).save(path)


def write_celebamask(root: Path, numbers: tuple[int, ...], persons_side: bool = False, mode: str = "RGB") -> Path:
    """Faces of 32x32 px with parts of 16x16; with `persons_side`, l_ and r_ are the person's own left and right."""
    for number in numbers:
        write_image(root / f"CelebA-HQ-img/{number}.jpg", 32)
        folder = root / f"CelebAMask-HQ-mask-anno/{number // 2000}"
        folder.mkdir(parents=True, exist_ok=True)
        for part, (top, bottom, left, right) in PARTS.items():
            drawn = np.zeros((16, 16), np.uint8)
            drawn[top:bottom, left:right] = 255
            name = part
            if persons_side and part in ("l_eye", "r_eye", "l_brow", "r_brow", "l_ear"):
                name = {"l": "r", "r": "l"}[part[0]] + part[1:]
            PIL.Image.fromarray(drawn).convert(mode).save(folder / f"{number:05d}_{name}.png")
    return root


def write_lapa(root: Path, mask: np.ndarray) -> Path:
    for split, names in {"train": ("a_0", "b,c"), "val": ("d",), "test": ("e",)}.items():
        for name in names:
            write_image(root / split / f"images/{name}.jpg", 16)
            (root / split / "labels").mkdir(exist_ok=True)
            PIL.Image.fromarray(mask).save(root / split / f"labels/{name}.png")
    return root


def masks_of(conversion: Conversion, split: str) -> dict[str, np.ndarray]:
    dataset = HelenDataset(conversion.root, split)
    return {name: dataset[index][1].numpy() for index, name in enumerate(dataset.ids)}


@pytest.mark.parametrize("persons_side", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_celebamask_parts_become_helens_classes(tmp_path: Path, persons_side: bool, mode: str) -> None:
    source = write_celebamask(tmp_path / "source", (3, 10, 2008, 2009, 2010), persons_side, mode)
    conversion = convert_celebamask(source, tmp_path / "made/faces")
    assert conversion == (tmp_path / "made/faces", {"train": 3, "val": 1, "test": 1}, persons_side)
    expected = face_mask().repeat(2, 0).repeat(2, 1)
    train = masks_of(conversion, "train")
    assert list(train) == ["3", "10", "2010"]
    for mask in (*train.values(), masks_of(conversion, "val")["2008"], masks_of(conversion, "test")["2009"]):
        assert np.array_equal(mask, expected)
    image = (conversion.root / "images/3.jpg").read_bytes()
    assert image == (source / "CelebA-HQ-img/3.jpg").read_bytes()
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["faces"], "no scratch is left"


def test_parts_that_are_not_seen_have_no_pixel(tmp_path: Path) -> None:
    source = write_celebamask(tmp_path / "source", (1, 2))
    for part in ("l_eye", "hair", "skin"):
        (source / f"CelebAMask-HQ-mask-anno/0/00001_{part}.png").unlink()
    mask = masks_of(convert_celebamask(source, tmp_path / "faces"), "train")["1"]
    assert not np.isin(mask, [1, 4, 10]).any()
    assert np.isin([2, 3, 5, 6, 7, 8, 9], mask).all()


def test_celebamask_split_by_celebas_lists(tmp_path: Path) -> None:
    numbers = (0, 1, 2, 3)
    source = write_celebamask(tmp_path / "source", numbers)
    celeba = (162770, 162771, 182637, 182638)
    lines = [f"{index} {number - 1} {number:06d}.jpg" for index, number in zip(numbers, celeba, strict=True)]
    mapping = source / "CelebA-HQ-to-CelebA-mapping.txt"
    mapping.write_text("\n".join(["idx  orig_idx  orig_file", *lines, "4 7 000008.jpg"]))
    by_number = convert_celebamask(source, tmp_path / "one")
    assert [list(masks_of(by_number, split)) for split in ("train", "val", "test")] == [["0"], ["1", "2"], ["3"]]
    groups = "".join(f"{number:06d}.jpg {group}\n" for number, group in zip((8, *celeba), (0, 2, 1, 0, 0), strict=True))
    (source / "list_eval_partition.txt").write_text(groups)
    by_list = convert_celebamask(source, tmp_path / "other")
    assert [list(masks_of(by_list, split)) for split in ("train", "val", "test")] == [["2", "3"], ["1"], ["0"]]


@pytest.mark.parametrize(
    ("mapping", "partition", "message"),
    [
        ("0 5", None, r"mapping.txt has the line '0 5'; a line reads, for example, '0 119613 119614.jpg'"),
        ("0 5 ../6.jpg", None, r"mapping.txt has the line '0 5 ../6.jpg'"),
        ("1 5 000006.jpg", None, r"mapping.txt has no line for 0.jpg \(1 such images\)"),
        ("0 5 000006.jpg", "000006.jpg 3", r"list_eval_partition.txt has the line '000006.jpg 3'"),
        ("0 5 000006.jpg", "000007.jpg 0", r"list_eval_partition.txt has no line for 000006.jpg"),
    ],
)
def test_lists_that_are_not_understood(tmp_path: Path, mapping: str, partition: str | None, message: str) -> None:
    source = write_celebamask(tmp_path / "source", (0,))
    (source / "CelebA-HQ-to-CelebA-mapping.txt").write_text(mapping)
    if partition:
        (source / "list_eval_partition.txt").write_text(partition)
    with pytest.raises(ValueError, match=message):
        convert_celebamask(source, tmp_path / "faces")


@pytest.mark.parametrize("persons_side", [False, True])
def test_lapa_keeps_its_classes(tmp_path: Path, persons_side: bool) -> None:
    mask = face_mask()
    source = write_lapa(tmp_path / "source", exchanged(mask) if persons_side else mask)
    conversion = convert_lapa(source, tmp_path / "faces")
    assert conversion == (tmp_path / "faces", {"train": 2, "val": 1, "test": 1}, persons_side)
    for split, names in {"train": ["a_0", "b,c"], "val": ["d"], "test": ["e"]}.items():
        masks = masks_of(conversion, split)
        assert list(masks) == names
        assert all(np.array_equal(made, mask) for made in masks.values())


def test_sides_are_those_of_most_faces_and_kept_where_none_shows_both(tmp_path: Path) -> None:
    """A single face upside down, and faces in profile, do not change the decision."""
    source = write_lapa(tmp_path / "source", face_mask())
    PIL.Image.fromarray(face_mask()[::-1, ::-1]).save(source / "train/labels/a_0.png")
    assert not convert_lapa(source, tmp_path / "upright").exchanged
    profile = np.where(np.isin(face_mask(), [2, 4]), 0, face_mask()).astype(np.uint8)
    assert not convert_lapa(write_lapa(tmp_path / "profiles", profile), tmp_path / "profile").exchanged


def test_progress_counts_the_faces(tmp_path: Path) -> None:
    seen = []
    convert_lapa(
        write_lapa(tmp_path / "source", face_mask()), tmp_path / "faces", lambda done, total: seen.append((done, total))
    )
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def unlink_masks(source: Path) -> None:
    for path in (source / "CelebAMask-HQ-mask-anno/0").glob("00009_*"):
        path.unlink()


def save(path: str, image: PIL.Image.Image) -> Callable[[Path], None]:
    return lambda source: image.save(source / path)


def cut(path: str) -> Callable[[Path], None]:
    return lambda source: (source / path).write_bytes((source / path).read_bytes()[:50]) and None


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (unlink_masks, FileNotFoundError, r"img/9.jpg has no masks: there is no .*0/00009_skin.png and no other part"),
        (save("CelebA-HQ-img/x.jpg", PIL.Image.new("L", (32, 32))), ValueError, "x.jpg is not named by a number"),
        (save("CelebA-HQ-img/09.jpg", PIL.Image.new("L", (32, 32))), ValueError, "9.jpg .* have the same name"),
        (save("CelebA-HQ-img/9.jpg", PIL.Image.new("L", (32, 24))), ValueError, "16x16 px .*other prop.*9.jpg, 24x32"),
        (
            save("CelebAMask-HQ-mask-anno/0/00009_nose.png", PIL.Image.new("L", (8, 16))),
            ValueError,
            "00009_nose.png is 16x8 px, but other parts of this face 16x16",
        ),
        (cut("CelebAMask-HQ-mask-anno/0/00009_hair.png"), OSError, "00009_hair.png is a damaged image"),
        (cut("CelebA-HQ-img/9.jpg"), OSError, "9.jpg cannot be opened as an image"),
    ],
)
def test_what_is_wrong_in_celebamask_is_named_and_nothing_is_left(
    tmp_path: Path, change: Callable[[Path], None], error: type[Exception], message: str
) -> None:
    source = write_celebamask(tmp_path / "source", (8, 9))
    change(source)
    with pytest.raises(error, match=message):
        convert_celebamask(source, tmp_path / "faces")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda source: (source / "val/labels/d.png").unlink(), FileNotFoundError, "d.png is missing, the mask of"),
        (lambda source: (source / "test/images/e.jpg").unlink(), FileNotFoundError, r"images holds no images"),
        (
            save("val/labels/d.png", PIL.Image.new("L", (16, 16), 11)),
            ValueError,
            r"d.png holds the value 11 \(2",
        ),
        (
            save("val/labels/d.png", PIL.Image.new("L", (16, 16), 255)),
            ValueError,
            r"d.png holds the value 255 .*; LaPa has",
        ),
        (save("val/labels/d.png", PIL.Image.new("L", (16, 8))), ValueError, "d.png is 8x16 px .* image is 16x16"),
        (save("val/labels/d.png", PIL.Image.new("RGB", (16, 16))), ValueError, "d.png holds colours"),
        (lambda source: (source / "val/images/d.jpg").rename(source / "val/images/e.jpg"), FileNotFoundError, "e.png"),
    ],
)
def test_what_is_wrong_in_lapa_is_named_and_nothing_is_left(
    tmp_path: Path, change: Callable[[Path], None], error: type[Exception], message: str
) -> None:
    source = write_lapa(tmp_path / "source", face_mask())
    change(source)
    with pytest.raises(error, match=message):
        convert_lapa(source, tmp_path / "faces")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_two_splits_may_not_share_a_name(tmp_path: Path) -> None:
    source = write_lapa(tmp_path / "source", face_mask())
    for folder, suffix in (("images", ".jpg"), ("labels", ".png")):
        (source / "val" / folder / f"d{suffix}").rename(source / "val" / folder / f"e{suffix}")
    with pytest.raises(ValueError, match=r"val/images/e.jpg and .*test/images/e.jpg have the same name"):
        convert_lapa(source, tmp_path / "faces")


def test_a_failure_late_leaves_nothing(tmp_path: Path) -> None:
    source = write_lapa(tmp_path / "source", face_mask())

    def stop(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_lapa(source, tmp_path / "faces", stop)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_an_existing_target_is_left_alone(tmp_path: Path) -> None:
    source = write_lapa(tmp_path / "source", face_mask())
    (tmp_path / "faces").mkdir()
    (tmp_path / "faces/mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=re.escape(f"{tmp_path / 'faces'} exists; name a folder that does not")):
        convert_lapa(source, tmp_path / "faces")
    assert [path.name for path in (tmp_path / "faces").iterdir()] == ["mine.txt"]


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    write_lapa(tmp_path / "lapa", exchanged(face_mask()))
    main(["convert", "lapa", "lapa", "faces"])
    shown = capsys.readouterr().out
    expected = "2 train, 1 val, 1 test faces are in faces; the source's left was the person's left, now exchanged\n"
    assert shown == expected
    assert len(HelenDataset("faces", "train")) == 2
    write_celebamask(tmp_path / "celeba", (0, 8))
    main(["convert", "celebamask", "celeba", "other"])
    assert capsys.readouterr().out.startswith("1 train, 1 val, 0 test faces are in other; the source's left was the v")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("lapa nowhere faces", "rfield convert: nowhere/train/images holds no images"),
        ("helen nowhere faces", "celebamask.*lapa.*helen"),
        ("lapa nowhere", "target"),
    ],
)
def test_mistakes_are_answered_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        main(["convert", *words.split()])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error), error
    assert not list(tmp_path.iterdir())


@pytest.mark.shared
def test_the_sides_of_real_faces(shared: Path, tmp_path: Path) -> None:
    """The FASSEG faces as if they were LaPa's: their "left" is the person's own."""
    faces = HelenDataset(shared / "data/fasseg_helen", "val")
    for split in ("train", "val", "test"):
        for folder in ("images", "labels"):
            (tmp_path / "source" / split / folder).mkdir(parents=True)
    stored = {}
    for index in range(0, len(faces), 5):
        split = ("train", "val", "test")[index // 5 % 3]
        image = tmp_path / "source" / split / f"images/{faces.ids[index]}.jpg"
        image.write_bytes(faces.image_paths[index].read_bytes())
        stored[faces.ids[index]] = faces[index][1].numpy()
        PIL.Image.fromarray(stored[faces.ids[index]]).save(
            tmp_path / "source" / split / f"labels/{faces.ids[index]}.png"
        )
    conversion = convert_lapa(tmp_path / "source", tmp_path / "faces")
    assert conversion.exchanged
    for split in ("train", "val", "test"):
        for name, mask in masks_of(conversion, split).items():
            assert np.array_equal(mask, exchanged(stored[name]))
