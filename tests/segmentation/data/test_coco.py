"""Annotations in COCO's format, as several tools export them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from rfield.segmentation.data import check_data, load_dataset
from rfield.segmentation.data.coco_masks import segment_pixels
from rfield.segmentation.data.looks_like import looks_like

SIZE = (6, 8)
CATEGORIES = [{"id": 0, "name": "things", "supercategory": "none"}, {"id": 7, "name": "cat", "supercategory": "things"},
              {"id": 3, "name": "dog", "supercategory": "things"}]  # fmt: skip


def runs(left: int, right: int) -> dict[str, Any]:
    """Run lengths of whole columns."""
    return {"size": list(SIZE), "counts": [6 * left, 6 * (right - left), 6 * (8 - right)]}


ANNOTATIONS = [
    {"image_id": 0, "category_id": 3, "segmentation": runs(1, 3), "iscrowd": 0},
    {"image_id": 0, "category_id": 7, "segmentation": runs(0, 4), "iscrowd": 0},
    {"image_id": 0, "category_id": 3, "segmentation": runs(2, 6), "iscrowd": 1},
]


def write(folder: Path, source: Path, count: int = 2, **changed: Any) -> Path:
    """Writes images 0.jpg, 1.jpg and annotations of the first."""
    for path in (folder, source.parent):
        path.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        pixels = np.random.default_rng([index, *str(folder).encode()]).integers(0, 256, (*SIZE, 3), np.uint8)
        PIL.Image.fromarray(pixels).save(folder / f"{index}.jpg")
    about = [{"id": index, "file_name": f"{index}.jpg", "height": 6, "width": 8} for index in range(count)]
    content = {"images": about, "annotations": ANNOTATIONS, "categories": CATEGORIES} | changed
    source.write_text(json.dumps(content))
    return source


EXPORTS: dict[str, Callable[[Path, str], Any]] = {
    "Roboflow": lambda root, split: write(root / split, root / split / "_annotations.coco.json"),
    "COCO": lambda root, split: write(
        root / f"{split}2017", root / f"annotations/instances_{split.replace('valid', 'val')}2017.json"
    ),
    "plain": lambda root, split: write(root / "images" / split, root / f"{split}.json"),
}


@pytest.mark.parametrize("export", EXPORTS)
def test_exports_with_splits(tmp_path: Path, export: str) -> None:
    for split in ("train", "valid"):
        EXPORTS[export](tmp_path, split)
    (tmp_path / "annotations").mkdir(exist_ok=True)
    (tmp_path / "annotations/captions_train2017.json").write_text("{}") if export == "COCO" else None
    dataset = load_dataset(f"coco:{tmp_path}")
    assert (dataset.ids, dataset.class_names) == (["0", "1"], ("background", "cat", "dog"))
    # The smaller dog lies over the cat, and the crowd below both.
    assert dataset[0][1][0].tolist() == [1, 2, 2, 1, 2, 2, 0, 0]
    assert dataset[1][1].unique().tolist() == [0]
    assert dataset.sizes() == [SIZE] * 2
    assert "valid" in str(load_dataset(f"coco:{tmp_path}", "val").image_paths[0]).replace("val2017", "valid")  # type: ignore[attr-defined]
    assert check_data(f"coco:{tmp_path}") == []
    assert check_data(f"coco:{tmp_path}", quick=True) == []
    assert export == "plain" or looks_like(tmp_path).endswith(f"`rfield check-data coco:{tmp_path}`")


@pytest.mark.parametrize(
    ("source", "prefix"), [("annotations/instances_default.json", ""), ("result.json", "images\\")]
)
def test_exports_without_splits_are_drawn(tmp_path: Path, source: str, prefix: str) -> None:
    about = [{"id": index, "file_name": f"{prefix}{index}.jpg"} for index in range(10)]
    write(tmp_path / "images", tmp_path / source, 10, images=about)
    train, val = (load_dataset(f"coco:{tmp_path}", split).ids for split in ("train", "val"))
    assert (len(train), len(val), len({*train, *val})) == (8, 2, 10)
    with pytest.raises(FileNotFoundError, match=r"has 0 JSON files of annotations for the split 'test' \(there are: "):
        load_dataset(f"coco:{tmp_path}", "test")
    config = tmp_path / "data.yaml"
    config.write_text(f"format: coco\nroot: .\nval: {source}\nmirrored: [[cat, dog]]\n")
    assert len(load_dataset(str(config), "val")) == 10
    assert load_dataset(str(config), "val").mirrored_classes == ((1, 2),)
    config.write_text("format: coco\nroot: .\nval: ../data.json\n")
    with pytest.raises(FileNotFoundError, match="is no file in"):
        load_dataset(str(config), "val")


def test_panoptic(tmp_path: Path) -> None:
    segments = [{"id": 1, "category_id": 7}, {"id": 256 * 256 + 2, "category_id": 3}]
    annotations = [{"image_id": 0, "file_name": "0.png", "segments_info": segments}]
    source = tmp_path / "annotations/panoptic_val2017.json"
    write(tmp_path / "val2017", source, 1, annotations=annotations)
    source.with_suffix("").mkdir()
    pixels = np.zeros((*SIZE, 3), np.uint8)
    pixels[:, :2], pixels[:, 2:4] = (1, 0, 0), (2, 0, 1)
    PIL.Image.fromarray(pixels).save(source.with_suffix("") / "0.png")
    dataset = load_dataset(f"coco:{tmp_path}", "val")
    assert dataset.class_names == ("cat", "dog")
    assert dataset[0][1][0].tolist() == [0, 0, 1, 1, 255, 255, 255, 255]
    segments[1]["category_id"] = 99
    write(tmp_path / "val2017", source, 1, annotations=annotations)
    with pytest.raises(ValueError, match=r"annotations\[0\]\.segments_info\[1\]: category_id 99 is no category"):
        load_dataset(f"coco:{tmp_path}", "val")[0]


def annotation(**changed: Any) -> dict[str, Any]:
    return {"annotations": [{**ANNOTATIONS[0], **changed}]}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"images": {}}, r"json has no list 'images' of objects"),
        ({"categories": [*CATEGORIES, CATEGORIES[1]]}, "but 'cat' is there twice"),
        (annotation(segmentation=[]), "holds no segments, only boxes"),
        (annotation(category_id=5), r"json: annotations\[0\]: category_id 5 is no category"),
        (annotation(segmentation="x"), r"annotations\[0\]: segmentation must be polygons or run lengths, got 'x'"),
        (annotation(segmentation={"size": [8, 6], "counts": [48]}), r"has the size \[8, 6\], but its image \[6, 8\]"),
        (annotation(segmentation={"size": [6, 8], "counts": [48, 10**12]}), "do not cover its 6x8 px"),
        (annotation(segmentation={"size": [6, 8], "counts": "~~"}), "do not cover its 6x8 px"),
        ({"images": [{"id": 0, "file_name": "0.jpg", "height": 8, "width": 6}]}, "annotated at 8x6 px .* has 6x8"),
        ({"images": [{"id": 0, "file_name": "../../x.jpg"}]}, r"names the image '../../x\.jpg', but .* has none"),
        ({"images": []}, "has no image for the split 'train'"),
    ],
)
def test_annotations_that_are_not_understood(tmp_path: Path, changed: dict[str, Any], words: str) -> None:
    write(tmp_path / "train", tmp_path / "train/_annotations.coco.json", **changed)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        load_dataset(f"coco:{tmp_path}")[0]
    assert [f.level for f in check_data(f"coco:{tmp_path}", ["train"])][:1] == ["error"]


def test_compressed_run_lengths_of_other_characters_are_refused() -> None:
    """48 px in 5 bits a character, which tell their end, and of at most seven."""
    for counts in ("`1", "`QPPPP0", "`10"):
        assert not segment_pixels({"size": [6, 8], "counts": counts}, SIZE, "").any()
    for counts in ("`q", "`1p", "`1/", "`QPPPPP0", "`Q"):
        with pytest.raises(ValueError, match="here: the run lengths of segmentation do not cover its 6x8 px"):
            segment_pixels({"size": [6, 8], "counts": counts}, SIZE, "here")


def test_segments_are_those_of_pycocotools() -> None:
    coco = pytest.importorskip("pycocotools.mask", reason="needs pycocotools: pip install 'rfield[coco]'")
    random = np.random.default_rng(0)
    for size in ((6, 8), (40, 31), (200, 300)):
        polygon = (random.random(10) * 2 * max(size) - 20).tolist()
        compressed = coco.frPyObjects([polygon], *size)[0]
        wanted = coco.decode(compressed) > 0
        text = {"size": list(size), "counts": compressed["counts"].decode()}
        assert (segment_pixels([polygon], size, "") == wanted).all()
        assert (segment_pixels(text, size, "") == wanted).all()
        noise = coco.encode(np.asfortranarray(random.random(size) < 0.5, dtype=np.uint8))
        text = {"size": list(size), "counts": noise["counts"].decode()}
        assert (segment_pixels(text, size, "") == (coco.decode(noise) > 0)).all()
    assert segment_pixels([[0, 0, 1e9, 0, 1e9, 1e9, 0, 1e9]], SIZE, "").all()  # and does not fill the memory
    for bad in ([1, 2, 3, 4], [0] * 7, ["a"] * 6, [float("nan")] * 6, 5):
        with pytest.raises(ValueError, match="here: a polygon of segmentation must be 6 or more numbers"):
            segment_pixels([bad], SIZE, "here")
