"""The phase of a search: what a checkpoint says, and what the module starts with."""

from typing import Any

import pytest

from rfield.segmentation.config.train import TrainConfig
from rfield.segmentation.runs import build_network
from rfield.segmentation.training import ParsingModule
from rfield.segmentation.training.search_phase import SearchPhase


def checkpoint(done: bool, holding_out: bool) -> dict[str, Any]:
    return {"search": {"search": {"done": done}, "seconds": 1.0, "holding_out": holding_out}}


@pytest.mark.parametrize(
    ("saved", "phase"),
    [
        ({}, SearchPhase.DONE),
        (checkpoint(False, True), SearchPhase.SEARCHING),
        (checkpoint(True, True), SearchPhase.HOLDING_OUT),
        (checkpoint(True, False), SearchPhase.DONE),
    ],
)
def test_the_module_takes_the_phase_of_its_checkpoint(saved: dict[str, Any], phase: SearchPhase) -> None:
    config = TrainConfig(data="synthetic", out="x", model="small_cnn", head_channels=4, search="spsa").resolved()
    module = ParsingModule(build_network(config, 2), config, ("a", "b"))
    assert module.phase is SearchPhase.SEARCHING
    module.on_load_checkpoint(saved)
    assert SearchPhase.saved_in(saved) is module.phase is phase
    assert (module._make_search(5) is None) == (phase is not SearchPhase.SEARCHING)


def test_a_run_without_a_search_is_done() -> None:
    config = TrainConfig(data="synthetic", out="x", model="small_cnn", head_channels=4, search="none").resolved()
    assert ParsingModule(build_network(config, 2), config, ("a", "b")).phase is SearchPhase.DONE
