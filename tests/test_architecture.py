"""Rules of the layout: which package imports which, how long a file may be, and what an import costs."""

import ast
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src" / "rfield"

# From the lowest package to the highest: each imports only from those before it, and the library (the packages outside
# `segmentation`) never from `segmentation`. The values are the third-party packages that each may import.
PACKAGES: dict[str, set[str]] = {
    "text": set(),
    "ops": {"torch"},
    "layers": {"torch"},
    "search": {"torch"},
    "receptive_field": {"torch", "matplotlib"},  # matplotlib only where a figure is drawn
    "surgery": {"torch"},
    "integrations": {"torch", "lightning", "transformers", "accelerate"},
    "segmentation.conventions": set(),
    "segmentation.config": set(),
    "segmentation.files": {"yaml", "torch", "safetensors"},
    "segmentation.console": {"rich"},
    "segmentation.doctor": {"torch"},
    "segmentation.models": {"torch", "torchvision", "timm", "huggingface_hub"},
    "segmentation.data": {"torch", "numpy", "PIL", "scipy", "torchvision", "yaml", "pycocotools", "datasets"},
    "segmentation.metrics": {"torch", "torchmetrics"},
    "segmentation.plots": {"numpy", "matplotlib"},
    "segmentation.runs": {"torch", "numpy"},
    "segmentation.inference": {"torch", "torchvision", "numpy", "PIL", "onnxruntime"},
    "segmentation.inspection": {
        *("torch", "torchvision", "PIL", "timm", "segmentation_models_pytorch", "transformers", "huggingface_hub"),
    },
    "segmentation.web": {"torch", "torchvision", "numpy", "PIL", "jinja2", "vl_convert", "starlette", "uvicorn"},
    "segmentation.training": {
        *("torch", "lightning", "tensorboard", "rich", "numpy", "yaml", "segmentation_models_pytorch"),
    },
    "segmentation.export": {"torch", "numpy", "onnx", "onnxscript", "onnxruntime", "huggingface_hub", "yaml"},
    "segmentation.experiments": {"torch", "numpy", "optuna", "rich"},
    "segmentation.parser": {"jsonargparse"},
    "segmentation.cli": set(),
}
LEVEL = {package: level for level, package in enumerate(PACKAGES)}
LIBRARY = {package for package in PACKAGES if not package.startswith("segmentation")}
FILES = sorted(SRC.rglob("*.py"))
# Lazy tables of names, and the entry of `python -m rfield`, are the only files that may name any package.
FACES = {SRC / "__init__.py", SRC / "__main__.py", SRC / "segmentation" / "__init__.py"}


def package_of(dotted: str) -> str:
    """The package that a dotted name below `rfield` lies in.

    >>> package_of("ops.resize"), package_of("segmentation.data.voc")
    ('ops', 'segmentation.data')
    """
    parts = dotted.split(".")
    return ".".join(parts[: 2 if parts[0] == "segmentation" else 1])


def imports_of(path: Path) -> list[str]:
    """Absolute dotted names of everything that a file imports, at any depth."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide which package is meant"
            if node.module in ("rfield", "rfield.segmentation"):
                names += [f"{node.module}.{alias.name}" for alias in node.names]
            elif node.module:
                names.append(node.module)
    return names


@pytest.mark.parametrize("path", [path for path in FILES if path not in FACES], ids=lambda p: str(p.relative_to(SRC)))
def test_packages_import_only_from_below(path: Path) -> None:
    package = package_of(".".join(path.relative_to(SRC).with_suffix("").parts))
    assert package in PACKAGES, f"{path} is in no package of the layout"
    for name in imports_of(path):
        top, _, rest = name.partition(".")
        if top == "rfield":
            if rest in ("", "__version__"):
                continue
            other = package_of(rest)
            assert LEVEL[other] <= LEVEL[package], f"{path} ({package}) imports {name}, from above it"
            assert package not in LIBRARY or other in LIBRARY, f"{path}: the library may not import {name}"
        elif top not in sys.stdlib_module_names:
            assert top in PACKAGES[package], f"{path} ({package}) may not import {name}"


def test_lazy_tables_point_at_leaves() -> None:
    import rfield
    import rfield.segmentation

    for module in rfield._PUBLIC.values():
        # `largefov_vgg16` and its like need the product's extras.
        assert package_of(module.removeprefix("rfield.")) in PACKAGES
    for path in FILES:
        if path.name == "__init__.py" and path not in FACES:
            names = {
                alias
                for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                if isinstance(node, ast.ImportFrom)
                for alias in (entry.asname or entry.name for entry in node.names)
            }
            modules = {entry.stem for entry in path.parent.iterdir() if entry.name != "__pycache__"}
            assert not names & modules, f"{path} re-exports {names & modules}, which shadows a module"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_text_files_are_utf_8_whatever_the_console_speaks(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name)):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
        owner = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
        given = [*node.args, *(word.value for word in node.keywords)]
        binary = any(isinstance(each, ast.Constant) and str(each.value).endswith("b") for each in given)
        if (
            name in ("read_text", "write_text", "open")
            and not binary
            and owner not in ("os", "PIL.Image", "bar", "tarfile")
        ):
            own = name == "write_text" and isinstance(
                node.func, ast.Name
            )  # of rfield.segmentation.files, which is UTF-8
            assert own or any(word.arg == "encoding" for word in node.keywords), f"{path}:{node.lineno}: no encoding"


def test_files_are_written_in_one_place() -> None:
    # Locks, and folders that are renamed when all of them is written.
    others = {
        "data/faces.py",
        "data/voc.py",
        "experiments/study.py",
        "experiments/trials.py",
        "inference/feature_cache.py",
    }
    for path in (SRC / "segmentation").rglob("*.py"):
        if str(path.relative_to(SRC / "segmentation")) in others | {
            "files/atomic.py",
            "files/checkpoints.py",
            "files/lock.py",
        }:
            continue
        source = re.sub(r"(?m)^ *(>>>|\.\.\.) .*", "", path.read_text(encoding="utf-8"))
        found = re.findall(
            r"os\.replace|\.write_(?:text|bytes)\(|\bopen\([^)]*\"wb?\"|json\.dump\(|yaml\.dump\(", source
        )
        assert not found, f"{path}: {found}: use rfield.segmentation.files.atomic"


def test_evaluate_imports_no_lightning() -> None:
    tree = ast.parse((SRC / "segmentation" / "cli.py").read_text(encoding="utf-8"))
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    called = [functions["evaluate"]]
    for function in called:
        names = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
        called += [functions[name] for name in sorted(names & set(functions)) if functions[name] not in called]
        for node in ast.walk(function):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rfield."):
                package = package_of(str(node.module).removeprefix("rfield."))
                # What a package imports lies below it.
                assert LEVEL[package] < LEVEL["segmentation.training"], f"{function.name} imports {node.module}"
    assert {"evaluate", "_write_scores"} <= {function.name for function in called}


def test_error_messages_start_in_lower_case_and_end_without_a_period() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args):
                continue
            message = node.exc.args[0]
            parts = message.values if isinstance(message, ast.JoinedStr) else [message]
            start, end = (part.value if isinstance(part, ast.Constant) else "" for part in (parts[0], parts[-1]))
            assert not re.match("(The|This|An?|Give|There) ", str(start)), f"{path}:{node.lineno}: {start}"
            assert not re.search(r"(?<!\.)\.$", str(end)), f"{path}:{node.lineno}: {end}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = node.body[0].end_lineno - node.body[0].lineno + 1 if ast.get_docstring(node) else 0
            assert node.end_lineno - node.lineno + 1 - docstring <= 50, f"{path}:{node.lineno}: {node.name}"


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_test_file_is_over_400_lines(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


def test_median_source_file_is_under_150_lines() -> None:
    assert statistics.median(len(path.read_text(encoding="utf-8").splitlines()) for path in FILES) < 150


def test_tests_mirror_the_source() -> None:
    # Every folder of tests stands for a package of the source.
    for folder in {path.parent.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py")}:
        assert (SRC / folder).is_dir() or folder == Path("."), f"tests/{folder} mirrors no package"


def test_reference_is_imported_by_tests_only() -> None:
    assert not [path for path in FILES if any("reference" in name for name in imports_of(path))]


def imported_after(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.slow
def test_import_rfield_needs_torch_alone() -> None:
    third_party = {"torchvision", "lightning", "PIL", "matplotlib", "jsonargparse", "torchmetrics", "rich"}
    used = "rfield.ReceptiveFieldRegulator; rfield.inspect(torch.nn.Conv2d(3, 3, 3, padding=1), 16)"
    assert not third_party & imported_after(f"import rfield, torch; {used}")
    assert "torch" not in imported_after("import rfield, rfield.segmentation")


@pytest.mark.parametrize("module", ["rfield", "rfield.segmentation"])
def test_public_names_resolve(module: str) -> None:
    import importlib

    face = importlib.import_module(module)
    for name in face.__all__:
        assert getattr(face, name) is not None
    assert set(dir(face)) >= set(face.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = face.nonsense


def test_help_imports_no_torch() -> None:
    loaded = imported_after(
        "import sys; sys.argv = ['rfield', 'train', '--help']\nimport contextlib, io, rfield.segmentation.cli as cli\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n    cli.main()"
    )
    assert "jsonargparse" in loaded
    assert "torch" not in loaded


TESTS = sorted(Path(__file__).parent.rglob("*.py"))


@pytest.mark.parametrize("path", TESTS, ids=lambda path: str(path.relative_to(Path(__file__).parent)))
def test_no_test_hides_in_a_function(path: Path) -> None:
    """One that stands inside of another function is never collected."""
    assert hidden_tests(path.read_text(encoding="utf-8")) == []


def hidden_tests(source: str) -> list[str]:
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    return sorted(
        {
            inner.name
            for outer in ast.walk(ast.parse(source))
            if isinstance(outer, functions)
            for inner in ast.walk(outer)
            if inner is not outer and isinstance(inner, (*functions, ast.ClassDef)) and is_test(inner.name)
        }
    )


def is_test(name: str) -> bool:
    return name.startswith(("test_", "Test"))


def test_hidden_tests_are_found() -> None:
    hidden = (
        "def test_a():\n    if 1:\n        def test_b(): pass\n    class TestC:\n        async def test_d(): pass\n"
    )
    assert hidden_tests(hidden) == ["TestC", "test_b", "test_d"]
    assert hidden_tests("class TestA:\n    def test_b(self):\n        def helper(): pass\n") == []
