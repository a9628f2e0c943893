"""A few of the inputs of studies/fuzz/fuzz.py, so that the study keeps running and the parsers keep refusing."""

import importlib.util
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rfield.segmentation import parser

SCRIPT = Path(__file__).parents[1] / "studies/fuzz/fuzz.py"


@pytest.fixture(scope="module")
def fuzz() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("fuzz", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz"] = module  # dataclasses look there
    make_parser = parser.make_parser
    spec.loader.exec_module(module)
    yield module
    parser.make_parser = make_parser
    del sys.modules["fuzz"]


@pytest.fixture(scope="module")
def parsers(fuzz: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return fuzz.parsers(tmp_path_factory.mktemp("fuzz"))


NAMES = ["list of voc", "list of camvid", "list of helen", "classes.txt", "CelebA's mapping", "image"]
NAMES += ["mask and palette", "check-data", "class groups", "data spec", "data config", "config of the command line"]
NAMES += ["config of a run", "checkpoint", ".pth weights", ".safetensors weights", "classes.json", "fused.json"]
NAMES += ["config.json", "metrics.json", "notes of an ONNX file"]


def test_every_parser_is_named(parsers: Any) -> None:
    assert sorted(parsers) == sorted(NAMES)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore")
def test_hostile_inputs_are_refused(fuzz: Any, parsers: Any, name: str) -> None:
    before = signal.signal(signal.SIGPROF, fuzz._interrupt)
    slow = name in ("config of the command line", "checkpoint", "fused.json", "config.json")
    try:
        for number in range(1_000_000, 1_000_000 + (25 if slow else 100)):
            content = fuzz.draw(parsers[name], 0, name, number)
            result, text = fuzz.try_input(parsers[name], content)
            assert result in ("accepted", "refused"), f"{number}: {text}: {content[:300]!r}"
    finally:
        signal.signal(signal.SIGPROF, before)


def test_the_frame_of_a_format_stays_whole(fuzz: Any, parsers: Any) -> None:
    """Some of the drawn inputs are accepted."""
    for name in NAMES:
        found = {fuzz.try_input(parsers[name], sample)[0] for sample in parsers[name].seeds}
        assert "accepted" in found, name
