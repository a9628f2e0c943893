"""Counts the packages of the source tree, the imports between them, and its longest modules and functions.

    python studies/layout/measure.py [SOURCE] [--out studies/layout/layout.json]

SOURCE is src/rfield unless given; any commit's can be measured (`git worktree add ../old COMMIT`). A package is a
folder, or a module beside one; `segmentation` counts as the packages inside it. An arrow is a pair of packages of which
one imports the other.
"""

import argparse
import ast
import json
import statistics
from pathlib import Path
from typing import Any


def package_of(parts: tuple[str, ...]) -> str:
    """The package of a module's dotted name below the source folder."""
    return "/".join(parts[: 2 if parts[0] == "segmentation" else 1])


def measure(source: Path) -> dict[str, Any]:
    """What the tree looks like, in numbers.

    Raises:
        ValueError: if there is no Python file.
    """
    files = sorted(path for path in source.rglob("*.py") if not path.name.startswith("__"))
    if not files:
        raise ValueError(f"{source} holds no Python files: give the folder of the package, such as src/rfield")
    lengths, functions, arrows = {}, {}, set()
    packages = {}
    for path in files:
        parts = path.relative_to(source).with_suffix("").parts
        package = package_of(parts)
        text = path.read_text()
        lengths["/".join(parts)] = len(text.splitlines())
        packages[package] = packages.get(package, 0) + len(text.splitlines())
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if ast.get_docstring(node):
                    lines -= (node.body[0].end_lineno or 0) - node.body[0].lineno + 1
                functions[f"{'/'.join(parts)}:{node.name}"] = lines
            names = []
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == source.name:
                whole = node.module in (source.name, f"{source.name}.segmentation")
                names = [f"{node.module}.{alias.name}" for alias in node.names] if whole else [node.module]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names if alias.name.startswith(f"{source.name}.")]
            for name in names:
                other = package_of(tuple(name.split(".")[1:]))
                if other != package and not other.startswith("__"):
                    arrows.add((package, other))
    longest = sorted(functions.items(), key=lambda item: -item[1])[:5]
    return {
        "entries at the top": sorted(p.name for p in source.iterdir() if not p.name.startswith("__")),
        "packages": len(packages),
        "arrows": len(arrows),
        "modules": len(files),
        "median module": statistics.median(lengths.values()),
        "longest modules": sorted(lengths.items(), key=lambda item: -item[1])[:5],
        "longest functions, without docstrings": longest,
        "functions over 50 lines": sum(lines > 50 for lines in functions.values()),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, nargs="?", default=Path("src/rfield"))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    found = measure(arguments.source)
    print(json.dumps(found, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(found) + "\n")
