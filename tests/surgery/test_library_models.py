"""Models of other libraries are adapted, trained, fused, and loaded into the library's own model."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rfield
from rfield.layers import LearnedFactor
from rfield.search import GradientSearch, SampledSearch, Search, SpsaSearch
from rfield.surgery.fuse import dilations, set_dilations

pytestmark = pytest.mark.slow

CLASSES = 3


def deeplabv3(name: str) -> nn.Module:
    from torchvision.models import segmentation

    model: nn.Module = getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=CLASSES)
    return model


def deeplabv3_plus() -> nn.Module:
    smp = pytest.importorskip("segmentation_models_pytorch")
    model: nn.Module = smp.DeepLabV3Plus("resnet18", encoder_weights=None, classes=CLASSES)
    return model


def segformer() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.SegformerConfig(
        num_labels=CLASSES,
        depths=[1, 1, 1, 1],
        hidden_sizes=[8, 16, 16, 16],
        num_attention_heads=[1, 2, 2, 2],
        decoder_hidden_size=16,
    )
    model: nn.Module = transformers.SegformerForSemanticSegmentation(config)
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], str | None, str]] = {
    "torchvision-resnet50": (lambda: deeplabv3("deeplabv3_resnet50"), "classifier", "classifier.1"),
    "torchvision-mobilenet": (lambda: deeplabv3("deeplabv3_mobilenet_v3_large"), None, "classifier.0"),
    "smp-deeplabv3plus": (deeplabv3_plus, None, "decoder.block2"),
    "hf-segformer": (segformer, "*.dwconv.dwconv", "mlp.dwconv.dwconv"),
}


@functools.cache
def first(name: str) -> nn.Module:
    return MODELS[name][0]()


def built(name: str) -> nn.Module:
    """Return a copy of a model; its initial weights take longer than the copy."""
    return copy.deepcopy(first(name))


def logits_of(model: nn.Module, image: Tensor) -> Tensor:
    output: Any = model(image)
    logits: Tensor = output["out"] if isinstance(output, dict) and "out" in output else output
    return getattr(logits, "logits", logits)


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    image, mask = batch
    logits = logits_of(model, image)
    return F.cross_entropy(F.interpolate(logits, mask.shape[1:], mode="bilinear"), mask)


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(2, 3, 32, 32, generator=generator) for _ in range(count)]
    return [(image, (image[:, 0] > 0).long()) for image in images]


def learn(model: nn.Module, kind: str, steps: int = 3) -> Search:
    search: Search
    if kind == "sampled":
        search = SampledSearch(model, loss_fn, steps, held_out=batches(1), candidates=3, narrowings={})
    else:
        search = {"gradient": GradientSearch, "spsa": SpsaSearch}[kind](model, loss_fn, steps)
    optimizer = torch.optim.AdamW(rfield.parameter_groups(model, lr=1e-4, factor_lr=0.1))
    for batch in batches(steps):
        search.loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        search.step()
    assert search.done
    return search


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("torchvision-resnet50", "sampled"),  # The largest by far: once.
        *[(name, kind) for name in [*MODELS][1:] for kind in ("gradient", "spsa", "sampled")],
    ],
)
def test_adapt_learn_fuse_load(name: str, kind: str) -> None:
    torch.manual_seed(0)
    _, select, _ = MODELS[name]
    stock = built(name)
    model = copy.deepcopy(stock)
    layers = rfield.adapt(model, select, share="parallel" if name.startswith("torchvision") else None)
    before = [layer.effective_dilation[0] for layer in layers]
    search = learn(model, kind)
    # A sampled search may end at its start, but it always draws other dilations, too.
    drawn = [max(dilations) for dilations in zip(*(each for _, each in search.trajectory), strict=True)]
    tried = drawn if kind == "sampled" else [values[0] for values in search.unsnapped]
    assert tried != before
    model.eval()
    image = batches(1)[0][0]
    expected = logits_of(model, image)

    plain = rfield.fuse(model)
    assert list(plain.state_dict()) == list(stock.state_dict())
    assert not [module for module in plain.modules() if type(module).__module__.startswith("rfield")]
    assert type(plain) is type(stock)
    torch.testing.assert_close(logits_of(plain, image), expected, rtol=0, atol=1e-5)

    set_dilations(stock, dilations(plain))
    stock.load_state_dict(plain.state_dict(), strict=True)
    torch.testing.assert_close(logits_of(stock.eval(), image), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_regulate_fuse(name: str) -> None:
    torch.manual_seed(0)
    _, _, part = MODELS[name]
    stock = built(name)
    model = copy.deepcopy(stock)
    name = next(name for name, _ in model.named_modules() if name.endswith(part))
    regulator = rfield.regulate(model, name, factor=0.7)
    loss_fn(model, batches(1)[0]).backward()
    assert regulator.log_factor.grad is not None
    assert regulator.log_factor.grad.abs().sum() > 0
    regulator.set_factor(0.8)
    image = batches(1)[0][0]
    model.eval()
    plain = rfield.fuse(model)
    torch.testing.assert_close(logits_of(plain, image), logits_of(model, image), rtol=0, atol=1e-5)
    assert set(plain.state_dict()) == set(stock.state_dict())
    stock.load_state_dict(plain.state_dict(), strict=True)
    assert not [module for module in plain.modules() if isinstance(module, LearnedFactor)]


def test_the_part_that_the_documentation_names() -> None:
    model = deeplabv3("deeplabv3_mobilenet_v3_large").eval()
    keys = set(model.state_dict())
    with pytest.warns(UserWarning, match="sees more than one pixel"):
        rfield.regulate(model, "classifier.4")
    assert "classifier.4.module.weight" in model.state_dict()
    assert set(rfield.fuse(model).state_dict()) == keys


def test_segformer_has_nothing_dilated() -> None:
    with pytest.raises(ValueError, match=r"nothing to adapt; .*\.mlp\.dwconv\.dwconv"):
        rfield.adapt(segformer())
