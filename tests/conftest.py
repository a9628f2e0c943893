"""Fixtures for every test: the real photographs and weights, where they are at hand."""

import shutil
from pathlib import Path

import pytest

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
