"""Fixtures for every test: tiny runs, and the real images and weights if they are available."""

import functools
import multiprocessing
import runpy
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from rfield.segmentation.config.train import TrainConfig

SHARED = Path(__file__).parents[1] / ".." / "shared"


# The server has everything imported and forks, so a separate process costs a test very little.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        "rfield.segmentation.cli",
        "rfield.segmentation.training",
        "rfield.segmentation.data.check",
        "rfield.segmentation.experiments",
    ]
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if {"forked", "in_processes"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("processes")
            item.add_marker("slow")
    if SHARED.is_dir():
        return
    skip = pytest.mark.skip(reason="needs ../shared, the real images and weights, beside the repository")
    for item in items:
        if item.get_closest_marker("shared"):
            item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def _parsers() -> Iterator[None]:
    """Keep each command's parser: making one takes a tenth of a second, and hundreds of tests need one."""
    from rfield.segmentation import parser

    real, made = parser.make_parser, {}

    def make_parser(commands: "parser.Commands", command: str | None, every: bool = False) -> Any:
        if every:
            return real(commands, command, every)
        key = command and (command, commands[command][0])
        if key not in made:
            made[key] = real(commands, command)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parser, "make_parser", make_parser)
        yield


@pytest.fixture
def shared() -> Path:
    """The folder ../shared beside the repository; mark the test with `shared`, so that it is skipped without it."""
    return SHARED


@pytest.fixture
def small_msrc(shared: Path, tmp_path: Path) -> Path:
    """A devkit of the first 8 training and 4 validation images of MSRC-21."""
    source, root = shared / "data/msrc21_voc", tmp_path / "msrc"
    for split, count in (("train", 8), ("val", 4)):
        names = (source / f"ImageSets/Segmentation/{split}.txt").read_text().split()[:count]
        for folder, suffix in (("JPEGImages", ".jpg"), ("SegmentationClass", ".png")):
            (root / folder).mkdir(parents=True, exist_ok=True)
            for name in names:
                shutil.copy(source / folder / f"{name}{suffix}", root / folder)
        (root / "ImageSets/Segmentation").mkdir(parents=True, exist_ok=True)
        (root / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(names))
    shutil.copy(source / "classes.txt", root)
    return root


@pytest.fixture
def undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out a run's own figures and report, which take a third of a short run; a test marked `figures` has them."""
    if request.node.get_closest_marker("figures") is None:
        from rfield.segmentation.training import fit, report

        monkeypatch.setattr(fit, "try_report", lambda folder: None)
        left_out = {"factor_curve": lambda *series, **options: None, "save": lambda figure, path: Path(path).touch()}
        monkeypatch.setattr(report, "plots", SimpleNamespace(**{**vars(report.plots), **left_out}))


def tiny_config(folder: Path, out: str = "run", **values: Any) -> "TrainConfig":
    from rfield.segmentation.config.train import TrainConfig

    data = folder / "data.yaml"
    data.write_text("format: synthetic\nsize: [36, 41]\ndistance: 12\nlength: 6\n")
    tiny: dict[str, Any] = {
        "data": str(data),
        "out": str(folder / out),
        "model": "small_cnn",
        "dilation": 3,
        "head_channels": 8,
        "search": "gradient",
        "factor_lr": 0.05,
        "epochs": 3,
        "batch_size": 2,
        "crop_size": (33, 33),
        "workers": 0,
        "cache": str(folder / "cache"),
        "report": "none",
    }
    return TrainConfig(**tiny | values)


@pytest.fixture
def make(tmp_path: Path, undrawn: None) -> "Callable[..., TrainConfig]":
    """The config of a run of three epochs of three steps."""
    return functools.partial(tiny_config, tmp_path)


@pytest.fixture(scope="session")
def _whole_runs(tmp_path_factory: pytest.TempPathFactory) -> "Callable[..., TrainConfig]":
    runs: dict[str, TrainConfig] = {}

    def trained(**values: Any) -> "TrainConfig":
        from rfield.segmentation.training import train

        key = repr(sorted(values.items()))
        if key not in runs:
            config = tiny_config(tmp_path_factory.mktemp("whole"), **values)
            train(config)
            runs[key] = config
        return runs[key]

    return trained


@pytest.fixture
def whole_run(_whole_runs: "Callable[..., TrainConfig]", undrawn: None) -> "Callable[..., TrainConfig]":
    """The config of a run that `make` makes with the same values, trained already; all tests share it, to read only."""
    return _whole_runs


@pytest.fixture(scope="session")
def in_processes() -> "Callable[..., None]":
    """Run a file in several processes at once, each with its own global names; all must succeed."""

    def run(worker: Path, *names: dict[str, Any]) -> None:
        processes = [SERVER.Process(target=runpy.run_path, args=(str(worker), each, "__main__")) for each in names]
        for process in processes:
            process.start()
        for process in processes:
            process.join(240)
        for process in processes:
            process.kill()
        assert [process.exitcode for process in processes] == [0] * len(names)

    return run


# runs before the code of a separate process
_FORKED = """
import multiprocessing, os, sys
multiprocessing.set_start_method(None, force=True)  # Otherwise data loaders would start servers of their own.
for number, suffix in ((1, "out"), (2, "err")):
    os.dup2(os.open(f"{{{out!r}}}.{{suffix}}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
sys.argv = {words!r}
{code}
"""


@pytest.fixture
def forked(tmp_path: Path) -> "Callable[..., subprocess.CompletedProcess[str]]":
    """Run Python code in a separate process with the given `sys.argv`, like `subprocess.run` without the imports."""

    def run(code: str, *words: str) -> "subprocess.CompletedProcess[str]":
        script = tmp_path / "forked.py"
        out = str(tmp_path / "forked")
        script.write_text(_FORKED.format(out=out, words=["rfield", *words], code=code))
        process = SERVER.Process(target=runpy.run_path, args=(str(script),))
        process.start()
        process.join(300)
        said, errors = (Path(f"{out}.{suffix}").read_text() for suffix in ("out", "err"))
        return subprocess.CompletedProcess(words, 1 if process.exitcode is None else process.exitcode, said, errors)

    return run
