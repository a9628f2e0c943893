"""One reader for every image (depth, colours, orientation), and masks that are compared with it."""

import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from rfield.segmentation.data import FolderDataset, check_data
from rfield.segmentation.data.check_sample import _check_kind_of_image, _check_orientations
from rfield.segmentation.data.images import apply_orientation, image_files, image_sizes, read_image
from rfield.segmentation.data.listing import Entry
from rfield.segmentation.inference.predict import find_images, label_images

RANDOM = np.random.default_rng(0)
COLOURS = RANDOM.integers(0, 256, (12, 16, 3), dtype=np.uint8)
DEEP = RANDOM.integers(0, 1 << 16, (12, 16)).astype(np.uint16)


def pixels_of(path: Path) -> np.ndarray:
    return read_image(path).permute(1, 2, 0).numpy()


def save_turned(path: Path, pixels: np.ndarray, orientation: int) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"tiffinfo": {0x0112: orientation}} if path.suffix == ".tif" else {"exif": exif}
    PIL.Image.fromarray(pixels).save(path, **options)


def move_exif_behind_the_pixels(path: Path) -> None:
    content = path.read_bytes()
    start = content.index(b"eXIf") - 4
    chunk = content[start : start + 12 + struct.unpack(">I", content[start : start + 4])[0]]
    path.write_bytes(content.replace(chunk, b"")[:-12] + chunk + content[-12:])


@pytest.mark.parametrize("kind", ["png", "late.png", "tif"])
@pytest.mark.parametrize("pixels", [COLOURS, COLOURS[..., 0], DEEP], ids=["colours", "grey", "deep"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(tmp_path: Path, kind: str, pixels: np.ndarray, orientation: int) -> None:
    path = tmp_path / f"image.{kind}"
    save_turned(path, pixels, orientation)
    if kind == "late.png":
        move_exif_behind_the_pixels(path)
    shallow = (pixels >> 8 if pixels.dtype == np.uint16 else pixels).astype(np.uint8)
    if shallow.ndim == 2:
        shallow = np.stack([shallow] * 3, axis=2)
    # The first stored row and column are at these sides of the displayed image (EXIF 2.3, tag 274).
    seen = {
        1: shallow,
        2: shallow[:, ::-1],
        3: np.rot90(shallow, 2),
        4: shallow[::-1],
        5: shallow.transpose(1, 0, 2),
        6: np.rot90(shallow, -1),
        7: np.rot90(shallow, 2).transpose(1, 0, 2),
        8: np.rot90(shallow),
    }[orientation]
    assert np.array_equal(pixels_of(path), seen)
    assert image_sizes([path]) == [seen.shape[:2]]


def test_damaged_orientation_turns_nothing(tmp_path: Path) -> None:
    PIL.Image.fromarray(COLOURS).save(tmp_path / "a.png", exif=b"Exif\0\0nonsense")
    assert np.array_equal(pixels_of(tmp_path / "a.png"), COLOURS)
    save_turned(tmp_path / "b.png", COLOURS, 9)
    assert np.array_equal(pixels_of(tmp_path / "b.png"), COLOURS)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "YCbCr"])
def test_kinds_of_colour_become_rgb(tmp_path: Path, mode: str) -> None:
    image = PIL.Image.new("RGB", (16, 12))
    image.paste("white", (0, 0, 8, 12))
    image = image.convert(mode)
    image.save(tmp_path / "a.tif")
    pixels = pixels_of(tmp_path / "a.tif")
    assert pixels.shape == (12, 16, 3)
    assert (pixels[:, :8] == 255).all()
    assert np.array_equal(pixels, np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_deep_grey_is_scaled_where_the_format_says_the_range(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"deep.{suffix}"
    PIL.Image.fromarray(COLOURS[..., 0].astype(np.uint16) * 257).save(path)
    assert np.array_equal(pixels_of(path), np.stack([COLOURS[..., 0]] * 3, axis=2))
    if suffix == "tif":
        PIL.Image.fromarray(COLOURS[..., 0].astype(">u2") * 257).save(path)
        assert np.array_equal(pixels_of(path)[..., 0], COLOURS[..., 0])
        PIL.Image.fromarray(65535 - COLOURS[..., 0].astype(np.uint16) * 257).save(path, tiffinfo={262: 0})
        assert np.array_equal(pixels_of(path)[..., 0], COLOURS[..., 0])  # white is 0


def write_tiff_of_12_bits(path: Path, low: int, high: int) -> None:
    """2x2 px of 12-bit grey: a row of two low and one of two high values; Pillow cannot write it."""
    tags = [(256, 2), (257, 2), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 2), (279, 6)]
    rows = b"".join(struct.pack(">I", value << 12 | value)[1:] for value in (low, high))
    entries = b"".join(struct.pack("<HHII", tag, 3, 1, value) for tag, value in tags)
    path.write_bytes(b"II*\0" + struct.pack("<I", 14) + rows + struct.pack("<H", len(tags)) + entries + bytes(4))


def test_twelve_bits_have_a_range_of_their_own(tmp_path: Path) -> None:
    write_tiff_of_12_bits(tmp_path / "a.tif", 0x800, 0xFFF)
    assert pixels_of(tmp_path / "a.tif")[..., 0].tolist() == [[128, 128], [255, 255]]
    found: list[str] = []
    with PIL.Image.open(tmp_path / "a.tif") as image:
        assert _check_kind_of_image(image, tmp_path, lambda level, path, text: found.append(f"{level} {text}"))
    assert found == ["warning is a 12-bit image, of which only the upper 8 bits are read; save it with 8 bits"]


@pytest.mark.parametrize(("kind", "words"), [("int32", "whole numbers of up to 32 bits"), ("float32", "floats")])
def test_what_has_no_range_is_refused_everywhere(root: Path, kind: str, words: str) -> None:
    path = root / "train/images/a.png"
    PIL.Image.fromarray((COLOURS[..., 0] / 2).astype(kind)).save(path, "TIFF")
    message = f"a.png holds {words}, whose range the format does not define; scale them to 0..255"
    with pytest.raises(ValueError, match=message):
        FolderDataset(root)[0]
    with pytest.raises(ValueError, match=message):
        list(label_images(lambda image: image, [(0, 0, 0)], None, [path], root / "out"))
    assert [finding.level for finding in check_data(f"folder:{root}") if message in finding.text] == ["error"]


def test_deep_images_that_use_little_of_their_range_are_told(root: Path) -> None:
    PIL.Image.fromarray(DEEP // 16).save(root / "train/images/a.png")  # 12 bits in 16
    told = [finding.text for finding in check_data(f"folder:{root}") if finding.file.endswith("images/a.png")]
    assert ["is a 16-bit image" in told[0], "is read as nearly black" in told[1]] == [True, True]
    for most, dark in ((15 * 256 + 255, True), (16 * 256, False)):
        PIL.Image.fromarray(np.minimum(DEEP, most)).save(root / "train/images/a.png")
        found = check_data(f"folder:{root}")
        assert sum("nearly black: its values use less than 16/256" in finding.text for finding in found) == dark
    PIL.Image.fromarray(DEEP).save(root / "train/images/a.png")
    assert len([f for f in check_data(f"folder:{root}") if f.file.endswith("images/a.png")]) == 1


@pytest.mark.parametrize(
    ("image", "mask", "size", "told"),
    [
        (4, 1, (12, 16), "a.jpg has the EXIF orientation 4, which is applied, but its mask has none"),
        (2, 4, (12, 16), "a.jpg has the EXIF orientation 2, which is applied, but its mask has 4"),
        (1, 3, (12, 16), "a.png has the EXIF orientation 3, which is applied, but its image has none"),
        (5, 1, (12, 12), "a.jpg has the EXIF orientation 5, which is applied, but its mask has none"),
        (1, 5, (12, 12), "a.png has the EXIF orientation 5, which is applied, but its image has none"),
        (5, 8, (12, 16), "a.jpg has the EXIF orientation 5, which is applied, but its mask has 8"),
        (5, 4, (12, 16), ""),
        (1, 8, (16, 12), ""),
        (7, 7, (12, 12), ""),
    ],
)
def test_orientations_whose_effect_the_sizes_do_not_show(
    image: int, mask: int, size: tuple[int, int], told: str
) -> None:
    found: list[str] = []
    entry = Entry("a", Path("a.jpg"), (Path("a.png"),))
    _check_orientations(entry, image, mask, size, lambda level, path, text: found.append(f"{level} {path} {text}"))
    assert [text.partition(", and their sizes")[0] for text in found] == ([f"warning {told}"] if told else [])


def test_prediction_sees_what_training_sees(tmp_path: Path) -> None:
    """A mask has the size of the rotated image, and the network gets the rotated, scaled pixels."""
    save_turned(tmp_path / "turned.png", COLOURS, 6)
    PIL.Image.fromarray(DEEP).save(tmp_path / "deep.png")
    given: list[torch.Tensor] = []

    def logits_of(image: torch.Tensor) -> torch.Tensor:
        given.append(image)
        return image

    (tmp_path / "._deep.png").write_bytes(b"what macOS leaves")
    images = find_images(str(tmp_path))
    assert [path.name for path in images] == ["deep.png", "turned.png"]
    masks = list(label_images(logits_of, [(0, 0, 0)] * 256, None, images, tmp_path / "out"))
    assert [tuple(image.shape) for image in given] == [(3, 12, 16), (3, 16, 12)]
    assert [PIL.Image.open(mask).size for mask in masks] == [(16, 12), (12, 16)]
    std, mean = torch.tensor([0.229, 0.224, 0.225]), torch.tensor([0.485, 0.456, 0.406])
    for image, path in zip(given, images, strict=True):
        shown = (image.permute(1, 2, 0) * std + mean) * 255
        assert np.array_equal(shown.round().numpy(), pixels_of(path))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "own"
    for split, name in (("train", "a"), ("val", "b")):
        for folder in ("images", "masks"):
            (root / split / folder).mkdir(parents=True)
        PIL.Image.fromarray(COLOURS if name == "a" else 255 - COLOURS).save(root / split / f"images/{name}.png")
        PIL.Image.fromarray(COLOURS[..., 0] % 2).save(root / split / f"masks/{name}.png")
    (root / "classes.txt").write_text("road\ncar\n")
    return root


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_a_mask_of_the_stored_pixels_is_refused(root: Path, orientation: int) -> None:
    save_turned(root / "train/images/a.png", COLOURS, orientation)
    words = f"a.png is 12x16 px .* is 16x12, rotated by its EXIF orientation {orientation}: .*; rotate the mask too"
    with pytest.raises(ValueError, match=words):
        FolderDataset(root)[0]
    (finding,) = check_data(f"folder:{root}")
    assert (finding.level, finding.file) == ("error", str(root / "train/masks/a.png"))
    assert f"rotated by its EXIF orientation {orientation}" in finding.text


@pytest.mark.parametrize("orientation", [1, 3])
def test_a_turned_mask_of_another_image_is_no_matter_of_exif(root: Path, orientation: int) -> None:
    save_turned(root / "train/images/a.png", COLOURS, orientation)
    PIL.Image.fromarray(COLOURS[..., 0].T.copy() % 2).save(root / "train/masks/a.png")
    with pytest.raises(ValueError, match=r"a.png is 16x12 px .* is 12x16; both must have the same size$"):
        FolderDataset(root)[0]


@pytest.mark.parametrize("marked", [False, True])
def test_a_mask_of_the_turned_image_fits(root: Path, marked: bool) -> None:
    """A mask with rotated pixels, or with the same orientation in its own EXIF data."""
    save_turned(root / "train/images/a.png", COLOURS, 6)
    stored = COLOURS[..., 0] % 2
    if marked:
        save_turned(root / "train/masks/a.png", stored, 6)
    else:
        PIL.Image.fromarray(apply_orientation(stored, 6)).save(root / "train/masks/a.png")
    assert check_data(f"folder:{root}") == []
    image, mask = FolderDataset(root)[0]
    assert np.array_equal(mask, image[0].numpy() % 2)


@pytest.mark.parametrize(("orientation", "width"), [(2, 16), (3, 16), (4, 16), (6, 12)])
def test_what_a_size_cannot_tell_is_a_warning(root: Path, orientation: int, width: int) -> None:
    save_turned(root / "train/images/a.png", COLOURS[:, :width], orientation)
    PIL.Image.fromarray(COLOURS[:, :width, 0] % 2).save(root / "train/masks/a.png")
    (finding,) = check_data(f"folder:{root}")
    assert (finding.level, finding.file) == ("warning", str(root / "train/images/a.png"))
    assert f"has the EXIF orientation {orientation}, which is applied" in finding.text


def png_with_transparency(path: Path) -> None:
    image = PIL.Image.fromarray(COLOURS).quantize(4)
    image.save(path, transparency=0)


@pytest.mark.parametrize("write", [png_with_transparency, PIL.Image.fromarray(COLOURS).convert("RGBA").save])
def test_transparency_is_told(root: Path, write: Callable[[Path], None]) -> None:
    write(root / "train/images/a.png")
    (finding,) = check_data(f"folder:{root}")
    assert (finding.level, "has an alpha channel" in finding.text) == ("warning", True)
    assert FolderDataset(root)[0][0].shape == (3, 12, 16)


def test_what_is_no_image_has_not_its_name(tmp_path: Path) -> None:
    names = ("b.PNG", "a.JPeG", "c.webp", "._a.jpg", ".hidden.png", "Thumbs.db", "notes.txt")
    for name in names:
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in image_files(tmp_path)] == ["a.JPeG", "b.PNG", "c.webp"]


def test_colours_of_16_bits_are_warned_of(root: Path) -> None:
    body = zlib.compress(b"".join(b"\0" + COLOURS[row].astype(">u2").tobytes() for row in range(12)))
    header = struct.pack(">IIBBBBB", 16, 12, 16, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", body), (b"IEND", b"")]
    packed = [struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in chunks]
    (root / "train/images/a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(packed))
    (finding,) = check_data(f"folder:{root}")
    assert (finding.level, "is a 16-bit image" in finding.text) == ("warning", True)
