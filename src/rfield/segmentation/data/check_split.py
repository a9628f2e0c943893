"""Check a split as a whole, and the names of its classes."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import yaml

from rfield.segmentation.conventions import IGNORE_INDEX
from rfield.segmentation.data.check_sample import Finding, Sample
from rfield.segmentation.data.dataset import ParsingDataset
from rfield.segmentation.data.listing import Listing
from rfield.segmentation.data.masks import Colour
from rfield.segmentation.data.sides import unlisted_pairs
from rfield.segmentation.data.spec import DataSource

_BACKGROUND = ("background", "void", "unlabeled", "unlabelled", "ignore", "ignored", "none")
_MOST_SHOWN = 3


def labelled_classes(samples: Sequence[Sample]) -> set[int]:
    """Return the classes in the masks that were read."""
    return {label for sample in samples for label in sample.classes or ()}


def check_repeated(
    path: str, split: str, index: int, digest: bytes, seen: dict[bytes, tuple[str, str]]
) -> list[Finding]:
    """Return a finding if the pixels of an image occurred before, in this split or another."""
    if digest not in seen:
        seen[digest] = (split, path)
        return []
    other_split, other = seen[digest]
    same = f"{path} has the same pixels as {other}"
    if other_split == split:
        return [Finding("warning", path, split, index, f"{same} of the same split, so it counts twice; remove one")]
    return [
        Finding(
            "error", path, split, index, f"{same} of the split {other_split!r}, so scores are misleading; remove one"
        )
    ]


def check_class_names(source: DataSource, listing: Listing | ParsingDataset, split: str, flip: bool) -> list[Finding]:
    """Check the names of the classes: a single class, left and right that mirroring confuses."""
    names, texts = listing.class_names, []
    if len(names) == 1:
        texts.append(
            f"there is only one class, {names[0]!r}, so every network gets perfect scores; name the others "
            "too, such as background, in the order of the mask values"
        )
    pairs = unlisted_pairs(names, listing.mirrored_classes) if flip and source.masks.mirrored != () else []
    if pairs:
        listed = ", ".join(f"[{quote_yaml(one)}, {quote_yaml(other)}]" for one, other in pairs)
        texts.append(
            f"the classes {pairs[0][0]!r} and {pairs[0][1]!r} look like the left and right of one thing, which a "
            f"mirrored image exchanges; write `mirrored: [{listed}]` in a data config, or train with --no-flip "
            "(`mirrored: []` if they are not)"
        )
    if source.masks.reduce_zero_label and names[0].lower() in _BACKGROUND:
        texts.append(
            f"reduce_zero_label is set, so the first class, {names[0]!r}, has the mask value 1; leave it out of "
            "the class names if it has 0, or write `ignore: 0` instead"
        )
    return [Finding("warning", str(source.root), split, None, text) for text in texts]


def check_classes(
    listing: Listing | ParsingDataset, split: str, samples: Sequence[Sample], root: Path | None, quick: bool
) -> list[Finding]:
    """Check which classes occur in the masks of a split."""
    shown, names = labelled_classes(samples), listing.class_names
    if (len(names) == 1 and shown) or all(sample.classes is None for sample in samples):
        return []
    void = {value for sample in samples for value in sample.void}
    absent = [name for label, name in enumerate(names) if label not in shown]
    if not shown:
        text = f"no mask of the split {split!r} has a labelled pixel, so nothing is learned or scored there; "
        text += _remedy(void, names) or "label its masks"
    elif len(shown) == 1:
        only = names[min(shown)]
        text = (
            f"the masks of the split {split!r} show only one of {len(names)} classes, {only!r}, so a network "
            "that always predicts it gets perfect scores; "
        )
        text += _remedy(void, names) or f"label {', '.join(absent[:_MOST_SHOWN])} too, or correct the masks' values"
    elif absent and not quick:
        text = (
            f"the split {split!r} has no pixel of {len(absent)} of {len(names)} classes: {', '.join(absent)}; they are "
            "neither learned nor scored there"
        )
        if len(absent) == 1 and IGNORE_INDEX in void:
            text += f" (255 means no label; if it stands for {absent[0]!r}, save {names.index(absent[0])} instead)"
    else:
        return []
    return [Finding("warning", str(root), split, None, text)]


def quote_yaml(name: str) -> str:
    """Return a class's name as YAML, quoted if necessary.

    >>> quote_yaml("left hand"), quote_yaml("hand, left"), quote_yaml("no")
    ('left hand', '"hand, left"', '"no"')
    """
    plain = re.fullmatch(r"[^\W\d][\w -]*", name) and yaml.safe_load(name) == name
    return name if plain else json.dumps(name, ensure_ascii=False)


def _remedy(void: set[int], names: Sequence[str]) -> str:
    """Return advice if values without a label hide the other classes."""
    if IGNORE_INDEX in void:
        two = names if len(names) > 1 else ("background", *names)
        colours = ", ".join(f"{quote_yaml(name)}: {[level] * 3}" for name, level in zip(two, (0, 255), strict=False))
        return (
            "255 means no label: if it stands for a class, save that class's index instead, or give the colours in a "
            f"data config, such as `colours: {{{colours}}}`"
        )
    if void:
        values = ", ".join(map(str, sorted(void)))
        have = f"s {values} have" if len(void) > 1 else f" {values} has"
        return f"the mask value{have} no label here: see `ignore` and `reduce_zero_label` of the data config"
    return ""


class Palettes:
    """Find palette masks whose colours and values contradict each other."""

    def __init__(self) -> None:
        self._colours: dict[int, tuple[Colour, Path]] = {}
        self._values: dict[Colour, tuple[int, Path]] = {}
        self._found: list[Finding] = []

    def add(self, palette: dict[int, Colour], path: Path, split: str, index: int) -> None:
        """Compare the colours of a mask's values with those of earlier masks."""
        contradiction = None
        several = {colour for colour in palette.values() if list(palette.values()).count(colour) > 1}
        for value, colour in palette.items():
            other, first = self._colours.setdefault(value, (colour, path))
            if other != colour:
                contradiction = f"draws the value {value} in {list(colour)}, but {first} in {list(other)}"
            if colour in several:
                continue
            own, first = self._values.setdefault(colour, (value, path))
            if own != value and contradiction is None:
                contradiction = f"has the colour {list(colour)} for the value {value}, but {first} for {own}"
        if contradiction is not None:
            self._found.append(Finding("warning", str(path), split, index, f"{path} {contradiction}"))

    def findings(self) -> list[Finding]:
        """Return one finding for all contradictions."""
        if not self._found:
            return []
        first = self._found[0]
        many = f" ({len(self._found)} masks contradict earlier ones)" if len(self._found) > 1 else ""
        fix = "if the colours are right, give them in a data config (`colours`), so that masks are read by them"
        return [replace(first, text=f"{first.text}{many}; {fix}")]
