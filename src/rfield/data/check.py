"""What ruins a training, found before it."""

import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from rfield.data.camvid import list_camvid
from rfield.data.check_sample import Finding, Sample, check_sample, quiet_bombs
from rfield.data.cityscapes import list_cityscapes
from rfield.data.folder import list_folder
from rfield.data.helen import HELEN_LISTS, list_helen
from rfield.data.listing import Listing, Refuse
from rfield.data.spec import DataSource, parse_spec
from rfield.data.synthetic import SyntheticCues
from rfield.data.voc import list_voc

_LISTINGS: dict[str, Callable[[Path, str, Refuse], Listing]] = {
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


def check_data(
    spec: str,
    splits: Sequence[str] | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    quick: bool = False,
) -> list[Finding]:
    """Finds what ruins a training: every file is opened, every pixel read, and nothing ends the check early.

    Errors are files that are missing, damaged, outside the root or larger than 89 million px; masks of another size,
    kind or with values that no class has; images of more than 8 bits; photographs that several splits share.
    Warnings are EXIF rotation, alpha channels, photographs that stand twice in a split, masks without any label, and
    classes that no mask of a split has.

    Args:
        spec: as for `load_dataset`.
        splits: to look at; by default train and val, and test where there is one with published truth.
        workers: threads; by default one for each core.
        progress: called with (samples done, samples in all).
        quick: look at the headers, the ends of the files and a few masks alone.

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
    with warnings.catch_warnings():
        quiet_bombs()
        for split, listing in listings.items():
            shown: list[set[int]] = []
            for index, sample in enumerate(_samples(listing, split, workers, quick) if listing else ()):
                findings += sample.findings
                shown += [] if sample.classes is None else [sample.classes]
                if listing and sample.digest:
                    findings += _repeated(str(listing.entries[index].image), split, index, sample.digest, seen)
                done += 1
                progress(done, total)
            if listing and shown and not quick:
                findings += _absent(listing, split, set().union(*shown), source.root)
    return findings


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


def refuse_bad_data(spec: str, splits: Sequence[str]) -> None:
    """The quick form of the check, before a training.

    Raises:
        ValueError: if it finds errors; names the first files.
    """
    errors = [finding for finding in check_data(spec, splits, quick=True) if finding.level == "error"]
    if errors:
        texts = " | ".join(finding.text for finding in errors[:_MOST_SHOWN])
        more = f" | and {len(errors) - _MOST_SHOWN} more" if len(errors) > _MOST_SHOWN else ""
        raise ValueError(f"{texts}{more} (`rfield check-data {spec}` finds all)")


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
        return _LISTINGS[source.format](source.root, source.splits.get(split, split), refuse)
    except (ValueError, OSError) as error:
        refuse(source.root, error)
        return None


def _samples(listing: Listing, split: str, workers: int | None, quick: bool) -> Iterator[Sample]:
    """Every sample's findings, in their order."""
    few = max(1, len(listing.entries) // _QUICK_MASKS)

    def check(index: int) -> Sample:
        return check_sample(listing, listing.entries[index], split, index, not quick, not quick or index % few == 0)

    if quick:  # headers are Python's work, which threads do not share
        yield from map(check, range(len(listing.entries)))
        return
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        for start in range(0, len(listing.entries), _AT_A_TIME):
            yield from pool.map(check, range(start, min(start + _AT_A_TIME, len(listing.entries))))


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


def _absent(listing: Listing, split: str, shown: set[int], root: Path) -> list[Finding]:
    """Classes that no mask of a split has."""
    absent = [name for label, name in enumerate(listing.class_names) if label not in shown]
    if not absent:
        return []
    text = (
        f"the split {split!r} has no pixel of {len(absent)} of {len(listing.class_names)} classes: "
        f"{', '.join(absent)}; they are neither learned nor scored there"
    )
    return [Finding("warning", str(root), split, None, text)]
