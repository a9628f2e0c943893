"""Learned sets of dilations beside fixed ones: trains what is missing, and prints a table.

python studies/sets/sets.py runs/sets --data ../shared/data --settings nuclei,coffee --seeds 0,1,2 [--jobs 2]
python studies/sets/sets.py runs/sets --report [--into studies/sets/sets.json]
"""

import argparse
import json
import math
import os
import random
import re
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# Data set: (its spec below --data or its file in configs/data, backbone, epochs, half the feature map and 4, score).
SETTINGS = {
    "nuclei": ("folder:nuclei", "efficientnet_lite0", 10, 20, "miou"),
    "coffee": ("folder:coffee", "efficientnet_lite0", 10, 36, "miou"),
    "road": ("folder:road", "efficientnet_lite0", 10, 36, "miou"),
    "camvid": ("camvid:camvid", "efficientnet_lite0", 10, 34, "miou"),
    "msrc21": ("voc:msrc21_voc", "largefov_vgg16", 10, 24, "miou"),
    "faces": ("faces_256x208.yaml", "largefov_vgg16", 20, 20, "f1_overall"),
}
VGG = "weights/vgg16_features_imagenet_fp16.pth"
# Written down before the first run; the random sets are drawn for each data set.
DEEPLAB = {8: "1x1,12,24,36", 16: "1x1,6,12,18"}
FIXED = {"6,12,18,24": "ASPP 6, 12, 18, 24", "1,2,4,8": "1, 2, 4, 8", "2,4,8,16": "2, 4, 8, 16"}


def random_sets(setting: str, count: int = 5) -> list[str]:
    """Return sets of four different dilations, log-uniform in the range that a search starts from."""
    draw = random.Random(setting)
    found = []
    while len(found) < count:
        rates = {round(math.exp(draw.uniform(0, math.log(SETTINGS[setting][3])))) for _ in range(4)}
        if len(rates) == 4:
            found.append(",".join(map(str, sorted(rates))))
    return found


# Search flags of the learned sets: the default, and what was tried beside it.
LEARNED = {
    "learned": [],
    "learned-share.3": ["--search-share", "0.3"],
    "learned-share.45": ["--search-share", "0.45"],
    "learned-shared-search": ["--shared-kernel", "search"],
    "learned-shared-always": ["--shared-kernel", "always"],
    "learned-extra": ["--extra-paths", "1x1,pool"],
    "learned-guided": ["--class-groups", "auto"],
}


def fixed_sets(setting: str) -> list[str]:
    return [*FIXED, DEEPLAB[8 if SETTINGS[setting][1] == "largefov_vgg16" else 16], *random_sets(setting)]


def methods(setting: str) -> list[str]:
    """Return the methods of the table, in the order in which they are run: the last three need other runs."""
    fixed = [f"fixed-{rates}" for rates in fixed_sets(setting)]
    return ["learned", "one-path", *fixed, "learned-auto", "four-equal", "learned-set-fixed", "tuned"]


def flags(setting: str, method: str, seed: int, root: Path) -> list[str]:
    """Return the flags of a method; a set that another run found is that of the same seed."""

    def found(other: str) -> list[int]:
        metrics = json.loads((root / setting / f"{other}-seed{seed}" / "metrics.json").read_text())
        return [round(field["effective_dilation"]) for field in metrics.get("paths") or [metrics]]

    if method in LEARNED:
        return ["--paths", "4", *LEARNED[method]]
    if method in ("one-path", "learned-auto"):
        return ["--paths", "1", "--path-norm"] if method == "one-path" else ["--paths", "auto"]
    if method == "four-equal":
        rates = ",".join(map(str, found("one-path") * 4))
    elif method == "tuned":
        answer = json.loads((root / setting / "tune" / "answer.json").read_text())
        rates = ",".join(map(str, answer["recommended_rates"]))
    elif method == "learned-set-fixed":
        rates = ",".join(map(str, found("learned")))
    else:
        rates = method.removeprefix("fixed-")
    return ["--aspp", rates, "--path-norm", "--search", "none"]


def data_spec(setting: str, data: Path) -> str:
    """Return the data set as `rfield train --data` takes it."""
    kind, _, name = SETTINGS[setting][0].partition(":")
    return f"{kind}:{data / name}" if name else str(Path(__file__).parents[2] / "configs" / "data" / kind)


def train_flags(setting: str, seed: int, data: Path, channels: int, out: Path) -> list[str]:
    """Return the flags of `rfield train` that all methods share."""
    return [
        *network_flags(setting, data, channels, out),
        "--freeze-backbone",
        "--seed",
        str(seed),
        "--resume",
        "--report",
        "none",
    ]


def network_flags(setting: str, data: Path, channels: int, out: Path) -> list[str]:
    _, model, epochs, _, _ = SETTINGS[setting]
    weights = ["--weights", str(data.parent / VGG)] if model == "largefov_vgg16" else []
    return [
        *("--data", data_spec(setting, data), "--model", model, *weights, "--head-channels", str(channels)),
        *("--epochs", str(epochs), "--precision", "bf16-mixed", "--out", str(out)),
    ]


def run(setting: str, method: str, seed: int, options: argparse.Namespace) -> str:
    out = options.root / setting / f"{method}-seed{seed}"
    if (out / "metrics.json").is_file():
        return f"{out.name}: done before"
    tuned = options.root / setting / "tune"
    if method == "tuned" and not (tuned / "answer.json").is_file():
        asked = ["--paths", "4", "--seeds", options.seeds, "--jobs", str(options.jobs)]
        words = ["-m", "rfield", "tune", *network_flags(setting, options.data, options.channels, tuned), *asked]
        if status := measure(words, tuned):
            return f"{tuned}: status {status}"
    shared = train_flags(setting, seed, options.data, options.channels, out)
    words = ["-m", "rfield", "train", *shared, *flags(setting, method, seed, options.root)]
    return f"{out.name}: status {measure(words, out)}"


def measure(words: list[str], out: Path) -> int:
    """Run Python with these words, log it beside a run folder, and return its status."""
    out.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with out.with_name(f"{out.name}.log").open("w") as log:
        process = subprocess.Popen([sys.executable, *words], stdout=log, stderr=subprocess.STDOUT, env=environment)
        _, status, used = os.wait4(process.pid, 0)
    if not status:  # The processor's time, which other work on the machine changes little.
        out.with_name(f"{out.name}.cpu").write_text(f"{used.ru_utime + used.ru_stime:.1f}\n")
    return status


def read(root: Path) -> list[dict]:
    rows = []
    for path in sorted(root.glob("*/*/metrics.json")):
        setting, (method, _, seed) = path.parts[-3], path.parent.name.rpartition("-seed")
        if setting in SETTINGS:
            metrics = json.loads(path.read_text())
            fields = metrics.get("paths") or [metrics]
            rates = sorted(field["effective_dilation"] for field in fields)
            cpu = path.parent.with_name(f"{path.parent.name}.cpu")
            row = {"setting": setting, "method": method, "seed": int(seed)}
            row |= {"score": 100 * metrics[SETTINGS[setting][4]], "rates": rates}
            rows.append({**row, "cpu_seconds": float(cpu.read_text()) if cpu.is_file() else None})
    return rows


def table(rows: list[dict]) -> str:
    lines = []
    for setting in SETTINGS:
        own = [row for row in rows if row["setting"] == setting]
        if not own:
            continue
        lines += [f"### {setting}", "", "| set | score | seeds | dilations | CPU seconds |", "|---|---|---|---|---|"]
        found: dict[str, list[dict]] = {}
        for row in own:
            found.setdefault(row["method"], []).append(row)
        for method, each in sorted(found.items(), key=lambda item: -statistics.mean(row["score"] for row in item[1])):
            scores = [row["score"] for row in each]
            error = f" ± {statistics.stdev(scores) / len(scores) ** 0.5:.1f}" if len(scores) > 1 else ""
            learned = not method.startswith("fixed")
            rates = "; ".join(", ".join(f"{rate:g}" for rate in row["rates"]) for row in each) if learned else ""
            times = [row["cpu_seconds"] for row in each if row["cpu_seconds"] is not None]
            cpu = f"{statistics.median(times):.0f}" if times else "-"
            lines.append(f"| {method} | {statistics.mean(scores):.1f}{error} | {len(each)} | {rates} | {cpu} |")
        lines.append("")
    return "\n".join(lines)


def overview(rows: list[dict]) -> str:
    """Return a row for each head and a column for each data set: mean, standard error, and number of seeds."""
    names = {
        "learned": "learned set of four",
        "learned-auto": "learned number of paths",
        "one-path": "one learned path",
    }
    names |= {"learned-set-fixed": "the learned set, fixed from the start", "four-equal": "four equal paths"}
    names |= {f"fixed-{rates}": name for rates, name in FIXED.items()} | {"fixed-1x1": "DeepLab's own"}
    names |= {"random": "five random sets", "tuned": "the set that `rfield tune` recommends"}
    lines = ["| head | " + " | ".join(SETTINGS) + " |", "|---" * (len(SETTINGS) + 1) + "|"]
    for start, name in names.items():
        cells = []
        for setting in SETTINGS:
            chosen = {f"fixed-{rates}" for rates in random_sets(setting)} if start == "random" else None
            scores = [
                row["score"]
                for row in rows
                if row["setting"] == setting
                and (row["method"] in chosen if chosen else re.fullmatch(f"{start}(,.*)?", row["method"]))
            ]
            error = f" ± {statistics.stdev(scores) / len(scores) ** 0.5:.1f}" if len(scores) > 1 else ""
            cells.append(f"{statistics.mean(scores):.1f}{error} ({len(scores)})" if scores else "-")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def gaps(rows: list[dict]) -> str:
    """Return by how much the learned set is above other heads, paired by the seed, and what it costs."""
    others = {"best fixed set": "", **{name: f"fixed-{rates}" for rates, name in FIXED.items()}}
    others |= {"DeepLab's own": "fixed-1x1", "one path": "one-path", "its sets, fixed": "learned-set-fixed"}
    lines = ["| learned set minus | " + " | ".join(others) + " | cost |", "|---" * (len(others) + 2) + "|"]
    columns: dict[str, list[float]] = {name: [] for name in others}
    for setting in SETTINGS:
        own = [row for row in rows if row["setting"] == setting]
        learned = {row["seed"]: row for row in own if row["method"] == "learned"}
        fixed: dict[str, dict[int, float]] = {}
        for row in own:
            fixed.setdefault(row["method"], {})[row["seed"]] = row["score"]
        sets = [each for method, each in fixed.items() if method.startswith("fixed") and {*learned} <= {*each}]
        if not learned or not sets:
            continue
        cells = []
        for name, start in others.items():
            best = max(sets, key=lambda each: statistics.mean(each[seed] for seed in learned))
            other = next((each for method, each in fixed.items() if method.startswith(start)), {}) if start else best
            gap = [row["score"] - other[seed] for seed, row in learned.items() if seed in other]
            error = f" ± {statistics.stdev(gap) / len(gap) ** 0.5:.1f}" if len(gap) > 1 else ""
            columns[name] += [statistics.mean(gap)] if gap else []
            cells.append(f"{statistics.mean(gap):+.1f}{error}" if gap else "-")
        # The first run of a data set computes the features, which the median of all fixed sets leaves out.
        times = [
            [row["cpu_seconds"] for row in own if re.fullmatch(name, row["method"])] for name in ("learned", "fixed.*")
        ]
        known = [[time for time in each if time is not None] for each in times]
        cost = f"{statistics.median(known[0]) / statistics.median(known[1]):.2f}" if all(known) else "-"
        lines.append(f"| {setting} ({len(learned)}) | {' | '.join(cells)} | {cost} |")
    means = [f"{statistics.mean(each):+.1f} ({len(each)})" if each else "-" for each in columns.values()]
    return "\n".join([*lines, f"| mean over the data sets | {' | '.join(means)} | |", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder of the runs")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the data sets")
    parser.add_argument("--settings", default=",".join(SETTINGS))
    parser.add_argument("--methods", help="only these, with slashes between them; fixed sets as in the table")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--report", action="store_true", help="train nothing")
    parser.add_argument("--into", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    if not options.report:
        jobs = [
            (setting, method, int(seed))
            for seed in options.seeds.split(",")
            for setting in options.settings.split(",")
            for method in (options.methods.split("/") if options.methods else methods(setting))
        ]
        with ThreadPoolExecutor(options.jobs) as pool:
            for number, line in enumerate(pool.map(lambda job: run(*job, options), jobs), 1):
                print(f"{number}/{len(jobs)} {line}", flush=True)
    rows = read(options.root)
    print(table(rows))
    print(overview(rows))
    print(gaps(rows))
    if options.into:
        options.into.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


if __name__ == "__main__":
    main()
