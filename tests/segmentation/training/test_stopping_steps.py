"""How a step ends a training, without one: signals, and losses that are not finite."""

import signal
from pathlib import Path
from signal import SIGINT, SIGTERM
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.segmentation.training.test_parts import module_of, trainer_at

from rfield.segmentation.data import EpochSampler
from rfield.segmentation.training.stopping import LossGuard, StopOnSignal


def test_the_handlers_of_signals_come_back_once() -> None:
    own = {each: signal.getsignal(each) for each in (SIGINT, SIGTERM)}
    module, stop = module_of(search="none"), StopOnSignal(Path("last.ckpt"))
    try:
        for begin in (stop.on_fit_start, stop.on_train_start):  # Lightning sets its own between them.
            begin(trainer_at(0), module)
            assert [signal.getsignal(each) for each in own] == [stop._ask] * 2
            signal.signal(SIGTERM, signal.SIG_IGN)
        stop.restore()
        assert {each: signal.getsignal(each) for each in own} == own
        signal.signal(SIGTERM, signal.SIG_IGN)
        stop.restore()
        assert signal.getsignal(SIGTERM) == signal.SIG_IGN, "a handler that was set later"
    finally:
        for each, handler in own.items():
            signal.signal(each, handler)


def test_a_signal_to_one_process_stops_all() -> None:
    for others, own, signum in ((True, None, SIGTERM), (False, None, None), (True, SIGINT, SIGINT)):
        seen: list[tuple[bool, bool]] = []

        def decide(asked: bool, all: bool, others: bool = others, seen: Any = seen) -> bool:
            seen.append((asked, all))
            return asked or others

        stop = StopOnSignal(Path("last.ckpt"))
        stop.signum = own
        trainer = trainer_at(3, world_size=2, strategy=SimpleNamespace(reduce_boolean_decision=decide))
        assert (stop._asked(trainer), stop.signum) == (signum is not None, signum)
        assert seen == [(own is not None, False)]
        trainer.world_size = 1
        assert stop._asked(trainer) == (signum is not None)
        assert len(seen) == 1


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_what_is_not_finite_ends_a_step(precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, guard = module_of(search="gradient"), LossGuard(tmp_path / "last.ckpt", [f"image{n}" for n in range(6)])
    sampler, saved, asked = EpochSampler(range(6), 1, 0, shuffle=False), [], []
    progress = SimpleNamespace(current=SimpleNamespace(ready=2))
    epoch_loop = SimpleNamespace(batch_progress=progress, _batches_that_stepped=5)
    trainer = trainer_at(4, precision=precision, world_size=1, fit_loop=SimpleNamespace(epoch_loop=epoch_loop))
    trainer.train_dataloader = SimpleNamespace(sampler=sampler, batch_size=2)
    trainer.strategy = SimpleNamespace(reduce_boolean_decision=lambda good, **how: asked.append(how["all"]) or good)
    trainer.lightning_module, trainer.save_checkpoint = module, saved.append
    optimizer: Any = None
    module.step_loss = torch.tensor(0.5)
    guard.on_before_optimizer_step(trainer, module, optimizer)  # No weight has a gradient.
    first, *_, last = module.parameters()
    first.grad, last.grad = torch.zeros_like(first), torch.full_like(last, torch.nan)
    what = r"step 5: the gradient of the loss 0\.5 is not finite, with factor 1, on image2, image3\. "
    if precision == "16-mixed":
        guard.on_before_optimizer_step(trainer, module, optimizer)
        what, module.step_loss = (
            r"step 5: the loss is inf, with factor 1, on image2, image3\. ",
            torch.tensor(torch.inf),
        )
    with pytest.raises(ValueError, match=f"^{what}The state before this step is in .*last.ckpt. Look at these files"):
        guard.on_before_optimizer_step(trainer, module, optimizer)
    assert (saved, epoch_loop._batches_that_stepped, set(asked)) == ([guard.checkpoint], 4, {True})
    last.data.fill_(torch.nan)
    with pytest.raises(ValueError, match=f"{what}The weights were not finite before it, and nothing was saved before"):
        guard.on_before_optimizer_step(trainer, module, optimizer)
    guard.checkpoint.touch()
    with pytest.raises(ValueError, match=f"{what}.*, so the last good state is that of .*last.ckpt"):
        guard.on_before_optimizer_step(trainer, module, optimizer)
    assert len(saved) == 1

    def gather(everyones: list[list[str]], mine: list[str]) -> None:
        everyones[:] = [mine, ["image4"]]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    trainer.world_size = 2
    assert guard._batch(trainer, False) == ["image2", "image3", "image4"]
    trainer.strategy = SimpleNamespace(reduce_boolean_decision=lambda good, **how: False)
    assert guard._batch(trainer, True) == ["image4"], "another process"
