"""Tables of studies/paths/paths.sh: what each head scored, with the paths' dilations.

python studies/paths/summarise.py OUT [--into studies/paths]
"""

import argparse
import json
import statistics
from pathlib import Path

HEADS = {
    "fixed": "one path, best fixed dilation",
    "learned": "one path, learned",
    "learned-wide": "one path twice as wide, learned",
    "aspp": "ASPP 6, 12, 18, 24",
    "learned-fast": "one path, learned, three times the learning rate",
    "aspp-fast": "ASPP, three times the learning rate",
    "fixed-two": "two paths, best fixed dilation",
    "unguided": "two paths, learned, unguided",
    "guided": "two paths, learned, guided in the search, weight 5",
    "published-2": "two paths, weighted gradients, weight 2",
    "published-5": "two paths, weighted gradients, weight 5",
}


def mean(values: list[float]) -> str:
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--into", type=Path)
    arguments = parser.parse_args()
    report: dict[str, dict[str, list[dict]]] = {}
    for setting in ("faces", "msrc21"):
        report[setting] = {}
        for head in HEADS:
            found = [
                json.loads(path.read_text())
                for path in sorted((arguments.out / setting / head).glob("d*-seed*/metrics.json"))
            ]
            keys = ("seed", "miou", "f1_overall", "f1", "effective_dilation", "paths")
            report[setting][head] = [{key: run[key] for key in keys if key in run} for run in found]
        scores = ["f1_overall", "miou"] if setting == "faces" else ["miou"]
        print(f"### {setting}\n\n| head | {' | '.join(scores)} | dilations, a seed |\n|---|{'---|' * len(scores)}---|")
        for head, runs in report[setting].items():
            if runs:
                ends = "; ".join(
                    ", ".join(f"{path['effective_dilation']:.3g}" for path in run.get("paths", [run])) for run in runs
                )
                values = " | ".join(mean([run[score] for run in runs]) for score in scores)
                print(f"| {HEADS[head]} | {values} | {ends} |")
        print()
    runs = {head: found for head, found in report["faces"].items() if found and "f1" in found[0]}
    if runs:
        parts = [part for part, value in next(iter(runs.values()))[0]["f1"].items() if value is not None]
        print(f"### F1 a part\n\n| head | {' | '.join(parts)} |\n|{'---|' * (len(parts) + 1)}")
        for head, found in runs.items():
            values = [f"{100 * statistics.mean(run['f1'][part] for run in found):.1f}" for part in parts]
            print(f"| {HEADS[head]} | {' | '.join(values)} |")
    if arguments.into:
        (arguments.into / "paths.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
