"""How a training ends early without loss: on a signal, and on a loss that is no number any more."""

import io
import math
import os
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import lightning as L
import torch
import torch.distributed
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.io import TorchCheckpointIO

from rfield.segmentation.config.train import counted
from rfield.segmentation.data import EpochSampler
from rfield.segmentation.files.checkpoints import write_checkpoint
from rfield.segmentation.training.module import ParsingModule, present_fields

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def leave_signals(worker: int) -> None:
    """Has a process that loads samples stay when all are told to end: the one that trains has a step to finish.

    It ends when the one that trains tells it to, by SIGTERM too.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # else the system does not say who sent a signal, and any SIGTERM ends it
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)


class Interrupted(KeyboardInterrupt):
    """A signal has ended a training, and what it did is saved.

    Args:
        signum: the signal.
        done: what has ended it, and what is saved.
        next: how to go on, which depends on the command.
    """

    def __init__(self, signum: int, done: str, next: str = "--resume goes on from there") -> None:
        super().__init__(f"{done}, {next}")
        self.signum = signum
        self.done = done


class WholeCheckpoints(TorchCheckpointIO):
    """Lightning's checkpoints, written whole or not at all, the last one's predecessor kept."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Writes `path`; see `rfield.segmentation.files.checkpoints.write_checkpoint`."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        # In memory first: PyTorch's writer turns what goes wrong on the disk into another error.
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_checkpoint(path, buffer.getbuffer())


class StopOnSignal(Callback):
    """SIGTERM and SIGINT end a training after the step at hand, saved; a second SIGINT ends it at once.

    A validation is finished first, since the epoch's end belongs to it. Several processes stop at the same step.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self.signum: int | None = None
        self.saved_step = 0
        self._replaced: dict[int, Any] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Takes the signals over."""
        self._take()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Takes them over from Lightning too, which would not save."""
        self._take()

    def _take(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for signum in _SIGNALS:
                self._replaced.setdefault(signum, signal.getsignal(signum))
                signal.signal(signum, self._ask)

    def restore(self) -> None:
        """Gives the signals back."""
        for signum, handler in self._replaced.items():
            signal.signal(signum, handler)
        self._replaced = {}

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_index: int
    ) -> None:
        """Saves and stops, if asked to; it stands after `SearchStep`, so that a search's part of the step is saved."""
        # At an epoch's or the run's last step, what ends it comes first.
        last = trainer.is_last_batch or trainer.global_step == trainer.max_steps
        if self._asked(trainer) and not last:
            trainer.save_checkpoint(self.checkpoint)
            self._stop(trainer)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The last epoch has been saved."""
        if self._asked(trainer):
            self._stop(trainer)

    def raise_interrupted(self, saved_step: int) -> NoReturn:
        """Tells the caller of the training what has ended it, so many steps being saved."""
        if self.signum is None:
            raise KeyboardInterrupt
        name = signal.Signals(self.signum).name
        verb = "is" if saved_step == 1 else "are"
        done = f"{counted(saved_step, 'step')} {verb} saved" if saved_step else "nothing was saved yet"
        raise Interrupted(self.signum, f"stopped by {name}; {done}")

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None and signum == signal.SIGINT:
            self.signum = None
            raise KeyboardInterrupt
        self.signum = signum

    def _asked(self, trainer: L.Trainer) -> bool:
        asked = self.signum is not None
        if trainer.world_size > 1:
            asked = trainer.strategy.reduce_boolean_decision(asked, all=False)
            self.signum = self.signum or (signal.SIGTERM if asked else None)
        return asked

    def _stop(self, trainer: L.Trainer) -> NoReturn:
        self.saved_step = trainer.global_step
        raise SystemExit  # Which Lightning hands on, its loaders and loggers closed.


class LossGuard(Callback):
    """Ends a training at a loss or gradient that is not finite, before it reaches the weights.

    The state before the step is saved, if that is finite itself; else the last checkpoint stands.

    Args:
        checkpoint: where to save.
        names: of the training samples.
    """

    def __init__(self, checkpoint: Path, names: Sequence[str]) -> None:
        self.checkpoint = checkpoint
        self.names = names

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Looks at the loss, and but in 16-mixed, whose scaler meets infinite gradients all the time, at the gradient.

        Raises:
            ValueError: what is not finite, where and on what.
        """
        assert isinstance(pl_module, ParsingModule)
        loss = pl_module.step_loss
        checked = loss
        if trainer.precision != "16-mixed":
            gradients = [weight.grad for weight in pl_module.parameters() if weight.grad is not None]
            checked = loss + torch.nn.utils.get_total_norm(gradients).to(loss)
        finite = bool(torch.isfinite(checked))
        names = self._batch(trainer, finite)
        if names is None:
            return
        value = float(loss)
        what = f"the gradient of the loss {value:.4g} is not finite" if math.isfinite(value) else f"the loss is {value}"
        fields = [f"{field.factor:.4g}" for field in present_fields(pl_module.network)]
        factor = f"factor {fields[0]}" if len(fields) == 1 else f"factors {', '.join(fields)}"
        raise ValueError(
            f"step {trainer.global_step + 1}: {what}, with {factor}, on {', '.join(names)}. {self._keep(trainer)}. "
            "Look at these files with rfield check-data, or train anew with a smaller lr or factor_lr"
        )

    def _batch(self, trainer: L.Trainer, finite: bool) -> list[str] | None:
        """The batch's samples if they are to blame, those of all processes; None if all is well everywhere."""
        if trainer.strategy.reduce_boolean_decision(finite, all=True):
            return None
        loader: Any = trainer.train_dataloader
        sampler = loader.sampler
        assert isinstance(sampler, EpochSampler)
        first = (trainer.fit_loop.epoch_loop.batch_progress.current.ready - 1) * loader.batch_size
        keys = list(sampler.order())[first : first + loader.batch_size]
        mine = [] if finite else [self.names[index] for _, index in keys]
        if trainer.world_size == 1:
            return mine
        everyones: list[list[str]] = [[]] * trainer.world_size
        torch.distributed.all_gather_object(everyones, mine)
        return [name for names in everyones for name in names]

    def _keep(self, trainer: L.Trainer) -> str:
        """Saves the state before the step, and says what is there to go back to."""
        module = trainer.lightning_module
        state = [value for value in module.state_dict().values() if value.is_floating_point()]
        good = all(bool(torch.isfinite(value).all()) for value in state)
        if trainer.strategy.reduce_boolean_decision(good, all=True):
            # Lightning counts a step's log when it is resumed, and this one is to be repeated.
            trainer.fit_loop.epoch_loop._batches_that_stepped -= 1
            trainer.save_checkpoint(self.checkpoint)
            return f"The state before this step is in {self.checkpoint}"
        if self.checkpoint.is_file():
            return f"The weights were no numbers before it, so the last good state is that of {self.checkpoint}"
        return "The weights were no numbers before it, and nothing was saved before"
