"""Parts that the reports of runs and of experiments share: tables of scores and combinations, texts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rfield.segmentation.web.report_page import Block, Matrix, Section, Table, Text


def what_it_sees(blocks: Sequence[Block]) -> Section:
    """Return the section of the pictures."""
    return Section(
        "What one output pixel sees",
        "A box is the part of the image that can change the label of its middle pixel, at true scale; "
        "what lies outside cannot. A box of more than twice the size of the image is cut.",
        blocks,
    )


def score_table(metrics: Mapping[str, Any], other: tuple[str, Mapping[str, Any]] | None) -> Table:
    """Return the IoU of each class, and those of another network, by name, with the differences."""
    rows: list[list[str]] = []
    for name, iou in [*metrics["per_class"].items(), ("mean (mIoU)", metrics["miou"])]:
        row = [name, percent(iou)]
        if other is not None:
            mean = len(rows) == len(metrics["per_class"])
            before = other[1]["miou"] if mean else other[1]["per_class"].get(name)
            row += [
                percent(before),
                "-" if iou is None or before is None else f"{round(100 * (iou - before), 1) + 0.0:+.1f}",
            ]
        rows.append(row)
    bars = [*metrics["per_class"].values(), metrics["miou"]]
    header = ["class", "IoU, %", *([f"{other[0]}, %", "difference"] if other else [])]
    return Table("Intersection over union of each class", header, rows, len(rows) - 1, bars)


def best_sets(caption: str, sets: Mapping[str, Any]) -> Table:
    """Return a table of the ten best combinations, and of the chosen one."""
    entries = list(sets["best"][:10])
    place = next((index for index, each in enumerate(entries) if each["rates"] == sets["chosen"]["rates"]), None)
    if place is None:
        entries.append(sets["chosen"])
    least = entries[0]["loss"]
    rows = [
        [
            rates_text(each["rates"]),
            str(sum(rate is not None for rate in each["rates"])),
            f"{each['loss']:.4f}",
            f"{each['loss'] - least:+.4f}",
            "-" if each["error"] is None else f"{each['error']:.2g}",
        ]
        for each in entries
    ]
    header = ("dilations", "paths", "held-out loss", "to the best", "standard error")
    return Table(f"{caption}; the chosen one is bold", header, rows, len(rows) - 1 if place is None else place)


def rates_text(rates: Sequence[Any]) -> str:
    """Return a set as text, without the paths that are left out.

    >>> rates_text([1.0, None, [2.0, 3.0], "pool"])
    '1, 2x3, pool'
    """

    def one(rate: Any) -> str:
        if isinstance(rate, list):
            return "x".join(map(one, rate))
        return str(rate) if isinstance(rate, str) else f"{rate:g}"

    return ", ".join(one(rate) for rate in rates if rate is not None)


def cost_matrix(costs: Sequence[Sequence[float | None]], classes: Sequence[str], paths: Sequence[str]) -> Matrix:
    """Return the matrix of classes and paths: by how much the loss of a class grows without a path."""
    bound = max((abs(cost) for row in costs for cost in row if cost is not None), default=0.0) or 1.0
    rows = [
        (name, [(None, "no pixels") if cost is None else (cost / bound, f"{cost:+.3g}") for cost in row])
        for name, row in zip(classes, costs, strict=True)
    ]
    caption = "Increase of the loss of a class without a path: the larger, the more the class needs it"
    return Matrix(caption, "class", paths, rows)


def data_name(data: str, public: bool = False) -> str:
    """Return a data set's name without the folders above it.

    >>> data_name("voc:/home/me/VOC2012"), data_name("scenes"), data_name("configs/pets.yaml"), data_name("x", True)
    ('voc:VOC2012', 'scenes', 'pets.yaml', 'its data')
    """
    kind, _, place = data.rpartition(":")
    return "its data" if public else f"{kind}{':' * bool(kind)}{Path(place).name}"


def percent(value: float | None) -> str:
    """Return a share as a percentage.

    >>> percent(0.1234), percent(None)
    ('12.3', '-')
    """
    return "-" if value is None else f"{100 * value:.1f}"


def seconds_text(seconds: float) -> str:
    """Return a duration as text.

    >>> seconds_text(8.25), seconds_text(754), seconds_text(9000)
    ('8.2 s', '12 min 34 s', '2 h 30 min')
    """
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def repeat_section(command: str, seeds: str, metrics: Mapping[str, Any]) -> Section:
    """Return the command, the seeds and the versions of a run."""
    said = ", ".join(f"{name} {version}" for name, version in metrics.get("versions", {}).items())
    about = f"{seeds}. {f'Versions: {said}.' if said else 'The versions are recorded at the end of a run.'}"
    return Section("How to repeat it", about, [Text(command.splitlines(), "code")])
