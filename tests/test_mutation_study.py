"""The mutation study's own tools: the mutants that it finds, the sample, and a whole study of a tiny project."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

STUDY = Path(__file__).parents[1] / "studies/mutation"

CODE = '''\
"""Text: 1 + 1."""
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
SLACK = 1e-4

class Layer:
    size: int = 3

    def __repr__(self) -> str:
        return f"{1 + 1}"

def area(h: int, w: int = 2, *, whole: bool = True) -> "int | None":
    """Less than 1 < 2."""
    if h < 0 or not whole:
        raise ValueError(f"{h + 1} is below {max(0, 1)}")
    h = max(1, abs(h))
    print(h + 1)
    return scaled(h, w, dim=0)
'''


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    monkeypatch.syspath_prepend(STUDY)
    import cover
    import forks
    import mutants
    import study

    return SimpleNamespace(mutants=mutants, study=study, cover=cover, forks=forks)


def test_every_kind_of_mutant_is_found_and_no_text_is_changed(tools: SimpleNamespace) -> None:
    found = tools.mutants.find_mutants("a.py", CODE.encode())
    changed = {}
    for each in found:
        changed.setdefault(each.line, set()).add(each.becomes)
    assert changed == {
        7: {"SLACK = 0.01", "SLACK = 1e-06"},
        10: {"size: int = 4", "size: int = 2"},
        15: {
            f'def area(h: int, w: int = {w}, *, whole: bool = {whole}) -> "int | None":'
            for w, whole in ((1, True), (3, True), (2, False))
        },
        17: {
            "if True:",
            "if False:",
            "if h <= 0 or not whole:",
            "if h < 1 or not whole:",
            "if h < 0 and not whole:",
            "if False or not whole:",
            "if h < 0 or False:",
            "if h < 0 or bool(whole):",
        },
        19: {
            "pass",
            "h = (abs(h))",
            "h = min(1, abs(h))",
            "h = max(1, (h))",
            "h = max(0, abs(h))",
            "h = max(2, abs(h))",
        },
        21: {
            "return (h)",
            "return scaled(w, h, dim=0)",
            "return scaled(h, w, dim=1)",
            "return scaled(h, w)",
        },
    }
    assert {each.kind for each in found} > {"branch", "comparison", "boolean", "drop", "swap", "axis", "keyword"}


def test_a_mutant_is_one_edit_and_waits_for_the_lines_that_show_it(tools: SimpleNamespace) -> None:
    source = CODE.encode()
    found = {each.becomes: each for each in tools.mutants.find_mutants("a.py", source)}
    swap = found["return scaled(w, h, dim=0)"]
    assert swap.apply(source) == source.replace(b"scaled(h, w", b"scaled(w, h")
    assert swap.diff(source).splitlines()[-2:] == ["-    return scaled(h, w, dim=0)", "+    return scaled(w, h, dim=0)"]
    assert swap.lines == (21,)
    assert found["size: int = 4"].lines == (13,)
    assert found["SLACK = 0.01"].lines == (13, *range(16, 22))  # No function names it: any of them.


def test_the_sample_stays_where_the_source_grows(tools: SimpleNamespace) -> None:
    source = "".join(f"def f{i}(a, b):\n    return a < {i} and g(a, b)\n" for i in range(20)).encode()
    grown = b"def first(x):\n    return x.abs()\n" + source
    drawn, again = (
        tools.mutants.sample(tools.mutants.find_mutants("a.py", each), 12, 0, {"a.py": each})
        for each in (source, grown)
    )
    assert len({each.key for each in drawn} & {each.key for each in again}) >= 10
    assert len({each.line for each in drawn}) == 12
    assert {each.kind for each in drawn} == {"boolean", "comparison", "number", "swap"}
    other = tools.mutants.sample(tools.mutants.find_mutants("a.py", source), 12, 1, {"a.py": source})
    assert drawn != other


def test_fast_tests_of_the_module_come_first_and_time_is_bounded(tools: SimpleNamespace) -> None:
    test = tools.cover.Test
    slow, own, other = (
        test(f"tests/test_{name}.py::test", seconds, seconds, False)
        for name, seconds in (("whole", 50.0), ("area", 3.0), ("other", 0.2))
    )
    shared = test("tests/test_area.py::test_shared", 0.1, 0.1, True)
    mutant = next(m for m in tools.mutants.find_mutants("src/area.py", CODE.encode()) if m.line == 21)
    chosen = tools.study.choose(mutant, {21: {slow, own, other, shared}}, 10.0)
    assert chosen == ([other, own], 2)
    beside = test("tests/test_area.py::test_beside", 0.3, 0.3, False)
    assert tools.study.choose(mutant, {21: {other}, 5: {beside, slow}}, 10.0) == ([beside, other], 0)
    assert tools.study.choose(mutant, {21: {shared}}, 10.0) == ([shared], 0)
    assert tools.study.choose(mutant, {}, 10.0) == ([], 0)


@pytest.mark.slow
def test_a_study_is_run_and_gone_on_with(tmp_path: Path) -> None:
    """A mutant survives; then an assertion is added that kills it, and the study is run again."""
    for name in ("mutants.py", "forks.py", "cover.py", "study.py"):
        target = tmp_path / "studies/mutation" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text((STUDY / name).read_text())
    (tmp_path / "studies/mutation/equivalent.yaml").write_text("[]")
    code, tests = tmp_path / "src/rfield/segmentation/metrics.py", tmp_path / "tests/segmentation/test_metrics.py"
    for path in (code, tests):
        path.parent.mkdir(parents=True)
    for folder in (code.parent, code.parents[1]):
        (folder / "__init__.py").touch()
    code.write_text("def least(a):\n    return a < 3\n")
    tests.write_text(
        "from rfield.segmentation.metrics import least\n\ndef test_least():\n    assert least(1) and not least(5)\n"
    )
    (tmp_path / ".gitignore").write_text("build/\n")
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    run = (
        "import sys; sys.path.insert(0, 'studies/mutation'); import study; study.preload = lambda names: None;"
        "study.report = lambda *args: 'reported';"
        "sys.argv = 'study --count 30 --packages metrics --jobs 1 --results build/results.jsonl'.split(); study.main()"
    )

    def study() -> tuple[str, list[str]]:
        plain = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        done = subprocess.run([sys.executable, "-c", run], cwd=tmp_path, env=plain, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        lines = (tmp_path / "build/results.jsonl").read_text().splitlines()
        return done.stdout, [f"{each.get('becomes')} {each['status']}" for each in map(json.loads, lines)]

    _, results = study()
    assert results[0] == "None survived"  # The control.
    assert len(results) == 2
    assert results[1] in ("return a <= 3 survived", "return a < 4 survived", "return a < 2 survived")
    tests.write_text(tests.read_text() + "    assert least(2) and not least(3)\n")
    shown, results = study()
    assert len(results) == 4
    assert results[2] == "None survived"
    assert results[3].endswith("killed")
    assert "reported" in shown
    assert code.read_text() == "def least(a):\n    return a < 3\n"


def test_what_is_known_is_not_run_again(tools: SimpleNamespace) -> None:
    plan = tools.study.Plan("data", None, "key", [], 0, code="a", suite="b")
    for status, code, suite, known in (
        ("killed", "a", "b", True),
        ("killed", "a", "other", True),
        ("timeout", "a", "other", True),
        ("survived", "a", "b", True),
        ("survived", "a", "other", False),
        ("killed", "other", "b", False),
        ("broken", "a", "b", False),
    ):
        assert tools.study.is_known(plan, {"status": status, "code": code, "suite": suite}) == known
    assert not tools.study.is_known(plan, None)


def test_the_report_leaves_out_equivalents_and_names_survivors(tools: SimpleNamespace) -> None:
    source = "".join(f"def f{i}(a):\n    return a < {i}\n" for i in range(5)).encode()
    drawn = tools.mutants.sample(tools.mutants.find_mutants("a.py", source), 5, 0, {"a.py": source})
    shared = {"test": "t", "tests": 3, "left_out": 2}
    whys = ("assert 1 == 2", "TypeError: no", "", "", "")
    kinds = ("killed", "killed", "timeout", "survived", "survived")
    results = {m.key: {"status": s, "why": w, **shared} for m, s, w in zip(drawn, kinds, whys, strict=True)}
    last = drawn[-1]
    same = {"path": "a.py", "place": last.place, "was": last.was, "becomes": last.becomes, "reason": "for a reason"}
    text = tools.study.report({"data": drawn}, {**results, "control-data": {"status": "survived"}}, [same])
    assert "| all | 4 | 3 | 1 | 75.0% | 30.1% to 95.4% |" in text
    survivors, equivalents = text.split("## Survivors")[1].split("## Called equivalent")
    assert drawn[3].key in survivors
    assert "2 more were not run" in survivors
    assert "for a reason" in equivalents
    assert "Notes" not in text
    assert "control of data is not run" in tools.study.report({"data": drawn}, results, [same])
