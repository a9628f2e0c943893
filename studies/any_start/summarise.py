"""Tables of studies/any_start/any_start.sh: all runs as CSV, and what the searches delivered against the grid.

python studies/any_start/summarise.py OUT [--into studies/any_start]
"""

import argparse
import csv
import json
import re
import statistics
from collections import defaultdict
from pathlib import Path

SETTINGS = {"msrc21": "miou", "camvid": "miou", "faces": "f1_overall"}
TITLES = {
    "msrc21": "MSRC-21, VGG16: mIoU",
    "camvid": "CamVid, EfficientNet-Lite0 at stride 8: mIoU",
    "faces": "Faces (256x208 px), VGG16: overall F1",
}
NAME = re.compile(r"d(\d+)-seed(\d+)(?:-(\w+))?")
COLUMNS = ("setting", "search", "dilation", "seed", "miou", "f1_overall", "delivered", "unsnapped", "seconds")


def read(out: Path) -> list[dict]:
    rows = []
    for setting in SETTINGS:
        for path in sorted((out / setting).glob("*/metrics.json")):
            dilation, seed, search = NAME.fullmatch(path.parent.name).groups()
            metrics = json.loads(path.read_text())
            found = metrics.get("search", {}).get("unsnapped_dilation", [None])
            values = (
                setting,
                search or "none",
                int(dilation),
                int(seed),
                metrics["miou"],
                metrics.get("f1_overall"),
                metrics["effective_dilation"],
                found[0],
                metrics["train_seconds"],
            )
            rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def error(values: list[float]) -> float:
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")


def summarise(rows: list[dict], setting: str) -> str:
    score = SETTINGS[setting]
    grid, searches = defaultdict(list), defaultdict(list)
    for row in rows:
        if row["setting"] == setting:
            (grid[row["dilation"]] if row["search"] == "none" else searches[row["search"], row["dilation"]]).append(row)
    if not grid:
        return ""
    means = {d: statistics.mean(row[score] for row in found) for d, found in grid.items()}
    counted = [d for d in grid if len(grid[d]) > 1] or list(grid)
    best = max(counted, key=lambda d: means[d])
    lines = [f"### {TITLES[setting]}, in points", ""]
    lines += ["| fixed d | " + " | ".join(f"**{d}**" if d == best else str(d) for d in sorted(grid)) + " |"]
    lines += ["|---" * (len(grid) + 1) + "|"]
    lines += ["| mean | " + " | ".join(f"{100 * means[d]:.1f}" for d in sorted(grid)) + " |"]
    lines += ["| seeds | " + " | ".join(str(len(grid[d])) for d in sorted(grid)) + " |", ""]
    lines += [
        "| search | start | seeds | mean | delivered d | gap to fixed d = " + f"{best} |",
        "|---|---|---|---|---|---|",
    ]
    reference = [row[score] for row in grid[best]]

    def line(search: str, start: str, found: list[dict]) -> str:
        scores = [row[score] for row in found]
        gap = means[best] - statistics.mean(scores)
        spread = (error(scores) ** 2 + error(reference) ** 2) ** 0.5
        ends = ", ".join(f"{row['delivered']:.3g}" for row in sorted(found, key=lambda row: row["seed"]))
        spread_text = "" if spread != spread else f" ± {100 * spread:.1f}"
        return (
            f"| {search} | {start} | {len(found)} | {100 * statistics.mean(scores):.1f} | {ends} | "
            f"{100 * gap:.1f}{spread_text} |".replace("-0.0", "0.0")
        )

    for search in ("sampled", "spsa", "gradient"):
        starts = sorted(start for kind, start in searches if kind == search)
        lines += [line(search, str(start), searches[search, start]) for start in starts]
        if len(starts) > 1:
            lines.append(line(f"**{search}**", "all", [row for start in starts for row in searches[search, start]]))
    near = [d for d in sorted(grid) if means[d] >= means[best] - 0.01]
    ends = sorted(
        {round(row["delivered"]) for (kind, _), found in searches.items() if kind == "sampled" for row in found}
    )
    lines += ["", f"Within 1 point of the best: d = {', '.join(map(str, near))}; `sampled` delivered {ends}.", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--into", type=Path)
    arguments = parser.parse_args()
    rows = read(arguments.out)
    text = "\n".join(summarise(rows, setting) for setting in SETTINGS)
    print(text)
    if arguments.into:
        with (arguments.into / "any_start.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        (arguments.into / "any_start.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
