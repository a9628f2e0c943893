"""The report of `rfield inspect --out`: what a network sees, layer by layer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rfield.segmentation.files.untrusted import read_json
from rfield.segmentation.web.report_page import Block, Page, Pictures, Section, Table, Text, read_picture
from rfield.segmentation.web.report_parts import data_name
from rfield.text import counted, format_pair


def inspect_page(path: Path, public: bool) -> Page:
    """Return the report of a folder with an inspect.json.

    Raises:
        ValueError: a file in it is damaged.
    """
    content = read_json(path / "inspect.json")
    networks = content["networks"]
    now = list(networks.values())[-1]
    model = Path(now["model"]).name  # A run folder, or a name without folders.
    size = format_pair(content["size"])
    images = data_name(content["images"], public)
    sections = [*_effective(path, networks), _advice(now), _layers(now)]
    return Page(
        title=f"rfield: what {model} sees",
        kind="an inspection",
        question=f"What does {model} see of images of {size} px?",
        answer=_answer(now),
        verdicts=[],
        facts=[
            ("layers", str(len(now["layers"]))),
            ("weights", now["weights"]),
            *([("effective field", f"{counted(content['count'], 'image')}: {images}")] if content["count"] else []),
        ],
        notes=[],
        sections=[section for section in sections if section.blocks],
    )


def _answer(now: Mapping[str, Any]) -> str:
    field = now["layers"][-1]["field"]
    seen = "the whole image" if None in field else f"{format_pair(field)} px"
    half = next((each for each in now["effective"] if each["share"] == 0.5), None)
    most = "" if half is None else f", and half of the effect comes from the middle {half['side']} px"
    return f"Each output pixel sees {seen}{most}."


def _effective(path: Path, networks: Mapping[str, Any]) -> list[Section]:
    blocks: list[Block] = []
    if (path / "effective.png").is_file():
        alt = "Heat map of what each pixel of an image contributes to the output in its middle"
        blocks.append(Pictures([read_picture(path / "effective.png", alt)]))
    rows = [
        [title, f"{each['share']:.0%}", f"{each['side']}", f"{each['area_ratio']:.1%}"]
        for title, network in networks.items()
        for each in network["effective"]
    ]
    if rows:
        header = ("network", "share of the effect", "side of the square, px", "of the image's area")
        blocks.append(Table("The squares that hold a share of the effect", header, rows))
    about = "How strongly each pixel of an image changes the output in the middle."
    return [Section("The effective receptive field", about, blocks)]


def _advice(now: Mapping[str, Any]) -> Section:
    blocks: list[Block] = []
    for each in now["advice"]:
        blocks.append(Text([each["text"]]))
        if each.get("code"):
            blocks.append(Text(each["code"].splitlines(), "code"))
    return Section("What to change", "", blocks)


def _layers(now: Mapping[str, Any]) -> Section:
    names = ("kernel", "dilation", "stride", "field")
    rows = [
        [
            layer["name"],
            layer["kind"],
            *("-" if layer[name] is None or None in layer[name] else format_pair(layer[name]) for name in names),
        ]
        for layer in now["layers"]
    ]
    header = ("layer", "kind", "kernel", "dilation", "stride", "receptive field, px")
    return Section("Layer by layer", "", [Table(f"The {len(rows)} layers", header, rows, folded=len(rows) > 12)])
