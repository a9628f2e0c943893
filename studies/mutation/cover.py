"""Which tests run which lines, measured one test file at a time, and again only where a file has changed."""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from coverage import CoverageData
from forks import Job, run_jobs


@dataclass(frozen=True)
class Test:
    """A test that passes; `apart`: marked as `slow` or `shared`."""

    name: str
    cpu: float
    wall: float
    apart: bool


class Map:
    """The tests that cover each line.

    folder: where it is kept, a JSON for each test file, and the sources that it was measured with. Where a source has
    changed since, its lines are found again by their text, and a new line takes the tests of the one before it.
    """

    def __init__(self, root: Path, folder: Path) -> None:
        self._root, self._folder = root, folder
        (folder / "sources").mkdir(parents=True, exist_ok=True)

    def update(self, trees: list[Path]) -> Iterator[str]:
        """Measures what is new or has changed, and yields a line about each file."""
        files = self._files()
        for left in {each.name for each in self._folder.glob("*.json")} - {_file_name(each) for each in files}:
            (self._folder / left).unlink()
        stale = {name: paths for name, paths in files.items() if self._is_stale(name, paths)}
        sources = {}
        for path in (self._root / "src").rglob("*.py"):
            sources[str(path.relative_to(self._root))] = digest = _digest(path)
            (self._folder / "sources" / digest).write_bytes(path.read_bytes())
        for left in self._folder.glob("*.coverage*"):
            left.unlink()
        jobs = {}
        for name, paths in stale.items():
            file = self._folder / f"{_file_name(name)}.coverage"
            jobs[name] = Job(paths, stop_at_failure=False, coverage_file=file, limit=1200)
        names = {id(job): name for name, job in jobs.items()}
        for number, job in enumerate(run_jobs(iter(jobs.values()), trees), 1):
            name = names[id(job)]
            if job.status not in (0, 1, 5):
                said = (trees[0].parent / "log.txt").read_text()[-2000:]
                raise RuntimeError(f"{name} cannot be measured: status {job.status}, late: {job.timed_out}\n{said}")
            self._keep(name, stale[name], job, sources)
            failed = [each["test"] for each in job.results if each["outcome"] == "failed"]
            passed = sum(each["outcome"] == "passed" for each in job.results)
            yield f"{number}/{len(jobs)} {name}: {passed} tests, {job.seconds:.0f} s" + "".join(
                f"\n  fails: {each}" for each in failed
            )

    def _files(self) -> dict[str, list[str]]:
        """The test files, and all doctests as one."""
        tests = [str(each.relative_to(self._root)) for each in sorted((self._root / "tests").rglob("test_*.py"))]
        sources = [each for each in sorted((self._root / "src").rglob("*.py")) if ">>>" in each.read_text()]
        doctests = {"doctests": [str(each.relative_to(self._root)) for each in sources]} if sources else {}
        return {each: [each] for each in tests} | doctests

    def _is_stale(self, name: str, paths: list[str]) -> bool:
        kept = self._folder / _file_name(name)
        return not kept.exists() or json.loads(kept.read_text())["digest"] != self._digest(paths)

    def _digest(self, paths: list[str]) -> str:
        return hashlib.sha256("".join(_digest(self._root / each) for each in paths).encode()).hexdigest()[:16]

    def _keep(self, name: str, paths: list[str], job: Job, sources: dict[str, str]) -> None:
        tests = [each for each in job.results if each["outcome"] == "passed"]
        index = {each["test"]: i for i, each in enumerate(tests)}
        lines: dict[str, dict[int, set[int]]] = {}
        for file in self._folder.glob(f"{_file_name(name)}.coverage*"):
            data = CoverageData(str(file))
            with contextlib.suppress(Exception):  # A process that was killed while it wrote.
                data.read()
                for path in data.measured_files():
                    own = lines.setdefault("src/" + path.rpartition("/src/")[2], {})
                    for line, contexts in data.contexts_by_lineno(path).items():
                        own.setdefault(line, set()).update(index[each] for each in contexts if each in index)
            file.unlink()
        kept = {
            "digest": self._digest(paths),
            "tests": [[each["test"], each["cpu"], each["wall"], each["apart"]] for each in tests],
            "sources": {path: sources[path] for path in lines if path in sources},
            "lines": {
                path: {line: sorted(of) for line, of in own.items() if of}
                for path, own in lines.items()
                if path in sources
            },
        }
        (self._folder / _file_name(name)).write_text(json.dumps(kept))

    def read(self, paths: set[str]) -> "dict[str, dict[int, set[Test]]]":
        """For each of the sources, the tests of each of its present lines."""
        found: dict[str, dict[int, set[Test]]] = {path: {} for path in paths}
        moved: dict[tuple[str, str], dict[int, list[int]]] = {}
        for file in self._folder.glob("*.json"):
            kept: dict[str, Any] = json.loads(file.read_text())
            tests = [Test(*each) for each in kept["tests"]]
            for path in paths & kept["lines"].keys():
                key = path, kept["sources"][path]
                if key not in moved:
                    moved[key] = self._moves(*key)
                for line, of in kept["lines"][path].items():
                    for now in moved[key].get(int(line), ()):
                        found[path].setdefault(now, set()).update(tests[i] for i in of)
        return found

    def _moves(self, path: str, digest: str) -> dict[int, list[int]]:
        """Where each line of the source that was measured stands now."""
        new = (self._root / path).read_text().splitlines()
        if digest == _digest(self._root / path):
            return {line: [line] for line in range(1, len(new) + 1)}
        old = (self._folder / "sources" / digest).read_text().splitlines()
        moves: dict[int, list[int]] = {}
        for tag, a, b, c, d in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
            if tag == "equal":
                for i in range(b - a):
                    moves.setdefault(a + i + 1, []).append(c + i + 1)
            else:
                for was in range(max(a, 1), b + 1) if b > a else (a,):
                    moves.setdefault(was, []).extend(range(c + 1, d + 1))
        return moves


def _file_name(name: str) -> str:
    return name.replace("/", "__") + ".json"


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
