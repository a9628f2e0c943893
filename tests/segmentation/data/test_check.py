"""Faults of data sets are found at the right file, and clean data have no findings."""

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import PIL.Image
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rfield.segmentation.cli import main
from rfield.segmentation.data import Finding, check_data, load_dataset
from rfield.segmentation.data.check import refuse_bad_data

MakeDevkit = Callable[..., Path]
MASK = "SegmentationClass/b.png"


def _script() -> ModuleType:
    path = Path(__file__).parents[3] / "studies/corrupted_data/corrupted_data.py"
    spec = importlib.util.spec_from_file_location("corrupted_data", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


corrupted = _script()


@pytest.mark.parametrize("layout", corrupted.LAYOUTS)
def test_clean_data_have_no_findings(tmp_path: Path, layout: str) -> None:
    made = corrupted.make(layout, tmp_path, np.random.default_rng(3))
    assert check_data(made.spec) == []
    for split, count in corrupted.COUNTS.items():
        assert len(load_dataset(made.spec, split)) == count


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        (kind, layout)
        for kind, (_, without) in corrupted.KINDS.items()
        for layout in corrupted.LAYOUTS
        if layout not in without and kind != "flipped bit in a JPEG"
    ],
)
def test_each_corruption_is_found_at_its_file_and_nothing_else(kind: str, layout: str) -> None:
    case = corrupted.run_case(kind, layout, seed=len(kind) + len(layout))
    assert case["found"], case
    assert not case["false_alarms"]


@pytest.mark.parametrize("kind", ["missing mask", "list entry outside the root", "link out of the root"])
@pytest.mark.parametrize("layout", ["voc", "camvid", "helen", "cityscapes", "folder"])
def test_loaders_refuse_what_lies_outside_or_nowhere(tmp_path: Path, kind: str, layout: str) -> None:
    corrupt, without = corrupted.KINDS[kind]
    if layout in without:
        pytest.skip("no lists")
    made = corrupted.make(layout, tmp_path, np.random.default_rng(0))
    corrupt(made, np.random.default_rng(0))

    def load() -> None:
        for split in corrupted.COUNTS:
            load_dataset(made.spec, split)

    with pytest.raises((ValueError, FileNotFoundError), match=r"is missing|a file outside"):
        load()


def test_one_bad_file_hides_no_other(make_devkit: MakeDevkit) -> None:
    root = make_devkit({"train": list("abcde"), "val": ["f"]})
    (root / "JPEGImages/a.jpg").unlink()
    (root / MASK).write_bytes(b"")
    PIL.Image.new("L", (12, 16), 1).save(root / "SegmentationClass/c.png")
    values = np.zeros((12, 16), np.uint8)
    values[0, :5], values[1, :3], values[2, 0] = 9, 77, 254
    PIL.Image.fromarray(values).save(root / "SegmentationClass/d.png")
    with (root / "ImageSets/Segmentation/val.txt").open("a") as file:
        file.write("../../../etc/passwd\n")
    findings = [finding for finding in check_data(f"voc:{root}") if finding.level == "error"]
    assert [(finding.split, finding.index, finding.file.removeprefix(f"{root}/")) for finding in findings] == [
        ("val", None, "ImageSets/Segmentation/val.txt"),
        ("train", 0, "JPEGImages/a.jpg"),
        ("train", 1, MASK),
        ("train", 2, "SegmentationClass/c.png"),
        ("train", 3, "SegmentationClass/d.png"),
    ]
    assert "holds the values 9 (5 px), 77 (3 px), 254 (1 px), which no class has (there are 3)" in findings[-1].text
    assert findings[-1].text.endswith("classes.txt")


def test_a_mask_in_colours_says_how_many(make_devkit: MakeDevkit) -> None:
    root = make_devkit()
    PIL.Image.open(root / MASK).convert("RGB").save(root / MASK)
    (finding,) = check_data(f"voc:{root}")
    assert (
        "holds colours (4 different), not class indices: a palette mask that was read and saved as RGB?" in finding.text
    )


def test_splits_and_progress(make_devkit: MakeDevkit) -> None:
    root = make_devkit({"train": ["a"], "val": ["b"], "test": ["c"], "trainval": ["a", "b"]})
    seen: list[tuple[int, int]] = []
    assert check_data(f"voc:{root}", progress=lambda done, total: seen.append((done, total))) == []
    assert seen == [(1, 3), (2, 3), (3, 3)]
    overlapping = check_data(f"voc:{root}", splits=["train", "trainval"], workers=1)
    assert [finding.file for finding in overlapping] == [str(root / "JPEGImages/a.jpg")]
    (missing,) = check_data(f"voc:{root}", splits=["minival"])
    assert (missing.level, missing.split) == ("error", "minival")
    assert "there is no list of the split 'minival'" in missing.text


def test_broken_class_names_are_a_finding(make_devkit: MakeDevkit) -> None:
    root = make_devkit()
    (root / "classes.txt").write_text("road\nroad\n")
    assert {finding.level for finding in check_data(f"voc:{root}")} == {"error"}


def test_results_do_not_depend_on_the_number_of_threads(make_devkit: MakeDevkit) -> None:
    root = make_devkit({"train": [f"t{index}" for index in range(40)], "val": ["v"]})
    for index in range(0, 40, 3):
        (root / f"SegmentationClass/t{index}.png").write_bytes(b"")
    assert check_data(f"voc:{root}", workers=1) == check_data(f"voc:{root}", workers=8)


def test_what_is_no_data_set_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere is not a folder; give the one that holds the data"):
        check_data(f"voc:{tmp_path / 'nowhere'}")
    with pytest.raises(ValueError, match=r"data 'yolo:x' is not understood"):
        check_data("yolo:x")
    with pytest.raises(ValueError, match=r"the synthetic data set has no split 'minival'"):
        check_data("synthetic", splits=["minival"])


@pytest.mark.parametrize(
    "kind", ["truncated image", "mask of another size", "file that is no image", "image of floats"]
)
def test_the_quick_form_finds_what_headers_tell(tmp_path: Path, kind: str) -> None:
    made = corrupted.make("camvid", tmp_path, np.random.default_rng(1))
    refuse_bad_data(made.spec, ["train", "val"])
    expected = corrupted.KINDS[kind][0](made, np.random.default_rng(1))
    with pytest.raises(ValueError, match=rf"{expected.file} .*`rfield check-data {made.spec}` finds all"):
        refuse_bad_data(made.spec, ["train", "val"])


def test_many_errors_are_not_all_told_before_a_training(make_devkit: MakeDevkit) -> None:
    root = make_devkit({"train": list("abcde"), "val": ["f"]})
    for name in "abcde":
        (root / f"SegmentationClass/{name}.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"/a.png .* \| .*/b.png .* \| .*/c.png .* \| and 2 more \("):
        refuse_bad_data(f"voc:{root}", ["train", "val"])


def test_the_command(
    make_devkit: MakeDevkit, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_devkit()
    monkeypatch.chdir(root.parent)
    main(["check-data", "voc:devkit"])
    assert capsys.readouterr().out == "voc:devkit: 0 errors, 0 warnings\n"

    PIL.Image.new("L", (16, 12), 255).save(root / MASK)
    main(["check-data", "voc:devkit", "--splits", "train", "--workers", "1"])
    assert "warning: train[1]: devkit/SegmentationClass/b.png has no labelled pixel" in capsys.readouterr().out

    (root / "JPEGImages/a.jpg").unlink()
    with pytest.raises(SystemExit) as caught:
        main(["check-data", "voc:devkit", "--json", "made/findings.json"])
    assert caught.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("error: train[0]: devkit/JPEGImages/a.jpg is missing; add the file")
    assert lines[-1] == "voc:devkit: 1 error, 1 warning"
    written = json.loads(Path("made/findings.json").read_text())
    assert (written["data"], written["errors"], written["warnings"]) == ("voc:devkit", 1, 1)
    assert [Finding(**finding) for finding in written["findings"]] == check_data("voc:devkit")

    with pytest.raises(SystemExit) as caught:
        main(["check-data", "voc:nowhere"])
    assert caught.value.code == 2


def test_file_names_that_are_no_text_can_be_printed(tmp_path: Path) -> None:
    made = corrupted.make("folder", tmp_path, np.random.default_rng(0))
    try:
        (made.root / "train/masks" / os.fsdecode(b"\xff.png")).write_bytes(b"")
    except OSError:
        pytest.skip("the file system wants text")
    (finding,) = check_data(made.spec)
    str(finding).encode()


fuzz = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@pytest.mark.slow
@fuzz
@given(st.sampled_from(["voc", "camvid", "helen"]), st.one_of(st.binary(max_size=60), st.text(max_size=60)))
def test_fuzzed_lists(tmp_path_factory: pytest.TempPathFactory, layout: str, content: bytes | str) -> None:
    made = corrupted.make(layout, tmp_path_factory.mktemp("fuzz"), np.random.default_rng(0))
    made.lists["train"].write_bytes(content if isinstance(content, bytes) else content.encode(errors="surrogatepass"))
    assert any(finding.level == "error" for finding in check_data(made.spec))
    with pytest.raises((ValueError, OSError), match=r"."):
        load_dataset(made.spec)


@fuzz
@given(st.data())
def test_fuzzed_headers(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    made = corrupted.make("voc", tmp_path_factory.mktemp("fuzz"), np.random.default_rng(0))
    image, (mask,) = made.pairs["train"][0]
    path = data.draw(st.sampled_from([image, mask]))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, min(len(content) - 1, 900)))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    errors = [finding for finding in check_data(made.spec) if finding.level == "error"]
    told = None
    try:
        load_dataset(made.spec)[0]
    except (ValueError, OSError) as error:
        told = str(error)
    assert told is None or str(made.root) in told
    assert told is None or errors
    refused = [finding for finding in check_data(made.spec, quick=True) if finding.level == "error"]
    assert len(refused) <= len(errors)


@pytest.mark.shared
@pytest.mark.parametrize(
    ("spec", "errors", "warnings"),
    [
        ("voc:data/msrc21_voc", {}, {"same pixels": 2}),
        ("camvid:data/camvid", {}, {}),
        # Six of the val faces are among the training faces, byte for byte.
        ("helen:data/fasseg_helen", {"same pixels": 6}, {"same pixels": 2, "classes: inner mouth": 2}),
    ],
)
def test_real_data(shared: Path, spec: str, errors: dict[str, int], warnings: dict[str, int]) -> None:
    layout, _, root = spec.partition(":")
    findings = check_data(f"{layout}:{shared / root}")
    for level, expected in (("error", errors), ("warning", warnings)):
        own = [finding for finding in findings if finding.level == level]
        assert len(own) == sum(expected.values()), own
        for words, count in expected.items():
            assert sum(words in finding.text for finding in own) == count
