"""A report as data, and as one HTML file that needs nothing else."""

import base64
import functools
import hashlib
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import PIL.Image

from rfield import __version__

# The longer side of a picture, in px.
_LARGEST = 720
MEANINGS = {
    "clear": "better than the present one by more than two standard errors",
    "likely": "better, but within two standard errors",
    "flat": "no better: several are equally good within one standard error",
    "at the edge": "the best one is at the end of the range, so a better one may lie beyond",
    "not reliable": "nothing is recommended, for the reason given",
}
"""What each verdict means, for those who read the first one."""


@dataclass(frozen=True)
class Table:
    """Rows of text; the first column names the row. `bars` holds a share from 0 to 1, or None, for each row."""

    kind: ClassVar[str] = "table"
    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    marked: int | None = None
    """The row that is printed bold."""
    bars: Sequence[float | None] = ()
    folded: bool = False
    """Whether a click opens it."""


@dataclass(frozen=True)
class Matrix:
    """Numbers as colours: rows, columns, and for each cell a share from -1 to 1 (None for unknown) and its text."""

    kind: ClassVar[str] = "matrix"
    caption: str
    corner: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[tuple[float | None, str]]]]


@dataclass(frozen=True)
class Chart:
    """A Vega-Lite specification, what it shows in words, and its values as a table."""

    kind: ClassVar[str] = "chart"
    caption: str
    spec: dict[str, Any]
    values: Table


@dataclass(frozen=True)
class Box:
    """A rectangle of (height, width) px around the middle of a picture."""

    name: str
    height: float
    width: float
    colour: int = 0
    """The index of one of the five colours."""


@dataclass(frozen=True)
class Picture:
    """An image in the page, with boxes at true scale."""

    source: str
    alt: str
    height: int
    width: int
    caption: str = ""
    boxes: Sequence[Box] = ()

    @property
    def frame(self) -> tuple[float, float, float, float]:
        """Return left, top, width and height of what is drawn: the image, and boxes of up to twice its size."""
        height, width = (
            max(side, *(min(1.03 * box, 2 * side) for box in boxes), side)
            for side, boxes in (
                (self.height, [box.height for box in self.boxes]),
                (self.width, [box.width for box in self.boxes]),
            )
        )
        return (self.width - width) / 2, (self.height - height) / 2, width, height


@dataclass(frozen=True)
class Pictures:
    """Pictures side by side, and the colours of the classes."""

    kind: ClassVar[str] = "pictures"
    pictures: Sequence[Picture]
    legend: Sequence[tuple[str, str]] = ()
    """Names and CSS colours."""


@dataclass(frozen=True)
class Text:
    """A paragraph, a list of lines, or code."""

    kind: ClassVar[str] = "text"
    lines: Sequence[str]
    style: Literal["paragraph", "list", "code"] = "paragraph"


Block = Table | Matrix | Chart | Pictures | Text


@dataclass(frozen=True)
class Section:
    """A part of the report, with a sentence on how to read it."""

    title: str
    about: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """A report: the question, the answer and how sure it is, then the sections."""

    title: str
    kind: str
    question: str
    answer: str
    verdicts: Sequence[tuple[str, str, str]]
    """What was judged (may be empty), the verdict's word, and its reason."""
    facts: Sequence[tuple[str, str]]
    notes: Sequence[str]
    """What is missing, and why."""
    sections: Sequence[Section]
    refresh: int | None = None
    """Seconds after which a browser reads the file again, while a run goes on."""


def picture(
    pixels: npt.NDArray[np.uint8], alt: str, caption: str = "", boxes: Sequence[Box] = (), largest: int = _LARGEST
) -> Picture:
    """Return an image uint8 [H, W, 3] as a WebP of `largest` px at most; boxes are in px of the image itself."""
    image = PIL.Image.fromarray(pixels)
    image.thumbnail((largest, largest))
    file = io.BytesIO()
    image.save(file, "WEBP", quality=82, method=4)
    source = f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
    return Picture(source, alt, pixels.shape[0], pixels.shape[1], caption, boxes)


def read_picture(path: Path, alt: str) -> Picture:
    """Return the image of a file that rfield has drawn as a picture."""
    with PIL.Image.open(path) as image:
        return picture(np.asarray(image.convert("RGB")), alt, largest=1400)


def render(page: Page) -> str:
    """Return a report as HTML. The texts in it are escaped, whoever wrote them.

    Raises:
        ValueError: a package that reports need is not installed.
    """
    try:
        import jinja2
        import vl_convert
    except ImportError as error:
        raise ValueError(f"a report needs the package {error.name}: pip install 'rfield[web]'") from error
    here = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(here),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    charts = any(isinstance(block, Chart) for section in page.sections for block in section.blocks)
    scripts = [_chart_library(vl_convert), (here / "report.js").read_text(encoding="utf-8")] if charts else []
    return environment.get_template("report.html.jinja").render(
        page=page,
        meanings=MEANINGS,
        version=__version__,
        style=(here / "report.css").read_text(encoding="utf-8"),
        scripts=scripts,
        hashes=[f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}" for text in scripts],
        plain_json=plain_json,
    )


@functools.cache
def _chart_library(vl_convert: Any) -> str:
    """Return Vega, Vega-Lite and vega-embed as one script."""
    script: str = vl_convert.javascript_bundle()
    return script.replace("</script", "<\\/script")


def plain_json(content: Any) -> str:
    """Return JSON that may stand in an HTML script: no tag can begin in it, and numbers that are not finite are null.

    >>> plain_json({"</script>": float("nan")})
    '{"\\\\u003c/script\\\\u003e": null}'
    """
    text = json.dumps(_finite(content), allow_nan=False)
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
