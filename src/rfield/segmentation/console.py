"""Print tables and progress on consoles of any encoding."""

import io
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def escape_unencodable() -> None:
    """Let stdout and stderr escape characters outside their encoding, so that printing a name never fails."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def print_scores(scores: dict[str, Any]) -> None:
    """Print a table of the classes' scores, and their means."""
    from rich.console import Console
    from rich.table import Table

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f}"

    table = Table("class", "IoU %")
    table.columns[1].justify = "right"
    for name, iou in scores["per_class"].items():
        table.add_row(name, percent(iou))
    console = Console(width=None if sys.stdout.isatty() else 100)
    console.print(table)
    miou, accuracy = (math.nan if scores[name] is None else scores[name] for name in ("miou", "pixel_accuracy"))
    print(f"mIoU {miou:.4f}   pixel accuracy {accuracy:.4f}")
    if "f1" in scores:
        parts = ", ".join(f"{part} {percent(value)}" for part, value in scores["f1"].items())
        print(f"F1 % of {parts}; overall {percent(scores['f1_overall'])}")


@contextmanager
def show_progress(text: str) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar on stderr during each count. Yield the function that updates it."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    bar: Progress | None = None

    def show(done: int, total: int) -> None:
        nonlocal bar
        if bar is None and done < total and console.is_terminal:
            bar = Progress(*columns, console=console, transient=True)
            bar.add_task(text)
            bar.start()
        if bar is not None:
            bar.update(bar.task_ids[0], completed=done, total=total)
            if done >= total:
                bar.stop()
                bar = None

    try:
        yield show
    finally:
        if bar is not None:
            bar.stop()
