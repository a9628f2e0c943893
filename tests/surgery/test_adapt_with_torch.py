"""Adapted models work with torch's training tools: each case learns, and ends at the right dilation."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

import rfield
from rfield.layers import AdaptiveConv2d, LearnedFactor
from rfield.search import GradientSearch, SampledSearch, Search, SpsaSearch, factor_parameters, learned_layers

Batch = tuple[Tensor, Tensor]


def batches(count: int, seed: int) -> list[Batch]:
    """Return smooth noise as the input, and the same noise shifted by 5 px as the target."""
    generator = torch.Generator().manual_seed(seed)
    images = [F.avg_pool2d(torch.randn(2, 3, 20, 20, generator=generator), 3, 1, 1) * 3 for _ in range(count)]
    return [(image, (image[:, 0].roll(-5, 2) > 0).long()) for image in images]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=3, dilation=3),
        nn.ReLU(),
        nn.Conv2d(6, 2, 1),
    )


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def search_of(
    kind: str,
    model: nn.Module,
    steps: int,
    held_out: list[Batch],
    loss: Callable[[nn.Module, Any], Tensor] = loss_fn,
) -> Search:
    if kind == "sampled":
        return SampledSearch(model, loss, steps, held_out=held_out)
    return {"gradient": GradientSearch, "spsa": SpsaSearch}[kind](model, loss, steps)


def learn(
    model: nn.Module,
    kind: str,
    data: list[Batch],
    held_out: list[Batch],
    loss: Callable[[nn.Module, Any], Tensor] = loss_fn,
) -> Search:
    search = search_of(kind, model, len(data), held_out, loss)
    optimizer = torch.optim.AdamW(rfield.parameter_groups(model, lr=1e-2, factor_lr=3e-2))
    for batch in data:
        search.loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        search.step()
    assert search.done
    assert len({dilations[0] for _, dilations in search.trajectory}) > 1, "the dilation never moved"
    return search


def learnt(model: nn.Module, kind: str = "spsa", loss: Callable[[nn.Module, Any], Tensor] = loss_fn) -> Search:
    return learn(model, kind, batches(8, seed=0), batches(2, seed=0), loss)


KINDS = pytest.mark.parametrize("kind", ["gradient", "spsa", "sampled"])


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory: pytest.TempPathFactory, in_processes: Any) -> list[dict[tuple[str, str], Any]]:
    """Return the results of two processes, each of which trains on half of every batch."""
    folder = tmp_path_factory.mktemp("processes")
    own = [{"rank": rank, "store": str(folder / "store"), "out": str(folder / f"{rank}.pt")} for rank in range(2)]
    in_processes(Path(__file__).with_name("adapt_worker.py"), *own)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@KINDS
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_two_processes_learn_what_one_learns_from_both_halves(
    of_two_processes: list[dict[tuple[str, str], Any]], wrapper: str, kind: str
) -> None:
    model = network()
    rfield.adapt(model)
    if wrapper == "fsdp":
        rfield.regulate(model, "0")
    halves = [
        [(torch.cat([one[0], other[0]]), torch.cat([one[1], other[1]])) for one, other in zip(*pair, strict=True)]
        for pair in ((batches(6, 0), batches(6, 1)), (batches(2, 2), batches(2, 3)))
    ]
    search = learn(model, kind, *halves)
    first, second = (found[wrapper, kind] for found in of_two_processes)
    assert first[:2] == second[:2]
    assert torch.equal(first[2], second[2])
    torch.testing.assert_close(torch.tensor(first[1]), torch.tensor(search.unsnapped), rtol=1e-4, atol=0)
    image = batches(1, seed=4)[0][0]
    torch.testing.assert_close(first[2], model(image).detach(), rtol=1e-3, atol=1e-4)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_fully_sharded_factor_stays_in_its_range() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = network()
    rfield.adapt(model)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    (layer,) = (module for module in model.modules() if isinstance(module, LearnedFactor))
    search = GradientSearch(model, loss_fn, steps=3)
    for _ in range(2):
        search.loss(batches(1, 0)[0]).backward()
        with torch.no_grad():
            layer.log_factor.fill_(7.0)  # a large optimizer step
        search.step()
        assert layer.effective_dilation[0] == pytest.approx(1.0)


@KINDS
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(kind: str, reentrant: bool) -> None:
    """The backward repeats the forward at the same dilations."""

    def checkpointed(model: nn.Module, batch: Any) -> Tensor:
        image = batch[0].clone().requires_grad_()
        return F.cross_entropy(checkpoint(model, image, use_reentrant=reentrant), batch[1])

    results = []
    for loss in (loss_fn, checkpointed):
        model = network()
        rfield.adapt(model)
        rfield.regulate(model, "0")
        search = learnt(model, kind, loss)
        results.append((search.trajectory, [parameter.detach() for parameter in model.parameters()]))
    torch.testing.assert_close(results[1], results[0])


@KINDS
@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrized_weights(kind: str, norm: Callable[[nn.Module], nn.Module]) -> None:
    model = network()
    norm(model[2])
    keys, parameters = list(model.state_dict()), list(model.parameters())
    image = batches(1, 0)[0][0]
    model.eval()
    before = model(image)
    (layer,) = rfield.adapt(model)
    assert parametrize.is_parametrized(layer, "weight")
    assert [key for key in model.state_dict() if not key.endswith("log_factor")] == keys
    assert {id(parameter) for parameter in parameters} < {id(parameter) for parameter in model.parameters()}
    torch.testing.assert_close(model(image), before)
    model.train()
    originals = [parameter.detach().clone() for parameter in layer.parametrizations["weight"].parameters()]
    learnt(model, kind)
    trained = list(layer.parametrizations["weight"].parameters())
    assert all(not torch.equal(new, old) for new, old in zip(trained, originals, strict=True))
    model.eval()
    plain = rfield.fuse(model)
    assert list(plain.state_dict()) == keys
    torch.testing.assert_close(plain(image), model(image))
    stock = network()
    norm(stock[2])
    stock.load_state_dict(plain.state_dict())


def test_running_average_of_the_weights() -> None:
    model = network()
    rfield.adapt(model)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    search = search_of("sampled", model, 8, batches(2, 0))
    optimizer = torch.optim.AdamW(rfield.parameter_groups(model, lr=1e-2, factor_lr=3e-2))
    for batch in batches(24, 0):
        search.loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        search.step()
        average.update_parameters(model)
    image = batches(1, 0)[0][0]
    plain = rfield.fuse(average.module.eval())
    assert isinstance(model[2], AdaptiveConv2d)
    assert plain.get_submodule("2").dilation == pytest.approx(model[2].effective_dilation)
    torch.testing.assert_close(plain(image), average.module(image), atol=1e-3, rtol=1e-3)


def test_running_average_with_a_regulator_that_is_snapped() -> None:
    model = network()
    regulator = rfield.regulate(model, "2")
    average = torch.optim.swa_utils.AveragedModel(model, avg_fn=lambda old, new, count: new)
    regulator.set_factor(1.4)
    regulator.snap()
    average.update_parameters(model)
    image = batches(1, 0)[0][0]
    torch.testing.assert_close(average(image), model(image))


def test_a_deep_copy_takes_no_part_in_the_search() -> None:
    model = network()
    (layer,) = rfield.adapt(model)
    search = search_of("sampled", model, 8, batches(2, 0))
    search.loss(batches(1, 0)[0]).backward()
    assert layer.dilation_override is not None
    copied = copy.deepcopy(model)
    assert [group[0].dilation_override for group in learned_layers(copied)] == [None]
    with torch.no_grad():
        factor_parameters(copied)[0].fill_(0.3)
    assert layer.factor.item() == pytest.approx(1.0)
    assert copied[2].effective_dilation[0] == pytest.approx(3 / 1.34986, rel=1e-4)


@pytest.mark.slow
def test_compiles_when_the_search_is_done() -> None:
    model = network()
    rfield.adapt(model)
    rfield.regulate(model, "0")
    learnt(model)
    image = batches(1, 0)[0][0]
    model.eval()
    expected = model(image)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(image), expected)
    plain = rfield.fuse(model)
    torch.testing.assert_close(torch.compile(plain, backend="aot_eager", fullgraph=True)(image), expected)
