"""The command line: each command is a function of its config, whose fields are the flags.

Torch and everything else slow is imported inside the commands, so that `rfield --help` answers at once.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from rfield.segmentation.config.data import CheckDataConfig, ConvertConfig, DownloadConfig
from rfield.segmentation.config.experiments import DemoConfig, ReproduceConfig, SweepConfig, TuneConfig
from rfield.segmentation.config.export import (
    EvaluateConfig,
    ExportConfig,
    FuseConfig,
    PredictConfig,
    PushConfig,
    ReportConfig,
)
from rfield.segmentation.config.inspect import DoctorConfig, InspectConfig, ShowConfig
from rfield.segmentation.config.train import TrainConfig
from rfield.segmentation.config.values import split_model_file
from rfield.segmentation.console import escape_unencodable, print_scores, show_progress
from rfield.segmentation.parser import parse as parse_words
from rfield.text import counted, format_size


def main(argv: list[str] | None = None) -> None:
    """Run one command. A user's mistake is one line on stderr and exit status 2.

    With `RFIELD_DEBUG=1` the traceback is shown instead.
    """
    escape_unencodable()
    command, config = parse(argv)
    try:
        COMMANDS[command][1](config)
    except KeyboardInterrupt as error:
        print(f"rfield {command}: {str(error) or 'interrupted'}", file=sys.stderr)
        sys.exit(128 + getattr(error, "signum", signal.SIGINT))
    except (ValueError, OSError) as error:
        if os.environ.get("RFIELD_DEBUG"):
            raise
        print(f"rfield {command}: {' '.join(_words_of(error).split())}", file=sys.stderr)
        sys.exit(2)


def _words_of(error: ValueError | OSError) -> str:
    """Return an error's message; for an error of the operating system, the file and the reason."""
    if isinstance(error, OSError) and error.errno and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror[0].lower()}{error.strerror[1:]}"
    if isinstance(error, UnicodeEncodeError):
        return f"{error.object.strip()} is not text in the encoding {sys.getfilesystemencoding()}: set PYTHONUTF8=1"
    return str(error)


def parse(argv: list[str] | None = None) -> tuple[str, Any]:
    """Return a command's name and its config, from the command line's words."""
    return parse_words(COMMANDS, sys.argv[1:] if argv is None else argv)


def train(config: TrainConfig) -> None:
    """Train a semantic segmentation network whose receptive field is fixed or learned."""
    from rfield.segmentation.training import train as run

    if config.run.resume and not Path(config.run.out).exists():
        print(f"note: there is no run {config.run.out} to resume; it starts anew", file=sys.stderr)
    with show_progress("preparing") as progress:
        metrics = run(config, progress)
    if not metrics:
        return  # not the first of several processes
    print_scores(metrics)
    print(
        f"\neffective dilation {metrics['effective_dilation']:.3g}, receptive field "
        f"{metrics['receptive_field_px']:.4g} px, {metrics['train_seconds']:.0f} s; the run is in {config.run.out}"
    )
    if (report := Path(config.run.out) / "report.html").is_file():
        print(f"all of it on one page: {report}")
    search = metrics.get("search")
    if search is not None:
        several = {f"path {each['path'] + 1}, {each['axis']}: ": each for each in search.get("factors", [])}
        for name, each in (several or {"": search}).items():
            print(f"{name}{each['verdict']['kind']}: {each['verdict']['reason']}")
    if "skipped" in metrics:
        names = [f"{split} {name}" for split, found in metrics["skipped_samples"].items() for name in found]
        print(f"skipped, as they cannot be read: {counted(len(names), 'sample')}{': ' * bool(names)}{', '.join(names)}")


def evaluate(config: EvaluateConfig) -> None:
    """Score a trained network on whole images at their own size."""
    from rfield.segmentation.data import load_dataset, match_classes
    from rfield.segmentation.inference.predict import evaluate_run
    from rfield.segmentation.inference.scores import scores_path
    from rfield.segmentation.runs import load_run

    if config.run.endswith(".onnx"):
        _evaluate_onnx(config)
        return
    run = load_run(config.run, config.checkpoint)
    if not (config.data or run.config.data.data):
        raise ValueError(f"{config.run} does not say what it was trained on: give --data")
    data = config.data or run.config.data.data
    dataset = match_classes(load_dataset(data, config.split), run.class_names, config.ignore_class_names)
    about = {"data": data, "split": config.split, "checkpoint": config.checkpoint, "files": dataset.fingerprint()}
    path = scores_path(config.json, run.folder / f"evaluation-{config.split}.json", about)
    with show_progress("scoring") as progress:
        scores = evaluate_run(run, dataset, progress, config.ignore_class_names)
    _write_scores(path, scores, about)


def predict(config: PredictConfig) -> None:
    """Label images: a palette-PNG mask and a coloured overlay of each."""
    from rfield.segmentation.inference.predict import find_images, predict_run
    from rfield.segmentation.inference.tiling import DEFAULT_BUDGET
    from rfield.segmentation.runs import load_run, run_at_dilations

    if config.run.endswith(".onnx"):
        from rfield.segmentation.inference.onnx import load_onnx, predict_onnx

        model = load_onnx(config.run)
        images = find_images(config.images)
        masks = predict_onnx(model, images, Path(config.out))
    else:
        run = load_run(config.run, config.checkpoint, config.weights == "search")
        if config.dilations is not None:
            run_at_dilations(run.network, config.dilations)
        images = find_images(config.images)
        budget = 2**30 * config.memory_budget if config.memory_budget else DEFAULT_BUDGET
        masks = predict_run(run, images, Path(config.out), budget)
    with show_progress("labelling") as progress:
        for done, _ in enumerate(masks, start=1):
            progress(done, len(images))
    made = "1 mask and its overlay are" if len(images) == 1 else f"{len(images)} masks and overlays are"
    print(f"{made} in {config.out}")


def fuse(config: FuseConfig) -> None:
    """Turn a trained network into a plain one, of fixed dilations, that needs no learned layer."""
    from rfield.segmentation.data import load_dataset, match_classes
    from rfield.segmentation.export.fused_run import fuse_run, score_change
    from rfield.segmentation.runs import load_run

    dataset = None if config.data is None else load_dataset(config.data, config.split)
    if dataset is not None:
        dataset = match_classes(dataset, load_run(config.run, config.checkpoint).class_names, config.ignore_class_names)
    made = fuse_run(config.run, config.out, config.mode, config.checkpoint)
    print("\n".join(f"{name}: {change}" for name, change in made.items()) or "nothing was learned in this run")
    if dataset is not None:
        with show_progress("scoring") as progress:
            before, after = score_change(
                config.run, config.out, config.checkpoint, dataset, progress, config.ignore_class_names
            )
        print(f"mIoU {before:.4f} before, {after:.4f} after: {after - before:+.4f}")
    print(f"the plain network is in {config.out}")


def export(config: ExportConfig) -> None:
    """Write a trained network as an ONNX or torch.export file, checked against the network."""
    from rfield.segmentation.data import load_dataset
    from rfield.segmentation.export.onnx import export_run
    from rfield.segmentation.runs import load_run

    run = load_run(config.run, config.checkpoint)
    if config.int8:
        from rfield.segmentation.export.int8 import export_int8

        images = load_dataset(str(config.data), run.config.data.train_split)
        dataset = load_dataset(str(config.data), config.split)
        with show_progress("quantising") as progress:
            made, before, after = export_int8(
                run,
                config.out,
                images,
                config.calibration_images,
                dataset,
                config.size,
                config.mode,
                progress,
                config.ignore_class_names,
            )
    else:
        made = export_run(run, config.out, config.size, config.mode)
    sizes = "any size" if made.size is None else f"{made.size[0]}x{made.size[1]} px"
    print(
        f"{config.out} takes images of {sizes}; its logits{' before int8' * config.int8} differ from the network's by "
        f"{made.difference:.1g} of their range, {made.agreement:.2%} of the pixels get the same label"
    )
    if config.int8:
        print(f"mIoU {before:.4f} before int8, {after:.4f} after: {after - before:+.4f}")


def push(config: PushConfig) -> None:
    """Upload a trained network to the Hugging Face Hub, with a card of its scores and receptive field."""
    from rfield.segmentation.export.hub import push_run
    from rfield.segmentation.export.space import share_space

    share = share_space if config.space else None
    address = push_run(config.run, config.repo_id, config.checkpoint, config.private, share)
    print(f"the {'page' if config.space else 'network'} is at {address}")


def download(config: DownloadConfig) -> None:
    """Download a public data set, with a data config beside it; the licence is said first."""
    from rfield.segmentation.data.download import download as run
    from rfield.segmentation.data.download import licence_of

    print(licence_of(config.name), flush=True)
    with show_progress("downloading (MB)") as progress:
        made = run(config.name, Path(config.root), progress)
    print(f"the data config is {made}\nnow run: rfield check-data {made}")


def convert(config: ConvertConfig) -> None:
    """Convert images with colour masks or LabelMe files to the layout folder, or CelebAMask-HQ and LaPa to Helen's."""
    if config.format == "masks":
        _convert_masks(config)
        return
    from rfield.segmentation.data import convert_celebamask, convert_lapa

    converters = {"celebamask": convert_celebamask, "lapa": convert_lapa}
    with show_progress("converting") as progress:
        made = converters[config.format](config.source, config.target, progress)
    counts = ", ".join(f"{count} {split}" for split, count in made.counts.items())
    faces = "face is" if sum(made.counts.values()) == 1 else "faces are"
    sides = "the person's left, now exchanged" if made.exchanged else "the viewer's left, as in Helen"
    print(f"{counts} {faces} in {made.root}; the source's left was {sides}")


def check_data(config: CheckDataConfig) -> None:
    """Find what would spoil a training: missing, damaged and unfit files, wrong values, splits that overlap."""
    from rfield.segmentation.data.check import check_data as check
    from rfield.segmentation.data.check import summarise, write_findings

    with show_progress("checking") as progress:
        findings = check(config.data, config.splits, config.workers, progress)
    for finding in findings:
        print(finding)
    if config.json is not None:
        write_findings(Path(config.json), config.data, findings)
    print(summarise(config.data, findings))
    if any(finding.level == "error" for finding in findings):
        sys.exit(1)


def demo(config: DemoConfig) -> None:
    """Learn a receptive field from a bad start, on the images that the package ships: before and after."""
    from rfield.segmentation.experiments import run_demo

    print(run_demo(config))


def sweep(config: SweepConfig) -> None:
    """Train once for every dilation and seed; finished runs are never repeated."""
    from rfield.segmentation.experiments import run_sweep

    with show_progress("preparing") as progress:
        print(run_sweep(config, progress))


def tune(config: TuneConfig) -> None:
    """Find the receptive field that a network should have, with the whole curve."""
    from rfield.segmentation.experiments import run_tune, run_tune_file

    if (file := split_model_file(config.train.model.model)) is None:
        with show_progress("preparing") as progress:
            print(run_tune(config, progress))
        return
    from rfield.segmentation.inspection.model_files import build_from_file

    network = build_from_file(*file)
    with show_progress("training") as progress:
        print(run_tune_file(config, network, progress))


def reproduce(config: ReproduceConfig) -> None:
    """Repeat the experiments of the paper: the grid, and learning from two bad starts."""
    from rfield.segmentation.experiments import run_reproduce

    with show_progress("preparing") as progress:
        print(run_reproduce(config, progress))


def inspect(config: InspectConfig) -> None:
    """Measure what a network sees: the receptive field of every layer, and the effective field as a picture."""
    from rfield.segmentation.inspection.report import run_inspect

    with show_progress("measuring") as progress:
        found = run_inspect(config, progress)
    print(list(found.values())[-1].inspection.table())
    for title, each in found.items():
        print(f"{title}: {each.name}, {each.weights}" if title != each.name else f"{each.name}, {each.weights}")
        print(f"  images of {format_size(each.inspection.size)} px")
        for line in [*each.inspection.summary(), *(f"warning: {advice}" for advice in each.inspection.advice)]:
            print("  " + line.replace("\n", "\n  "))
    if config.out is not None:
        print(f"written to {config.out}")


def show(config: ShowConfig) -> None:
    """Open a page on which the dilations of a trained network are moved, and its labels change."""
    try:
        from rfield.segmentation.web.show import run_show
    except ModuleNotFoundError as error:
        raise ValueError(f"show needs the package {error.name}: pip install 'rfield[all]'") from error
    run_show(config)


def report(config: ReportConfig) -> None:
    """Write what a run, a tune, a sweep or an inspection has found as one HTML file that opens anywhere."""
    from rfield.segmentation.web.report import write_report

    out = Path(config.out or Path(config.path) / "report.html")
    write_report(config.path, out, config.public)
    print(f"the report is {out} ({out.stat().st_size / 1e6:.1f} MB)")


def doctor(config: DoctorConfig) -> None:
    """Print the versions of everything that rfield uses, the processor and the GPUs, for a bug report."""
    from rfield.segmentation.doctor import environment_report

    print(environment_report())


COMMANDS: dict[str, tuple[Any, Any]] = {
    "demo": (DemoConfig, demo),
    "train": (TrainConfig, train),
    "evaluate": (EvaluateConfig, evaluate),
    "predict": (PredictConfig, predict),
    "sweep": (SweepConfig, sweep),
    "tune": (TuneConfig, tune),
    "reproduce": (ReproduceConfig, reproduce),
    "fuse": (FuseConfig, fuse),
    "export": (ExportConfig, export),
    "push": (PushConfig, push),
    "download": (DownloadConfig, download),
    "convert": (ConvertConfig, convert),
    "inspect": (InspectConfig, inspect),
    "show": (ShowConfig, show),
    "report": (ReportConfig, report),
    "doctor": (DoctorConfig, doctor),
    "check-data": (CheckDataConfig, check_data),
}


def _convert_masks(config: ConvertConfig) -> None:
    from rfield.segmentation.data.convert_masks import convert_masks, list_colours
    from rfield.segmentation.data.labelme import find_labelme

    with show_progress("reading") as progress:
        if config.colours is None and not find_labelme(Path(config.source)):
            print(list_colours(config.source, config.target, progress))
            return
        made = convert_masks(config.source, config.target, config.colours, config.val, config.seed, progress)
    shares = ", ".join(f"{name} {share:.1%}" for name, share in made.shares.items())
    counts = ", ".join(f"{count} {split}" for split, count in made.counts.items())
    print(f"{counts} images are in {made.root}; pixels: {shares}\nnow run: rfield check-data folder:{made.root}")


def _evaluate_onnx(config: EvaluateConfig) -> None:
    from rfield.segmentation.data import load_dataset, match_classes
    from rfield.segmentation.inference.onnx import evaluate_onnx, load_onnx
    from rfield.segmentation.inference.scores import scores_path

    if config.data is None:
        raise ValueError(f"{config.run} does not say what it was trained on: give --data")
    model = load_onnx(config.run)
    dataset = match_classes(load_dataset(config.data, config.split), model.class_names, config.ignore_class_names)
    about = {"data": config.data, "split": config.split, "model": model.path.name, "files": dataset.fingerprint()}
    path = scores_path(config.json, model.path.with_name(f"evaluation-{config.split}.json"), about)
    with show_progress("scoring") as progress:
        scores = evaluate_onnx(model, dataset, progress, config.ignore_class_names)
    _write_scores(path, scores, about)


def _write_scores(path: Path, scores: dict[str, Any], about: dict[str, str]) -> None:
    from rfield.segmentation.files.atomic import write_json

    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {**scores, **about})
    print_scores(scores)
    print(f"\nwritten to {path}")
