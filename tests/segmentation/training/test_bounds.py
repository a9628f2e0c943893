"""The bounds of what a training learns: a factor that stays at one, and the memory that an inflated map may take."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from rfield.layers import Inflation2d, ReceptiveFieldRegulator
from rfield.search import GradientSearch
from rfield.segmentation.config.train import TrainConfig
from rfield.segmentation.runs import load_run
from rfield.segmentation.training import train

pytestmark = pytest.mark.slow


@pytest.fixture
def tiny(tmp_path: Path, undrawn: None) -> dict[str, Any]:
    """A run of forty steps whose factor is learned by its gradient."""
    data = tmp_path / "data.yaml"
    data.write_text("format: synthetic\nsize: [36, 41]\ndistance: 12\nlength: 4\n")
    return {
        "data": str(data),
        "out": str(tmp_path / "run"),
        "model": "small_cnn",
        "dilation": 3,
        "head_channels": 4,
        "search": "gradient",
        "factor_start": 0,
        "epochs": 20,
        "val_every": 20,
        "batch_size": 2,
        "crop_size": (33, 33),
        "colour_jitter": 0.0,
        "workers": 0,
    }


def push(patch: pytest.MonkeyPatch, towards: float) -> None:
    """Has every factor be drawn one way, whatever the data say."""
    real = GradientSearch.loss

    def loss(self: GradientSearch, batch: Any) -> Any:
        return real(self, batch) - towards * sum(group[0].log_factor.sum() for group in self.groups)

    patch.setattr(GradientSearch, "loss", loss)


@pytest.mark.parametrize(
    ("towards", "words", "rectangular"),
    [(1.0, "upper bound.*output_stride", True), (-1.0, "lower bound.*crop_size", False)],
)
def test_a_factor_that_stays_at_a_bound_is_told_once(
    tiny: dict[str, Any], towards: float, words: str, rectangular: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(monkeypatch, towards)
    config = TrainConfig(**tiny, factor_lr=0.3, clip_norm=0.0, rectangular=rectangular)
    with pytest.warns(UserWarning, match=f"the factor of path 1, height, has been at its {words}.*sampled") as told:
        train(config)
    found = [str(each.message) for each in told if "has been at its" in str(each.message)]
    assert len(found) == 1 + rectangular
    assert all(each.startswith("step 2") and "for 20 steps" in each for each in found)


def test_a_factor_that_comes_and_goes_is_not_told(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*has been at its.*")
        train(TrainConfig(**tiny | {"epochs": 12}, factor_lr=0.05))
        push(monkeypatch, 1.0)  # Ten steps of the search at the bound, and then it is over.
        train(TrainConfig(**tiny | {"epochs": 12, "search_share": 0.5, "out": f"{tiny['out']}-2"}, factor_lr=0.3))


def test_the_memory_of_the_inflated_map_is_bounded(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    push(monkeypatch, 1.0)
    bytes_taken: list[int] = []
    real = Inflation2d.forward

    def forward(self: Inflation2d, *args: Any) -> torch.Tensor:
        inflated = real(self, *args)
        bytes_taken.append(inflated.numel() * inflated.element_size())
        return inflated

    monkeypatch.setattr(Inflation2d, "forward", forward)
    config = TrainConfig(**tiny | {"epochs": 6}, factor_lr=0.3, memory_budget=50_000 / 2**30)
    with pytest.warns(UserWarning, match="over the budget.*raise memory_budget, or use a smaller batch") as told:
        train(config)
    assert len([each for each in told if "over the budget" in str(each.message)]) == 1
    assert min(bytes_taken) < 30_000 < 40_000 < max(bytes_taken) <= 50_000
    found = [m for m in load_run(config.run.out).network.modules() if isinstance(m, ReceptiveFieldRegulator)]
    assert [m.memory_budget for m in found] == [50_000]


def test_a_budget_must_be_positive() -> None:
    with pytest.raises(ValueError, match="memory_budget must be positive, got 0"):
        TrainConfig(data="synthetic", out="x", memory_budget=0)
