"""Columns of images and masks in local parquet files, through the library `datasets`."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from rfield.segmentation.data import check_data, load_dataset

datasets = pytest.importorskip("datasets", reason="needs datasets: pip install 'rfield[datasets]'")
pytestmark = pytest.mark.slow  # The library's first import takes seconds.


def png(pixels: np.ndarray) -> dict[str, Any]:
    data = io.BytesIO()
    PIL.Image.fromarray(pixels.astype(np.uint8)).save(data, "PNG")
    return {"bytes": data.getvalue(), "path": None}


def write(
    root: Path, split: str, masks: list[np.ndarray], column: str = "label", **columns: list[dict[str, Any]]
) -> None:
    random = np.random.default_rng(list(split.encode()))
    images = [png(random.integers(0, 256, (6, 8, 3))) for _ in masks]
    values = {"image": images, column: [png(each) for each in masks], **columns}
    features = datasets.Features({name: datasets.Image() for name in values})
    (root / "data").mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(values, features).to_parquet(root / f"data/{split}-00000-of-00001.parquet")


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def columns(*values: int) -> np.ndarray:
    return np.repeat(np.array([values]), 6, 0).repeat(8 // len(values), 1)


def test_a_folder_of_parquet_files(tmp_path: Path) -> None:
    root = tmp_path / "set"
    for split in ("train", "validation"):
        write(root, split, [columns(0, 1), columns(1, 2)])
    with pytest.raises(ValueError, match="does not say what its classes are; name them in a data config, such as `cl"):
        load_dataset(f"hf:{root}")
    (root / "classes.txt").write_text("road\ncar\nsky\n")
    dataset = load_dataset(f"hf:{root}", "val")
    assert (dataset.ids, dataset.class_names) == (["validation_000000", "validation_000001"], ("road", "car", "sky"))
    assert (dataset[1][1][0].tolist(), dataset[1][0].shape, dataset.sizes()) == (
        [1] * 4 + [2] * 4,
        (3, 6, 8),
        [(6, 8)] * 2,
    )
    assert dataset.fingerprint() == load_dataset(f"hf:{root}", "val").fingerprint()
    assert dataset.fingerprint() != load_dataset(f"hf:{root}").fingerprint()
    assert check_data(f"hf:{root}") == []
    config = tmp_path / "data.yaml"
    config.write_text("format: hf\nroot: set\nclasses: [car, sky]\nreduce_zero_label: true\nval: train\nsize: [3, 4]\n")
    reduced = load_dataset(str(config), "val")
    assert (reduced.class_names, reduced[0][1][0].tolist()) == (("car", "sky"), [255, 255, 0, 0])
    with pytest.raises(ValueError, match="set has no split 'test'; it has train, validation"):
        load_dataset(f"hf:{root}", "test")
    with pytest.raises(ValueError, match=r"hf:.*nowhere cannot be read: .*; give a name on the Hub or a folder"):
        load_dataset(f"hf:{tmp_path / 'nowhere'}")


def test_columns_and_colours_of_a_config(tmp_path: Path) -> None:
    red, green = [255, 0, 0], [0, 255, 0]
    mask = np.array([[red] * 4 + [green] * 4] * 6)
    write(tmp_path / "set", "train", [mask], "truth", other=[png(mask)])
    config = tmp_path / "data.yaml"
    text = "format: hf\nroot: set\ncolours: {a: [0, 255, 0], b: [255, 0, 0]}\n"
    config.write_text(text)
    with pytest.raises(
        ValueError, match=r"data\.yaml: hf:.* has no column of images named mask; its .* image, truth, ot"
    ):
        load_dataset(str(config))
    config.write_text(text + "mask: truth\n")
    dataset = load_dataset(str(config))
    assert (dataset.palette[:2], dataset[0][1][0].tolist()) == ([(0, 255, 0), (255, 0, 0)], [1] * 4 + [0] * 4)
    config.write_text(text.replace("[255, 0, 0]", "[9, 0, 0]") + "mask: truth\n")
    with pytest.raises(ValueError, match=r"set/train\[0\]\.truth holds the colour \[255, 0, 0\] \(24 px\)"):
        load_dataset(str(config))[0]
    for more, words in (
        ("mask: nothing\n", "no column 'nothing' of images"),
        ("classes: road\n", "classes must be a list"),
    ):
        config.write_text(text + more)
        with pytest.raises(ValueError, match=words):
            load_dataset(str(config))


def test_what_is_no_image_is_named(tmp_path: Path) -> None:
    outside = tmp_path / "secret.png"
    PIL.Image.fromarray(columns(0, 1).astype(np.uint8)).save(outside)
    masks = [
        {"bytes": None, "path": str(outside)},
        {"bytes": b"nothing", "path": None},
        png(columns(0)),
        png(columns(0, 9)),
    ]
    masks[2] = png(np.zeros((5, 5)))
    write(tmp_path / "set", "train", [columns(0)] * 4, "x", mask=masks)
    (tmp_path / "set/classes.txt").write_text("a\nb\n")
    texts = [finding.text for finding in check_data(f"hf:{tmp_path / 'set'}", ["train"]) if finding.level == "error"]
    wanted = (
        "[0].mask holds no image",
        "[1].mask cannot be opened as an image",
        "[2].mask is 5x5 px",
        "[3].mask holds the value 9",
    )
    assert len(texts) == 4
    assert all(words in text for words, text in zip(wanted, texts, strict=True))
