"""Bring images with colour masks, or with LabelMe files, into the layout of `FolderDataset`."""

import csv
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image

from rfield.segmentation.conventions import IGNORE_INDEX, Progress
from rfield.segmentation.data.dataset import voc_palette
from rfield.segmentation.data.files import draw_names, new_folder
from rfield.segmentation.data.images import image_sizes, load_named, open_named
from rfield.segmentation.data.labelme import BACKGROUND, IGNORED, draw_labelme, find_labelme, labels_in
from rfield.segmentation.data.listed import ListedDataset
from rfield.segmentation.data.listing import Listing, make_listing
from rfield.segmentation.data.mask_options import mask_options
from rfield.segmentation.data.masks import Colour, MaskCode, plain_labels, read_opened
from rfield.segmentation.data.pairing import Pair, find_pairs
from rfield.segmentation.files.atomic import write_text
from rfield.segmentation.files.untrusted import read_yaml
from rfield.text import counted

_MOST_COLOURS = IGNORE_INDEX
_MANY = 2**14
_SHOWN = 5


@dataclass(frozen=True)
class ConvertedMasks:
    """What `convert_masks` has made.

    Attributes:
        root: the folder to give to `FolderDataset`.
        counts: split to number of images.
        shares: class to its share of the labelled pixels.
    """

    root: Path
    counts: dict[str, int]
    shares: dict[str, float]


def convert_masks(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    colours: str | os.PathLike[str] | None = None,
    val: float = 0.2,
    seed: int = 0,
    progress: Progress = lambda done, total: None,
) -> ConvertedMasks:
    """Bring images and their masks (colours, palette or grey) or LabelMe files into the layout of `FolderDataset`.

    Splits that the source's folders name are kept. Without a split for validation, `val` of the other images become
    one, chosen by their names and the seed.

    Args:
        source: the folder that holds the images and masks; see `find_pairs`.
        target: the folder to make; it appears when it is complete.
        colours: a YAML file as `list_colours` writes it, or a CSV file with the columns name, r, g, b. LabelMe files
            need none.
        val: the share of the images for validation, where the source has no such split.
        seed: of that choice.
        progress: called with the numbers of images done and of all.

    Raises:
        FileExistsError: the target exists.
        FileNotFoundError: the source or the file of colours is missing.
        ValueError: the images and masks form no pairs, a mask has another size than its image, or a colour has no
            class. The message names the file.
        OSError: a file is damaged.

    Example:
        >>> convert_masks("no/photos", "data", "colours.yaml")
        Traceback (most recent call last):
        FileNotFoundError: no/photos is not a folder; give the one that holds the images and masks
    """
    source = Path(source)
    labelme = find_labelme(source) if source.is_dir() else []
    pairs = labelme or find_pairs(source)
    if labelme:
        if colours is not None:
            raise ValueError(f"{source} holds LabelMe files, which name their classes; leave the colours out")
        labels = set().union(*(labels_in(pair.labels) for pair in pairs)) - {BACKGROUND, IGNORED, "background"}
        class_names: tuple[str, ...] = ("background", *sorted(labels))
        palette = voc_palette()

        def read(pair: Pair) -> npt.NDArray[np.uint8]:
            return draw_labelme(pair, class_names)
    else:
        if colours is None:
            raise ValueError("colours are missing: the file that gives a colour to each class")
        listing = read_colours(Path(colours))
        class_names, palette = listing.class_names, ListedDataset(source, listing).palette

        def read(pair: Pair) -> npt.NDArray[np.uint8]:
            return _read(pair, listing.code, Path(colours))

    splits = choose_splits(pairs, source, val, seed)
    return _write(Path(target), pairs, splits, class_names, palette, read, progress)


def list_colours(
    source: str | os.PathLike[str], target: str = "DST", progress: Progress = lambda done, total: None
) -> str:
    """Return the colours in the masks of a folder as YAML for `convert_masks`, with the share of each as a comment.

    Raises: as for `convert_masks`; ValueError also if there are more than 255 colours.
    """
    pairs = find_pairs(Path(source))
    pixels: Counter[Colour] = Counter()
    masks: Counter[Colour] = Counter()
    for done, pair in enumerate(pairs, start=1):
        own = _count_colours(pair.labels)
        pixels += own
        masks.update(own.keys())
        if not own or len(pixels) > _MOST_COLOURS:
            few = ", ".join(str(list(colour)) for colour, _ in pixels.most_common(_SHOWN))
            count = len(pixels) if own else f"more than {_MANY}"
            raise ValueError(
                f"{pair.labels}: with it the masks have {count} colours, but there may be {_MOST_COLOURS} classes; the "
                f"commonest are {few}. JPEG and smooth resizing blend colours: save masks as PNG, and resize them by "
                "the nearest pixel"
            )
        progress(done, len(pairs))
    total = pixels.total()
    lines = [
        f"# {counted(len(pairs), 'mask')} in {source}, {counted(len(pixels), 'colour')}. Save this as colours.yaml, "
        "put the names of the classes in place of",
        "# class_0, class_1 and so on (their order is that of the classes; one class may have several colours), then:",
        f"#   rfield convert masks {source} {target} --colours colours.yaml",
        "colours:",
    ]
    for index, (colour, count) in enumerate(sorted(pixels.items(), key=lambda item: (-item[1], item[0]))):
        share = f"{count / total:.2%} of the pixels, in {masks[colour]} of {counted(len(pairs), 'mask')}"
        lines.append(f"  class_{index}: {list(colour)}  # {share}")
    return "\n".join([*lines, 'ignore: []  # colours that mean "no label", such as [[0, 0, 0]]'])


def read_colours(path: Path) -> Listing:
    """Return a listing without samples whose masks hold the colours in a YAML or CSV file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not understood; names the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of colours {path}; without --colours they are listed")
    try:
        if path.suffix.lower() == ".csv":
            content = _read_csv(path)
        else:
            content = read_yaml(path)
            if not isinstance(content, dict) or "colours" not in content or not {*content} <= {"colours", "ignore"}:
                raise ValueError("it must have the key colours, and may have ignore")
        return make_listing((), MaskCode(plain_labels(0)), [], "", mask_options(content), None)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read_csv(path: Path) -> dict[str, Any]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [{key.strip().lower(): value for key, value in row.items()} for row in csv.DictReader(file)]
        return {"colours": {row["name"].strip(): [int(row[channel]) for channel in "rgb"] for row in rows}}
    except (KeyError, AttributeError, TypeError, ValueError, csv.Error) as error:
        raise ValueError(f"it is no CSV file with the columns name, r, g and b ({error!r})") from error


def choose_splits(pairs: Sequence[Pair], source: Path, val: float, seed: int) -> list[str]:
    """Return the split of each pair: that of its folder, or one drawn by its name."""
    if any(pair.split == "val" for pair in pairs):
        return [pair.split or "train" for pair in pairs]
    free = [str(pair.image.relative_to(source)) for pair in pairs if pair.split != "test"]
    if not 0 < val < 1 or len(free) < 2:
        raise ValueError(
            f"{source} has {counted(len(free), 'image')} for train and val, and val is {val:g}: both splits need one, "
            "and val must lie between 0 and 1"
        )
    drawn = draw_names(free, val, seed)
    names = [str(pair.image.relative_to(source)) for pair in pairs]
    return [
        "test" if p.split == "test" else "val" if n in drawn else "train" for p, n in zip(pairs, names, strict=True)
    ]


def _write(
    target: Path,
    pairs: Sequence[Pair],
    splits: Sequence[str],
    class_names: tuple[str, ...],
    palette: Sequence[Colour],
    read: Callable[[Pair], npt.NDArray[np.uint8]],
    progress: Progress,
) -> ConvertedMasks:
    names = _names(pairs, splits)
    pixels = np.zeros(256, np.int64)
    with new_folder(target) as made:
        for split in {*splits}:
            for kind in ("images", "masks"):
                (made / split / kind).mkdir(parents=True)
        for done, (pair, split, name) in enumerate(zip(pairs, splits, names, strict=True), start=1):
            values = read(pair)
            mask = PIL.Image.fromarray(values)
            mask.putpalette([level for colour in palette for level in colour])
            mask.save(made / split / "masks" / f"{name}.png")
            shutil.copyfile(pair.image, made / split / "images" / f"{name}{pair.image.suffix}")
            pixels += np.bincount(values.ravel(), minlength=256)
            progress(done, len(pairs))
        write_text(made / "classes.txt", "".join(f"{name}\n" for name in class_names))
    total = max(1, pixels[: len(class_names)].sum())
    shares = {name: float(pixels[index] / total) for index, name in enumerate(class_names)}
    return ConvertedMasks(target, dict(sorted(Counter(splits).items())), shares)


def _names(pairs: Sequence[Pair], splits: Sequence[str]) -> list[str]:
    """Return a name for each image: its own, with those of its folders before it where two in a split have it."""
    often = Counter((split, pair.image.stem) for pair, split in zip(pairs, splits, strict=True))
    root = Path(os.path.commonpath([pair.image.parent for pair in pairs]))
    names = [
        pair.image.stem
        if often[split, pair.image.stem] == 1
        else "_".join(pair.image.relative_to(root).with_suffix("").parts)
        for pair, split in zip(pairs, splits, strict=True)
    ]
    seen: dict[tuple[str, str], Path] = {}
    for pair, split, name in zip(pairs, splits, names, strict=True):
        other = seen.setdefault((split, name), pair.image)
        if other != pair.image:
            raise ValueError(f"{other} and {pair.image} would have one name, {name}; rename one of them and its mask")
    return names


def _read(pair: Pair, code: MaskCode, colours: Path) -> npt.NDArray[np.uint8]:
    size = image_sizes([pair.image])[0]
    advice = f"correct the mask, or add the colour to a class or `ignore` in {colours}"
    with open_named(pair.labels) as file:
        classes = read_opened(file, pair.labels, size, code, advice, pair.image)
        _refuse_merged(file, pair.labels)
    return classes


def _count_colours(path: Path) -> Counter[Colour]:
    with open_named(path) as file:
        wrong = MaskCode(plain_labels(0), colours={}).wrong_kind(file)
        if wrong is not None:
            raise ValueError(f"{path} {'; '.join(wrong)}")
        load_named(file, path)
        _refuse_merged(file, path)
        file.info.pop("transparency", None)
        found = file.convert("RGB").getcolors(_MANY) or []
    return Counter({(colour[0], colour[1], colour[2]): count for count, colour in found if isinstance(colour, tuple)})


def _refuse_merged(mask: PIL.Image.Image, path: Path) -> None:
    """Refuse a palette mask two of whose values have one colour: read by colour they would become one class."""
    if mask.mode != "P":
        return
    levels = mask.getpalette() or []
    by_colour: dict[tuple[int, ...], int] = {}
    for _, value in mask.getcolors() or ():
        assert isinstance(value, int)
        other = by_colour.setdefault(tuple(levels[3 * value : 3 * value + 3]), value)
        if other != value:
            raise ValueError(
                f"{path} draws the values {min(value, other)} and {max(value, other)} in one colour of its palette; "
                f"save it as 8-bit grey, or use its values as classes with --data folder:ROOT"
            )
