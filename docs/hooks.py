"""Fill the reference pages from the program itself, and cut links that leave the site, when mkdocs builds it."""

import contextlib
import importlib
import io
import os
import re
from pathlib import Path
from typing import Any

# The order of the sections of the Python reference: a package, and its title.
_SECTIONS = {
    "rfield.surgery": "Learned layers in a model, and out of it",
    "rfield.search": "Searches",
    "rfield.receptive_field": "Measuring a receptive field",
    "rfield.layers": "Layers",
    "rfield.ops": "Operators",
    "rfield.integrations": "Training loops of other libraries",
    "rfield.segmentation": "Semantic segmentation",
}


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Return a page's text with its generated parts, and with links into the repository as plain text."""
    for place, make in {"command": commands, "name": names, "study": studies}.items():
        if f"<!-- every {place} -->" in markdown:
            markdown = markdown.replace(f"<!-- every {place} -->", make())
    return cut_links(markdown)


def on_post_build(config: Any) -> None:
    """Raise if a page would load anything from another host."""
    for path in sorted(Path(config.site_dir).rglob("*.html")):
        found = foreign_sources(path.read_text(encoding="utf-8"))
        if found:
            raise ValueError(f"{path} loads {', '.join(found)} from another host")


def foreign_sources(html: str) -> list[str]:
    """Return the addresses that a page loads from other hosts; links to click are none.

    >>> foreign_sources('<a href="https://a.org"><img src="b.png"><script src=//c.org/d.js>')
    ['//c.org/d.js']
    """
    loaded = r"<(?:script|link|img|iframe|source|video|audio|object)\b[^>]*?(?:src|href|data)=[\"']?"
    styles = r"(?:@import\s+|url\()[\"']?"
    return re.findall(rf"(?:{loaded}|{styles})((?:https?:)?//[^\"'\s>)]+)", html)


def cut_links(markdown: str) -> str:
    """Return the text with links to files beside the folder docs as the files' paths.

    >>> cut_links("see [the study](../studies/kills/README.md#how), [data](data.md)")
    'see the study (`studies/kills/README.md`), [data](data.md)'
    """
    return re.sub(r"(?<!!)\[([^\]]+)\]\(\.\./([^)#]+)(?:#[^)]*)?\)", _as_path, markdown)


def _as_path(found: re.Match[str]) -> str:
    text, path = found[1], found[2].rstrip("/")
    return f"`{path}`" if text.strip("`") in path else f"{text} (`{path}`)"


def studies() -> str:
    """Return the question and the answer of every study whose page has both."""
    parts = []
    for path in sorted(Path(__file__).parents[1].glob("studies/*/README.md")):
        text = path.read_text(encoding="utf-8").replace("](../../docs/", "](")
        text = re.sub(r"\[([^\]]+)\]\((?!\w+\.md)[^)]*\)", r"\1", text)
        found = [re.search(rf"(?m)^(?:- |\*\*){word}[.:](?:\*\*)? (.*)$", text) for word in ("Question", "Answer")]
        if all(found):
            question, answer = (each[1][0].upper() + each[1][1:] for each in found if each)
            parts.append(f"## {text.splitlines()[0][2:]}\n\n*{question}*\n\n{answer} (`studies/{path.parent.name}`)\n")
    return "\n".join(parts)


def commands() -> str:
    """Return the help of every command, as its parser prints it."""
    from rfield.segmentation.cli import COMMANDS, main

    os.environ["COLUMNS"] = "110"
    parts = []
    for name, (_, function) in COMMANDS.items():
        with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):
            main([name, "--help"])
        parts.append(f"## rfield {name}\n\n{function.__doc__}\n\n```text\n{shown.getvalue().rstrip()}\n```\n")
    return "\n".join(parts)


def names() -> str:
    """Return the documentation of every public name of `rfield` and `rfield.segmentation`, for mkdocstrings."""
    sections: dict[str, list[str]] = {title: [] for title in _SECTIONS.values()}
    for face in ("rfield", "rfield.segmentation"):
        module = importlib.import_module(face)
        for name in module.__all__:
            found = getattr(module, name)
            where = getattr(found, "__module__", None)
            if where is not None:  # neither the version nor a module
                package = next(prefix for prefix in _SECTIONS if where.startswith(prefix))
                sections[_SECTIONS[package]].append(f"::: {where}.{found.__qualname__}\n")
    # They need their libraries, so `import rfield` does not have them.
    callbacks = ("lightning.ReceptiveFieldSearch", "transformers.ReceptiveFieldSearch", "loop.LoopSearch")
    sections[_SECTIONS["rfield.integrations"]] += [f"::: rfield.integrations.{name}\n" for name in callbacks]
    return "\n".join("\n".join([f"## {title}\n", *dict.fromkeys(items)]) for title, items in sections.items() if items)
