"""Run the benchmarks, print them as a table, and compare two machines or commits.

python -m benchmarks run OUT.json [--only resize,head] [--match "batch 8"] [--rounds 9] [--threads 1,2] [--quick]
python -m benchmarks table OUT.json
python -m benchmarks compare BEFORE.json AFTER.json
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import GROUPS
from benchmarks.timing import machine, measure, peaks


def run(out: Path, only: list[str], match: str, rounds: int, threads: list[int], quick: bool) -> None:
    rows: list[dict[str, Any]] = []
    best = {}
    for count in threads:
        torch.set_num_threads(count)
        best[count] = peaks()
        for name in only:
            torch.manual_seed(0)
            for group in GROUPS[name](quick):
                if match not in group.name:
                    continue
                found = measure(group, rounds)
                rows += [{"threads": count, **row} for row in found]
                print(group.name + f", {count} threads", flush=True)
                for row in found:
                    ratios = f"{row['ratio'][1]:7.2f} {row['cpu_ratio'][1]:7.2f} of CPU time"
                    print(f"    {row['case']:42} {row['ms'][1]:10.3f} ms {ratios}", flush=True)
                # Written after every group, so that an interrupted run keeps what it measured.
                notes = json.dumps({"machine": machine(), "peaks": best, "rounds": rounds})
                lines = ",\n".join(json.dumps(row) for row in rows)  # One row a line, for readable differences.
                out.write_text(f'{notes[:-1]}, "rows": [\n{lines}\n]}}\n')


def table(path: Path) -> None:
    report = json.loads(path.read_text())
    print(", ".join(f"{key} {value}" for key, value in report["machine"].items() if value) + "\n")
    print("| | | threads | ratio (quartiles) | of CPU time | ms | peak MiB |\n|---|---|---|---|---|---|---|")
    for row in report["rows"]:
        ratio, cpu_ratio = (
            f"{middle:.2f} ({low:.2f} to {high:.2f})"
            for low, middle, high in (row["ratio"], row.get("cpu_ratio", row["ratio"]))
        )
        print(
            f"| {row['group']} | {row['case']} | {row['threads']} | {ratio} | {cpu_ratio} "
            f"| {row['ms'][1]:.2f} | {row['peak_mib']:.1f} |"
        )


def compare(before: Path, after: Path) -> bool:
    """Print each ratio that grew by more than the noise of both reports, and return whether there is one."""
    keys = ("group", "case", "threads")
    old, new = (
        {tuple(row[key] for key in keys): row["ratio"] for row in json.loads(path.read_text())["rows"]}
        for path in (before, after)
    )
    slower = False
    for key in old.keys() & new.keys():
        (low, middle, high), (new_low, new_middle, new_high) = old[key], new[key]
        noise = max(high - low, new_high - new_low, 0.03 * middle)
        if new_middle - middle > noise:
            slower = True
            print(f"slower: {key[0]}, {key[1]}, {key[2]} threads: {middle:.2f} before, {new_middle:.2f} now")
    for key in sorted(old.keys() ^ new.keys()):
        print(f"only in {before if key in old else after}: {key[0]}, {key[1]}, {key[2]} threads")
    return slower


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run")
    runner.add_argument("out", type=Path)
    runner.add_argument("--only", default=",".join(GROUPS))
    runner.add_argument("--match", default="", help="only groups with this in their names")
    runner.add_argument("--rounds", type=int, default=9)
    runner.add_argument("--threads", default="1")
    runner.add_argument("--quick", action="store_true", help="a few small sizes, to check that everything runs")
    commands.add_parser("table").add_argument("report", type=Path)
    comparer = commands.add_parser("compare")
    comparer.add_argument("before", type=Path)
    comparer.add_argument("after", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "run":
        only = arguments.only.split(",")
        if unknown := set(only) - GROUPS.keys():
            parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(GROUPS)}")
        threads = [int(count) for count in arguments.threads.split(",")]
        run(arguments.out, only, arguments.match, arguments.rounds, threads, arguments.quick)
    elif arguments.command == "table":
        table(arguments.report)
    elif compare(arguments.before, arguments.after):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
