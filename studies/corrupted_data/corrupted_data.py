"""How much of what ruins data `check_data` finds, in 200 generated data sets with one thing wrong, and 50 clean ones.

    python studies/corrupted_data/corrupted_data.py --out studies/corrupted_data

Written: corrupted_data.json. A finding counts as found where it names the right file at the right level, with the
words that tell what is wrong; everything else that is found is a false alarm.
"""

import argparse
import json
import struct
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from rfield.segmentation.data import HELEN_CLASSES, Finding, check_data

HEIGHT, WIDTH = 24, 32
COUNTS = {"train": 4, "val": 2}
Pair = tuple[Path, list[Path]]


@dataclass
class Made:
    """A generated data set; `names` are the classes of mask values 0, 1, ..., `void` what has no label."""

    layout: str
    root: Path
    spec: str
    names: list[str]
    values: int
    void: int
    pairs: dict[str, list[Pair]]
    lists: dict[str, Path]

    def pick(self, random: np.random.Generator) -> tuple[str, Pair]:
        split = str(random.choice(list(self.pairs)))
        return split, self.pairs[split][random.integers(len(self.pairs[split]))]


@dataclass
class Expected:
    """What the check must say."""

    file: Path
    words: str
    level: str = "error"


def draw_image(random: np.random.Generator) -> PIL.Image.Image:
    small = PIL.Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    return small.resize((WIDTH, HEIGHT), PIL.Image.Resampling.BICUBIC)


def mask_values(random: np.random.Generator, values: int) -> np.ndarray:
    """Every value is there."""
    mask = np.resize(np.arange(values, dtype=np.uint8), (HEIGHT, WIDTH))
    return np.roll(mask, random.integers(WIDTH), axis=1)


def write_mask(paths: list[Path], mask: np.ndarray, palette: bool) -> None:
    for label, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        is_map = len(paths) > 1
        image = PIL.Image.fromarray(np.where(mask == label, 255, 0).astype(np.uint8) if is_map else mask)
        if palette and not is_map:
            image.putpalette([level for index in range(256) for level in (index, 255 - index, 7)])
        image.save(path)


def make(layout: str, folder: Path, random: np.random.Generator) -> Made:
    """A clean data set in one of the layouts."""
    root = folder / "data"
    root.mkdir()
    spec, values, void, names = f"{layout}:{root}", 4, 255, ["road", "car", "sky", "tree"]
    if layout == "camvid":
        values, void, names = 12, 11, [f"class {index}" for index in range(11)]
    if layout == "cityscapes":
        values, void = 34, 0
    if layout == "helen":
        values, names = 11, list(HELEN_CLASSES)
    if layout in ("voc", "resized", "folder", "camvid"):
        (root / "classes.txt").write_text("\n".join(names))
    if layout == "resized":
        (folder / "data.yaml").write_text("format: voc\nroot: data\nval: minival\nsize: [12, 16]\n")
        spec = str(folder / "data.yaml")
    made = Made(layout, root, spec, names, values, void, {}, {})
    for split, count in COUNTS.items():
        made.pairs[split] = [files_of(layout, root, split, f"{split}_{index}") for index in range(count)]
        for image, masks in made.pairs[split]:
            image.parent.mkdir(parents=True, exist_ok=True)
            draw_image(random).save(image)
            write_mask(masks, mask_values(random, values), palette=layout == "voc")
        lines, path = list_of(layout, root, split, made.pairs[split])
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(f"{line}\n" for line in lines))
            made.lists[split] = path
    return made


def files_of(layout: str, root: Path, split: str, name: str) -> Pair:
    if layout == "camvid":
        return root / f"{split}/{name}.png", [root / f"{split}annot/{name}.png"]
    if layout == "helen":
        return root / f"images/{name}.jpg", [root / f"labels/{name}/{name}_lbl{label:02d}.png" for label in range(11)]
    if layout == "cityscapes":
        image = root / f"leftImg8bit/{split}/ulm/{name}_leftImg8bit.png"
        return image, [root / f"gtFine/{split}/ulm/{name}_gtFine_labelIds.png"]
    if layout == "folder":
        return root / f"{split}/images/{name}.jpg", [root / f"{split}/masks/{name}.png"]
    return root / f"JPEGImages/{name}.jpg", [root / f"SegmentationClass/{name}.png"]


def list_of(layout: str, root: Path, split: str, pairs: list[Pair]) -> tuple[list[str], Path | None]:
    if layout == "camvid":
        return [f"{i.relative_to(root)} {m.relative_to(root)}" for i, (m,) in pairs], root / f"{split}.txt"
    if layout == "helen":
        name = {"train": "exemplars", "val": "tuning"}[split]
        return [f"1 , {image.stem}" for image, _ in pairs], root / f"{name}.txt"
    if layout in ("voc", "resized"):
        split = "minival" if (layout, split) == ("resized", "val") else split
        return [image.stem for image, _ in pairs], root / f"ImageSets/Segmentation/{split}.txt"
    return [], None


def png_header(width: int, height: int) -> bytes:
    """A PNG of any size whose pixels are not there."""
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", b""), (b"IEND", b""))
    packed = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def some_file(made: Made, random: np.random.Generator) -> Path:
    _, (image, masks) = made.pick(random)
    return image if random.random() < 0.5 else masks[random.integers(len(masks))]


def some_mask(made: Made, random: np.random.Generator) -> Path:
    _, (_, masks) = made.pick(random)
    return masks[random.integers(len(masks))]


def missing_image(made: Made, random: np.random.Generator) -> Expected:
    _, (image, masks) = made.pick(random)
    image.unlink()
    if made.layout == "folder":
        return Expected(masks[0], "is the mask of no image")
    return Expected(image, "is missing; add the file")


def missing_mask(made: Made, random: np.random.Generator) -> Expected:
    path = some_mask(made, random)
    path.unlink()
    return Expected(path, "is missing")


def empty_file(made: Made, random: np.random.Generator) -> Expected:
    path = some_file(made, random)
    path.write_bytes(b"")
    return Expected(path, "cannot be opened as an image")


def no_image(made: Made, random: np.random.Generator) -> Expected:
    path = some_file(made, random)
    path.write_bytes(b"<html>404 Not Found</html>" * random.integers(1, 20))
    return Expected(path, "cannot be opened as an image")


def cut_off(path: Path, random: np.random.Generator) -> Expected:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * random.uniform(0.1, 0.9))])
    return Expected(path, "image")


def truncated_image(made: Made, random: np.random.Generator) -> Expected:
    return cut_off(made.pick(random)[1][0], random)


def truncated_mask(made: Made, random: np.random.Generator) -> Expected:
    return cut_off(some_mask(made, random), random)


def flipped_bits(made: Made, random: np.random.Generator) -> Expected:
    """Within the pixels of a PNG, whose checksum tells."""
    path = some_mask(made, random)
    content = bytearray(path.read_bytes())
    start = content.index(b"IDAT") + 4
    length = struct.unpack(">I", content[start - 8 : start - 4])[0]
    content[start + random.integers(2, length)] ^= 1 << int(random.integers(8))
    path.write_bytes(content)
    return Expected(path, "is a damaged image")


def flipped_bits_of_jpeg(made: Made, random: np.random.Generator) -> Expected:
    """Within the pixels of a JPEG, which has no checksum."""
    _, (path, _) = made.pick(random)
    content = bytearray(path.read_bytes())
    start = content.index(b"\xff\xda") + 14
    content[random.integers(start, len(content) - 2)] ^= 1 << int(random.integers(8))
    path.write_bytes(content)
    return Expected(path, "is a damaged image")


def other_size(made: Made, random: np.random.Generator) -> Expected:
    path = some_mask(made, random)
    with PIL.Image.open(path) as mask:
        height, width = ((WIDTH, HEIGHT), (HEIGHT + 1, WIDTH), (HEIGHT, WIDTH // 2))[random.integers(3)]
        mask.resize((width, height), PIL.Image.Resampling.NEAREST).save(path)
    return Expected(path, f"is {height}x{width} px (height x width) but its image")


def wrong_value(made: Made, random: np.random.Generator) -> Expected:
    path = some_mask(made, random)
    with PIL.Image.open(path) as mask:
        palette, values = mask.getpalette(), np.array(mask)
    value, count = int(random.integers(made.values, 255)), int(random.integers(1, 20))
    values.ravel()[random.choice(values.size, count, replace=False)] = value
    changed = PIL.Image.fromarray(values)
    if palette:
        changed.putpalette(palette)
    changed.save(path)
    return Expected(path, f"holds the value {value} ({count} px)")


def colour_mask(made: Made, random: np.random.Generator) -> Expected:
    path = some_mask(made, random)
    with PIL.Image.open(path) as mask:
        mask.convert("RGB").save(path)
    return Expected(path, "not class indices")


def deep_mask(made: Made, random: np.random.Generator) -> Expected:
    path = some_mask(made, random)
    with PIL.Image.open(path) as mask:
        PIL.Image.fromarray(np.array(mask).astype(np.uint16)).save(path)
    return Expected(path, "more than 8 bits")


def one_bit_mask(made: Made, random: np.random.Generator) -> Expected:
    path = some_mask(made, random)
    PIL.Image.fromarray(random.random((HEIGHT, WIDTH)) < 0.5).save(path)
    return Expected(path, "fewer than 8 bits")


def deep_image(made: Made, random: np.random.Generator) -> Expected:
    _, (image, _) = made.pick(random)
    pixels = random.integers(0, 1 << 16, (HEIGHT, WIDTH)).astype(np.uint16)
    PIL.Image.fromarray(pixels).save(image, "PNG")
    return Expected(image, "is a 16-bit image", "warning")


def float_image(made: Made, random: np.random.Generator) -> Expected:
    _, (image, _) = made.pick(random)
    PIL.Image.fromarray(random.random((HEIGHT, WIDTH), dtype=np.float32)).save(image, "TIFF")
    return Expected(image, "holds floats, whose range the format does not define")


def alpha_image(made: Made, random: np.random.Generator) -> Expected:
    _, (image, _) = made.pick(random)
    draw_image(random).convert("RGBA").save(image, "PNG")
    return Expected(image, "has an alpha channel", "warning")


def turned_image(made: Made, random: np.random.Generator) -> Expected:
    _, (image, masks) = made.pick(random)
    orientation = int(random.integers(2, 5 if len(masks) > 1 else 9))
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    draw_image(random).save(image, exif=exif)
    if orientation < 5:
        return Expected(image, f"has the EXIF orientation {orientation}", "warning")
    return Expected(masks[0], f"rotated by its EXIF orientation {orientation}: the mask was drawn")


def void_mask(made: Made, random: np.random.Generator) -> Expected:
    _, (_, masks) = made.pick(random)
    write_mask(masks, np.full((HEIGHT, WIDTH), made.void, np.uint8), palette=made.layout == "voc")
    return Expected(masks[0], "0 everywhere" if made.layout == "helen" else "no labelled pixel", "warning")


def bomb(made: Made, random: np.random.Generator) -> Expected:
    path = some_file(made, random)
    sides = ((40_000, 40_000), (10_000, 10_000), (1, 2**31 - 1), (2**31 - 1, 2**31 - 1))
    path.write_bytes(png_header(*sides[random.integers(len(sides))]))
    return Expected(path, "too large")


def overlap(made: Made, random: np.random.Generator) -> Expected:
    source, target = (made.pairs[split][random.integers(COUNTS[split])][0] for split in ("train", "val"))
    if source.suffix == ".png" and random.random() < 0.5:  # other bytes, the same pixels
        PIL.Image.open(source).save(target, compress_level=1)
    else:
        target.write_bytes(source.read_bytes())
    return Expected(target, f"has the same pixels as {source} of the split 'train'")


def twice(made: Made, random: np.random.Generator) -> Expected:
    first, second = sorted(random.choice(COUNTS["train"], 2, replace=False).tolist())
    source, target = made.pairs["train"][first][0], made.pairs["train"][second][0]
    target.write_bytes(source.read_bytes())
    return Expected(target, f"has the same pixels as {source} of the same split", "warning")


def absent_class(made: Made, random: np.random.Generator) -> Expected:
    split = str(random.choice(list(COUNTS)))
    label = int(random.integers(1, len(made.names)))
    for _, masks in made.pairs[split]:
        values = mask_values(random, made.values)
        values[values == label] = 0
        write_mask(masks, values, palette=made.layout == "voc")
    return Expected(made.root, f"no pixel of 1 of {len(made.names)} classes: {made.names[label]}", "warning")


def outside_entry(made: Made, random: np.random.Generator) -> Expected:
    path = made.lists["train"]
    entry = ("../../../../etc/passwd", "/etc/passwd", "../../outside")[random.integers(3)]
    line = {"camvid": f"{entry} {entry}", "helen": f"7 , {entry}"}.get(made.layout, entry)
    path.write_text(f"{path.read_text()}{line}\n")
    return Expected(path, "a file outside")


def outside_link(made: Made, random: np.random.Generator) -> Expected:
    split, (image, masks) = made.pick(random)
    path = image if random.random() < 0.5 else masks[random.integers(len(masks))]
    path.rename(made.root.parent / f"outside{path.suffix}")
    path.symlink_to(made.root.parent / f"outside{path.suffix}")
    return Expected(made.lists.get(split, path), "a file outside")


def torn_line(made: Made, random: np.random.Generator) -> Expected:
    path = made.lists["val"]
    path.write_text(f"{path.read_text()}a line of one word\n")
    return Expected(path, "has the line 'a line of one word'")


LAYOUTS = ("voc", "camvid", "helen", "cityscapes", "folder", "resized")
Corruption = Callable[[Made, np.random.Generator], Expected]
# Each kind with the layouts that cannot have it.
KINDS: dict[str, tuple[Corruption, tuple[str, ...]]] = {
    "missing image": (missing_image, ("cityscapes",)),
    "missing mask": (missing_mask, ()),
    "empty file": (empty_file, ()),
    "file that is no image": (no_image, ()),
    "truncated image": (truncated_image, ()),
    "truncated mask": (truncated_mask, ()),
    "flipped bit in a mask": (flipped_bits, ()),
    "flipped bit in a JPEG": (flipped_bits_of_jpeg, ("camvid", "cityscapes")),
    "mask of another size": (other_size, ()),
    "value outside the classes": (wrong_value, ("helen",)),
    "mask saved as RGB": (colour_mask, ()),
    "16-bit mask": (deep_mask, ()),
    "1-bit mask": (one_bit_mask, ()),
    "16-bit image": (deep_image, ()),
    "image of floats": (float_image, ()),
    "alpha channel": (alpha_image, ()),
    "EXIF rotation": (turned_image, ()),
    "mask without labels": (void_mask, ()),
    "decompression bomb": (bomb, ()),
    "image in train and val": (overlap, ()),
    "image twice in train": (twice, ()),
    "class never present": (absent_class, ("cityscapes",)),
    "list entry outside the root": (outside_entry, ("cityscapes", "folder")),
    "link out of the root": (outside_link, ()),
    "torn line in a list": (torn_line, ("voc", "resized", "cityscapes", "folder")),
}


def matches(finding: Finding, expected: Expected) -> bool:
    return (finding.file, finding.level) == (str(expected.file), expected.level) and expected.words in finding.text


def run_case(kind: str | None, layout: str, seed: int) -> dict[str, Any]:
    """Makes a data set, corrupts it unless `kind` is none, and checks it."""
    random = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        made = make(layout, Path(folder), random)
        expected = None if kind is None else KINDS[kind][0](made, random)
        findings = check_data(made.spec, workers=2)
        hits = [finding for finding in findings if expected is not None and matches(finding, expected)]
        return {
            "kind": kind or "clean",
            "layout": layout,
            "seed": seed,
            "found": bool(hits),
            "false_alarms": [str(f).replace(folder, "") for f in findings if f not in hits],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("studies/corrupted_data"))
    parser.add_argument("--sets", type=int, default=200)
    parser.add_argument("--clean", type=int, default=50)
    args = parser.parse_args()
    possible = [(kind, layout) for layout in LAYOUTS for kind, (_, without) in KINDS.items() if layout not in without]
    started = time.monotonic()
    cases = [run_case(*possible[seed % len(possible)], seed) for seed in range(args.sets)]
    clean = [run_case(None, LAYOUTS[seed % len(LAYOUTS)], 10_000 + seed) for seed in range(args.clean)]
    table = {}
    for kind in KINDS:
        own = [case for case in cases if case["kind"] == kind]
        found = sum(case["found"] for case in own)
        alarms = sum(len(case["false_alarms"]) for case in own)
        table[kind] = {"sets": len(own), "found": found, "missed": len(own) - found, "false_alarms": alarms}
        print(f"| {kind} | {len(own)} | {found} | {len(own) - found} | {alarms} |")
    total = {key: sum(row[key] for row in table.values()) for key in ("sets", "found", "missed", "false_alarms")}
    clean_alarms = sum(len(case["false_alarms"]) for case in clean)
    print(total, f"clean: {len(clean)} sets, {clean_alarms} false alarms")
    content = {
        "total": total,
        "clean": {"sets": len(clean), "false_alarms": clean_alarms},
        "kinds": table,
        "not_right": [case for case in cases + clean if case["false_alarms"] or not (case["found"] or case in clean)],
        "seconds": round(time.monotonic() - started, 1),
    }
    (args.out / "corrupted_data.json").write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
