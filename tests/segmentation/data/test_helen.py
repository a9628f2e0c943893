import os
import re
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from rfield.segmentation.data import HELEN_CLASSES, AugmentedDataset, HelenDataset, load_dataset, training_transform


def write_face(root: Path, name: str, maps: np.ndarray, image: np.ndarray | None = None) -> None:
    (root / "images").mkdir(parents=True, exist_ok=True)
    (root / "labels" / name).mkdir(parents=True, exist_ok=True)
    height, width = maps.shape[1:]
    PIL.Image.fromarray(np.zeros((height, width, 3), np.uint8) if image is None else image).save(
        root / "images" / f"{name}.jpg"
    )
    for label, values in enumerate(maps):
        PIL.Image.fromarray(values).save(root / "labels" / name / f"{name}_lbl{label:02d}.png")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two faces of train, one of val and one of test, of 12x16 px (height x width)."""
    root = tmp_path / "helen"
    random = np.random.default_rng(0)
    lists = {"exemplars": ("100032540_1", "b"), "tuning": ("c",), "testing": ("d",)}
    for name, ids in lists.items():
        for face in ids:
            write_face(root, face, random.integers(0, 256, (11, 12, 16), dtype=np.uint8))
        (root / f"{name}.txt").write_text("".join(f"{number} , {face}\n" for number, face in enumerate(ids, 1)))
    return root


def test_labels_are_the_surest_classes(root: Path) -> None:
    dataset = HelenDataset(root)
    assert (dataset.ids, dataset.num_classes, dataset.class_names) == (["100032540_1", "b"], 11, HELEN_CLASSES)
    maps = np.zeros((11, 12, 16), np.uint8)
    maps[0], maps[6, 2], maps[9, 2:4, 5], maps[10, 0, 0], maps[3, 5] = 100, 101, 255, 99, 100
    write_face(root, "b", maps)
    image, mask = dataset[1]
    assert (image.dtype, image.shape, mask.dtype, mask.shape) == (torch.uint8, (3, 12, 16), torch.uint8, (12, 16))
    expected = np.zeros((12, 16), np.uint8)
    expected[2], expected[2:4, 5] = 6, 9
    assert np.array_equal(mask, expected)  # 100 is higher than 99, and of two equal values the first counts
    assert dataset.sizes() == [(12, 16)] * 2


def test_the_three_lists(root: Path) -> None:
    assert load_dataset(f"helen:{root}", "val").ids == ["c"]
    assert HelenDataset(root, "test").ids == ["d"]
    with pytest.raises(ValueError, match="Helen has no split 'tuning'; it has train, val, test"):
        HelenDataset(root, "tuning")


def test_every_class_has_a_colour_of_its_own(root: Path) -> None:
    palette = HelenDataset(root).palette
    assert len(palette) == 256
    # A slip in any number of the table changes a sum.
    assert np.sum(palette[:11], axis=0).tolist() == [1593, 1432, 1442]


def test_brows_and_eyes_change_sides_in_a_mirror() -> None:
    pairs = [(HELEN_CLASSES[one], HELEN_CLASSES[other]) for one, other in HelenDataset.mirrored_classes]
    assert pairs == [("left brow", "right brow"), ("left eye", "right eye")]
    sided = [name for name in HELEN_CLASSES if name.startswith(("left", "right"))]
    assert sorted(sided) == sorted(name for pair in pairs for name in pair)


def test_a_mirrored_sample_is_a_face_again(root: Path) -> None:
    """The left half holds the left brow and eye, mirrored or not."""
    maps = np.zeros((11, 12, 16), np.uint8)
    maps[2, :6, :8], maps[3, :6, 8:], maps[4, 6:, :8], maps[5, 6:, 8:] = 255, 255, 255, 255
    image = np.zeros((12, 16, 3), np.uint8)
    image[:, 8:] = 255
    write_face(root, "b", maps, image)
    dataset = HelenDataset(root)
    transform = training_transform((12, 16), (1, 1), mirrored_classes=dataset.mirrored_classes)
    augmented = AugmentedDataset(dataset, transform, seed=0)
    mirrored = 0
    for epoch in range(12):
        image, mask = augmented[epoch, 1]
        mirrored += bool(image[0, 0, 0] > image[0, 0, 15])
        assert torch.equal(mask, dataset[1][1].long())
    assert 2 <= mirrored <= 10


@pytest.mark.parametrize("line", ["1 , ../../outside", "1 , link", "1 , /etc/hosts"])
def test_list_entries_may_not_leave_the_root(root: Path, line: str) -> None:
    PIL.Image.new("RGB", (16, 12)).save(root.parent / "outside.jpg")
    (root / "images/link.jpg").symlink_to(root.parent / "outside.jpg")
    (root / "exemplars.txt").write_text(line)
    with pytest.raises(ValueError, match=r"exemplars.txt names '.*', a file outside .*helen; remove that line"):
        HelenDataset(root)


@pytest.mark.parametrize("label", [0, 1, 5, 10])
def test_no_map_may_be_a_link_out_of_the_root(root: Path, label: int) -> None:
    path = root / f"labels/b/b_lbl{label:02d}.png"
    path.rename(root.parent / "outside.png")
    path.symlink_to(root.parent / "outside.png")
    with pytest.raises(ValueError, match=r"exemplars.txt names 'b.*', a file outside .*helen; remove that line"):
        HelenDataset(root)
    path.unlink()
    (root.parent / "outside.png").rename(root / "labels/inside.png")
    path.symlink_to(root / "labels/inside.png")
    assert len(HelenDataset(root)) == 2  # a link may point to any place in the root


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("b\n", "has the line 'b'; a line reads `number , ID`"),
        ("1 ,\n", "has the line '1 ,'"),
        ("\n", "is empty"),
    ],
)
def test_lists_that_are_not_understood(root: Path, text: str, message: str) -> None:
    (root / "exemplars.txt").write_text(text)
    with pytest.raises(ValueError, match=f"exemplars.txt {message}"):
        HelenDataset(root)


def test_what_is_missing_is_named(root: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere is not a folder; give the one that holds images and labels"):
        HelenDataset(root / "nowhere")
    (root / "labels/b/b_lbl07.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"b_lbl07.png is missing \(1 of the 24 files of the split 'train'\)"):
        HelenDataset(root)
    (root / "tuning.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"tuning.txt is missing; it must hold a line `number , ID`"):
        HelenDataset(root, "val")


@pytest.mark.parametrize(
    ("map", "message"),
    [
        (PIL.Image.new("L", (12, 16)), "16x12 px .* but its image is 12x16; both must have the same size"),
        (PIL.Image.new("RGB", (16, 12)), "not class indices; a map must be 8-bit grey"),
        (PIL.Image.new("I;16", (16, 12)), "Pillow mode 'I;16'"),
        (PIL.Image.new("P", (16, 12)), r"\(Pillow mode 'P'\); a map must be 8-bit grey"),
    ],
)
def test_maps_that_do_not_fit(root: Path, map: PIL.Image.Image, message: str) -> None:
    map.save(root / "labels/b/b_lbl03.png")
    with pytest.raises(ValueError, match=f"b_lbl03.png .*{message}"):
        HelenDataset(root)[1]


def test_damaged_files_are_named(root: Path) -> None:
    path = root / "labels/b/b_lbl03.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(OSError, match=re.escape(str(path))):
        HelenDataset(root)[1]


def test_fingerprint_changes_with_the_list_and_any_file(root: Path) -> None:
    seen = [HelenDataset(root).fingerprint(), HelenDataset(root, "val").fingerprint()]
    for path in ("images/b.jpg", "labels/b/b_lbl10.png"):
        os.utime(root / path, ns=(0, 0))
        seen.append(HelenDataset(root).fingerprint())
    (root / "exemplars.txt").write_text("1 , b\n")
    seen.append(HelenDataset(root).fingerprint())
    assert len(set(seen)) == 5
    assert HelenDataset(root).fingerprint() == seen[-1]


@pytest.mark.shared
@pytest.mark.parametrize(("split", "length"), [("train", 202), ("val", 50)])
def test_fasseg_faces(shared: Path, split: str, length: int) -> None:
    dataset = HelenDataset(shared / "data/fasseg_helen", split)
    assert len(dataset) == length
    assert dataset.sizes()[0][0] == 512
    counts = torch.zeros(11, dtype=torch.int64)
    for index in range(0, length, 10):
        image, mask = dataset[index]
        assert mask.shape == image.shape[1:]
        counts += torch.bincount(mask.flatten(), minlength=11)
    assert counts[8] == 0  # the converted faces have no inner mouth
    assert (counts[[0, 1, 2, 3, 4, 5, 6, 7, 9, 10]] > 0).all()
    assert counts[1] > 10 * counts[6] > 0
