"""Check a data set for faults that spoil a training."""

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from rfield.segmentation.data.ade20k import list_ade20k
from rfield.segmentation.data.camvid import list_camvid
from rfield.segmentation.data.check_opened import OPENED, check_opened
from rfield.segmentation.data.check_sample import Finding, Sample, check_sample, ignore_bomb_warnings
from rfield.segmentation.data.check_split import (
    Palettes,
    check_class_names,
    check_classes,
    check_repeated,
    labelled_classes,
)
from rfield.segmentation.data.cityscapes import list_cityscapes
from rfield.segmentation.data.folder import list_folder, mask_suffixes, splits_of
from rfield.segmentation.data.helen import HELEN_LISTS, list_helen
from rfield.segmentation.data.listing import Listing, Refuse
from rfield.segmentation.data.looks_like import looks_like
from rfield.segmentation.data.mask_options import MaskOptions
from rfield.segmentation.data.pets import list_pets
from rfield.segmentation.data.spec import DataSource, parse_spec
from rfield.segmentation.data.synthetic import SyntheticCues
from rfield.segmentation.data.voc import list_voc
from rfield.segmentation.files.atomic import write_json

_LISTINGS: dict[str, Callable[[Path, str, MaskOptions, Refuse], Listing]] = {
    "voc": list_voc,
    "camvid": list_camvid,
    "helen": list_helen,
    "cityscapes": list_cityscapes,
    "ade20k": list_ade20k,
    "pets": list_pets,
    "folder": list_folder,
}
# Limit the samples whose results wait for their turn, so that memory stays flat.
_AT_A_TIME = 256
_QUICK_MASKS = 4
_MOST_SHOWN = 3


def check_data(
    spec: str,
    splits: Sequence[str] | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    quick: bool = False,
    flip: bool = True,
) -> list[Finding]:
    """Find the faults that spoil a training. Open every file, read every pixel, and continue after each fault.

    Errors are files that are missing, damaged, outside the root or larger than 89 million px; masks of another size,
    kind or with values that no class has; images of more than 8 bits; images that several splits share.
    Warnings are EXIF orientations that masks may not share, alpha channels, 16-bit images, images that occur twice in a
    split, masks without any label, classes that no mask of a split has, data on which every score is perfect (at most
    one class is labelled or named), palettes that contradict each other, and classes that mirrored images may confuse.

    Args:
        spec: as for `load_dataset`.
        splits: the splits to check; by default train and val, and test if it exists and its masks are published.
        workers: number of threads; by default one for each core.
        progress: called with (samples done, all samples).
        quick: check only the headers, the ends of the files, and a few masks (enough to see two classes).
        flip: warn of classes named left and right that `mirrored_classes` does not pair.

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
    if source.format != "hf" and not source.root.is_dir():
        raise FileNotFoundError(f"{source.root} is not a folder; give the one that holds the data")
    if source.format in OPENED:
        return check_opened(source, splits or ("train", "val"), progress, quick, flip)
    findings: list[Finding] = []
    listings = {split: _list(source, split, findings) for split in splits or _default_splits(source)}
    described = source.format == "folder" and (source.root / "classes.txt").is_file()  # by the errors themselves
    other = "" if any(listings.values()) or described else looks_like(source.root)
    if other and f" {source.format}:" not in other:
        findings.append(Finding("error", str(source.root), next(iter(listings)), None, other))
    total, done = sum(len(listing.entries) for listing in listings.values() if listing), 0
    seen: dict[bytes, tuple[str, str]] = {}
    palettes = Palettes()
    first = next((listing for listing in listings.values() if listing), None)
    if first is not None:
        findings += check_class_names(source, first, next(iter(listings)), flip)
    with warnings.catch_warnings():
        ignore_bomb_warnings()
        for split, listing in listings.items():
            samples = []
            for index, sample in enumerate(_samples(listing, split, workers, quick) if listing else ()):
                findings += sample.findings
                if listing and sample.digest:
                    findings += check_repeated(str(listing.entries[index].image), split, index, sample.digest, seen)
                if listing:
                    palettes.add(sample.palette, listing.entries[index].masks[0], split, index)
                sample.findings, sample.palette = [], {}
                samples.append(sample)
                done += 1
                progress(done, total)
            if listing:
                findings += check_classes(listing, split, samples, source.root, quick)
    return findings + palettes.findings()


def summarise(spec: str, findings: Sequence[Finding]) -> str:
    """Return the findings in one line.

    >>> summarise("synthetic", [])
    'synthetic: 0 errors, 0 warnings'
    """
    counts = [sum(finding.level == level for finding in findings) for level in ("error", "warning")]
    words = [f"{count} {word}{'s' * (count != 1)}" for count, word in zip(counts, ("error", "warning"), strict=True)]
    return f"{spec}: {', '.join(words)}"


def write_findings(path: Path, spec: str, findings: Sequence[Finding]) -> None:
    """Write the findings as JSON: `data`, `errors`, `warnings` (counts) and `findings`."""
    counts = {f"{level}s": sum(finding.level == level for finding in findings) for level in ("error", "warning")}
    content = {"data": spec, **counts, "findings": [asdict(finding) for finding in findings]}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content)


def refuse_bad_data(spec: str, splits: Sequence[str], flip: bool = True, skip_bad: bool = False) -> list[str]:
    """Run the quick check that comes before a training.

    Args:
        spec: as for `load_dataset`.
        splits: the splits that the training reads.
        flip: the training mirrors images.
        skip_bad: the training skips samples that cannot be read, so errors do not end it.

    Returns:
        The warnings. Of equal warnings for many files, the first one with the number of the others.

    Raises:
        ValueError: if there are errors; names the first files.
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
    }
    there = (
        test in splits_of(root, mask_suffixes(source.masks)) if source.format == "folder" else source.format in places
    )
    return ["train", "val", *(["test"] if there and places.get(source.format, root).exists() else [])]


def _list(source: DataSource, split: str, findings: list[Finding]) -> Listing | None:
    """Return the samples of a split, or None if it cannot be listed. Add its faults to the findings."""

    def refuse(path: Path, error: Exception) -> None:
        findings.append(Finding("error", str(path), split, None, str(error)))

    assert source.root is not None
    try:
        return _LISTINGS[source.format](source.root, source.splits.get(split, split), source.masks, refuse)
    except (ValueError, OSError) as error:
        refuse(source.root, error if source.file is None else ValueError(f"{source.file}: {error}"))
        return None


def _samples(listing: Listing, split: str, workers: int | None, quick: bool) -> Iterator[Sample]:
    """Yield the findings of every sample, in the order of the samples."""
    few = max(1, len(listing.entries) // _QUICK_MASKS)

    def check(index: int, values: bool = not quick) -> Sample:
        return check_sample(listing, listing.entries[index], split, index, not quick, values)

    if quick:  # reading headers holds the interpreter lock
        samples = [check(index, index % few == 0) for index in range(len(listing.entries))]
        shown = labelled_classes(samples)
        for index in range(len(samples)):
            if len(shown) < 2 and samples[index].classes is None:
                samples[index] = check(index, values=True)
                shown |= samples[index].classes or set()
        yield from samples
        return
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        for start in range(0, len(listing.entries), _AT_A_TIME):
            yield from pool.map(check, range(start, min(start + _AT_A_TIME, len(listing.entries))))
