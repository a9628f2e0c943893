"""ADE20K and Oxford-IIIT Pet, in the folders in which they are downloaded."""

from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from rfield.segmentation.data import check_data, load_dataset
from rfield.segmentation.data.looks_like import looks_like


def write(image: Path, mask: Path, values: list[int]) -> None:
    for path in (image, mask):
        path.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(list(str(image).encode()))
    PIL.Image.fromarray(random.integers(0, 256, (6, 8, 3), np.uint8)).save(image)
    PIL.Image.fromarray(np.array([values] * 6, np.uint8).repeat(8 // len(values), 1)).save(mask)


def make_ade20k(root: Path) -> Path:
    for folder in ("training", "validation"):
        for name in ("1", "2"):
            write(root / f"images/{folder}/{name}.jpg", root / f"annotations/{folder}/{name}.png", [0, 1, 150, 3])
    names = ["screen door, screen", "screen, silver screen", "bed", *(f"thing {index}, x" for index in range(147))]
    lines = [f"{index}\t0.1\t7\t8\t{name}\n" for index, name in enumerate(names, 1)]
    (root / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tName\n" + "".join(lines))
    return root


def make_pets(root: Path, count: int = 10) -> Path:
    names = [f"Abyssinian_{index}" for index in range(count)]
    for name in names:
        write(root / f"images/{name}.jpg", root / f"annotations/trimaps/{name}.png", [1, 2, 3, 2])
    for split, own in (("trainval", names[:-2]), ("test", names[-2:])):
        (root / f"annotations/{split}.txt").write_text("#Image CLASS-ID\n" + "".join(f"{name} 1 1 1\n" for name in own))
    return root


def test_ade20k(tmp_path: Path) -> None:
    root = make_ade20k(tmp_path / "ADEChallengeData2016")
    dataset = load_dataset(f"ade20k:{root}", "val")
    assert (len(dataset), dataset.num_classes) == (2, 150)
    assert dataset.class_names[:4] == ("screen door", "screen", "bed", "thing 0")
    assert dataset[0][1][0, ::2].tolist() == [255, 0, 149, 2]
    assert [f.level for f in check_data(f"ade20k:{root}")] == ["error"] * 0 + ["warning"] * 2  # absent classes
    assert looks_like(tmp_path) == f"{root} looks like ade20k: run `rfield check-data ade20k:{root}`"
    config = tmp_path / "data.yaml"
    config.write_text("format: ade20k\nroot: ADEChallengeData2016\nreduce_zero_label: true\n")
    with pytest.raises(ValueError, match="unknown key reduce_zero_label"):  # it is built in
        load_dataset(str(config))
    write(root / "images/training/1.jpg", root / "annotations/training/1.png", [0, 151])
    with pytest.raises(ValueError, match=r"training/1\.png holds the value 151 .*; ADE20K has the values 0\.\.150"):
        load_dataset(f"ade20k:{root}")[0]
    (root / "annotations/training/1.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"training/1\.png is missing \(1 of the 2 masks"):
        load_dataset(f"ade20k:{root}")
    with pytest.raises(ValueError, match="ADE20K has no split 'test'; it has train, val"):
        load_dataset(f"ade20k:{root}", "test")
    (root / "objectInfo150.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"objectInfo150\.txt is missing"):
        load_dataset(f"ade20k:{root}", "val")


def test_pets(tmp_path: Path) -> None:
    root = make_pets(tmp_path / "oxford-iiit-pet")
    splits = {split: load_dataset(f"pets:{root}", split) for split in ("train", "val", "test")}
    assert {split: len(dataset) for split, dataset in splits.items()} == {"train": 6, "val": 2, "test": 2}
    assert len({name for dataset in splits.values() for name in dataset.ids}) == 10
    assert load_dataset(f"pets:{tmp_path}", "val").ids == splits["val"].ids  # where torchvision downloads it
    assert splits["val"].class_names == ("background", "pet")
    assert splits["val"][0][1][0, ::2].tolist() == [1, 0, 255, 0]
    assert check_data(f"pets:{root}") == []
    assert looks_like(root).endswith(f"`rfield check-data pets:{root}`")
    write(root / "images/Abyssinian_9.jpg", root / "annotations/trimaps/Abyssinian_9.png", [0, 2])
    with pytest.raises(ValueError, match=r"Abyssinian_9\.png holds the value 0 .*; the trimaps have the values"):
        load_dataset(f"pets:{root}", "test")[1]
    (root / "annotations/test.txt").write_text("../../etc/passwd 1 1 1\n")
    with pytest.raises(ValueError, match=r"names .*passwd.*, a file outside"):
        load_dataset(f"pets:{root}", "test")
    with pytest.raises(ValueError, match="Pet has no split 'dev'"):
        load_dataset(f"pets:{root}", "dev")
