"""YAML, JSON and archives of strangers: what is read, and where it ends."""

import zipfile
from pathlib import Path

import pytest

from rfield.segmentation.files.untrusted import check_yaml, is_zip_bomb, read_json, read_yaml


def nested(depth: int, mapping: bool) -> str:
    """YAML of so many collections inside each other."""
    if mapping:
        return "".join(f"{' ' * level}a:\n" for level in range(depth - 1)) + f"{' ' * depth}a: 1\n"
    return "[" * depth + "1" + "]" * depth


@pytest.mark.parametrize("mapping", [False, True])
def test_fifty_levels_are_read_and_one_more_is_refused(tmp_path: Path, mapping: bool) -> None:
    path = tmp_path / "file.yaml"
    path.write_text(nested(50, mapping))
    value, depth = read_yaml(path), 0
    while isinstance(value, dict | list):
        value, depth = value["a"] if isinstance(value, dict) else value[0], depth + 1
    assert (value, depth) == (1, 50)
    path.write_text(nested(51, mapping))
    with pytest.raises(ValueError, match=r"file\.yaml is not valid YAML: it is nested more than 50 deep"):
        read_yaml(path)


def test_collections_side_by_side_are_not_deep() -> None:
    check_yaml("- [1]\n" * 60 + "- {a: {b: [1, [2]]}}\n" * 60)


def test_missing_files_are_missing_and_damaged_ones_named(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for read in (read_json, read_yaml):
        with pytest.raises(FileNotFoundError):
            read(path)
    path.write_bytes(b"\xff\xfe\x00")
    for read, message in ((read_json, "is damaged or not JSON"), (read_yaml, "is not valid YAML")):
        with pytest.raises(ValueError, match=f"file {message}"):
            read(path)
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="is damaged or not JSON"):
        read_json(path)
    path.write_text("a: !!python/object/apply:os.getcwd []")
    with pytest.raises(ValueError, match="is not valid YAML"):
        read_yaml(path)


def test_archives_swell_only_where_they_hold_more_than_they_are(tmp_path: Path) -> None:
    path = tmp_path / "file.zip"
    path.write_bytes(b"no archive" * 100)
    assert not is_zip_bomb(path)
    for packing, swollen in ((zipfile.ZIP_STORED, False), (zipfile.ZIP_DEFLATED, True)):
        with zipfile.ZipFile(path, "w", packing) as archive:
            archive.writestr("one", bytes(500))
            archive.writestr("two", bytes(500))
        assert is_zip_bomb(path) == swollen
