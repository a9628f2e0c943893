"""Check data sets that are no pairs of files: every sample is read as a training reads it."""

import hashlib
from collections.abc import Sequence

from rfield.segmentation.conventions import IGNORE_INDEX, Progress
from rfield.segmentation.data.check_sample import Finding, Sample
from rfield.segmentation.data.check_split import check_class_names, check_classes, check_repeated
from rfield.segmentation.data.dataset import ParsingDataset
from rfield.segmentation.data.opening import open_dataset
from rfield.segmentation.data.spec import DataSource

OPENED = ("coco", "hf")
_QUICK_SAMPLES = 4


def check_opened(
    source: DataSource, splits: Sequence[str], progress: Progress, quick: bool = False, flip: bool = True
) -> list[Finding]:
    """Return the findings about splits; `quick` reads a few samples alone."""
    findings: list[Finding] = []
    datasets: dict[str, ParsingDataset] = {}
    for split in splits:
        try:
            datasets[split] = open_dataset(source, split)
        except (ValueError, OSError) as error:  # noqa: PERF203
            findings.append(Finding("error", str(source.root), split, None, str(error)))
    for split, dataset in [*datasets.items()][:1]:
        findings += check_class_names(source, dataset, split, flip)
    indices = {
        split: range(0, len(dataset), max(1, len(dataset) // _QUICK_SAMPLES) if quick else 1)
        for split, dataset in datasets.items()
    }
    seen: dict[bytes, tuple[str, str]] = {}
    total, done = sum(map(len, indices.values())), 0
    for split, dataset in datasets.items():
        samples = []
        for index in indices[split]:
            sample = _read(dataset, split, index)
            findings += sample.findings
            if sample.digest:
                findings += check_repeated(f"{split}[{index}]", split, index, sample.digest, seen)
            samples.append(sample)
            done += 1
            progress(done, total)
        findings += check_classes(dataset, split, samples, source.root, quick)
    return findings


def _read(dataset: ParsingDataset, split: str, index: int) -> Sample:
    try:
        image, mask = dataset[index]
    except (ValueError, OSError) as error:
        return Sample(findings=[Finding("error", dataset.ids[index], split, index, str(error))])
    values = {*mask.unique().tolist()}
    digest = hashlib.sha256(repr(tuple(image.shape)).encode() + image.numpy().tobytes()).digest()
    return Sample(classes=values - {IGNORE_INDEX}, void=values & {IGNORE_INDEX}, digest=digest)
