"""The Lightning callback: three lines learn the rates of a module, and what it logs, saves, gives back and refuses."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

L = pytest.importorskip("lightning")

from rfield.integrations.lightning import ReceptiveFieldSearch  # noqa: E402
from rfield.layers import AdaptiveConv2d  # noqa: E402
from rfield.search.held_out import HeldOut  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


class Module(L.LightningModule):
    def __init__(self, automatic: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=9, dilation=9), nn.Conv2d(2, 1, 1))
        self.automatic_optimization = automatic
        self.drawn: list[float] = []
        self.seen: list[set[int]] = []

    def training_step(self, batch: list[Tensor]) -> dict[str, Tensor]:
        if self.training:
            layer: Any = self.net[0]
            self.drawn.append(layer.realised_dilation[0] if isinstance(layer, AdaptiveConv2d) else 0)
            self.seen.append({int(index) for index in batch[2]})
        loss = (self.net(batch[0]) - batch[1]).square().mean()
        self.log("loss", loss)
        return {"loss": loss}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.02)


def loader() -> DataLoader[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(48, 1, 20, 20, generator=generator)
    targets = nn.functional.conv2d(images, torch.ones(1, 1, 3, 3), padding=3, dilation=3)
    return DataLoader(TensorDataset(images, targets, torch.arange(48)), batch_size=8)


def trainer(folder: Path, *callbacks: Any, **options: Any) -> Any:
    options = {"max_steps": 30, "logger": False, "enable_progress_bar": False, **options}
    return L.Trainer(
        default_root_dir=folder, accelerator="cpu", enable_model_summary=False, callbacks=[*callbacks], **options
    )


@pytest.mark.slow
def test_rates_are_learned_logged_and_fused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lightning.pytorch.loggers import CSVLogger

    module, data, search = Module(), loader(), ReceptiveFieldSearch(search_share=0.5, seed=1)
    logger = CSVLogger(tmp_path, name="log", version="")
    options = {"logger": logger, "log_every_n_steps": 1, "accumulate_grad_batches": 2, "max_steps": 12}
    trainer(tmp_path, search, **options).fit(module, data)
    assert search.search is not None
    assert (search.search.steps, search.search.step_index, search.search.done) == (6, 6, True)
    tried = [rates[0] for _, rates in search.search.trajectory]
    # The first forward pass of all records the map's size, and each step has two of its own.
    assert module.drawn[1 : 1 + 12] == [rate for rate in tried for _ in range(2)]
    assert {*module.drawn[13:]} == {search.search.groups[0][0].effective_dilation[0]}
    assert len(search.search.losses[0, 0][-1][1].popitem()[1]) == 16
    held_out = {*HeldOut(loader(), seed=1).indices}
    assert not held_out & set.union(*module.seen[:13])
    assert held_out & set.union(*module.seen[13:])
    assert isinstance(data.dataset, TensorDataset)
    assert "log" not in vars(module)
    plain: Any = search.fused
    assert type(plain.net[0]) is nn.Conv2d
    assert (
        plain.net[0].dilation == search.search.groups[0][0].nearest_dilation((1.0, 1.0))
        or plain.net[0].dilation[0] >= 1
    )
    shown = capsys.readouterr().out
    assert "rfield: 16 samples of 48 are held out\n" in shown
    assert f"rfield: {search.report()}\n" in shown
    assert "not reliable: the search has 6 steps" in search.report()
    logged = (tmp_path / "log/metrics.csv").read_text().splitlines()[0]
    assert "dilation/net.0" in logged
    assert "held_out_loss/net.0/dilation_" in logged


@pytest.mark.slow
def test_a_resumed_training_goes_on_with_the_search(tmp_path: Path) -> None:
    whole = ReceptiveFieldSearch()
    checkpoints = L.pytorch.callbacks.ModelCheckpoint(
        tmp_path, "{step}", every_n_train_steps=6, save_top_k=-1, auto_insert_metric_name=False
    )
    trainer(tmp_path, whole, checkpoints, max_steps=20).fit(Module(), loader())
    for step in (6, 18):  # within the search, and after it
        again = ReceptiveFieldSearch()
        trainer(tmp_path, again, max_steps=20).fit(Module(), loader(), ckpt_path=tmp_path / f"{step}.ckpt")
        assert again.report() == whole.report()
        assert (again.search is None) == (step == 18)
        ours, theirs = (each.fused.state_dict() for each in (again, whole))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
        assert again.fused.net[0].dilation == whole.fused.net[0].dilation


def test_what_is_refused(tmp_path: Path) -> None:
    for options, module, message in (
        ({}, Module(automatic=False), "Module optimizes by itself"),
        ({"reload_dataloaders_every_n_epochs": 1}, Module(), "makes new loaders, of which no samples are held out"),
        ({"max_steps": -1, "max_epochs": -1}, Module(), "give the Trainer max_epochs or max_steps"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path, ReceptiveFieldSearch(), **options).fit(module, loader())
    with pytest.raises(ValueError, match="search_share must be above 0 and at most 1, got 2"):
        ReceptiveFieldSearch(search_share=2)
