"""`rfield.tune` finds a dilation that is known, leaves the network as it is, and says how sure it is."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import rfield
from rfield.search.certainty import Verdict
from rfield.surgery.tune import Tuned, TunedFactor


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=2, dilation=2), nn.ReLU(), nn.Conv2d(8, 2, 1))


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], ignore_index=255)


def loader() -> DataLoader[tuple[Tensor, ...]]:
    """Images in which a pixel's class is the sign of the value 5 px to its right."""
    noise = torch.randn(64, 1, 40, 40, generator=torch.Generator().manual_seed(0))
    smooth = F.avg_pool2d(F.avg_pool2d(noise, 3, 1, 1), 3, 1, 1)
    target = torch.full((64, 40, 40), 255)
    target[:, :, :-5] = (smooth[:, 0, :, 5:] > 0).long()
    return DataLoader(TensorDataset(smooth * 5, target), batch_size=4, shuffle=True)


@pytest.mark.slow
def test_a_known_dilation_is_found() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    steps: list[tuple[int, int]] = []
    data = loader()
    found = rfield.tune(
        model, loss_fn, data, steps=120, lr=0.02, seeds=[0, 1], progress=lambda *step: steps.append(step)
    )
    (factor,) = found.factors
    assert factor.layers == {"0": (2, 5)}
    assert factor.verdict.kind == "clear"
    assert min(factor.curve, key=lambda dilation: factor.curve[dilation]) == 5
    assert found.dilations == {"0": (5, 5)}
    assert str(found).endswith("rfield.set_dilations(model, {'0': (5, 5)})")
    assert "clear: dilation 5 beats the present 2" in str(found)
    assert torch.equal(model.state_dict()["0.weight"], before["0.weight"])
    assert type(model[0]) is nn.Conv2d
    assert isinstance(data.dataset, TensorDataset)
    assert steps[0] == (0, 240)
    assert steps[-1] == (240, 240)


def test_what_is_recommended() -> None:
    def factor(side: str, best: int, kind: str) -> TunedFactor:
        layers = {"a": (2, best), "b": (4, 2 * best)}
        return TunedFactor(layers, side, {1.0: 2.0}, Verdict(kind, "reason"))  # type: ignore[arg-type]

    assert Tuned([factor("", 3, "flat")]).dilations == {}
    assert str(Tuned([factor("", 3, "flat")])).endswith("nothing is recommended")
    both = Tuned([factor("height", 3, "clear"), factor("width", 5, "likely")])
    assert both.dilations == {"a": (3, 5), "b": (6, 10)}
    assert Tuned([factor("height", 3, "clear"), factor("width", 5, "flat")]).dilations == {"a": (3, 2), "b": (6, 4)}
    assert str(both).startswith("a, b, height: 2, 4 -> 3, 6; clear: reason\n  held-out loss at 1: 2\n")


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a seed or more, got none"):
        rfield.tune(network(), loss_fn, loader(), seeds=[])
    small = DataLoader(TensorDataset(torch.zeros(3, 1, 8, 8)), batch_size=4, drop_last=True)
    with pytest.raises(ValueError, match="the loader has no batch"):
        rfield.tune(network(), loss_fn, small)
    data = loader()
    with pytest.raises(ValueError, match="nothing to adapt"):
        rfield.tune(nn.Sequential(nn.Conv2d(1, 1, 1)), loss_fn, data)
    assert isinstance(data.dataset, TensorDataset)


def test_ten_epochs_but_a_hundred_steps_and_the_seeds_decide() -> None:
    def tuned(count: int, state: int, steps: int | None = None) -> tuple[Tuned, int]:
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(count, 1, 4, 4, generator=generator), torch.ones(count, 4, 4, dtype=torch.long)
        small = nn.Sequential(nn.Conv2d(1, 2, 3, padding=2, dilation=2))
        with torch.no_grad():
            for weight in small.parameters():
                weight.fill_(0.1)
        torch.manual_seed(state)
        asked: list[int] = []
        data = DataLoader(TensorDataset(*images), batch_size=1, shuffle=True)
        found = rfield.tune(
            small, loss_fn, data, steps=steps, seeds=[3], progress=lambda done, total: asked.append(total)
        )
        return found, asked[-1]

    assert [tuned(count, 0)[1] for count in (6, 12)] == [100, 120]
    found = tuned(6, 0, steps=10)[0]
    assert isinstance(found, Tuned)
    assert tuned(6, 1, steps=10)[0] == found
