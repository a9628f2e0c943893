from collections.abc import Callable
from pathlib import Path

import pytest

from rfield.data import SyntheticCues, VOCDataset, load_dataset

MakeDevkit = Callable[..., Path]


def test_short_specs(make_devkit: MakeDevkit) -> None:
    dataset = load_dataset(f"voc:{make_devkit()}", "val")
    assert isinstance(dataset, VOCDataset)
    assert dataset.ids == ["c"]
    assert load_dataset("synthetic", "val").fingerprint() == SyntheticCues("val").fingerprint()


def test_a_config_names_root_and_lists(make_devkit: MakeDevkit) -> None:
    root = make_devkit({"train": ["a"], "minival": ["b"], "test": ["c"]})
    config = root.parent / "data.yaml"
    config.write_text("format: voc\nroot: devkit\nval: minival\n")
    assert [load_dataset(str(config), split).ids for split in ("train", "val", "test")] == [["a"], ["b"], ["c"]]
    config.write_text(f"format: voc\nroot: {root}\n")
    assert load_dataset(str(config)).ids == ["a"]


def test_a_config_of_synthetic_cues(tmp_path: Path) -> None:
    config = tmp_path / "cues.yml"
    config.write_text("format: synthetic\nsize: [65, 97]\ndistance: 16\nlength: 5\nseed: 2\n")
    expected = SyntheticCues("val", size=(65, 97), distance=16, length=5, seed=2)
    assert load_dataset(str(config), "val").fingerprint() == expected.fingerprint()


@pytest.mark.parametrize(
    "spec", ["", "voc", "voc:", "VOC:x", "camvid:data", "synthetic:48", "/data/msrc21_voc", "data.json"]
)
def test_unknown_specs(spec: str) -> None:
    with pytest.raises(ValueError, match=r"write voc:ROOT, synthetic, or the path of a .yaml .* voc, synthetic"):
        load_dataset(spec)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must hold keys and values, `format`"),
        ("root: x", "must hold keys and values, `format`"),
        ("- voc", "must hold keys and values, `format`"),
        ("format: [", "is not valid YAML"),
        ("format: !!python/object/apply:os.getcwd []", "is not valid YAML"),
        ("format: coco", "format 'coco' is not known; the known ones are voc, synthetic"),
        ("format: [voc]", r"format \['voc'\] is not known"),
        ("format: voc\nroot: x\nroots: y", "unknown key roots; .* keys format, root, train, val, test"),
        ("format: synthetic\nroot: x", "unknown key root; .* keys format, size, distance, length, seed"),
        ("format: voc", "the key root is missing"),
        ("format: voc\nroot: 2012", "root must be text, got 2012"),
        ("format: voc\nroot: x\ntrain: 1", "train must be text, got 1"),
        ("format: synthetic\ndistance: far", "distance must be a whole number .* got 'far'"),
        ("format: synthetic\nseed: true", "seed must be a whole number, 0 or more; got True"),
        ("format: synthetic\nlength: null\nsize: 5", "got 5"),
    ],
)
def test_configs_that_are_not_understood_name_the_file(tmp_path: Path, text: str, message: str) -> None:
    config = tmp_path / "data.yaml"
    config.write_text(text)
    with pytest.raises(ValueError, match=rf"data\.yaml.*{message}"):
        load_dataset(str(config))


def test_missing_config_and_missing_root(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no data config .*data\.yaml"):
        load_dataset(str(tmp_path / "data.yaml"))
    (tmp_path / "data.yaml").write_text("format: voc\nroot: nowhere")
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        load_dataset(str(tmp_path / "data.yaml"))
