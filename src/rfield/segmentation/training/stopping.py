"""End a training early without losing it: on a signal, or on a loss that is not finite."""

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

from rfield.segmentation.data import EpochSampler
from rfield.segmentation.files.checkpoints import write_checkpoint
from rfield.segmentation.training.fields import present_fields
from rfield.segmentation.training.module import ParsingModule
from rfield.text import counted

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def leave_signals(worker: int) -> None:
    """Make a loader's process ignore signals that are sent to all processes, so that training can finish its step.

    It ends when the training process sends SIGTERM to it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # Elsewhere the sender is unknown, and any SIGTERM ends the process.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)


class Interrupted(KeyboardInterrupt):
    """A signal has ended a training, whose state is saved.

    Args:
        signum: the signal.
        done: what has ended it, and what is saved.
        next: how to continue, which depends on the command.
    """

    def __init__(self, signum: int, done: str, next: str = "--resume continues from there") -> None:
        super().__init__(f"{done}, {next}")
        self.signum = signum
        self.done = done


class WholeCheckpoints(TorchCheckpointIO):
    """Writes Lightning's checkpoints whole or not at all, and keeps the one before the last."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint; see `rfield.segmentation.files.checkpoints.write_checkpoint`."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        # In memory first: PyTorch's writer hides the disk's error.
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_checkpoint(path, buffer.getbuffer())


class StopOnSignal(Callback):
    """Ends a training on SIGTERM or SIGINT after the current step, saved; a second SIGINT ends it at once.

    A validation that has begun is finished first. Several processes stop at the same step.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self.signum: int | None = None
        self.saved_step = 0
        self._replaced: dict[int, Any] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Install the handlers."""
        self._take()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Install the handlers again: Lightning has set its own, which would not save."""
        self._take()

    def _take(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for signum in _SIGNALS:
                self._replaced.setdefault(signum, signal.getsignal(signum))
                signal.signal(signum, self._ask)

    def restore(self) -> None:
        """Restore the earlier handlers."""
        for signum, handler in self._replaced.items():
            signal.signal(signum, handler)
        self._replaced = {}

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_index: int
    ) -> None:
        """Save and stop, if asked to; it runs after `SearchStep`, so that the search's part of the step is saved."""
        # After an epoch's or the run's last step the validation comes first.
        last = trainer.is_last_batch or trainer.global_step == trainer.max_steps
        if self._asked(trainer) and not last:
            trainer.save_checkpoint(self.checkpoint)
            self._stop(trainer)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop, if asked to; the last epoch has been saved."""
        if self._asked(trainer):
            self._stop(trainer)

    def raise_interrupted(self, saved_step: int) -> NoReturn:
        """Raise what tells the caller which signal has ended the training, and how many steps are saved.

        Raises:
            Interrupted: a signal has asked for it.
            KeyboardInterrupt: a second SIGINT has.
        """
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
        raise SystemExit  # Lightning closes its loaders and loggers, and passes it on.


class LossGuard(Callback):
    """Ends a training at a loss or gradient that is not finite, before it changes the weights.

    The state before the step is saved if it is finite; otherwise the last checkpoint stays.

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
        """Check the loss and the gradient; in 16-mixed the loss alone, since its scaler expects infinite gradients.

        Raises:
            ValueError: one is not finite; names the step, the factors and the samples.
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
        """Return the samples of the processes whose values are not finite; None if all are finite."""
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
        """Save the state before the step if it is finite, and return a sentence that says which state is left."""
        module = trainer.lightning_module
        state = [value for value in module.state_dict().values() if value.is_floating_point()]
        good = all(bool(torch.isfinite(value).all()) for value in state)
        if trainer.strategy.reduce_boolean_decision(good, all=True):
            # Lightning would count this step as done when the run is resumed, but it must be repeated.
            trainer.fit_loop.epoch_loop._batches_that_stepped -= 1
            trainer.save_checkpoint(self.checkpoint)
            return f"The state before this step is in {self.checkpoint}"
        if self.checkpoint.is_file():
            return f"The weights were not finite before it, so the last good state is that of {self.checkpoint}"
        return "The weights were not finite before it, and nothing was saved before"
