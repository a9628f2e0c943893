"""The training step by itself, in no run: losses, guides, draws, rates and warnings, each against its definition."""

import copy
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rfield.search import GradientSearch, SampledSearch, SpsaSearch, factor_parameters, learned_layers
from rfield.search.factors import override_dilation
from rfield.segmentation.config.train import TrainConfig
from rfield.segmentation.data import EpochSampler
from rfield.segmentation.models import ParsingNetwork
from rfield.segmentation.runs import build_network
from rfield.segmentation.training import ParsingModule
from rfield.segmentation.training.losses import make_loss

CLASSES = ("a", "b", "c", "d")
GROUPS = [(0,), (1, 3)]


def config_of(**values: Any) -> TrainConfig:
    tiny: dict[str, Any] = {"model": "small_cnn", "dilation": 3, "head_channels": 4, "dropout": 0.0, "batch_size": 2}
    return TrainConfig(data="synthetic", out="x", **tiny | values).resolved()


def module_of(config: TrainConfig, **values: Any) -> ParsingModule:
    torch.manual_seed(0)
    groups = values.get("class_groups")
    network = build_network(config, len(CLASSES), class_groups=groups)
    torch.nn.init.normal_(next(m for n, m in network.named_parameters() if n.endswith("fc8.weight")), std=1.0)
    return ParsingModule(network, config, CLASSES, **{"held_out": [None], **values})


class Trainer(SimpleNamespace):
    """What the module asks of Lightning's."""

    def __init__(self, **values: Any) -> None:
        plain = {"global_step": 0, "global_rank": 0, "world_size": 1, "precision_plugin": object()}
        super().__init__(**plain | {"estimated_stepping_batches": 100} | values)


def attach(module: ParsingModule, **values: Any) -> ParsingModule:
    module._trainer = Trainer(**values)  # type: ignore[assignment]
    return module


def batch_of(size: tuple[int, int] = (33, 41), void: float = 0.2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.randint(len(CLASSES), (2, *size), generator=generator)
    void_pixels = torch.rand(2, *size, generator=generator) < void
    return torch.randn(2, 3, *size, generator=generator), mask.masked_fill(void_pixels, 255)


# ------------------------------------------------------------------------------------------------- the loss's place


@pytest.mark.parametrize("decoder", [False, True])
@pytest.mark.parametrize("place", ["features", "image"])
def test_the_loss_is_taken_on_the_padded_image_s_labels(place: Any, decoder: bool) -> None:
    """Where the image is padded to the stride, the mask is void."""
    config = config_of(loss_resolution=place, decoder=decoder, search="none")
    module = module_of(config).eval()
    network = module.network
    image, mask = batch_of((30, 35))
    stride = network.logit_stride
    assert stride == (2 if decoder else 4)
    padded, labels = F.pad(image, (0, 2, 0, 3)), F.pad(mask, (0, 2, 0, 3), value=255)
    if place == "image":
        logits = network.logits(padded, (33, 37))
    else:
        logits, labels = network.logits(padded), labels[:, ::stride, ::stride]
    got = module._logits(network, (image, mask))
    torch.testing.assert_close(got[0], logits)
    assert torch.equal(got[1], labels)
    expected = make_loss("cross_entropy", len(CLASSES))(logits, labels)
    torch.testing.assert_close(module._loss(network, (image, mask)), expected)


@pytest.mark.parametrize("paths", [1, 2])
@pytest.mark.parametrize("place", ["features", "image"])
def test_a_frozen_run_s_loss_is_the_head_s(place: Any, paths: int) -> None:
    module = module_of(config_of(loss_resolution=place, freeze_backbone=True, paths=paths, search="none")).eval()
    features, mask = torch.randn(2, 32, 9, 11).half(), batch_of((30, 38))[1]
    labels = F.pad(mask, (0, 3, 0, 3), value=255)
    size = None if place == "features" else (33, 41)
    expected = module.network.head(features.float(), size)
    got = module._logits(module.network, (features, mask))
    torch.testing.assert_close(got[0], expected)
    assert torch.equal(got[1], labels[:, ::4, ::4] if place == "features" else labels)


@pytest.mark.parametrize("frozen", [False, True])
def test_the_published_guidance_reaches_the_loss(frozen: bool) -> None:
    """The gradient of fc8's bias is the sum of the logits' gradients, a path's own pixels weighing more."""
    values: dict[str, Any] = {"paths": 2, "path_weight": 3.0, "path_guidance": "gradient", "freeze_backbone": frozen}
    config = config_of(class_groups=[["a"], ["b", "d"]], loss_resolution="image", search="none", **values)
    module = module_of(config, class_groups=GROUPS).train()
    image, mask = batch_of()
    input = torch.randn(2, 32, 9, 11) if frozen else image
    loss = module._loss(module.network, (input, mask))
    heads = module.network.head.heads()  # type: ignore[union-attr]
    gradients = torch.autograd.grad(loss, [head.layers.fc8.bias for head in heads])
    logits = module._logits(module.network, (input, mask))[0].detach().requires_grad_()
    (plain,) = torch.autograd.grad(make_loss("cross_entropy", 4)(logits, mask), logits)
    for gradient, group in zip(gradients, GROUPS, strict=True):
        weight = torch.where(torch.isin(mask, torch.tensor(group)), 3.0, 1.0)[:, None]
        torch.testing.assert_close(gradient, (plain * weight).sum((0, 2, 3)), rtol=1e-4, atol=1e-6)


# -------------------------------------------------------------------------------------------------------- the guides


def losses_of(module: ParsingModule, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The cross-entropy of every pixel where the loss is taken, 0 without a label; and the labels."""
    logits, mask = module._logits(module.network, batch)
    return F.cross_entropy(logits, mask, ignore_index=255, reduction="none"), mask


@pytest.mark.parametrize("weight", [5.0, 2.0])
def test_a_path_s_guide_counts_its_own_classes_more(weight: float) -> None:
    """By `path_weight`, over the number of all labelled pixels; the weights learn by the loss itself."""
    values: dict[str, Any] = {"paths": 2, "class_groups": [["a"], ["b", "d"]], "path_weight": weight}
    # Weights of a reading are a sampled search's affair.
    options: dict[str, Any] = {"class_groups": GROUPS, "reading_weights": torch.tensor([1.0, 2.0, 0.5, 3.0])}
    module = module_of(config_of(search="gradient", loss="focal", **values), **options)
    attach(module).configure_optimizers()
    assert isinstance(module.search, GradientSearch)
    batch = batch_of()
    output = module._guided_loss(module.network, batch)
    assert isinstance(output, tuple)
    losses, mask = losses_of(module, batch)
    count = (mask != 255).sum()
    for guide, group in zip(output[1], GROUPS, strict=True):
        own = sum(mask == index for index in group).bool()
        torch.testing.assert_close(guide, (losses * (1 + (weight - 1) * own)).sum() / count)
    torch.testing.assert_close(output[0], module._loss(module.network, batch))
    assert not torch.isclose(output[1][0], output[1][1])
    # What the search hands to the factors is the guides' gradient.
    factors = factor_parameters(module.network)
    expected = torch.autograd.grad(module._guided_loss(module.network, batch)[1][1], factors[1])[0]
    module.search.loss(batch).backward()
    assert expected.abs() > 1e-6
    torch.testing.assert_close(factors[1].grad, expected, rtol=1e-4, atol=1e-7)


def test_published_guidance_leaves_the_search_s_loss_alone() -> None:
    values: dict[str, Any] = {"paths": 2, "class_groups": [["a"], ["b", "d"]], "path_guidance": "gradient"}
    for kind in ("gradient", "spsa", "sampled"):
        module = module_of(config_of(search=kind, **values), class_groups=GROUPS)
        attach(module).configure_optimizers()
        assert module.search is not None
        assert module.search.loss_fn == module._loss


@pytest.mark.parametrize("guided", [False, True])
def test_a_sampled_search_draws_by_the_loss_and_reads_by_the_weights(guided: bool) -> None:
    values: dict[str, Any] = {"class_groups": [["a"], ["b", "d"]]} if guided else {}
    weights = torch.tensor([1.0, 2.0, 0.5, 3.0])
    groups = GROUPS if guided else None
    module = module_of(config_of(search="sampled", paths=2, **values), class_groups=groups, reading_weights=weights)
    attach(module).configure_optimizers()
    batch = batch_of()
    drawn = module._guided_loss(module.network, batch)
    assert isinstance(drawn, Tensor)
    torch.testing.assert_close(drawn, module._loss(module.network, batch))
    with torch.no_grad():
        output = module._guided_loss(module.network, batch)
        losses, mask = losses_of(module, batch)
    assert isinstance(output, tuple)
    losses = losses * sum(weight * (mask == index) for index, weight in enumerate(weights.tolist()))
    for place, guide in enumerate(output[1]):
        own = sum(mask == index for index in GROUPS[place]) * 4.0 if guided else 0.0
        torch.testing.assert_close(guide, (losses * (1 + own)).sum() / (mask != 255).sum())
    assert len(output[1]) == 2
    torch.testing.assert_close(output[0], drawn.detach())


@pytest.mark.parametrize("kind", ["gradient", "spsa", "sampled"])
def test_what_a_search_reads(kind: Any) -> None:
    """Without class groups the loss, and for a sampled search the weighted one where there are weights."""
    kinds = {"gradient": GradientSearch, "spsa": SpsaSearch, "sampled": SampledSearch}
    weights = torch.ones(len(CLASSES))
    for reading_weights, reads in ((None, False), (weights, kind == "sampled")):
        module = module_of(config_of(search=kind, search_share=0.297, seed=7), reading_weights=reading_weights)
        attach(module).configure_optimizers()
        search = module.search
        assert type(search) is kinds[kind]
        assert search.loss_fn == (module._guided_loss if reads else module._loss)
        assert (search.steps, search.seed) == (30, 7)
    assert module_of(config_of(search="none"))._make_search(5) is None


def test_a_sampled_search_without_narrowing() -> None:
    for narrowing in (True, False):
        module = module_of(config_of(search="sampled", search_narrowing=narrowing, seed=7), held_out=[batch_of()])
        search = attach(module)._make_search(40)
        assert isinstance(search, SampledSearch)
        assert search.seed == 7
        assert bool(search.narrowings) == narrowing
        assert search.held_out is module.held_out


# ------------------------------------------------------------------------------------------------------ draws, steps


def test_dropout_depends_on_seed_step_and_process() -> None:
    seeds = {}
    for seed, step, rank in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 1, 1), (1, 1, 0)]:
        module = attach(module_of(config_of(seed=seed, search="none")), global_step=step, global_rank=rank)
        torch.manual_seed(99)
        module.on_train_batch_start(None, 4)
        seeds[seed, step, rank] = torch.initial_seed()
        module.on_train_batch_start(None, 5)  # Not on where the epoch began.
        assert torch.initial_seed() == seeds[seed, step, rank]
    assert len(set(seeds.values())) == len(seeds)


@pytest.mark.parametrize("frozen", [False, True])
def test_features_are_computed_once_a_batch_and_kind_of_forward(frozen: bool) -> None:
    module = module_of(config_of(search="sampled", freeze_backbone=frozen))
    calls = []
    real = ParsingNetwork.features
    module.network.features = lambda padded: calls.append(1) or real(module.network, padded)  # type: ignore
    batch, other = batch_of(), batch_of()
    if frozen:
        batch, other = ((torch.randn(2, 32, 9, 11), mask) for _, mask in (batch, other))
    counts = []
    for given, grad in ((batch, True), (batch, True), (batch, False), (batch, False), (batch, True), (other, True)):
        with torch.set_grad_enabled(grad):
            module._loss(module.network, given)
        counts.append(len(calls))
    assert counts == ([0] * 6 if frozen else [1, 1, 2, 2, 3, 4])


def test_each_path_is_read_once_a_batch_and_dilation() -> None:
    module = module_of(config_of(search="sampled", paths=2, freeze_backbone=True))
    calls: list[int] = []
    for number, path in enumerate(module.network.head.paths):  # type: ignore[union-attr, arg-type]
        path.register_forward_hook(lambda *_, number=number: calls.append(number))
    _, mask = batch_of()
    batch, other = (torch.randn(2, 32, 9, 11), mask), (torch.randn(2, 32, 9, 11), mask)
    read = {}
    for given, dilation in ((batch, 1.0), (batch, 4.0), (batch, 1.0), (other, 4.0)):
        override_dilation(learned_layers(module.network)[1], [dilation])
        with torch.no_grad():
            logits = read[id(given), dilation] = module._read_paths(module.network, given).logits
            total = module._logits(module.network, given)[0].movedim(1, -1)
            del calls[-2:]
        assert torch.allclose(sum(logits), total[mask[:, ::4, ::4] != 255], atol=1e-6)  # type: ignore[arg-type]
    assert calls == [0, 1, 1, 0, 1]
    assert read[id(batch), 1.0][0] is read[id(batch), 4.0][0]


@pytest.mark.parametrize("rank", [0, 1])
def test_what_only_fills_up_an_epoch_has_no_labels(rank: int) -> None:
    """Five images, two processes, four a step: each has three, and the last of the second is a repetition."""
    sampler = EpochSampler(range(5), num_replicas=2, rank=rank)
    module = attach(module_of(config_of(batch_size=4, search="none")), world_size=2)
    module._trainer.train_dataloader = SimpleNamespace(sampler=sampler)  # type: ignore[union-attr]
    input, mask = batch_of()
    kept = module._without_repeats((input, mask), 0)
    assert torch.equal(kept[0], input)
    assert torch.equal(kept[1], mask)
    kept = module._without_repeats((input[:1], mask[:1]), 1)
    assert torch.equal(kept[0], input[:1])
    assert torch.equal(kept[1], mask[:1] if rank == 0 else torch.full_like(mask[:1], 255))
    # Of both in a batch the repetition goes.
    sampler.dataset = range(3)
    input, mask = module._without_repeats((input, mask), 0)
    assert len(input) == len(mask) == 2 - rank


@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_the_factor_s_two_gradients_add_up_to_its_own(scale: float) -> None:
    """The derivative by the factor, of all paths together; without the scale of a loss in half precision."""
    module = module_of(config_of(search="gradient", paths=2, factor=1.25, loss_resolution="image"))
    scaler = SimpleNamespace(scaler=SimpleNamespace(get_scale=lambda: scale))
    attach(module, global_step=3, precision_plugin=object() if scale == 1 else scaler)
    module.on_fit_start()
    (module._loss(module.network, batch_of()) * scale).backward()
    factors = factor_parameters(module.network)
    copies = copy.deepcopy(module.regulators)
    parts = [[part.sum().item() / scale for part in each.pop_factor_gradients()] for each in copies]
    total = sum(factor.grad.item() / 1.25 for factor in factors if factor.grad is not None) / scale
    module.factor_start = 3
    module.on_before_optimizer_step(torch.optim.SGD(factors, 1.0))
    assert module.factor_gradients is not None
    assert sum(module.factor_gradients) == pytest.approx(total, rel=1e-4)
    assert module.factor_gradients == pytest.approx([parts[0][term] + parts[1][term] for term in (0, 1)])
    assert all(abs(part) > 1e-6 for part in module.factor_gradients)
    assert all(factor.grad is not None for factor in factors)
    module.factor_start = 4
    module.factor_gradients = None
    for factor in factors:
        factor.requires_grad_(False)
    module.on_before_optimizer_step(torch.optim.SGD(factors, 1.0))
    assert module.factor_gradients is None, "nothing is learned any more"
    assert all(factor.grad is None for factor in factors), "before the start"


@pytest.mark.parametrize(
    ("paths", "total", "told"),
    [
        ((24.9, 1.0), 0.0, False),  # A small sum counts as 5.
        ((1.0, 25.1), 0.0, True),
        ((44.9, 1.0), 9.0, False),
        ((45.1, 1.0), 9.0, True),
        ((49.9, 1.0), 30.0, False),  # From 50 on whatever the sum.
        ((50.1, 1.0), 30.0, True),
    ],
)
def test_a_drift_of_the_paths_is_told_once(paths: tuple[float, float], total: float, told: bool) -> None:
    values: dict[str, Any] = {"paths": 2, "class_groups": [["a"], ["b", "d"]], "path_guidance": "gradient"}
    module = attach(module_of(config_of(search="none", **values), class_groups=GROUPS), global_step=7)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module._warn_of_drift()
        module.network.head.path_logits = torch.tensor([*paths, total])  # type: ignore[assignment]
        module._warn_of_drift()
        module._warn_of_drift()
    assert len(caught) == told
    if told:
        expected = f"step 7: the paths' logits drift apart, {max(paths):.3g} in root mean square where their sum has"
        assert str(caught[0].message).startswith(f"{expected} {total:.3g}; ")


# --------------------------------------------------------------------------------------------------------- optimizers


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_groups_of_the_optimizer(optimizer: Any, frozen: bool) -> None:
    rates: dict[str, Any] = {"lr": 0.01, "head_lr_scale": 4.0, "factor_lr": 0.5, "weight_decay": 0.125}
    values: dict[str, Any] = {"freeze_backbone": frozen, "decoder": not frozen, "search": "gradient"}
    module = attach(module_of(config_of(optimizer=optimizer, **rates, **values)))
    made: Any = module.configure_optimizers()
    found = made["optimizer"]
    assert type(found) is {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[optimizer]
    assert all(group.get("momentum", 0.9) == 0.9 for group in found.param_groups)
    names = {id(weight): name for name, weight in module.network.named_parameters()}
    groups = [{names[id(weight)].split(".")[0] for weight in group["params"]} for group in found.param_groups]
    assert groups == ([{"head"}, {"head"}] if frozen else [{"head", "decoder"}, {"head"}, {"backbone"}])
    assert found.param_groups[1]["params"] == factor_parameters(module.network)
    listed = [weight for group in found.param_groups for weight in group["params"]]
    trained = [weight for weight in module.network.parameters() if weight.requires_grad]
    assert {id(weight) for weight in listed} == {id(weight) for weight in trained}
    assert len(listed) == len(trained)
    assert [group["initial_lr"] for group in found.param_groups] == [0.04, 0.5, 0.01][: 3 - frozen]
    assert [group["weight_decay"] for group in found.param_groups] == [0.125, 0.0, 0.125][: 3 - frozen]
    assert made["lr_scheduler"]["interval"] == "step"
    schedule = made["lr_scheduler"]["scheduler"].lr_lambdas[0]
    assert [schedule(step) for step in (0, 50, 100, 101)] == [1.0, 0.5**0.9, 0.0, 0.0]


def test_when_a_factor_and_a_search_begin_and_end() -> None:
    for start, expected in ((None, 3), (0, 0), (7, 7)):
        module = attach(module_of(config_of(search="gradient", factor_start=start)), estimated_stepping_batches=39)
        module.configure_optimizers()
        assert module.factor_start == expected
        assert module.search is not None
        assert module.search.steps == 31  # 0.8 of 39
    module = attach(module_of(config_of(search="gradient", search_share=0.001)), estimated_stepping_batches=39)
    module.configure_optimizers()
    assert module.search is not None
    assert module.search.steps == 1
    module = attach(module_of(config_of(search="none")))
    module.configure_optimizers()
    assert module.search is None


def test_weights_stay_float32_and_a_frozen_backbone_does_not_learn() -> None:
    module = module_of(config_of(freeze_backbone=True))
    assert not any(weight.requires_grad for weight in module.network.backbone.parameters())
    assert all(weight.requires_grad for weight in module.network.head.parameters() if weight.dim() == 4)
    module = module_of(config_of())
    assert all(weight.requires_grad for weight in module.network.backbone.parameters())
    assert set(module.hparams) == {"config", "class_names"}
    assert module.hparams["class_names"] == list(CLASSES)
    assert TrainConfig(**module.hparams["config"]) == module.config
