"""Runs the mutation study, or goes on with it: `python studies/mutation/study.py --help`, and README.md beside it."""

import argparse
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from cover import Map, Test
from forks import LIBRARIES, Job, copy_tree, preload, run_jobs
from mutants import Mutant, find_mutants, sample

HERE = Path(__file__).resolve().parent
# Of src/rfield; a module that stands nowhere belongs to the last.
PACKAGES: dict[str, tuple[str, ...]] = {
    "ops": ("ops/",),
    "layers": ("layers/",),
    "search": ("search/",),
    "surgery": ("surgery/", "segmentation/export/hub.py"),
    "fields": ("receptive_field/",),
    "metrics": ("segmentation/metrics.py", "segmentation/training/losses.py"),
    "models": ("segmentation/models/",),
    "training": ("segmentation/training/",),
    "data": ("segmentation/data/",),
    "files": (),
}
# The slow oracle of the tests; figures; commands and flags; experiments that join the others.
LEFT_OUT = (
    *("ops/reference.py", "__main__.py", "segmentation/plots/", "segmentation/experiments/", "segmentation/cli.py"),
    *("segmentation/console.py", "segmentation/config/"),
)
_CRASHES = ("TypeError", "AttributeError", "NameError", "UnboundLocalError", "IndexError", "KeyError")


@dataclass(frozen=True)
class Plan:
    """A mutant, or with `mutant` None its package's control, and the tests to run."""

    package: str
    mutant: Mutant | None
    key: str
    tests: list[Test]
    left_out: int
    code: str
    suite: str


def package_of(module: str) -> str | None:
    """The package of a module, named from src/rfield on; None if it is left out.

    >>> package_of("search/base.py"), package_of("plots/style.py"), package_of("new.py")
    ('search', None, 'files')
    """

    def stands(parts: tuple[str, ...]) -> bool:
        return any(module.startswith(part) if part.endswith("/") else module == part for part in parts)

    if stands(LEFT_OUT) or module.endswith("_config.py"):
        return None
    return next((package for package, parts in PACKAGES.items() if stands(parts)), [*PACKAGES][-1])


def draw(root: Path, count: int, seed: int, source: str = "src/rfield") -> dict[str, list[Mutant]]:
    """The sample: as many mutants of each package."""
    of: dict[str, list[Mutant]] = {package: [] for package in PACKAGES}
    sources = {}
    for path in sorted((root / source).rglob("*.py")):
        name = str(path.relative_to(root))
        if (package := package_of(str(path.relative_to(root / source)))) is not None:
            sources[name] = path.read_bytes()
            of[package] += find_mutants(name, sources[name])
    each = -(-count // len(PACKAGES))
    return {package: sample(mutants, each, seed, sources) for package, mutants in of.items()}


def choose(mutant: Mutant, covering: dict[int, set[Test]], seconds: float) -> tuple[list[Test], int]:
    """The tests to run, the fast first, and how many more cover the line.

    Those of the module's own test file come before others, and may take half of the time. What is marked `slow` or
    `shared` is run only where nothing else covers the line. Own tests of other lines come last: what the line gave to
    an earlier test may have been kept for them, in a cache of the module.
    """
    # What no test runs may have run when the module was imported.
    every = set().union(*(covering.get(line, ()) for line in mutant.lines)) or set().union(*covering.values())
    tests = [each for each in every if not each.apart] or [*every]

    def own(test: Test) -> bool:
        file, module = Path(test.name.partition("::")[0]), Path(mutant.path)
        return file == module or module.stem in file.stem or file.stem.removeprefix("test_") in module.stem

    near = [each for each in set().union(*covering.values()) if own(each) and not each.apart]
    chosen: list[Test] = []
    for some, share in ((filter(own, tests), seconds / 2), (tests, seconds * 0.8), (near if tests else [], seconds)):
        for each in sorted(some, key=_speed):
            if each not in chosen and (sum(test.cpu for test in chosen) + each.cpu <= share or not chosen):
                chosen.append(each)
    steps = (0.1, 0.5, 2, 8)
    chosen.sort(key=lambda test: (sum(test.cpu > step for step in steps), not own(test), test.name))
    return chosen, len(every.difference(chosen))


def _speed(test: Test) -> tuple[float, str]:
    return test.cpu, test.name


def plans(root: Path, drawn: dict[str, list[Mutant]], tests: Map, seconds: float) -> Iterator[Plan]:
    covering = tests.read({each.path for mutants in drawn.values() for each in mutants})
    for package, mutants in drawn.items():
        for number, mutant in enumerate(mutants):
            chosen, left_out = choose(mutant, covering[mutant.path], seconds)
            files = sorted({each.name.partition("::")[0] for each in chosen})
            suite = _digest(*(each.name.encode() for each in chosen), *((root / each).read_bytes() for each in files))
            code = _digest((root / mutant.path).read_bytes())
            if not number:
                yield Plan(package, None, f"control-{package}", chosen, left_out, code, suite)
            yield Plan(package, mutant, mutant.key, chosen, left_out, code, suite)


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:12]


def read_results(file: Path) -> dict[str, dict[str, Any]]:
    """The last result of each mutant."""
    lines = file.read_text().splitlines() if file.exists() else []
    return {each["key"]: each for each in map(json.loads, lines)}


def is_known(plan: Plan, known: dict[str, Any] | None) -> bool:
    """Whether a result still holds: of the same code, and if nothing failed, of the same tests."""
    if known is None or known["code"] != plan.code or known["status"] == "broken":
        return False
    return known["status"] in ("killed", "timeout") or known["suite"] == plan.suite


def run(root: Path, planned: list[Plan], trees: list[Path], file: Path) -> Iterator[dict[str, Any]]:
    """Runs the plans and appends each result to the file as it comes."""
    of: dict[int, Plan] = {}
    mutated: dict[Path, str] = {}

    def jobs() -> Iterator[Job]:
        for plan in planned:
            limits = {each.name: 30 + 10 * each.wall for each in plan.tests}

            def prepare(tree: Path, mutant: Mutant | None = plan.mutant) -> None:
                if tree in mutated:
                    (tree / mutated[tree]).write_bytes(sources[mutated.pop(tree)])
                if mutant:
                    (tree / mutant.path).write_bytes(mutant.apply(sources[mutant.path]))
                    mutated[tree] = mutant.path

            job = Job([each.name for each in plan.tests], prepare, limits, 120.0)
            of[id(job)] = plan
            yield job

    sources = {each.mutant.path: (root / each.mutant.path).read_bytes() for each in planned if each.mutant}
    alone = [plan for plan in planned if not plan.tests]
    planned = [plan for plan in planned if plan.tests]
    with file.open("a") as out:
        for plan in alone:
            yield _write(out, _result(plan, None, sources))
        for job in run_jobs(jobs(), trees):
            yield _write(out, _result(of[id(job)], job, sources))


def _write(out: Any, result: dict[str, Any]) -> dict[str, Any]:
    out.write(json.dumps(result, ensure_ascii=False) + "\n")
    out.flush()
    return result


def _result(plan: Plan, job: Job | None, sources: dict[str, bytes]) -> dict[str, Any]:
    status, test, why = "survived", "", "no test covers it"
    if job:
        failed = next((each for each in job.results if each["outcome"] == "failed"), None)
        begun = [each["test"] for each in job.events if "test" in each]
        codes = {0: "survived", 1: "killed", 2: "killed", 3: "killed", None: "killed"}
        status = "timeout" if job.timed_out else codes.get(job.status, "broken")
        test = failed["test"] if failed else begun[-1] if begun and status != "survived" else ""
        why = failed["why"] if failed else {None: "the process died", 2: "not collected"}.get(job.status, "")
    mutant, result = plan.mutant, {"key": plan.key, "package": plan.package, "status": status}
    if mutant:
        of_mutant = asdict(mutant)
        result |= {name: of_mutant[name] for name in ("kind", "path", "place", "line", "was", "becomes")}
    result |= {"test": test, "why": why, "tests": len(plan.tests), "left_out": plan.left_out}
    result |= {"seconds": round(job.seconds, 1) if job else 0.0, "code": plan.code, "suite": plan.suite}
    if mutant and status == "survived":
        result["diff"] = mutant.diff(sources[mutant.path])
    return result


def report(drawn: dict[str, list[Mutant]], results: dict[str, dict[str, Any]], equivalent: list[dict[str, str]]) -> str:
    """The share killed, a table of the packages, the survivors and the mutants called equivalent, in Markdown."""
    from scipy.stats import binomtest

    reasons = {tuple(each[part] for part in ("path", "place", "was", "becomes")): each["reason"] for each in equivalent}
    rows, survivors, same, notes, total = [], [], [], [], [0, 0, 0]
    for package, mutants in drawn.items():
        counts = [0, 0, 0]  # Judged, killed, killed by a crash.
        for mutant in mutants:
            result = results.get(mutant.key)
            reason = reasons.get((mutant.path, mutant.place, mutant.was, mutant.becomes))
            title = f"`{mutant.path}:{mutant.line}` {mutant.place}: `{mutant.was}` -> `{mutant.becomes}`"
            if result is None or result["status"] == "broken":
                notes.append(f"- not run: {title}")
                continue
            killed = result["status"] in ("killed", "timeout")
            if reason and killed:
                notes.append(f"- called equivalent, but killed by `{result['test']}`: {title}")
            elif reason:
                same.append(f"- {title}: {reason}")
                continue
            crash = killed and result["why"].startswith(_CRASHES)
            counts = [a + b for a, b in zip(counts, (1, killed, crash), strict=True)]
            if not killed:
                unrun = f"; {result['left_out']} more were not run" if result["left_out"] else ""
                survivors.append(f"- {mutant.key} {title} ({result['tests']} tests{unrun})")
        control = results.get(f"control-{package}", {"status": "not run"})["status"]
        if control != "survived":
            notes.append(f"- the control of {package} is {control}")
        total = [a + b for a, b in zip(total, counts, strict=True)]
        rows.append((package, counts))
    lines = []
    for package, (judged, killed, crashed) in (*rows, ("all", total)):
        if judged:
            low, high = binomtest(killed, judged).proportion_ci(method="wilson")
            share = f"{killed / judged:.1%} | {low:.1%} to {high:.1%}"
            lines.append(f"| {package} | {judged} | {killed} | {crashed} | {share} |")
    table = "| package | mutants | killed | of these by a crash | share | 95 % interval |\n|---|---|---|---|---|---|\n"
    text = table + "\n".join(lines) + "\n"
    for title, each in (("Survivors", survivors), ("Called equivalent", same), ("Notes", notes)):
        if each:
            text += f"\n## {title}\n\n" + "\n".join(each) + "\n"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=300, help="mutants, the same number of each package")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--packages", default=",".join(PACKAGES), help="which to run, in this order")
    parser.add_argument("--only", default="", help="keys of mutants, which are run again")
    parser.add_argument("--jobs", type=int, default=2, help="copies of the repository, and tests at a time")
    parser.add_argument("--seconds", type=float, default=60, help="of tests for each mutant, on the processor")
    parser.add_argument("--results", type=Path, default=HERE / "results.jsonl", help="appended to, and gone on with")
    parser.add_argument("--work", type=Path, default=HERE.parents[1] / "build/mutation")
    parser.add_argument("--report", action="store_true", help="print the report of what has been run, and run nothing")
    flags = parser.parse_args()
    root, packages = HERE.parents[1], flags.packages.split(",")
    if unknown := set(packages) - PACKAGES.keys():
        parser.error(f"no packages {', '.join(sorted(unknown))}; there are {', '.join(PACKAGES)}")
    trees = [flags.work.resolve() / f"copy{number}" / "rfield" for number in range(flags.jobs)]
    if not flags.report:
        whole = flags.work.resolve() / "whole" / "rfield"  # The working copy may change in the meantime.
        for tree in (whole, *trees):
            copy_tree(root, tree)
        root = whole
    every = draw(root, flags.count, flags.seed)
    drawn = {package: every[package] for package in packages}
    if not flags.report:
        preload(LIBRARIES)
        tests = Map(root, flags.work / "map")
        for line in tests.update(trees):
            print(line, flush=True)
        known, only = read_results(flags.results), set(filter(None, flags.only.split(",")))
        todo = [
            each
            for each in plans(root, drawn, tests, flags.seconds)
            if (each.key in only if only else not is_known(each, known.get(each.key)))
        ]
        print(f"{len(todo)} to run", flush=True)
        for number, result in enumerate(run(root, todo, trees, flags.results), 1):
            place = f"{result.get('path', '')}:{result.get('line', '')}"
            print(f"{number}/{len(todo)} {result['key']} {result['status']} {result['seconds']} s {place}", flush=True)
    equivalent = yaml.safe_load((HERE / "equivalent.yaml").read_text()) or []
    print(report(drawn, read_results(flags.results), equivalent))


if __name__ == "__main__":
    main()
