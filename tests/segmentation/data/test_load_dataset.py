from collections.abc import Callable
from pathlib import Path

import pytest

from rfield.segmentation.data import ResizedDataset, SyntheticCues, VOCDataset, load_dataset

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
    "spec", ["", "voc", "voc:", "VOC:x", "coco:", "helen:", "synthetic:48", "/data/msrc21_voc", "data.json"]
)
def test_unknown_specs(spec: str) -> None:
    with pytest.raises(
        ValueError,
        match=r"write voc:ROOT, .*cityscapes:ROOT, ade20k:ROOT, pets:ROOT, coco:ROOT, folder:ROOT, hf:ROOT, scenes, s",
    ):
        load_dataset(spec)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must hold keys and values, `format`"),
        ("root: x", "must hold keys and values, `format`"),
        ("- voc", "must hold keys and values, `format`"),
        ("format: [", "is not valid YAML"),
        ("format: !!python/object/apply:os.getcwd []", "is not valid YAML"),
        (
            "format: yolo",
            "format 'yolo' is not known; the known ones are voc, .*ade20k, pets, coco, folder, hf, synthetic",
        ),
        ("format: [voc]", r"format \['voc'\] is not known"),
        (
            "format: voc\nroot: x\nroots: y",
            r"unknown key roots \(did you mean root\?\); .* keys format, root, train, val, test, size, ignore",
        ),
        ("format: camvid\nroot: x\ntrain: y", "unknown key train; .* keys format, root, size"),
        ("format: helen", "the key root is missing"),
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


@pytest.mark.parametrize("size", ["5", "[0, 5]", "[5]", "[5, 5, 5]", "[5.0, 5]", "5x5", "[true, 5]", "{a: 1}"])
def test_a_wrong_working_size_names_the_file(make_devkit: MakeDevkit, size: str) -> None:
    config = make_devkit().parent / "data.yaml"
    config.write_text(f"format: voc\nroot: devkit\nsize: {size}\n")
    with pytest.raises(ValueError, match=r"data\.yaml: size must be \[height, width\] in whole px, both above 0; got"):
        load_dataset(str(config))


def test_a_working_size(make_devkit: MakeDevkit) -> None:
    config = make_devkit().parent / "data.yaml"
    config.write_text("format: voc\nroot: devkit\nsize: [6, 32]\n")
    dataset = load_dataset(str(config), "val")
    assert isinstance(dataset, ResizedDataset)
    assert dataset.sizes() == [(6, 32)]
    assert dataset[0][0].shape == (3, 6, 32)


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "lengths", "num_classes", "size"),
    [
        ("faces_256x208", (202, 50), 11, (256, 208)),
        ("camvid", (367, 101), 11, (360, 480)),
        ("msrc21", (295, 148), 21, None),
    ],
)
def test_shipped_configs(
    shared: Path, name: str, lengths: tuple[int, int], num_classes: int, size: tuple[int, int] | None
) -> None:
    config = Path(__file__).parents[3] / "configs" / "data" / f"{name}.yaml"
    for split, length in zip(("train", "val"), lengths, strict=True):
        dataset = load_dataset(str(config), split)
        assert (len(dataset), dataset.num_classes) == (length, num_classes)
        assert size is None or set(dataset.sizes()) == {size}
        image, mask = dataset[length - 1]
        assert tuple(mask.shape) == tuple(image.shape[1:]) == dataset.sizes()[length - 1]
        assert set(mask.unique().tolist()) <= {*range(num_classes), 255}


def test_every_shipped_config_is_tested() -> None:
    folder = Path(__file__).parents[3] / "configs" / "data"
    assert {path.name for path in folder.iterdir()} == {"faces_256x208.yaml", "camvid.yaml", "msrc21.yaml"}


def test_missing_config_and_missing_root(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no data config .*data\.yaml"):
        load_dataset(str(tmp_path / "data.yaml"))
    (tmp_path / "data.yaml").write_text("format: voc\nroot: nowhere")
    with pytest.raises(FileNotFoundError, match=r"data\.yaml: .*nowhere is not a folder"):
        load_dataset(str(tmp_path / "data.yaml"))
    (tmp_path / "data.yaml").write_text("format: folder\nroot: .")
    with pytest.raises(FileNotFoundError, match=r"data\.yaml: .*classes\.txt is missing"):
        load_dataset(str(tmp_path / "data.yaml"))
