"""Images and masks of unknown layout become the folder layout."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import yaml
from tests.segmentation.data.test_options import FORMATS, make

from rfield.segmentation.cli import main
from rfield.segmentation.data import FolderDataset, check_data, load_dataset
from rfield.segmentation.data.convert_masks import convert_masks, list_colours
from rfield.segmentation.data.files import new_folder
from rfield.segmentation.data.looks_like import looks_like
from rfield.segmentation.data.pairing import find_pairs

SKY, ROAD, CAR = (70, 130, 180), (128, 64, 128), (0, 0, 142)
SIZE = (12, 16)


def write(root: Path, image: str, mask: str, colours: tuple[tuple[int, ...], ...] = (SKY, ROAD, CAR)) -> None:
    """Write an image and a mask of stripes of the colours, in RGB."""
    random = np.random.default_rng(list(image.encode()))
    mask_pixels = np.array(colours, np.uint8)[np.arange(16) * len(colours) // 16][None].repeat(12, 0)
    for name, pixels in ((image, random.integers(0, 256, (*SIZE, 3), np.uint8)), (mask, mask_pixels)):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(pixels).save(root / name)


LAYOUTS = {
    "two folders": ("images/{}.jpg", "masks/{}.png"),
    "two folders of other names": ("photos/{}.png", "colour/{}.png"),
    "an ending": ("all/{}.jpg", "all/{}_mask.png"),
    "an unusual ending": ("all/{}.png", "all/{}_L.png"),
    "an ending in two folders": ("a/{}.jpg", "b/{}.colour.png"),
    "another file suffix": ("{}.jpg", "{}.png"),
    "words": ("x/image_{}.png", "x/mask_{}.png"),
    "words in two folders": ("Images/img-{}.JPG", "Labels/label-{}.PNG"),
    "by folder": ("{}/image.png", "{}/mask.png"),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_pairs_are_found_in_any_layout(tmp_path: Path, layout: tuple[str, str]) -> None:
    for name in ("01", "02", "03"):
        write(tmp_path, *(part.format(name) for part in layout))
    pairs = [(str(p.image.relative_to(tmp_path)), str(p.labels.relative_to(tmp_path))) for p in find_pairs(tmp_path)]
    assert pairs == [tuple(part.format(name) for part in layout) for name in ("01", "02", "03")]


@pytest.mark.parametrize(
    "layout",
    [
        ("{}/images/{}.jpg", "{}/masks/{}.png"),
        ("images/{}/{}.jpg", "labels/{}/{}.png"),
        ("{}/{}.jpg", "{}_labels/{}.png"),
        ("{}/{}.jpg", "{}/{}_mask.png"),
    ],
)
def test_splits_of_the_source_are_kept_though_names_repeat(tmp_path: Path, layout: tuple[str, str]) -> None:
    for split in ("train", "valid", "test"):
        for name in ("1", "2"):
            write(tmp_path / "source", *(part.format(split, name) for part in layout))
    (tmp_path / "c.csv").write_text("name, r, g, b\nsky,70,130,180\nroad,128,64,128\ncar,0,0,142\n")
    made = convert_masks(tmp_path / "source", tmp_path / "data", tmp_path / "c.csv")
    assert made.counts == {"test": 2, "train": 2, "val": 2}
    assert check_data(f"folder:{tmp_path / 'data'}") == []
    assert sorted(path.stem for path in (tmp_path / "data/val/masks").iterdir()) == ["1", "2"]


def test_listed_colours_become_classes(tmp_path: Path) -> None:
    for index in range(10):
        write(tmp_path / "s", f"{index}.jpg", f"{index}_mask.png", (SKY, SKY, ROAD, CAR) if index else (SKY, ROAD))
    before = sorted(tmp_path.rglob("*"))
    text = list_colours(tmp_path / "s", "data")
    assert sorted(tmp_path.rglob("*")) == before
    assert f"rfield convert masks {tmp_path / 's'} data --colours colours.yaml" in text
    assert "class_0: [70, 130, 180]  # 50.00% of the pixels, in 10 of 10 masks" in text
    assert "class_2: [0, 0, 142]  # 22.50% of the pixels, in 9 of 10 masks" in text
    colours = {"sky": list(SKY), "ground": [list(ROAD)]}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"colours": colours, "ignore": [list(CAR)]}, sort_keys=False))
    made = convert_masks(tmp_path / "s", tmp_path / "data", tmp_path / "c.yaml", val=0.3)
    assert made.counts == {"train": 7, "val": 3}
    assert made.shares == pytest.approx({"sky": 80 / 124, "ground": 44 / 124})
    dataset = FolderDataset(tmp_path / "data", "train")
    assert (dataset.class_names, dataset.palette[:2]) == (("sky", "ground"), [SKY, ROAD])
    index = next(index for index, name in enumerate(dataset.ids) if name != "0")
    assert dataset[index][1][0].tolist() == [0] * 8 + [1] * 4 + [255] * 4
    assert check_data(f"folder:{tmp_path / 'data'}") == []
    # The listing itself can be used, and the split depends on the names and the seed alone.
    (tmp_path / "listed.yaml").write_text(text)
    (tmp_path / "s").rename(tmp_path / "moved")
    for seed, same in ((0, True), (1, False)):
        convert_masks(tmp_path / "moved", tmp_path / f"again{seed}", tmp_path / "listed.yaml", val=0.3, seed=seed)
        ids = FolderDataset(tmp_path / f"again{seed}", "val").ids
        assert (ids == FolderDataset(tmp_path / "data", "val").ids) == same


def test_palette_and_grey_masks_are_read_by_their_colours(tmp_path: Path) -> None:
    values = np.repeat(np.array([[1, 3]], np.uint8), 12, 0).repeat(8, 1)
    for index in range(2):
        write(tmp_path / "s", f"{index}.jpg", f"{index}.png")
        mask = PIL.Image.fromarray(values)
        if index:
            mask.putpalette([9, 9, 9, 1, 1, 1, 9, 9, 9, 3, 3, 3])
        mask.save(tmp_path / f"s/{index}.png")
    assert "class_1: [3, 3, 3]  # 50.00%" in list_colours(tmp_path / "s")
    mask.putpalette([9, 9, 9, 1, 1, 1, 9, 9, 9, 1, 1, 1])
    mask.save(tmp_path / "s/1.png")
    with pytest.raises(ValueError, match=r"1\.png draws the values 1 and 3 in one colour of its palette"):
        list_colours(tmp_path / "s")


def test_what_is_refused_leaves_nothing_behind(tmp_path: Path) -> None:
    colours = tmp_path / "c.yaml"
    colours.write_text("colours: {sky: [70, 130, 180], road: [128, 64, 128]}\n")
    source, target = tmp_path / "s", tmp_path / "data"

    def refused(words: str, error: type[Exception] = ValueError) -> None:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(error, match=words):
            convert_masks(source, target, colours)
        assert sorted(tmp_path.rglob("*")) == before

    refused("s is not a folder", FileNotFoundError)
    write(source, "images/a.jpg", "masks/a.png", (SKY, ROAD))
    refused("s has 1 image for train and val, and val is 0.2: both splits need one")
    write(source, "images/b.jpg", "masks/b.png")
    refused(r"b\.png holds the colour \[0, 0, 142\] \(60 px\), which no class has; .* or `ignore` in .*c\.yaml")
    PIL.Image.new("RGB", (5, 4), SKY).save(source / "masks/b.png")
    refused(r"b\.png is 4x5 px \(height x width\) but its image is 12x16")
    (source / "masks/b.png").unlink()
    refused(r"b\.jpg is neither a mask nor has one \(1 of 3 image files have no counterpart\)")
    (source / "images/b.jpg").unlink()
    (source / "images/b.jpg").symlink_to(colours)
    (source / "masks/b.png").symlink_to(colours)
    refused("is a link to a file outside")
    for path in (source / "images/b.jpg", source / "masks/b.png"):
        path.unlink()
    for text, words in (
        ("{sky: [0, 0, 0]}", "c.yaml: it must have the key colours"),
        ("colours: {sky: [0, 0]}", "c.yaml: colours must hold names and colours"),
        ("colours: {sky: [0, 0, 0], road: [0, 0, 0]}", r"c\.yaml: the colour \[0, 0, 0\] occurs twice"),
    ):
        colours.write_text(text)
        refused(words)
    write(source, "images/b.jpg", "masks/b.png", (SKY, ROAD))
    colours.write_text("colours: {sky: [70, 130, 180], road: [128, 64, 128]}\n")
    target.mkdir()
    refused("data exists; name a folder that does not", FileExistsError)
    noise = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), np.uint8)
    PIL.Image.fromarray(noise).save(source / "masks/b.png")
    PIL.Image.fromarray(noise[::-1] // 2).save(source / "masks/a.png")
    with pytest.raises(ValueError, match=r"but there may be 255 classes; .* JPEG and smooth resizing blend colours"):
        list_colours(source)


def shape(label: str, points: list[list[float]], kind: str = "polygon", **values: str) -> dict[str, object]:
    return {"label": label, "points": points, "shape_type": kind, **values}


def labelme(root: Path, name: str, shapes: list[dict[str, object]], height: int = 12) -> None:
    root.mkdir(exist_ok=True)
    PIL.Image.new("RGB", (16, 12), (len(name), *name.encode()[:1], 0)).save(root / f"{name}.jpg")
    content = {"imagePath": f"{name}.jpg", "imageHeight": height, "imageWidth": 16, "shapes": shapes}
    (root / f"{name}.json").write_text(json.dumps(content))


def _encoded(drawn: np.ndarray) -> str:
    file = io.BytesIO()
    PIL.Image.fromarray(drawn).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


PNG = _encoded(np.eye(3) > 0)


def test_labelme_files_are_drawn(tmp_path: Path) -> None:
    shapes = [
        shape("dog", [[0, 0], [7, 0], [7, 11], [0, 11]]),
        shape("cat", [[5, 4], [2, 2]], "rectangle"),
        shape("__ignore__", [[12, 6], [12, 8]], "circle"),
        shape("cat", [[13, 0], [15, 2]], "mask", mask=PNG),
    ]
    labelme(tmp_path / "s", "a", shapes)
    labelme(tmp_path / "s", "b", [])
    made = convert_masks(tmp_path / "s", tmp_path / "data", val=0.5)
    assert made.counts == {"train": 1, "val": 1}
    split = next(path.parts[-3] for path in (tmp_path / "data").rglob("a.jpg"))
    dataset = FolderDataset(tmp_path / "data", split)
    assert dataset.class_names == ("background", "cat", "dog")
    mask = dataset[0][1]
    assert mask[3].tolist()[:9] == [2, 2, 1, 1, 1, 1, 2, 2, 0]
    assert (mask == 1).sum() == 12 + 3
    assert [int(mask[6, 12]), int(mask[6, 9]), int(mask[1, 14]), int(mask[1, 13])] == [255, 0, 1, 0]
    (tmp_path / "s/b.json").unlink()
    with pytest.raises(ValueError, match=r"b\.jpg has no LabelMe file \(1 of 2"):
        convert_masks(tmp_path / "s", tmp_path / "other")


@pytest.mark.parametrize(
    ("height", "shapes", "words"),
    [
        (11, [], r"a\.json is for an image of 11x16 px .*but .*a\.jpg has 12x16"),
        (12, [shape("x", [[0, 0], [1, 1]], "line")], r"a\.json: shape 0 \('x'\): it is a line of 2 points"),
        (12, [shape("x", [["a", 0], [1, 1], [0, 1]])], r"shape 0 \('x'\): a point must be two numbers, got 'a'"),
        (12, [shape("x", [[0], [1, 1], [0, 1]])], r"a\.json: shape 0 \('x'\): not enough values"),
        (12, [shape("x", [[0, 0], [1, 1]], "mask", mask="?")], r"shape 0 \('x'\): its mask is no PNG image"),
        (12, [shape("x", [[0, 0]] * 2, "mask", mask=f"!{PNG}")], r"shape 0 \('x'\): its mask is no PNG image"),
        (12, [shape(" ", [])], r"a\.json: shape 0 has no label"),
    ],
)
def test_labelme_files_that_are_not_understood(
    tmp_path: Path, height: int, shapes: list[dict[str, object]], words: str
) -> None:
    labelme(tmp_path / "s", "a", shapes, height)
    labelme(tmp_path / "s", "b", [])
    with pytest.raises(ValueError, match=words):
        convert_masks(tmp_path / "s", tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_a_new_folder_is_hidden_until_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "a/data"
    with pytest.raises(KeyError), new_folder(target):
        raise KeyError
    with new_folder(target) as made:
        (made / "x").touch()
        (hidden,) = target.parent.iterdir()
        assert hidden.name.startswith(".data")
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == [
        "a",
        "a/data",
        "a/data/x",
    ]
    with pytest.raises(FileExistsError, match="data exists; name a folder that does not"), new_folder(target):
        pass


def test_a_folder_of_no_layout_says_what_it_looks_like(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    for index in range(2):
        write(root, f"{index}.jpg", f"{index}_mask.png")
    wanted = f"{root} looks like 2 images with masks: run `rfield convert masks {root} NEW_FOLDER`"
    assert [finding.text for finding in check_data(f"folder:{root}", ["train"])][1:] == [wanted]
    with pytest.raises(ValueError, match=f"names a folder without its format; {wanted}"):
        load_dataset(str(root))
    (root / "0.jpg").unlink()
    assert "cannot be converted: " in looks_like(root)
    labelme(tmp_path / "drawn", "a", [])
    assert "looks like 1 image with LabelMe files" in looks_like(tmp_path / "drawn")
    (tmp_path / "faces/CelebA-HQ-img").mkdir(parents=True)
    assert looks_like(tmp_path / "faces").endswith(f"`rfield convert celebamask {tmp_path / 'faces'} NEW_FOLDER`")


@pytest.mark.parametrize("layout", FORMATS)
def test_known_layouts_are_recognised(tmp_path: Path, layout: str) -> None:
    root = tmp_path / "unpacked" / layout
    make(root, layout, np.zeros(SIZE, np.uint8), "a\nb" if layout == "folder" else None)
    for place in (root, root.parent):
        assert looks_like(place) == f"{root} looks like {layout}: run `rfield check-data {layout}:{root}`"


def test_the_command_lists_first_and_converts_then(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for index in range(3):
        write(tmp_path / "s", f"{index}.jpg", f"{index}_mask.png")
    words = ["convert", "masks", str(tmp_path / "s"), str(tmp_path / "data")]
    main(words)
    listed = capsys.readouterr().out
    assert not (tmp_path / "data").exists()
    (tmp_path / "colours.yaml").write_text(listed)
    main([*words, "--colours", str(tmp_path / "colours.yaml"), "--val", "0.5"])
    said = capsys.readouterr().out
    assert "1 train, 2 val images are in" in said
    assert "class_0 37.5%, class_1 31.2%, class_2 31.2%" in said
    assert f"now run: rfield check-data folder:{tmp_path / 'data'}" in said
    labelme(tmp_path / "drawn", "a", [])
    labelme(tmp_path / "drawn", "b", [shape("x", [[0, 0], [9, 9]], "rectangle")])
    main(["convert", "masks", str(tmp_path / "drawn"), str(tmp_path / "of_shapes")])
    assert "background 74.0%, x 26.0%" in capsys.readouterr().out
    for given, wanted in (
        (["masks", "a", "b", "--val", "1"], "val must lie"),
        (["lapa", "a", "b", "--seed", "1"], "are options of masks"),
    ):
        with pytest.raises(SystemExit):
            main(["convert", *given])
        assert wanted in capsys.readouterr().err
