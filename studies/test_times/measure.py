"""The CPU time of a run of the tests with all processes that it starts: measure.py OUT [ARGUMENTS OF PYTEST]."""

import collections
import contextlib
import ctypes
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest


class Times:
    """The CPU seconds of each test, of this process and of those that it has waited for."""

    def __init__(self) -> None:
        self.of_test: dict[str, float] = {}

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> object:
        start = sum(os.times()[:4])
        try:
            return (yield)
        finally:
            self.of_test[item.nodeid] = sum(os.times()[:4]) - start


def run(words: list[str]) -> int:
    times = Times()
    status = pytest.main([*words, "-q", "-p", "no:cacheprovider"], plugins=[times])
    slowest = collections.Counter(times.of_test).most_common(25)
    print("\n".join(["", "slowest 25, CPU seconds", *(f"{seconds:7.2f} {name}" for name, seconds in slowest)]))
    return status


def main(out: str, *words: str) -> None:
    if os.environ.pop("MEASURED", None):
        sys.exit(run([*words]))
    if sys.platform == "linux":  # What outlives its parent, as a fork server does, is waited for here.
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
    environment = {**os.environ, "MEASURED": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, __file__, out, *words], env=environment, capture_output=True, text=True)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    lines = done.stdout.splitlines()
    summary = [line for line in lines if line.startswith(("FAILED", "ERROR")) or " passed" in line]
    table = lines[lines.index("slowest 25, CPU seconds") :]
    total = f"{used.ru_utime:.0f} s user, {used.ru_stime:.0f} s system, {used.ru_utime + used.ru_stime:.0f} s in all"
    Path(out).write_text("\n".join([f"pytest {' '.join(words)}", *summary, total, "", *table]) + "\n")
    print(total)
    sys.exit(done.returncode)


if __name__ == "__main__":
    main(*sys.argv[1:])
