"""A sampled search keeps one loss per evaluation, held-out batch and dilation."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from rfield.layers import AdaptiveConv2d
from rfield.search import SampledSearch
from rfield.search.factors import gather_rows


def model_and_batches() -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    return nn.Sequential(AdaptiveConv2d(1, 2, 3, padding=3, dilation=3)), list(torch.randn(8, 1, 1, 9, 9))


def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def finished(model: nn.Module, batches: list[Tensor], **options: Any) -> SampledSearch:
    search = SampledSearch(model, loss_fn, steps=5, held_out=batches[:3], **options)
    for batch in batches[3:]:
        search.loss(batch).backward()
        search.step()
    return search


def test_every_batch_s_loss_is_kept_and_their_mean_is_the_curve() -> None:
    model, batches = model_and_batches()
    search = finished(model, batches)
    assert [step for step, _ in search.losses[0, 0]] == [step for step, _ in search.readings[0, 0]] == [1, 2, 3, 5]
    for (_, losses), (_, curve) in zip(search.losses[0, 0], search.readings[0, 0], strict=True):
        assert {len(each) for each in losses.values()} == {3}
        assert curve == {dilation: pytest.approx(sum(each) / len(each)) for dilation, each in losses.items()}
    # The weights have not changed, so that the final network has the losses of the last evaluation.
    _, losses = search.losses[0, 0][-1]
    delivered = float(round(model[0].effective_dilation[0]))
    assert losses[delivered] == pytest.approx([loss_fn(model, batch).item() for batch in batches[:3]])


def test_only_the_last_evaluation_needs_all_batches() -> None:
    class Halved(list[Tensor]):
        def half(self) -> list[Tensor]:
            return self[:2]

    model, batches = model_and_batches()
    search = SampledSearch(model, loss_fn, steps=5, held_out=Halved(batches[:3]))
    for batch in batches[3:]:
        search.loss(batch).backward()
        search.step()
    counts = [{len(each) for each in losses.values()} for _, losses in search.losses[0, 0]]
    assert counts == [{2}, {2}, {2}, {3}]


def test_losses_and_starts_are_saved_and_loaded() -> None:
    model, batches = model_and_batches()
    state = copy.deepcopy(finished(model, batches).state_dict())
    other = SampledSearch(model_and_batches()[0], loss_fn, steps=5, held_out=batches[:3])
    state["starts"] = [[4.0]]
    other.load_state_dict(state)
    assert other.losses == state["losses"]
    assert other.starts == [[4.0]]


def test_the_start_is_that_of_each_factor_and_axis() -> None:
    model = nn.Sequential(
        AdaptiveConv2d(1, 2, 3, padding=6, dilation=6, factor=1.5), AdaptiveConv2d(2, 2, 3, factor=(1.0, 0.5))
    )
    assert SampledSearch(model, loss_fn, steps=5, held_out=[torch.zeros(1)]).starts == [[4.0], [1.0, 2.0]]


def test_rows_are_gathered_in_turn_from_processes_that_have_unequally_many(monkeypatch: pytest.MonkeyPatch) -> None:
    own, other = torch.tensor([[0.0, 0.5]]), torch.tensor([[1.0, 1.5], [3.0, 3.5]])
    assert gather_rows(own) is own

    def all_gather(gathered: list[Tensor], tensor: Tensor) -> None:
        gathered[0].copy_(tensor)
        gathered[1].copy_(tensor.new_tensor([2]) if tensor.dim() == 1 else other)

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda: "gloo")
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather", all_gather)
    assert gather_rows(own).tolist() == [[0.0, 0.5], [1.0, 1.5], [3.0, 3.5]]
    assert gather_rows(own[:0]).tolist() == other.tolist()
