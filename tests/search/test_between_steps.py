"""Between a search's steps the network runs at the best dilation found so far, or at its start."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from rfield.search import GradientSearch, SampledSearch, Search, SpsaSearch, curve_minimum

KINDS = pytest.mark.parametrize("kind", ["gradient", "spsa", "sampled"])


def search_of(kind: str, model: nn.Module, loss_fn: Any, batches: list[Any], steps: int = 20) -> Search:
    if kind == "gradient":
        return GradientSearch(model, loss_fn, steps)
    return SpsaSearch(model, loss_fn, steps) if kind == "spsa" else SampledSearch(model, loss_fn, steps, batches)


@KINDS
@pytest.mark.parametrize("mechanism", ["dilation", "regulator"])
def test_a_validation_sees_what_a_checkpoint_holds(cues: Any, kind: str, mechanism: str) -> None:
    model, batches = cues.model(9, mechanism), cues.batches(8)
    search = search_of(kind, model, cues.loss, batches[:1], steps=8)
    image = cues.batches(1, seed=3)[0][0]
    for index, batch in enumerate(batches):
        cues.run(search, model, [batch])
        reopened = cues.model(9, mechanism)
        reopened.load_state_dict(copy.deepcopy(model.state_dict()))
        with torch.no_grad():
            assert torch.equal(reopened.eval()(image), model.eval()(image)), index
        model.train()
    assert search.done


def test_a_sampled_search_is_at_its_start_and_then_at_its_best(toy: Any) -> None:
    model = toy.model(5, factor=1.25)
    search = SampledSearch(model, toy.loss(7.0), 20, [toy.image])
    for step in range(1, 13):
        toy.run(search, 1)
        assert model[0].dilation_override is None
        readings = search.readings[0, 0]
        assert [at for at, _ in readings] == [at for at in (5, 8, 12) if at <= step]
        best = curve_minimum(readings[-1][1]) if readings else 4.0
        assert model[0].realised_dilation[0] == pytest.approx(best)


def test_an_evaluation_that_fails_leaves_no_override(cues: Any) -> None:
    model = cues.model(9)

    def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
        if search.step_index == 2:
            raise KeyboardInterrupt
        return cues.loss(model, batch)

    search = SampledSearch(model, loss_fn, 8, cues.batches(1))
    batches = cues.batches(2)
    cues.run(search, model, batches[:1])
    search.loss(batches[1]).backward()
    with torch.no_grad():
        model[2].weight.add_(1.0)
    model[1].eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyboardInterrupt):
        search.step()
    assert model[0].dilation_override is None
    assert (model[0].training, model[1].training) == (True, False)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("kind", ["spsa", "sampled"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_backward_pass_after_its_step_leaves_no_override(cues: Any, kind: str, reentrant: bool) -> None:
    """The backward pass repeats its forward pass at the same dilations."""
    gradients = []
    for late in (False, True):
        model = cues.model(9)

        def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
            image = batch[0].clone().requires_grad_()
            return cues.loss(lambda x: checkpoint(model, x, use_reentrant=reentrant), (image, batch[1]))

        search = search_of(kind, model, loss_fn, cues.batches(1))
        loss = search.loss(cues.batches(1)[0])
        if late:
            search.step()
        loss.backward()
        assert (model[0].dilation_override is None) == late
        gradients.append([weight.grad for weight in model[0].parameters() if weight.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@KINDS
def test_a_loss_may_be_changed_in_place(cues: Any, kind: str) -> None:
    model = cues.model(9)
    search = search_of(kind, model, cues.loss, cues.batches(1))
    loss = search.loss(cues.batches(1)[0])
    value = loss.item()
    loss += 1
    loss.backward()
    assert loss.item() == pytest.approx(value + 1)
    assert math.isfinite(model[2].weight.grad.sum())


@pytest.mark.parametrize("kind", ["spsa", "sampled"])
def test_a_loss_that_fails_leaves_no_override(cues: Any, kind: str) -> None:
    """For example out of memory: the loop may skip the batch, validate and save."""
    model = cues.model(9)
    held = []

    def loss_fn(model: nn.Module, batch: Any) -> Any:
        held.append(model[0].dilation_override)
        raise MemoryError

    search = search_of(kind, model, loss_fn, cues.batches(1))
    with pytest.raises(MemoryError):
        search.loss(cues.batches(1)[0])
    assert held[0] is not None
    assert model[0].dilation_override is None
