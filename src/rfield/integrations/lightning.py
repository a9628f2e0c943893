"""Learn receptive fields in a training by Lightning."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from rfield.integrations.loop import LoopSearch


class ReceptiveFieldSearch(LoopSearch, Callback):
    """Learn the dilations of a LightningModule's convolutions, starting from any dilations, while it is trained.

    The convolutions are adapted in `setup`, before the optimizer is made; a module that builds its layers in
    `configure_model` cannot be adapted. The curve is read on training samples that are held out of the training loader
    until the search ends, by `training_step` in eval mode; what it logs then is dropped. The rates and the curve are
    logged to the trainer's loggers. Checkpoints hold the search, and a resumed training goes on with it.

    Args:
        select, share, axes, search_share, held_out, seed: see `LoopSearch`.

    Example:
        >>> from rfield.integrations.lightning import ReceptiveFieldSearch
        >>> search = ReceptiveFieldSearch("decoder", share="parallel")
        >>> trainer = L.Trainer(callbacks=[search], logger=False, enable_checkpointing=False)

        After `trainer.fit(module, loader)`, `search.fused` is the plain module, and `search.report()` says how sure the
        rates are.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._restored: dict[str, Any] = {}
        self._global_step = 0
        self._is_first_process = True

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Adapt the module, before its optimizer is made."""
        if stage != "fit":
            return
        if not pl_module.automatic_optimization:
            raise ValueError(
                f"{type(pl_module).__name__} optimizes by itself (automatic_optimization is False): use "
                "rfield.SampledSearch in its training_step"
            )
        self._is_first_process = trainer.is_global_zero
        self._adapt(pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make the search, or continue that of a checkpoint."""
        if self.held_out is None and trainer.reload_dataloaders_every_n_epochs:  # type: ignore[attr-defined]
            raise ValueError(
                "reload_dataloaders_every_n_epochs makes new loaders, of which no samples are held out: give batches "
                "by held_out="
            )
        steps = trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise ValueError("the search takes a share of the training: give the Trainer max_epochs or max_steps")

        def move(batch: Any) -> Any:
            batch = trainer.precision_plugin.convert_input(batch)
            batch = pl_module.on_before_batch_transfer(batch, 0)
            return trainer.strategy.batch_to_device(batch, dataloader_idx=0)

        def loss_fn(module: nn.Module, batch: Any) -> Tensor:
            with trainer.precision_plugin.train_step_context(), _unlogged(pl_module):
                return _training_loss(pl_module, batch)

        self._report = self._restored.get("report", "")
        self._global_step = trainer.global_step
        self._start(pl_module, loss_fn, int(steps), trainer.train_dataloader, move)
        if self._samples is not None:
            # Lightning has begun to read the loader already, with the samples that are now held out.
            iter(trainer.fit_loop._data_fetcher)  # type: ignore[arg-type]
        if self.search is not None and (state := self._restored.get("search")) is not None:
            self.search.load_state_dict(state)
            self._shown = len(self.search.readings[0, 0])

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Draw the dilations of the step."""
        if self.search is not None and not self.search.done:
            self.search.begin_step(batch)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End the search's step, unless gradients are still accumulated, and log the rates and a new curve."""
        if self.search is None or trainer.global_step == self._global_step:
            return
        self._global_step = trainer.global_step
        if self.search.done:
            return
        if self._step():
            for logger in trainer.loggers:
                logger.log_metrics(self._curve(), step=trainer.global_step)
        pl_module.log_dict(self._rates(), prog_bar=len(self.search.groups) == 1)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make the plain module, and say what was found."""
        self._finish(pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Give the held-out samples back."""
        self._give_back()

    def state_dict(self) -> dict[str, Any]:
        """Return the search's state and what it has found, for a checkpoint."""
        return {"search": self.search.state_dict() if self.search is not None else None, "report": self.report()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the training starts."""
        self._restored = state_dict

    def _say(self, text: str) -> None:
        if self._is_first_process:
            super()._say(text)


def _training_loss(module: L.LightningModule, batch: Any) -> Tensor:
    """Return the loss of a module's `training_step`."""
    step: Any = module.training_step
    output = step(batch) if len(inspect.signature(step).parameters) == 1 else step(batch, 0)
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor):
        raise ValueError(
            f"{type(module).__name__}.training_step returned no loss but a {type(loss).__name__} for a held-out batch"
        )
    return loss


@contextmanager
def _unlogged(module: L.LightningModule) -> Iterator[None]:
    """Drop what a module logs within the block: held-out losses are none of the training's."""
    vars(module)["log"] = lambda *args, **options: None
    try:
        yield
    finally:
        del vars(module)["log"]
