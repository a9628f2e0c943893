"""The data set that the package ships."""

from pathlib import Path

from rfield.segmentation.data import check_data, load_dataset
from rfield.segmentation.data.spec import SCENES


def test_the_shipped_data_set_is_sound_and_small() -> None:
    assert check_data("scenes") == []
    assert [len(load_dataset("scenes", split)) for split in ("train", "val")] == [48, 12]
    assert load_dataset("scenes").class_names == ("brick", "grass", "gravel in brick", "gravel in grass")
    files = [path for path in SCENES.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 600_000
    assert "CC0" in (SCENES / "LICENCE.txt").read_text()
    package = Path(__file__).parents[3] / "pyproject.toml"
    assert f'"segmentation/data/{SCENES.name}/**"' in package.read_text()
