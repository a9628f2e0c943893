"""Tests run in forked processes, which find torch and the rest imported already, in copies of the repository."""

import contextlib
import importlib.util
import json
import os
import resource
import selectors
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import coverage
import pytest

# Imported once, before the forks. rfield itself is not: each process imports it from its copy.
LIBRARIES = (
    "torch",
    "lightning.pytorch",
    "torchvision.transforms.v2",
    "torchmetrics",
    "timm",
    "segmentation_models_pytorch",
    "scipy.stats",
    "matplotlib.pyplot",
    "jsonargparse",
    "optuna",
    "hypothesis",
    "tensorboard",
    "torch.utils.tensorboard",
    "torch.optim.swa_utils",
    "PIL.Image",
    "rich.console",
)
_ENVIRONMENT = {
    "PYTHONDONTWRITEBYTECODE": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "MPLBACKEND": "Agg",
}


def preload(libraries: tuple[str, ...]) -> None:
    os.environ.update(_ENVIRONMENT)
    for name in libraries:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def copy_tree(root: Path, tree: Path) -> None:
    """The files that git does not ignore, as they are in the working copy, and ../shared beside them."""
    shutil.rmtree(tree.parent, ignore_errors=True)
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (root / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, tree / name)
    if (root / "../shared").is_dir():
        (tree.parent / "shared").symlink_to((root / "../shared").resolve())
    # Bytecode that is checked by the source's hash, not by its time and size, which a mutant may share.
    command = [sys.executable, "-m", "compileall", "-q", "--invalidation-mode", "checked-hash", "src"]
    subprocess.run(command, cwd=tree, check=True)


@dataclass
class Job:
    """Tests to run in a tree that `prepare` sets up, and what comes of them.

    limits: the seconds that each test may take, and `limit` for the others.
    events: what the process said: tests begun and ended, and its exit status.
    """

    tests: list[str]
    prepare: Callable[[Path], None] = lambda tree: None
    limits: dict[str, float] = field(default_factory=dict)
    limit: float = 600.0
    stop_at_failure: bool = True
    coverage_file: Path | None = None
    events: list[dict[str, Any]] = field(default_factory=list)
    timed_out: bool = False
    seconds: float = 0.0

    @property
    def status(self) -> int | None:
        """Pytest's exit status; None of a process that died or was ended."""
        return next((each["status"] for each in self.events if "status" in each), None)

    @property
    def results(self) -> list[dict[str, Any]]:
        return [each for each in self.events if "outcome" in each]


def run_jobs(jobs: Iterator[Job], trees: list[Path]) -> Iterator[Job]:
    """Runs jobs, one in each tree at a time, and yields each as it ends."""
    free, selector = list(trees), selectors.DefaultSelector()
    running: dict[int, _Process] = {}
    try:
        while True:
            while free and (job := next(jobs, None)):
                tree = free.pop()
                job.prepare(tree)
                process = _Process(job, tree)
                running[process.pipe] = process
                selector.register(process.pipe, selectors.EVENT_READ)
            if not running:
                return
            for key, _ in selector.select(1.0):
                running[key.fd].read()
            for pipe, process in list(running.items()):
                if process.ended or process.late:
                    process.stop()
                    selector.unregister(pipe)
                    os.close(running.pop(pipe).pipe)
                    free.append(process.tree)
                    yield process.job
    finally:
        for process in running.values():
            process.stop()


class _Process:
    def __init__(self, job: Job, tree: Path) -> None:
        self.job, self.tree, self.ended, self._text = job, tree, False, b""
        self.pipe, write = os.pipe()
        self._began = self._test_began = time.monotonic()
        self._limit = 300.0  # For the imports and the collection.
        self._pid = os.fork()
        if not self._pid:
            os.close(self.pipe)
            status = 70
            try:
                status = _child(job, tree, write)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        os.close(write)

    def read(self) -> None:
        data = os.read(self.pipe, 65536)
        self.ended = not data
        *lines, self._text = (self._text + data).split(b"\n")
        for line in lines:
            event = json.loads(line)
            self.job.events.append(event)
            self._test_began = time.monotonic()
            self._limit = self.job.limits.get(event.get("test", ""), self.job.limit)

    @property
    def late(self) -> bool:
        self.job.timed_out = not self.ended and time.monotonic() - self._test_began > self._limit
        return self.job.timed_out

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        self.job.seconds = time.monotonic() - self._began


def _child(job: Job, tree: Path, write: int) -> int:
    os.setsid()
    os.chdir(tree)
    os.set_inheritable(write, False)
    log = os.open(tree.parent / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.path.insert(0, str(tree / "src"))
    sys.dont_write_bytecode, sys.argv = True, ["pytest"]
    main = Path(pytest.__file__).with_name("__main__.py")  # What spawned processes import, not the study.
    vars(sys.modules["__main__"]).update(__spec__=None, __file__=str(main))
    os.environ["PYTHONPATH"] = str(tree / "src")
    spec = importlib.util.find_spec("rfield")
    if spec is None or not (spec.origin or "").startswith(str(tree)):
        raise ImportError(f"rfield is {spec}, not the copy in {tree}")
    measure = None
    if job.coverage_file:
        settings = tree.parent / "coverage.ini"
        settings.write_text(
            f"[run]\nsource = {tree / 'src'}\ndata_file = {job.coverage_file}\nparallel = true\n"
            "context = ${MUTATION_TEST-}\npatch = _exit\ndisable_warnings = no-data-collected\n"
        )
        os.environ["COVERAGE_PROCESS_START"] = str(settings)
        measure = coverage.Coverage(config_file=str(settings))
        measure.start()
    arguments = ["-q", "-p", "no:cacheprovider", f"--basetemp={tree.parent / 'tmp'}", *job.tests]
    arguments += ["-x"] * job.stop_at_failure
    status = int(pytest.main(arguments, plugins=[_Teller(write, measure)]))
    if measure:
        measure.stop()
        measure.save()
    os.write(write, json.dumps({"status": status}).encode() + b"\n")
    return status


class _Teller:
    """Tells of each test over the pipe, and gives its name to the coverage of this process and of those it starts."""

    def __init__(self, write: int, measure: coverage.Coverage | None) -> None:
        self._write, self._measure = write, measure
        self._outcome, self._why = "", ""
        # Of the fixtures that several tests share: what each took on the processor and by the clock.
        self._shared: dict[Any, tuple[float, float]] = {}

    def _tell(self, **event: Any) -> None:
        os.write(self._write, json.dumps(event).encode() + b"\n")

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self._outcome, self._why = "passed", ""
        os.environ["MUTATION_TEST"] = item.nodeid
        if self._measure:
            self._measure.switch_context(item.nodeid)
        self._tell(test=item.nodeid)
        # A test that runs alone must set up what an earlier one has set up here.
        definitions = [each for of in item._fixtureinfo.name2fixturedefs.values() for each in of]  # type: ignore[attr-defined]
        before = [self._shared[each] for each in definitions if each in self._shared]
        cpu, wall = (sum(spent[axis] for spent in before) for axis in (0, 1))
        cpu, wall = _cpu() - cpu, time.monotonic() - wall
        result = yield
        apart = any(item.get_closest_marker(name) for name in ("shared", "slow"))
        seconds = {"cpu": round(_cpu() - cpu, 3), "wall": round(time.monotonic() - wall, 3)}
        self._tell(test=item.nodeid, outcome=self._outcome, why=self._why, apart=apart, **seconds)
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[None]:
        cpu, wall = _cpu(), time.monotonic()
        result = yield
        if fixturedef.scope != "function":
            self._shared[fixturedef] = _cpu() - cpu, time.monotonic() - wall
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped:
            self._outcome = "skipped"
        elif report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            self._outcome, self._why = "failed", (crash.message if crash else str(report.longrepr)).strip()[:200]


def _cpu() -> float:
    """The processor's seconds of this process and of those that it has started and waited for."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime
