"""Hostile data sets: nothing outside of them is read or written, and damaged images are named."""

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import PIL.Image
import pytest

from rfield.segmentation.data import FolderDataset, check_data, load_dataset
from rfield.segmentation.data.images import palette_of


@pytest.fixture
def pair(tmp_path: Path) -> Callable[[], Path]:
    """Write a data set of one image and its mask."""

    def make() -> Path:
        root = tmp_path / "pair"
        for folder, image in (("images", PIL.Image.new("RGB", (8, 6))), ("masks", PIL.Image.new("L", (8, 6)))):
            (root / "train" / folder).mkdir(parents=True, exist_ok=True)
            image.save(root / f"train/{folder}/a.png")
        (root / "classes.txt").write_text("road\ncar")
        return root

    return make


@pytest.mark.parametrize("sides", [(2**31 - 1, 1), (50_000, 40_000), (2**31 - 1, 2**31 - 1)])
def test_pictures_with_huge_headers(pair: Callable[[], Path], sides: tuple[int, int]) -> None:
    head = struct.pack(">IIBBBBB", *sides, 8, 0, 0, 0, 0)
    packed = [struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in ((b"IHDR", head),)]
    for name in ("train/images/a.png", "train/masks/a.png"):
        root = pair()
        (root / name).write_bytes(b"\x89PNG\r\n\x1a\n" + packed[0])
        with pytest.raises(OSError, match=name):
            _ = FolderDataset(root)[0]


def test_pictures_are_given_to_no_program(
    pair: Callable[[], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow detects the format by the contents, and passes EPS to Ghostscript."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/gs").write_text(f"#!/bin/sh\nmkdir {tmp_path}/marker\n")
    (tmp_path / "bin/gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    root = pair()
    eps = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 6\n%%EndComments\nshowpage\n%%EOF\n"
    (root / "train/images/a.png").write_text(eps)
    with pytest.raises(OSError, match=r"a\.png cannot be opened as an image"):
        _ = FolderDataset(root)[0]
    assert check_data(f"folder:{root}", ["train"])[0].level == "error"
    assert not (tmp_path / "marker").exists()


ESCAPES = ["../../outside", "/etc/passwd", "../../../../../../etc/passwd", "x/../../../outside", "..", "a\0b"]


@pytest.mark.parametrize("entry", ESCAPES)
@pytest.mark.parametrize("layout", ["voc", "camvid", "helen"])
def test_lists_name_nothing_outside(tmp_path: Path, layout: str, entry: str) -> None:
    root = tmp_path / "root"
    places = {"voc": "ImageSets/Segmentation/train.txt", "camvid": "train.txt", "helen": "exemplars.txt"}
    lines = {"voc": entry, "camvid": f"{entry} {entry}", "helen": f"1 , {entry}"}
    (root / places[layout]).parent.mkdir(parents=True)
    (root / places[layout]).write_text(lines[layout])
    with pytest.raises((ValueError, FileNotFoundError), match=r"outside|is missing"):
        load_dataset(f"{layout}:{root}")


def test_a_home_of_nobody(tmp_path: Path) -> None:
    (tmp_path / "data.yaml").write_text("format: voc\nroot: ~nobody-here/voc\n")
    for spec in ("voc:~nobody-here/voc", str(tmp_path / "data.yaml")):
        with pytest.raises(ValueError, match="'~nobody-here/voc' names no folder"):
            load_dataset(spec)


def test_a_palette_in_a_broken_file(tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    PIL.Image.new("P", (16, 12)).save(path)
    content = bytearray(path.read_bytes())
    place = content.index(b"IDAT")
    content[place - 4 : place] = bytes(4)  # the chunk of the pixels says that it is empty
    path.write_bytes(content)
    assert palette_of([path]) == []


def test_a_palette_that_is_none(pair: Callable[[], Path]) -> None:
    """Pillow reads the pixels, but fails on the colours."""
    root = pair()
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 8, 6, 8, 3, 0, 0, 0)), (b"PLTE", b"\1" * 776)]
    chunks += [(b"IDAT", zlib.compress(b"\0" * 54)), (b"IEND", b"")]
    packed = [struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in chunks]
    (root / "train/masks/a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(packed))
    assert len(FolderDataset(root).palette) == 256


@pytest.mark.parametrize("split", ["../train", "/etc/passwd"])
def test_data_configs_name_no_list_outside(tmp_path: Path, split: str) -> None:
    (tmp_path / "voc/ImageSets/Segmentation").mkdir(parents=True)
    (tmp_path / "voc/ImageSets/train.txt").write_text("a")
    (tmp_path / "data.yaml").write_text(f"format: voc\nroot: voc\ntrain: {split}\n")
    with pytest.raises(FileNotFoundError, match="there is no list"):
        load_dataset(str(tmp_path / "data.yaml"))


def test_sbd_names_nothing_outside(tmp_path: Path) -> None:
    from rfield.segmentation.data import convert_sbd

    voc, sbd = tmp_path / "voc", tmp_path / "sbd"
    (voc / "ImageSets/Segmentation").mkdir(parents=True)
    (voc / "SegmentationClass").mkdir()
    sbd.mkdir()
    for path in (voc / "ImageSets/Segmentation/train.txt", sbd / "train.txt", sbd / "val.txt"):
        path.write_text("../../secret")
    (voc / "ImageSets/Segmentation/val.txt").write_text("b")
    (tmp_path / "secret.png").write_bytes(b"secret")
    with pytest.raises(ValueError, match=r"names '\.\./\.\./secret', a file outside"):
        convert_sbd(sbd, voc)
    assert not (voc / "SegmentationClassAug").exists()


def test_converters_copy_nothing_from_outside(tmp_path: Path) -> None:
    from rfield.segmentation.data import convert_celebamask, convert_lapa

    PIL.Image.new("RGB", (8, 6)).save(tmp_path / "secret.jpg")
    for folder, convert in (("CelebA-HQ-img", convert_celebamask), ("train/images", convert_lapa)):
        (tmp_path / "source" / folder).mkdir(parents=True)
        (tmp_path / "source" / folder / "0.jpg").symlink_to(tmp_path / "secret.jpg")
        with pytest.raises(ValueError, match=r"0\.jpg is a link to a file outside"):
            convert(tmp_path / "source", tmp_path / "target")
        assert not (tmp_path / "target").exists()
