"""The callback for the Trainer of transformers: rates are learned, logged and fused; what it refuses."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from rfield.integrations.transformers import ReceptiveFieldSearch  # noqa: E402
from rfield.search.held_out import HeldOut  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 2, 3, padding=9, dilation=9)
        self.norm = nn.BatchNorm2d(2)
        self.last = nn.Conv2d(2, 1, 1)
        self.seen: list[set[int]] = []

    def forward(self, image: Tensor, target: Tensor, index: Tensor) -> dict[str, Tensor]:
        if self.training:
            self.seen.append({*index.tolist()})
        output = self.last(self.norm(self.conv(image)))
        return {"loss": (output - target).square().mean(), "logits": output}


def make_trainer(folder: Path, **options: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(48, 1, 20, 20, generator=generator)
    targets = nn.functional.conv2d(images, torch.ones(1, 1, 3, 3), padding=3, dilation=3)
    samples = [{"image": images[index], "target": targets[index], "index": index} for index in range(48)]
    arguments = transformers.TrainingArguments(
        str(folder),
        max_steps=12,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        report_to="none",
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    return transformers.Trainer(Net(), arguments, train_dataset=samples)


def test_rates_are_learned_logged_and_fused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make_trainer(tmp_path)
    search = ReceptiveFieldSearch(trainer, search_share=0.5)
    trainer.train()
    assert search.search is not None
    assert (search.search.step_index, search.search.done) == (6, True)
    assert len({rates[0] for _, rates in search.search.trajectory}) > 1
    held_out = {*HeldOut(DataLoader(range(48))).indices}
    assert not held_out & set.union(*trainer.model.seen[:12])
    assert held_out & set.union(*trainer.model.seen[12:])
    plain: Any = search.fused
    assert type(plain.conv) is nn.Conv2d
    assert plain.conv.dilation[0] == search.search.groups[0][0].snapped_dilation[0]
    keys = {key for row in trainer.state.log_history for key in row}
    assert "dilation/conv" in keys
    assert any(key.startswith("held_out_loss/conv/dilation_") for key in keys)
    shown = capsys.readouterr().out
    assert "rfield: 16 samples of 48 are held out\n" in shown
    assert search.report() in shown
    with pytest.raises(ValueError, match="has begun already: make the search before train"):
        ReceptiveFieldSearch(SimpleNamespace(optimizer=trainer.optimizer, state=trainer.state))  # type: ignore[arg-type]
