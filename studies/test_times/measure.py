"""The CPU time of a run of the tests with all processes that it starts: measure.py OUT [ARGUMENTS OF PYTEST]."""

import collections
import contextlib
import ctypes
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

# This file is also a plugin of pytest, in the workers of xdist too: they send their times with the reports.
_TIMES: collections.Counter[str] = collections.Counter()
_STARTED: dict[str, float] = {}
_GRACE = 5  # s


def _used() -> float:
    return sum(os.times()[:4])


def pytest_runtest_logstart(nodeid: str) -> None:
    _STARTED[nodeid] = _used()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: "pytest.CallInfo[None]") -> Iterator[None]:
    report = yield
    if call.when == "teardown":
        report.user_properties.append(("cpu", _used() - _STARTED[item.nodeid]))
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "teardown":
        _TIMES[report.nodeid] += dict(report.user_properties)["cpu"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.line("slowest 25, CPU seconds")
    for name, seconds in _TIMES.most_common(25):
        terminalreporter.line(f"{seconds:7.2f} {name}")


def _children() -> list[int]:
    return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


def wait_for_all() -> None:
    """Wait for what has outlived pytest; kill what does not end by itself, as a resource tracker may not."""
    end = time.monotonic() + _GRACE
    with contextlib.suppress(ChildProcessError):
        while True:
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                time.sleep(0.1)
                for pid in _children() if time.monotonic() > end else []:
                    os.kill(pid, signal.SIGKILL)


def main(out: str, *words: str) -> None:
    if sys.platform == "linux":  # What outlives its parent, as a fork server does, becomes a child of this process.
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
    places = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": places}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", Path(__file__).stem, *words]
    log = Path(out).with_suffix(".log")  # A file, since a process that is left over would keep a pipe open.
    with log.open("w") as file:
        status = subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT).returncode
    wait_for_all()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    lines = log.read_text().splitlines()
    log.unlink()
    summary = [line for line in lines if line.startswith(("FAILED", "ERROR")) or " passed" in line]
    table = lines[lines.index("slowest 25, CPU seconds") :][:26]
    total = f"{used.ru_utime:.0f} s user, {used.ru_stime:.0f} s system, {used.ru_utime + used.ru_stime:.0f} s in all"
    Path(out).write_text("\n".join([f"pytest {' '.join(words)}", *summary, total, "", *table]) + "\n")
    print(total)
    sys.exit(status)


if __name__ == "__main__":
    main(*sys.argv[1:])
