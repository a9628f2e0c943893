"""Gates beside one path, sets of the same cost, and a deformable convolution: trains what is missing, prints a table.

python studies/gates/gates.py runs/gates --data ../shared/data --settings nuclei,coffee --seeds 0,1,2
python studies/gates/gates.py runs/gates --report [--into studies/gates/gates.json]

The rows of one path and of sets are those of studies/sets/sets.json.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "sets"))

import sets  # noqa: E402

OTHERS = ("one-path", "fixed-1,2,4,8", "learned")
METHODS = ("gates-image", "gates-pixel", "deformable", "gates-image-learned", "gates-pixel-learned")


def earlier_rows() -> list[dict]:
    """Return the rows of the study of sets that the table shows too."""
    rows = json.loads((HERE.parent / "sets" / "sets.json").read_text())
    return [row for row in rows if row["method"] in OTHERS]


def flags(setting: str, method: str, seed: int) -> list[str]:
    """Return the flags of a method: `-learned` mixes the rates of the set that was learned with the same seed."""
    rows = [row for row in earlier_rows() if row["setting"] == setting]
    if method == "deformable":
        dilations = [row["rates"][0] for row in rows if row["method"] == "one-path"]
        return ["--search", "none", "--path-norm", "--dilation", f"{statistics.median(dilations):.0f}"]
    words = ["--search", "none", "--gates", method.split("-")[1]]
    if not method.endswith("-learned"):
        return words
    (found,) = [row["rates"] for row in rows if (row["method"], row["seed"]) == ("learned", seed)]
    rates = sorted({round(rate) for rate in found})
    return [*words, "--aspp", ",".join(map(str, rates))]


def run(setting: str, method: str, seed: int, options: argparse.Namespace) -> str:
    out = options.root / setting / f"{method}-seed{seed}"
    if (out / "metrics.json").is_file():
        return f"{out.name}: done before"
    shared = sets.train_flags(setting, seed, options.data, options.channels, out)
    script = [str(HERE / "deformable.py")] if method == "deformable" else ["-m", "rfield", "train"]
    return f"{out.name}: status {sets.measure([*script, *shared, *flags(setting, method, seed)], out)}"


def read(root: Path) -> list[dict]:
    """Return a row for each run, with what its gates chose."""
    rows = sets.read(root)
    for row in rows:
        path = root / row["setting"] / f"{row['method']}-seed{row['seed']}" / "metrics.json"
        if gates := json.loads(path.read_text()).get("gates"):
            row["rates"] = [each["rate"] for each in gates["rates"]]
            row["mean_gates"] = [round(each["mean_gate"], 3) for each in gates["rates"]]
            for name in ("field_px", "least_field_px", "greatest_field_px", "size_correlation"):
                row[name] = gates[name] and round(gates[name], 3)
    return rows


def gate_table(rows: list[dict]) -> str:
    """Return what the gates chose, as Markdown."""
    lines = ["| data | gates | seed | rates | mean gates | field, px | correlation with size |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in rows:
        if "mean_gates" in row:
            rates, means = (", ".join(map(str, row[name])) for name in ("rates", "mean_gates"))
            field = f"{row['field_px']:.0f} ({row['least_field_px']:.0f} to {row['greatest_field_px']:.0f})"
            size = "-" if row["size_correlation"] is None else f"{row['size_correlation']:.2f}"
            names = (row["setting"], row["method"].removeprefix("gates-"), str(row["seed"]))
            lines.append(f"| {' | '.join((*names, rates, means, field, size))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder of the runs")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the data sets")
    parser.add_argument("--settings", default=",".join(sets.SETTINGS))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--report", action="store_true", help="train nothing")
    parser.add_argument("--into", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    jobs = [
        (setting, method, int(seed))
        for setting in options.settings.split(",")
        for seed in options.seeds.split(",")
        for method in options.methods.split(",")
    ]
    for number, job in enumerate([] if options.report else jobs, 1):
        print(f"{number}/{len(jobs)} {job[0]} {run(*job, options)}", flush=True)
    rows = read(options.root)
    present = {row["setting"] for row in rows}
    print(sets.table([*rows, *(row for row in earlier_rows() if row["setting"] in present)]))
    print(gate_table(rows))
    if options.into:
        options.into.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


if __name__ == "__main__":
    main()
