"""DESIGN rules that a machine can hold: which room imports which, and how long a file may be."""

import ast
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "rfield"

# From the top of the house to the bottom: a room imports from rooms above it, never from one below.
# The second entry names the third-party packages that the room may use, beside those of the rooms it imports.
ROOMS: dict[str, set[str]] = {
    "config": set(),
    "ship_config": set(),
    "inspect_config": set(),
    "data_config": set(),
    "reading": {"yaml"},
    "checkpoints": set(),
    "ops": {"torch"},
    "layers": {"torch"},
    "adapting": {"torch"},
    "search": {"torch"},
    "absolute_gradient": {"torch"},
    "let_pass": {"torch"},
    "receptive_field": {"torch"},
    "layer_fields": {"torch"},
    "effective_field": {"torch"},
    "fusing": {"torch"},
    "models": {"torch", "torchvision", "timm", "huggingface_hub", "safetensors"},
    "data": {"torch", "numpy", "PIL", "scipy", "torchvision", "yaml"},
    "losses": {"torch", "segmentation_models_pytorch"},
    "metrics": {"torch", "torchmetrics"},
    "plots": {"numpy", "matplotlib"},
    "tiling": {"torch"},
    "inference": {"torch", "torchvision", "numpy", "PIL", "yaml"},
    "plain_run": {"torch", "safetensors", "yaml"},
    "sharing": set(),
    "training": {"torch", "lightning", "tensorboard", "rich", "numpy", "yaml"},
    "deployed": {"torch", "onnxruntime"},
    "exporting": {"torch", "onnx", "onnxscript", "onnxruntime"},
    "quantising": {"torch", "numpy", "onnx", "onnxruntime"},
    "console": {"rich"},
    "experiments": {"torch", "numpy", "optuna", "rich"},
    "sources": {"torch", "torchvision", "timm", "segmentation_models_pytorch", "transformers", "huggingface_hub"},
    "inspecting": {"torch", "torchvision", "PIL"},
    "cli": {"jsonargparse", "docstring_parser"},
    "__main__": set(),
    "__init__": set(),
}
ORDER = {room: row for row, room in enumerate(ROOMS)}
FILES = sorted(SRC.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(SRC).parts[0].removesuffix(".py")


def imports_of(path: Path) -> list[str]:
    """Absolute dotted names of everything that a file imports, at any depth."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide which room is meant"
            if node.module == "rfield":
                names += [f"rfield.{alias.name}" for alias in node.names]
            elif node.module:
                names.append(node.module)
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_rooms_import_only_what_stands_above_them(path: Path) -> None:
    room = room_of(path)
    assert room in ROOMS, f"{path.name} is in no room of the design"
    for name in imports_of(path):
        top, _, rest = name.partition(".")
        if top == "rfield":
            other = rest.split(".")[0]
            if other in ("", "__version__"):
                continue
            assert ORDER[other] <= ORDER[room], f"{path} ({room}) imports {name}, a room below it"
        elif top not in sys.stdlib_module_names:
            assert top in ROOMS[room], f"{path} ({room}) may not import {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_text_files_are_utf_8_whatever_the_console_speaks(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name)):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
        owner = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
        given = [*node.args, *(word.value for word in node.keywords)]
        binary = any(isinstance(each, ast.Constant) and str(each.value).endswith("b") for each in given)
        if name in ("read_text", "write_text", "open") and not binary and owner not in ("os", "PIL.Image", "bar"):
            own = name == "write_text" and isinstance(node.func, ast.Name)  # of rfield.training, which is UTF-8
            assert own or any(word.arg == "encoding" for word in node.keywords), f"{path}:{node.lineno}: no encoding"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_no_source_file_is_over_500_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 500


def test_median_source_file_is_under_150_lines() -> None:
    assert statistics.median(len(path.read_text().splitlines()) for path in FILES) < 150


def test_reference_is_imported_by_tests_only() -> None:
    assert not [path for path in FILES if any("reference" in name for name in imports_of(path))]


def imported_after(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_import_rfield_needs_torch_alone() -> None:
    third_party = {"torchvision", "lightning", "PIL", "matplotlib", "jsonargparse", "torchmetrics", "rich"}
    assert not third_party & imported_after("import rfield; rfield.ReceptiveFieldRegulator")
    assert "torch" not in imported_after("import rfield")


def test_public_names_resolve() -> None:
    import rfield

    for name in rfield.__all__:
        assert getattr(rfield, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = rfield.nonsense


def test_help_imports_no_torch() -> None:
    loaded = imported_after(
        "import sys; sys.argv = ['rfield', 'train', '--help']\nimport contextlib, io, rfield.cli\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n    rfield.cli.main()"
    )
    assert "jsonargparse" in loaded
    assert "torch" not in loaded


TESTS = sorted(Path(__file__).parent.rglob("*.py"))


@pytest.mark.parametrize("path", TESTS, ids=lambda path: str(path.relative_to(Path(__file__).parent)))
def test_no_test_hides_in_a_function(path: Path) -> None:
    """One that stands inside of another function is never collected."""
    assert hidden_tests(path.read_text()) == []


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
