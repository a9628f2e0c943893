"""Write what a folder of rfield holds as one HTML file: `rfield report`."""

import sys
from pathlib import Path

from rfield.segmentation.files.atomic import write_text
from rfield.segmentation.web.report_inspect import inspect_page
from rfield.segmentation.web.report_page import Page, render
from rfield.segmentation.web.report_run import run_page
from rfield.segmentation.web.report_sweep import sweep_page, unfinished_page
from rfield.segmentation.web.report_tune import tune_page


def write_report(path: str | Path, out: str | Path, public: bool = False, refresh: int | None = None) -> None:
    """Write the report of a folder of `rfield train`, `tune`, `sweep`, `reproduce` or `inspect`.

    Args:
        path: the folder.
        out: the file to write; an earlier one is replaced, and never read half.
        public: leave out images, names and places of the data, for a report that others will read.
        refresh: seconds after which a browser reads the file again; the report of a finished run has none.

    Raises:
        FileNotFoundError: the folder is of none of these kinds.
        ValueError: a file in it is damaged, or a package is missing.
    """
    path = Path(path)
    try:
        page = _page(path, public, refresh)
    except (KeyError, TypeError, IndexError, AttributeError, ArithmeticError, ValueError) as error:
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} holds a file that is not what rfield writes: {reason}") from error
    write_text(Path(out), render(page))


def try_report(path: Path, out: Path | None = None, public: bool = False, refresh: int | None = None) -> None:
    """Write `report.html` for a folder; if that fails, say why in one line on stderr, since the work before it is done.

    Args:
        path, public, refresh: as in `write_report`.
        out: the folder for the file; None for `path` itself.
    """
    file = (out or path) / "report.html"
    try:
        write_report(path, file, public, refresh)
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        print(f"note: {file} is not written: {reason}", file=sys.stderr)


def _page(path: Path, public: bool, refresh: int | None) -> Page:
    if (path / "config.yaml").is_file() and (path / "classes.json").is_file():
        return run_page(path, public, refresh)
    if (path / "answer.json").is_file():
        return tune_page(path, public)
    if (path / "results.json").is_file():
        return sweep_page(path, public)
    if (path / "inspect.json").is_file():
        return inspect_page(path, public)
    if runs := sorted(each.parent for each in path.glob("d*-seed*/config.yaml")):
        return unfinished_page(runs)
    reason = f"it holds {_content(path)}" if path.is_dir() else "there is no such folder"
    raise FileNotFoundError(
        f"{path} is not a folder of rfield train, tune, sweep, reproduce or inspect: {reason}; give the --out of one"
    )


def _content(path: Path) -> str:
    names = sorted(each.name for each in path.iterdir())
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return shown or "nothing"
