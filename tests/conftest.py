"""Fixtures for every test: tiny runs, and the real photographs and weights, where they are at hand."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from rfield.config import TrainConfig

SHARED = Path(__file__).parents[1] / ".." / "shared"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if SHARED.is_dir():
        return
    skip = pytest.mark.skip(reason="needs ../shared, the real photographs and weights, beside the repository")
    for item in items:
        if item.get_closest_marker("shared"):
            item.add_marker(skip)


@pytest.fixture
def shared() -> Path:
    """The folder ../shared beside the repository; mark the test with `shared`, so that it is skipped without it."""
    return SHARED


@pytest.fixture
def small_msrc(shared: Path, tmp_path: Path) -> Path:
    """A devkit of the first 8 training and 4 validation photographs of MSRC-21."""
    source, root = shared / "data/msrc21_voc", tmp_path / "msrc"
    for split, count in (("train", 8), ("val", 4)):
        names = (source / f"ImageSets/Segmentation/{split}.txt").read_text().split()[:count]
        for folder, suffix in (("JPEGImages", ".jpg"), ("SegmentationClass", ".png")):
            (root / folder).mkdir(parents=True, exist_ok=True)
            for name in names:
                shutil.copy(source / folder / f"{name}{suffix}", root / folder)
        (root / "ImageSets/Segmentation").mkdir(parents=True, exist_ok=True)
        (root / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(names))
    shutil.copy(source / "classes.txt", root)
    return root


@pytest.fixture
def make(tmp_path: Path) -> "Callable[..., TrainConfig]":
    """The config of a run of three epochs of three steps."""
    data = tmp_path / "data.yaml"
    data.write_text("format: synthetic\nsize: [36, 41]\ndistance: 12\nlength: 6\n")

    def make_config(out: str = "run", **values: Any) -> "TrainConfig":
        from rfield.config import TrainConfig

        tiny: dict[str, Any] = {
            "data": str(data),
            "out": str(tmp_path / out),
            "model": "small_cnn",
            "dilation": 3,
            "head_channels": 8,
            "search": "gradient",
            "factor_lr": 0.05,
            "epochs": 3,
            "batch_size": 2,
            "crop_size": (33, 33),
            "workers": 0,
            "cache": str(tmp_path / "cache"),
        }
        return TrainConfig(**tiny | values)

    return make_config
