"""`rfield.inspect` in Python: the table, the figure, the HTML of a notebook, and what it refuses."""

import sys

import pytest
import torch
from torch import nn

import rfield


class Net(nn.Module):
    """Two layers, one of them with a name that HTML must escape."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, stride=8, padding=1)
        self.add_module("<b>&", nn.Conv2d(4, 2, 3, padding=9, dilation=9))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = getattr(self, "<b>&")(self.stem(image))
        return output


def test_what_is_shown() -> None:
    found = rfield.inspect(Net(), (100, 104), torch.randn(2, 1, 100, 104), channels=1)
    lines = str(found).splitlines()
    assert lines[0].split("  ")[0] == "layer"
    assert lines[2].split() == ["<b>&", "Conv2d", "3", "9", "8", "147", "1.47x1.41", "20", "%"]
    assert "images of 100x104 px" in lines
    assert repr(found) == str(found)
    assert [advice.code for advice in found.advice] == ["rfield.set_dilations(model, {'<b>&': (5, 5)})"] * 2
    assert found.scores is not None
    assert found.squares[-1].share == 0.99
    page = found._repr_html_()
    assert "<b>" not in page
    assert "&lt;b&gt;&amp;" in page
    assert page.count("<tr>") == len(found.layers) + 1
    assert "(5, 5)})</code>" in page
    titles = [text.get_text() for text in found.plot().legends[0].get_texts()]
    assert titles == ["theoretical field", "50 % of the contributions", "99 % of the contributions"]
    unmeasured = rfield.inspect(Net(), 100, images=[], channels=1)
    assert (unmeasured.scores, unmeasured.squares) == (None, [])
    assert unmeasured.plot().axes[0].lines[0].get_ydata()[1] == 147


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, message in (
        ((0,), "must be at least 1x1 px, got 0x0"),
        ((64, torch.zeros(1, 1, 32, 32)), "the images have 32x32 px, but size is 64x64 px"),
    ):
        with pytest.raises(ValueError, match=message):
            rfield.inspect(Net(), *arguments, channels=1)
    found = rfield.inspect(Net(), 64, images=[], channels=1)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="plot needs the package matplotlib: pip install matplotlib"):
        found.plot()
