"""Make docs/tutorial.ipynb from docs/tutorial.md, and execute it.

pip install '.[all,docs]'
python docs/notebook.py
"""

import os
import re
from pathlib import Path

PAGE = Path(__file__).with_name("tutorial.md")
NOTEBOOK = PAGE.with_suffix(".ipynb")
_LINES = 12  # that are kept of each cell's text


def cells(text: str) -> list[tuple[str, str]]:
    """Return the cells of a page: prose, and its Python and shell blocks as code; expected outputs are left out.

    >>> cells("# Title\\n\\n```sh\\nrfield demo\\nls\\n```\\n\\n```text\\nshown\\n```\\nEnd\\n")
    [('markdown', '# Title'), ('code', '!rfield demo\\n!ls'), ('markdown', 'End')]
    """
    found = []
    for part in re.split(r"(```\w+\n.*?```)", text, flags=re.DOTALL):
        language, _, body = part.removeprefix("```").removesuffix("```").partition("\n")
        if not part.startswith("```"):
            found.append(("markdown", part.strip()))
        elif language == "python":
            found.append(("code", body.strip()))
        elif language == "sh":
            found.append(("code", "\n".join(f"!{line}" for line in body.strip().splitlines())))
    return [cell for cell in found if cell[1]]


def settled(text: str) -> str:
    """Return the last lines of a console's text, without colours and progress bars.

    >>> settled("\\x1b[2Kscoring ━━━━ 12/12\\r\\n\\x1b[1mdone\\x1b[0m\\r\\n")
    'done\\n'
    """
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", text).splitlines()
    kept = [line.rstrip() for line in lines if not re.search(r"[^┏┡━┳╇┓┩]━|^ {30}", line)]
    return "".join(f"{line}\n" for line in kept[-_LINES:] if line)


def main() -> None:
    """Execute the cells in the repository's root and write the notebook with the ends of their outputs."""
    import nbformat
    from nbclient import NotebookClient

    os.environ["MPLBACKEND"] = "agg"  # The commands draw into files.
    made = {"markdown": nbformat.v4.new_markdown_cell, "code": nbformat.v4.new_code_cell}
    parts = [
        made[kind](source, id=f"cell-{index}")
        for index, (kind, source) in enumerate(cells(PAGE.read_text(encoding="utf-8")))
    ]
    notebook = nbformat.v4.new_notebook(cells=parts)
    NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(PAGE.parents[1])}}).execute()
    for cell in notebook.cells:
        cell.metadata = {}
        texts = [
            output for output in cell.get("outputs", []) if output.output_type == "stream" and output.name == "stdout"
        ]
        if texts:
            texts[0].text = settled("".join(output.text for output in texts))
        if cell.cell_type == "code":
            cell.outputs = texts[:1]
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    main()
