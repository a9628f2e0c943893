"""Time callables in turns in one process, every second round in reverse order, and compare them by ratios."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # Silence the profiler on stderr.
import torch
from torch.profiler import ProfilerActivity, profile

Case = Callable[[], object]
# The least seconds of one case in one round.
_SAMPLE = 0.05


@dataclass
class Group:
    """Cases that do the same work; ratios are to the first."""

    name: str
    cases: Mapping[str, Case]


def measure(group: Group, rounds: int) -> list[dict[str, Any]]:
    """Return a row a case: quartiles of its milliseconds and of its ratios to the first case, and its peak memory.

    `ratio` is of wall time, `cpu_ratio` of the CPU time of all threads. The second one is the more certain where other
    processes run; there, start Python with `OMP_WAIT_POLICY=passive`, or waiting counts as work.
    """
    cuda = torch.cuda.is_available()
    counts, memory = {}, {}
    for name, case in group.cases.items():
        memory[name] = peak_memory(case)
        case()
        counts[name] = max(1, round(_SAMPLE / max(_seconds(case, 1, cuda), 1e-6)))
    seconds: dict[str, list[float]] = {name: [] for name in group.cases}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in group.cases}
    for number in range(rounds):
        for name in list(group.cases)[:: (-1) ** number]:
            begun = time.process_time()
            seconds[name].append(_seconds(group.cases[name], counts[name], cuda))
            cpu_seconds[name].append((time.process_time() - begun) / counts[name])
    first = next(iter(group.cases))
    rows = []
    for name, values in seconds.items():
        ratios, cpu_ratios = (
            [value / base for value, base in zip(taken[name], taken[first], strict=True)]
            for taken in (seconds, cpu_seconds)
        )
        rows.append(
            {
                "group": group.name,
                "case": name,
                "ms": _quartiles([1000 * value for value in values]),
                "ratio": _quartiles(ratios),
                "cpu_ratio": _quartiles(cpu_ratios),
                "peak_mib": memory[name] / 2**20,
            }
        )
    return rows


def peak_memory(case: Case) -> float:
    """Return the most bytes that one call holds at a time, in addition to what was in use before."""
    case()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        case()
        return float(torch.cuda.max_memory_allocated() - before)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        case()
    held = peak = 0
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return float(peak)


def machine() -> dict[str, Any]:
    """Return what the figures were measured on."""
    info = Path("/proc/cpuinfo")
    models = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def peaks() -> dict[str, float]:
    """Return the machine's best rates with torch's present threads: of a float32 product and of a large copy."""
    size, values = 2048, torch.randn(2**24)
    square, target = torch.randn(size, size), torch.empty_like(values)
    cases = {"product": lambda: torch.mm(square, square, out=square.new_empty(0)), "copy": lambda: target.copy_(values)}
    seconds = {name: min(_seconds(case, 1, cuda=False) for _ in range(5)) for name, case in cases.items()}
    return {"gflop_s": 2 * size**3 / seconds["product"] / 1e9, "copy_gb_s": 2 * 4 * 2**24 / seconds["copy"] / 1e9}


def _seconds(case: Case, count: int, cuda: bool) -> float:
    if cuda:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(count):
            case()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / 1000 / count
    begun = time.perf_counter()
    for _ in range(count):
        case()
    return (time.perf_counter() - begun) / count


def _quartiles(values: list[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    if len(values) < 2:
        return [values[0]] * 3
    return statistics.quantiles(values, n=4, method="inclusive")


def training_step(forward: Callable[[], torch.Tensor], leaves: list[torch.Tensor]) -> Case:
    """Return a forward and backward pass with the gradients of all leaves. The gradient of the output is made once."""
    grad = torch.randn_like(forward())

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        forward().backward(grad)

    return step


def without_gradient(forward: Callable[[], torch.Tensor]) -> Case:
    """Return a forward pass that autograd does not record."""

    def step() -> None:
        with torch.no_grad():
            forward()

    return step
