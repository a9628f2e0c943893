"""The examples run on a few generated images, and end with a plain model whose dilations have changed."""

import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rfield.segmentation.data import SyntheticCues
from rfield.surgery.fuse import dilations

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str) -> Callable[..., Any]:
    """Return an example's `main`, on smaller images."""
    main: Any = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]
    main.__globals__["SyntheticCues"] = lambda split, size=None, length=None: SyntheticCues(
        split, (64, 64), distance=24, length=length
    )
    return main


def is_plain(model: nn.Module) -> bool:
    return not any(type(module).__module__.startswith("rfield") for module in model.modules())


def test_blocks_and_links_of_the_page() -> None:
    page = EXAMPLES.parent / "docs/adapt.md"
    namespace: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, page.name, "exec"), namespace)
    for link in re.findall(r"\]\(([^)#]+)", page.read_text()):
        assert (page.parent / link).exists(), link


@pytest.mark.slow
def test_torchvision(tmp_path: Path) -> None:
    from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large

    plain = load("adapt_torchvision")(steps=2, out=str(tmp_path / "plain.pt"))
    assert is_plain(plain)
    stock = deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4)
    stock.load_state_dict(torch.load(tmp_path / "plain.pt"))
    assert dilations(plain) != dilations(stock)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_smp_with_lightning(tmp_path: Path) -> None:
    pytest.importorskip("segmentation_models_pytorch")
    plain = load("adapt_smp_lightning")(steps=3, folder=str(tmp_path))
    assert is_plain(plain)
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    (state,) = (
        state for key, state in torch.load(checkpoint, weights_only=False)["callbacks"].items() if "Receptive" in key
    )
    search = state["search"]
    assert search["done"]
    assert search["unsnapped"] != [[12.0]]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_transformers_with_the_trainer(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    plain = load("adapt_hf_trainer")(steps=2, folder=str(tmp_path))
    assert is_plain(plain)
    found = [rate for name, rate in dilations(plain).items() if ".aspp." in name]
    assert found != [(6, 6), (12, 12), (18, 18)]
    again = transformers.MobileViTForSemanticSegmentation.from_pretrained(tmp_path)
    assert list(again.state_dict()) == list(plain.state_dict())
