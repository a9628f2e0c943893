"""Mask options of a data config: values without a label, a zero label, colours, suffixes, mirrored classes."""

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import yaml

from rfield.segmentation.data import AugmentedDataset, check_data, load_dataset, training_transform
from rfield.segmentation.data.masks import MaskCode, plain_labels
from rfield.segmentation.data.sides import unlisted_pairs

IMAGE = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
FORMATS = ("voc", "camvid", "helen", "cityscapes", "folder")
MASKS = {
    "voc": "SegmentationClass/a.png",
    "camvid": "trainannot/a.png",
    "helen": "labels/a/a_lbl00.png",
    "cityscapes": "gtFine/train/ulm/a_gtFine_labelIds.png",
    "folder": "train/masks/a.png",
}
IMAGES = {
    "voc": "JPEGImages/a.jpg",
    "camvid": "train/a.png",
    "helen": "images/a.jpg",
    "cityscapes": "leftImg8bit/train/ulm/a_leftImg8bit.png",
    "folder": "train/images/a.png",
}
LISTS = {
    "voc": ("ImageSets/Segmentation/train.txt", "a"),
    "camvid": ("train.txt", "train/a.png trainannot/a.png"),
    "helen": ("exemplars.txt", "1 , a"),
}


def make(root: Path, layout: str, mask: np.ndarray, classes: str | None = None) -> Path:
    """Make a data set of one sample in a layout, and return a data config without options."""
    for path in (root / MASKS[layout], root / IMAGES[layout]):
        path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(IMAGE).save(root / IMAGES[layout])
    if layout == "helen":
        for label in range(11):
            path = (root / MASKS[layout]).with_name(f"a_lbl{label:02d}.png")
            PIL.Image.fromarray(np.uint8(255 * (mask == label))).save(path)
    else:
        PIL.Image.fromarray(mask).save(root / MASKS[layout])
    if layout in LISTS:
        path = root / LISTS[layout][0]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(LISTS[layout][1])
    if classes is not None:
        (root / "classes.txt").write_text(classes)
    config = root.parent / f"{layout}.yaml"
    config.write_text(yaml.safe_dump({"format": layout, "root": root.name}))
    return config


def say(config: Path, **options: Any) -> str:
    """The config with options."""
    config.write_text(yaml.safe_dump({**yaml.safe_load(config.read_text()), **options}, sort_keys=False))
    return str(config)


def columns(*values: int) -> np.ndarray:
    """A mask of upright stripes."""
    return np.repeat(np.array(values, np.uint8), 16 // len(values))[None].repeat(12, axis=0)


def stripes(spec: str) -> list[int]:
    """The labels of the first sample's stripes, of four px."""
    mask = load_dataset(spec)[0][1]
    return mask[0, ::4].tolist()


@pytest.mark.parametrize("layout", FORMATS)
def test_values_without_a_label(tmp_path: Path, layout: str) -> None:
    classes = "\n".join("abcdefghijk") if layout == "folder" else None
    config = make(tmp_path / "data", layout, columns(0, 7, 8, 3), classes)
    plain = {"cityscapes": [255, 0, 1, 255]}.get(layout, [0, 7, 8, 3])
    before = load_dataset(str(config))
    assert stripes(str(config)) == plain
    assert stripes(say(config, ignore=0)) == [255, *plain[1:]]
    assert stripes(say(config, ignore=[0, 7])) == [255, 255, *plain[2:]]
    assert load_dataset(str(config)).class_names == before.class_names
    assert load_dataset(str(config)).fingerprint() != before.fingerprint()


@pytest.mark.parametrize("layout", FORMATS)
def test_a_zero_label_is_left_out(tmp_path: Path, layout: str) -> None:
    """The first class has the value 1; a background of the format's own classes is left out."""
    classes = "\n".join("abcdefghijk") if layout in ("folder", "camvid") else None
    config = make(tmp_path / "data", layout, columns(0, 8, 1, 10), classes)
    names = load_dataset(str(config)).class_names
    spec = say(config, reduce_zero_label=True)
    reduced = load_dataset(spec).class_names
    assert reduced == (names[1:] if layout in ("voc", "helen") else names)
    # In Cityscapes the value 8 then means the label id 7 (road); 1 and 10 mean the unscored 0 and 9.
    assert stripes(spec) == ([255, 0, 255, 255] if layout == "cityscapes" else [255, 7, 0, 9])
    assert stripes(say(config, ignore=10))[3] == 255  # the values are those in the file


def test_a_zero_label_moves_every_value_by_one(tmp_path: Path) -> None:
    config = make(tmp_path / "data", "folder", columns(0, 3, 255, 1), "a\nb\nc\n")
    assert stripes(say(config, reduce_zero_label=True)) == [255, 2, 255, 0]
    PIL.Image.fromarray(columns(0, 4, 255, 1)).save(tmp_path / "data" / MASKS["folder"])
    with pytest.raises(ValueError, match=r"holds the value 4 \(48 px\), which no class has"):
        stripes(str(config))
    config = make(tmp_path / "camvid", "camvid", columns(0, 11, 12, 1))
    assert stripes(say(config, reduce_zero_label=True)) == [255, 10, 255, 0]  # void is 12 then
    config = make(tmp_path / "voc", "voc", columns(0, 20, 255, 1))
    assert stripes(say(config, reduce_zero_label=True)) == [255, 19, 255, 0]
    PIL.Image.fromarray(columns(0, 21, 255, 1)).save(tmp_path / "voc" / MASKS["voc"])
    with pytest.raises(ValueError, match="holds the value 21"):
        stripes(str(config))


def test_a_background_at_value_one_is_asked_about(tmp_path: Path) -> None:
    config = make(tmp_path / "data", "folder", columns(0, 1, 2, 2), "background\nroad\ncar\n")
    told = [f.text for f in check_data(say(config, reduce_zero_label=True), ["train"])]
    assert sum("the first class, 'background', has the mask value 1" in text for text in told) == 1


COLOURS = {"road": [128, 64, 128], "car": [[0, 0, 142], [0, 0, 143]]}
PAINTED = np.array([(128, 64, 128), (0, 0, 142), (0, 0, 143), (0, 0, 0)], np.uint8)[columns(0, 1, 2, 3)]


@pytest.mark.parametrize("layout", ["voc", "camvid", "cityscapes", "folder"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colours_are_read_exactly(tmp_path: Path, layout: str, mode: str) -> None:
    config = make(tmp_path / "data", layout, PAINTED)
    path = tmp_path / "data" / MASKS[layout]
    image = PIL.Image.fromarray(PAINTED)
    (image.quantize(8) if mode == "P" else image.convert(mode)).save(path)
    spec = say(config, colours=COLOURS, ignore=[0, 0, 0])
    dataset = load_dataset(spec)
    assert dataset.class_names == ("road", "car")
    assert stripes(spec) == [0, 1, 1, 255]
    assert dataset.palette[:2] == [(128, 64, 128), (0, 0, 142)]
    assert [f for f in check_data(spec, ["train"]) if "background" not in f.text] == []


def test_unknown_colours_are_named_with_file_and_count(tmp_path: Path) -> None:
    config = make(tmp_path / "data", "folder", PAINTED)
    spec = say(config, colours={"road": [128, 64, 128], "car": [0, 0, 142]})
    words = r"masks/a.png holds the colours .*\[0, 0, 143\] \(48 px\).*; correct the mask, or name the colour"
    with pytest.raises(ValueError, match=words):
        load_dataset(spec)[0]
    (error,) = [f for f in check_data(spec, ["train"]) if f.level == "error"]
    assert "[0, 0, 0] (48 px)" in error.text
    assert "[0, 0, 143] (48 px)" in error.text


def test_grey_and_one_bit_masks_have_colours_too(tmp_path: Path) -> None:
    config = make(tmp_path / "data", "folder", columns(0, 255, 0, 255))
    spec = say(config, colours={"background": [0, 0, 0], "object": [255, 255, 255]})
    assert stripes(spec) == [0, 1, 0, 1]
    PIL.Image.fromarray(columns(0, 255, 0, 255)).convert("1").save(tmp_path / "data" / MASKS["folder"])
    assert stripes(spec) == [0, 1, 0, 1]
    PIL.Image.fromarray(columns(0, 255, 0, 255).astype(np.uint16)).save(tmp_path / "data" / MASKS["folder"])
    with pytest.raises(ValueError, match="more than 8 bits"):
        stripes(spec)


def test_classes_keep_the_order_of_classes_txt(tmp_path: Path) -> None:
    config = make(tmp_path / "data", "folder", PAINTED, "car\nroad\n")
    spec = say(config, colours=COLOURS, ignore=[[0, 0, 0]])
    assert (load_dataset(spec).class_names, stripes(spec)) == (("car", "road"), [1, 0, 0, 255])
    for text, message in (("car\n", "colours has road, but"), ("car\nroad\nsky\n", "colours lacks sky, but")):
        (tmp_path / "data/classes.txt").write_text(text)
        with pytest.raises(ValueError, match=rf"folder.yaml: {message} .*classes.txt names the classes"):
            load_dataset(spec)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ignore": "sky"}, "ignore must be a mask value of 0 to 255 or several, such as .*, got 'sky'"),
        ({"ignore": [0, 256]}, r"got \[0, 256\]"),
        ({"ignore": True}, "got True"),
        ({"ignore": -1}, "got -1"),
        ({"reduce_zero_label": 1}, "reduce_zero_label must be true or false, got 1"),
        ({"reduce_zero_label": True, "colours": COLOURS}, "reduce_zero_label does not fit colours"),
        ({"colours": [[1, 2, 3]]}, "colours must hold names and colours"),
        ({"colours": {}}, "colours must hold names and colours"),
        ({"colours": {"a": [1, 2]}}, r"got \[1, 2\] for a"),
        ({"colours": {"a": [1, 2, 256]}}, "for a"),
        ({"colours": {"a": "red"}}, "got 'red' for a"),
        ({"colours": {1: [1, 2, 3]}}, "got the name 1, put it in quotation marks"),
        ({"colours": {"a": [1, 2, 3], "b": [1, 2, 3]}}, r"the colour \[1, 2, 3\] occurs twice"),
        ({"colours": {"a": [1, 2, 3]}, "ignore": [1, 2, 3]}, r"the colour \[1, 2, 3\] occurs twice"),
        ({"colours": {"a": [1, 2, 3]}, "ignore": 0}, "ignore must be a colour .* beside colours, got 0"),
        ({"mask_suffix": 5}, "mask_suffix must be the end of a file's name, such as _mask, got 5"),
        ({"mask_suffix": "/../../x"}, "mask_suffix must be the end of a file's name"),
        ({"mirrored": "left"}, r"mirrored must hold pairs of classes, such as .*, got 'left'"),
        ({"mirrored": [["a", "b", "c"]]}, "mirrored must hold pairs"),
        ({"mirrored": [["a", 1]]}, "mirrored must hold pairs"),
        ({"mirrored": [["a", "b"], ["b", "c"]]}, "mirrored names 'b' twice"),
        ({"mirrored": [["a", "a"]]}, "mirrored names 'a' twice"),
        ({"mirrored": [["a", "bb"]]}, "mirrored names 'bb', but the classes are a, b, c; did you mean 'b'"),
        ({"colors": COLOURS}, r"unknown key colors \(did you mean colours\?\)"),
    ],
)
def test_options_that_are_not_understood_name_the_file(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    classes = None if "colours" in options else "a\nb\nc\n"
    config = make(tmp_path / "data", "folder", columns(0, 1, 2, 255), classes)
    with pytest.raises(ValueError, match=rf"folder\.yaml: {message}|folder\.yaml: .*{message}"):
        load_dataset(say(config, **options))


def test_colours_do_not_fit_maps(tmp_path: Path) -> None:
    config = make(tmp_path / "data", "helen", columns(0, 1, 2, 3))
    with pytest.raises(ValueError, match=r"helen.yaml: colours do not fit this format, whose masks are grey maps"):
        load_dataset(say(config, colours=COLOURS))


@pytest.mark.parametrize(
    ("layout", "suffix", "name"),
    [
        ("voc", "_gt", "SegmentationClass/a_gt.png"),
        ("voc", "-mask.tif", "SegmentationClass/a-mask.tif"),
        ("camvid", "_L", "trainannot/a_L.png"),
        ("helen", "_map", "labels/a/a_map{label:02d}.png"),
        ("cityscapes", "_gtFine_labelTrainIds", "gtFine/train/ulm/a_gtFine_labelTrainIds.png"),
        ("folder", "_label", "train/masks/a_label.PNG"),
    ],
)
def test_masks_with_a_suffix(tmp_path: Path, layout: str, suffix: str, name: str) -> None:
    classes = "a\nb\nc\nd\n" if layout == "folder" else None
    config = make(tmp_path / "data", layout, columns(0, 1, 2, 3), classes)
    mask = tmp_path / "data" / MASKS[layout]
    for label in range(11 if layout == "helen" else 1):
        old = mask.with_name(mask.name.replace("lbl00", f"lbl{label:02d}"))
        new = tmp_path / "data" / name.format(label=label)
        PIL.Image.open(old).save(new)
        old.unlink()
    with pytest.raises(FileNotFoundError, match="is missing"):
        load_dataset(str(config))
    assert stripes(say(config, mask_suffix=suffix)) == [0, 1, 2, 3]


@pytest.mark.parametrize("layout", ["voc", "camvid", "folder"])
def test_classes_that_a_mirror_exchanges(tmp_path: Path, layout: str) -> None:
    names = ["left_hand", "right_hand", *"cdefghijk"]
    config = make(tmp_path / "data", layout, columns(0, 2, 3, 1), "\n".join(names))
    plain = load_dataset(str(config))
    told = [f.text for f in check_data(str(config), ["train", "train"]) if "look like the left" in f.text]
    assert len(told) == 1
    assert "write `mirrored: [[left_hand, right_hand]]` in a data config" in told[0]

    spec = say(config, mirrored=[["left_hand", "right_hand"]])
    dataset = load_dataset(spec)
    assert (plain.mirrored_classes, dataset.mirrored_classes) == ((), ((0, 1),))
    assert not [f for f in check_data(spec, ["train"]) if "left and right of one" in f.text]
    transform = training_transform((12, 16), (1, 1), mirrored_classes=dataset.mirrored_classes)
    seen = {tuple(AugmentedDataset(dataset, transform, 0)[epoch, 0][1][0, ::4].tolist()) for epoch in range(12)}
    assert seen == {(0, 2, 3, 1), (0, 3, 2, 1)}
    assert not [f for f in check_data(say(config, mirrored=[]), ["train"]) if "left and right of one" in f.text]
    resized = load_dataset(say(config, size=[6, 8], mirrored=[["left_hand", "right_hand"]]))
    assert resized.mirrored_classes == ((0, 1),)


def test_the_pairs_of_helen_follow_its_classes(tmp_path: Path) -> None:
    config = make(tmp_path / "data", "helen", columns(0, 2, 3, 4))
    assert load_dataset(say(config, reduce_zero_label=True)).mirrored_classes == ((1, 2), (3, 4))
    assert load_dataset(say(config, mirrored=[])).mirrored_classes == ()


@pytest.mark.parametrize(
    ("names", "pairs"),
    [
        (["left_hand", "right_hand"], [(0, 1)]),
        (["Right-Arm", "bg", "Left-Arm"], [(0, 2)]),
        (["hand_left", "hand right"], [(0, 1)]),
        (["l_eye", "r_eye", "L-Ear", "R-Ear"], [(0, 1), (2, 3)]),
        (["EyeL", "EyeR", "LeftHand", "RightHand"], [(0, 1), (2, 3)]),
        (["lefthand", "righthand", "armleft", "armright"], [(0, 1), (2, 3)]),
        (["upper left leg", "upper right leg"], [(0, 1)]),
        (["left", "right", "L1", "R1"], [(0, 1), (2, 3)]),
        (["left_hand", "right_foot", "road", "car", "leftover", "light"], []),
    ],
)
def test_names_that_look_like_two_sides(names: list[str], pairs: list[tuple[int, int]]) -> None:
    assert unlisted_pairs(names, []) == [(names[one], names[other]) for one, other in pairs]
    assert unlisted_pairs(names, pairs) == []


def test_palettes_that_contradict_each_other(tmp_path: Path) -> None:
    config = make(tmp_path / "data", "folder", columns(0, 1, 2, 255), "a\nb\nc\n")
    folder = tmp_path / "data/train"

    def write(name: str, mask: np.ndarray, *colours: tuple[int, int, int]) -> None:
        PIL.Image.fromarray(np.roll(IMAGE, ord(name), axis=1)).save(folder / f"images/{name}.png")
        image = PIL.Image.fromarray(mask)
        image.putpalette([level for colour in (*colours, *[(9, 9, 9)] * 256)[:256] for level in colour])
        image.save(folder / f"masks/{name}.png")

    black, red, green = (0, 0, 0), (255, 0, 0), (0, 255, 0)
    write("a", columns(0, 1, 2, 255), black, red, red)  # two values of one colour in one file
    assert check_data(str(config), ["train"]) == []
    write("a", columns(0, 1, 2, 255), black, red, green)
    write("b", columns(0, 1, 1, 255), black, red, black, red)  # unused values may have any colour
    assert check_data(str(config), ["train"]) == []
    write("c", columns(0, 2, 2, 255), black, green, red)
    (finding,) = check_data(str(config), ["train"])
    assert (finding.level, finding.index) == ("warning", 2)
    assert f"c.png draws the value 2 in [255, 0, 0], but {folder / 'masks/a.png'} in [0, 255, 0]" in finding.text
    write("d", columns(0, 1, 2, 255), black, green, red)
    (finding,) = check_data(str(config), ["train"])
    assert "(2 masks contradict earlier ones); if the colours are right" in finding.text
    write("d", columns(0, 1, 1, 1), black, green)
    write("a", columns(0, 2, 2, 2), black, black, green)
    write("b", columns(0, 0, 0, 0), black)
    write("c", columns(0, 0, 0, 0), black)
    (finding,) = [f for f in check_data(str(config), ["train"]) if "colour" in f.text]
    assert "d.png has the colour [0, 255, 0] for the value 1, but" in finding.text
    assert not [
        f
        for f in check_data(say(config, colours={"a": [0, 0, 0], "b": [1, 1, 1], "c": [0, 255, 0]}), ["train"])
        if "for the value" in f.text
    ]


def test_masks_are_of_their_own(tmp_path: Path) -> None:
    """The options of one data set do not change the table of another."""
    config = make(tmp_path / "data", "cityscapes", columns(7, 8, 11, 12))
    plain = stripes(str(config))
    say(config, ignore=7)
    assert stripes(str(config)) == [255, *plain[1:]]
    assert stripes(f"cityscapes:{tmp_path / 'data'}") == plain
    assert torch.equal(*(load_dataset(f"cityscapes:{tmp_path / 'data'}")[0][1] for _ in range(2)))


def test_unknown_colours_are_counted_the_most_frequent_and_of_these_the_last_first() -> None:
    code = MaskCode(plain_labels(1), colours={(0, 0, 0): 0})
    values = np.concatenate([np.arange(64), [5, 5, 9, 1 << 16 | 2 << 8 | 3]])
    shown = ", ".join(
        [
            "[0, 0, 5] (3 px)",
            "[0, 0, 9] (2 px)",
            "[1, 2, 3] (1 px)",
            *(f"[0, 0, {n}] (1 px)" for n in (63, 62, 61, 60, 59)),
        ]
    )
    assert code.unknown(values, code.classes(values)) == f"holds the colours {shown} and 56 more, which no class has"
    plain, labels = MaskCode(plain_labels(3)), np.array([7, 1, 7, 4])
    assert plain.unknown(labels, plain.classes(labels)) == "holds the values 4 (1 px), 7 (2 px), which no class has"
    assert plain.unknown(labels[1:2], plain.classes(labels[1:2])) is None
