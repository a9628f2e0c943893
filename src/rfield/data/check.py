"""What ruins a training, found before it."""

import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

from rfield.data.camvid import list_camvid
from rfield.data.check_sample import Finding, Sample, check_sample, quiet_bombs
from rfield.data.cityscapes import list_cityscapes
from rfield.data.dataset import IGNORE_INDEX
from rfield.data.folder import list_folder
from rfield.data.helen import HELEN_LISTS, list_helen
from rfield.data.listing import Listing, MaskOptions, Refuse, unlisted_pairs
from rfield.data.masks import Colour
from rfield.data.spec import DataSource, parse_spec
from rfield.data.synthetic import SyntheticCues
from rfield.data.voc import list_voc

_LISTINGS: dict[str, Callable[[Path, str, MaskOptions, Refuse], Listing]] = {
    "voc": list_voc,
    "camvid": list_camvid,
    "helen": list_helen,
    "cityscapes": list_cityscapes,
    "folder": list_folder,
}
# Samples whose results are kept waiting at a time, so that memory stays flat.
_AT_A_TIME = 256
_QUICK_MASKS = 4
_MOST_SHOWN = 3
_BACKGROUND = ("background", "void", "unlabeled", "unlabelled", "ignore", "ignored", "none")


def check_data(
    spec: str,
    splits: Sequence[str] | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    quick: bool = False,
    flip: bool = True,
) -> list[Finding]:
    """Finds what ruins a training: every file is opened, every pixel read, and nothing ends the check early.

    Errors are files that are missing, damaged, outside the root or larger than 89 million px; masks of another size,
    kind or with values that no class has; images of more than 8 bits; photographs that several splits share.
    Warnings are EXIF orientations that masks may not share, alpha channels, 16-bit images, images that stand twice in a
    split, masks without any label, classes that no mask of a split has, what makes every score perfect (one class, or
    none, is labelled or named), palettes that contradict each other, and classes that mirrored images may confuse.

    Args:
        spec: as for `load_dataset`.
        splits: to look at; by default train and val, and test where there is one with published truth.
        workers: threads; by default one for each core.
        progress: called with (samples done, samples in all).
        quick: look at the headers, the ends of the files and a few masks alone, or as many as show two classes.
        flip: warn of classes called left and right that `mirrored_classes` does not pair.

    Returns:
        The findings, in the order of splits and samples.

    Raises:
        ValueError: if the spec is not understood.
        FileNotFoundError: if the data config or the root is missing.

    Example:
        >>> check_data("synthetic")
        []
    """
    source = parse_spec(spec)
    if source.root is None:
        for split in splits or ("train", "val"):
            SyntheticCues(split, **source.options)
        return []
    if not source.root.is_dir():
        raise FileNotFoundError(f"{source.root} is not a folder; give the one that holds the data")
    findings: list[Finding] = []
    listings = {split: _list(source, split, findings) for split in splits or _default_splits(source)}
    total, done = sum(len(listing.entries) for listing in listings.values() if listing), 0
    seen: dict[bytes, tuple[str, str]] = {}
    palettes = _Palettes()
    first = next((listing for listing in listings.values() if listing), None)
    if first is not None:
        findings += _names(source, first, next(iter(listings)), flip)
    with warnings.catch_warnings():
        quiet_bombs()
        for split, listing in listings.items():
            samples = []
            for index, sample in enumerate(_samples(listing, split, workers, quick) if listing else ()):
                findings += sample.findings
                if listing and sample.digest:
                    findings += _repeated(str(listing.entries[index].image), split, index, sample.digest, seen)
                if listing:
                    palettes.add(sample.palette, listing.entries[index].masks[0], split, index)
                sample.findings, sample.palette = [], {}
                samples.append(sample)
                done += 1
                progress(done, total)
            if listing:
                findings += _shown(listing, split, samples, source.root, quick)
    return findings + palettes.findings()


def summarise(spec: str, findings: Sequence[Finding]) -> str:
    """The findings in one line.

    >>> summarise("synthetic", [])
    'synthetic: 0 errors, 0 warnings'
    """
    counts = [sum(finding.level == level for finding in findings) for level in ("error", "warning")]
    words = [f"{count} {word}{'s' * (count != 1)}" for count, word in zip(counts, ("error", "warning"), strict=True)]
    return f"{spec}: {', '.join(words)}"


def write_findings(path: Path, spec: str, findings: Sequence[Finding]) -> None:
    """Writes the findings as JSON: `data`, `errors`, `warnings` (counts) and `findings`."""
    counts = {f"{level}s": sum(finding.level == level for finding in findings) for level in ("error", "warning")}
    content = {"data": spec, **counts, "findings": [asdict(finding) for finding in findings]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def refuse_bad_data(spec: str, splits: Sequence[str], flip: bool = True, skip_bad: bool = False) -> list[str]:
    """The quick form of the check, before a training.

    Args:
        spec: as for `load_dataset`.
        splits: that the training reads.
        flip: the training mirrors images.
        skip_bad: it leaves out samples that cannot be read, so that errors do not end it.

    Returns:
        The warnings; of those that say the same of many files the first, and how many more there are.

    Raises:
        ValueError: if it finds errors; names the first files.
    """
    findings = check_data(spec, splits, quick=True, flip=flip)
    errors = [finding for finding in findings if finding.level == "error"]
    if errors and not skip_bad:
        texts = " | ".join(finding.text for finding in errors[:_MOST_SHOWN])
        more = f" | and {len(errors) - _MOST_SHOWN} more" if len(errors) > _MOST_SHOWN else ""
        raise ValueError(f"{texts}{more} (`rfield check-data {spec}` finds all)")
    kinds: dict[str, list[str]] = {}
    for finding in findings:
        if finding.level == "warning":
            kinds.setdefault(finding.text.replace(finding.file, ""), []).append(finding.text)
    more = f"more; `rfield check-data {spec}` names them"
    return [texts[0] + f" (and {len(texts) - 1} {more})" * (len(texts) > 1) for texts in kinds.values()]


def _default_splits(source: DataSource) -> list[str]:
    root = source.root or Path()
    test = source.splits.get("test", "test")
    places = {
        "voc": root / "ImageSets/Segmentation" / f"{test}.txt",
        "camvid": root / f"{test}.txt",
        "helen": root / HELEN_LISTS["test"],
        "folder": root / test / "images",
    }
    return ["train", "val", *(["test"] if source.format in places and places[source.format].exists() else [])]


def _list(source: DataSource, split: str, findings: list[Finding]) -> Listing | None:
    """What a split holds; its mistakes become findings, and nothing is left of one that cannot be listed."""

    def refuse(path: Path, error: Exception) -> None:
        findings.append(Finding("error", str(path), split, None, str(error)))

    assert source.root is not None
    try:
        return _LISTINGS[source.format](source.root, source.splits.get(split, split), source.masks, refuse)
    except (ValueError, OSError) as error:
        refuse(source.root, error)
        return None


def _samples(listing: Listing, split: str, workers: int | None, quick: bool) -> Iterator[Sample]:
    """Every sample's findings, in their order."""
    few = max(1, len(listing.entries) // _QUICK_MASKS)

    def check(index: int, values: bool = not quick) -> Sample:
        return check_sample(listing, listing.entries[index], split, index, not quick, values)

    if quick:  # headers are Python's work, which threads do not share
        samples = [check(index, index % few == 0) for index in range(len(listing.entries))]
        shown = _union(samples)
        for index in range(len(samples)):
            if len(shown) < 2 and samples[index].classes is None:
                samples[index] = check(index, values=True)
                shown |= samples[index].classes or set()
        yield from samples
        return
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        for start in range(0, len(listing.entries), _AT_A_TIME):
            yield from pool.map(check, range(start, min(start + _AT_A_TIME, len(listing.entries))))


def _union(samples: Sequence[Sample]) -> set[int]:
    return {label for sample in samples for label in sample.classes or ()}


def _repeated(path: str, split: str, index: int, digest: bytes, seen: dict[bytes, tuple[str, str]]) -> list[Finding]:
    """A photograph whose pixels were seen before, in this split or another."""
    if digest not in seen:
        seen[digest] = (split, path)
        return []
    other_split, other = seen[digest]
    same = f"{path} has the same pixels as {other}"
    if other_split == split:
        return [
            Finding("warning", path, split, index, f"{same} of the same split, so that it counts twice; remove one")
        ]
    return [
        Finding("error", path, split, index, f"{same} of the split {other_split!r}, so that scores mislead; remove one")
    ]


def _names(source: DataSource, listing: Listing, split: str, flip: bool) -> list[Finding]:
    """What the names of the classes tell: one class alone, left and right that a mirror confuses."""
    names, texts = listing.class_names, []
    if len(names) == 1:
        texts.append(
            f"there is one class alone, {names[0]!r}, so that every network scores perfectly; name the others "
            "too, such as background, in the order of the mask values"
        )
    pairs = unlisted_pairs(names, listing.mirrored_classes) if flip and source.masks.mirrored != () else []
    if pairs:
        listed = ", ".join(f"[{one}, {other}]" for one, other in pairs)
        texts.append(
            f"the classes {pairs[0][0]!r} and {pairs[0][1]!r} look like the two sides of one thing, which a mirrored "
            f"image exchanges; write `mirrored: [{listed}]` in a data config, or train with --no-flip (`mirrored: []` "
            "if neither is meant)"
        )
    if source.masks.reduce_zero_label and names[0].lower() in _BACKGROUND:
        texts.append(
            f"reduce_zero_label is set, so that the first class, {names[0]!r}, has the mask value 1; leave it out of "
            "the class names if it has 0, or write `ignore: 0` instead"
        )
    return [Finding("warning", str(source.root), split, None, text) for text in texts]


def _shown(listing: Listing, split: str, samples: Sequence[Sample], root: Path, quick: bool) -> list[Finding]:
    """What the classes in the masks of a split tell."""
    shown, names = _union(samples), listing.class_names
    if (len(names) == 1 and shown) or all(sample.classes is None for sample in samples):
        return []
    void = {value for sample in samples for value in sample.void}
    absent = [name for label, name in enumerate(names) if label not in shown]
    if not shown:
        text = f"no mask of the split {split!r} has a labelled pixel, so that nothing is learned or scored there; "
        text += _remedy(void, names) or "label its masks"
    elif len(shown) == 1:
        only = names[min(shown)]
        text = (
            f"the masks of the split {split!r} show one of {len(names)} classes alone, {only!r}, so that a network "
            "which always answers it scores perfectly; "
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


def _remedy(void: set[int], names: Sequence[str]) -> str:
    """What to do where values without a label hide the other classes."""
    if IGNORE_INDEX in void:
        colours = ", ".join(f"{name}: {[level] * 3}" for name, level in zip(names, (0, 255), strict=False))
        return (
            "255 means no label: if it stands for a class, save that class's index instead, or give the colours in a "
            f"data config, such as `colours: {{{colours}}}`"
        )
    if void:
        values = ", ".join(map(str, sorted(void)))
        return f"the mask values {values} have no label here: see `ignore` and `reduce_zero_label` of the data config"
    return ""


class _Palettes:
    """Palette masks whose colours and values contradict each other."""

    def __init__(self) -> None:
        self._colours: dict[int, tuple[Colour, Path]] = {}
        self._values: dict[Colour, tuple[int, Path]] = {}
        self._found: list[Finding] = []

    def add(self, palette: dict[int, Colour], path: Path, split: str, index: int) -> None:
        """The colours of the values that a mask uses."""
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
        """One for all of them."""
        if not self._found:
            return []
        first = self._found[0]
        many = f" ({len(self._found)} masks contradict earlier ones)" if len(self._found) > 1 else ""
        fix = "if the colours are right, give them in a data config (`colours`), which reads masks by them"
        return [replace(first, text=f"{first.text}{many}; {fix}")]
