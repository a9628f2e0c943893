"""YAML and JSON of strangers: how deep, what is named."""

from pathlib import Path

import pytest

from rfield.reading import check_yaml, read_json, read_yaml


@pytest.mark.parametrize("pair", ["[]", "{}"])
def test_yaml_may_be_nested_50_deep(tmp_path: Path, pair: str) -> None:
    def nested(depth: int) -> str:
        opening = "[" if pair == "[]" else "{a: "
        return opening * (depth - 1) + pair + pair[1] * (depth - 1)

    check_yaml(nested(50))
    (tmp_path / "a.yaml").write_text(nested(50))
    value = read_yaml(tmp_path / "a.yaml")
    for _ in range(49):
        value = value[0] if pair == "[]" else value["a"]
    assert not value
    with pytest.raises(ValueError, match="it is nested more than 50 deep"):
        check_yaml(nested(51))
    (tmp_path / "a.yaml").write_text(nested(51))
    with pytest.raises(ValueError, match=r"a.yaml is not valid YAML: it is nested more than 50 deep"):
        read_yaml(tmp_path / "a.yaml")


def test_depth_is_not_the_number_of_collections(tmp_path: Path) -> None:
    check_yaml("[" + "[], " * 200 + "]")
    with pytest.raises(ValueError, match=r"aliases, such as \*all, are not read"):
        check_yaml("a: &all [1]\nb: *all")


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match=r"a.json is damaged or not JSON"):
        read_json(tmp_path / "a.json")
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match=r"a.yaml is not valid YAML"):
        read_yaml(tmp_path / "a.yaml")
    for read in (read_json, read_yaml):
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "missing")
