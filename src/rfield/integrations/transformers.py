"""Learn receptive fields in a training by the Trainer of transformers."""

from typing import Any

from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rfield.integrations.loop import LoopSearch


class ReceptiveFieldSearch(LoopSearch, TrainerCallback):
    """Learn the dilations of a Trainer's model, starting from any dilations, while it is trained.

    Make it before `train`; it adapts the model and adds itself to the Trainer's callbacks. The curve is read on
    training samples that are held out of the training loader until the search ends, with the Trainer's own
    `compute_loss`. The rates and the curve are logged by the Trainer. A training that is resumed starts a new search
    over the steps that are left.

    Args:
        trainer: the Trainer.
        select, share, axes, search_share, held_out, seed: see `LoopSearch`.

    Raises:
        ValueError: as `rfield.adapt`; or if the Trainer has begun already.

    Example:
        search = ReceptiveFieldSearch(trainer, share="parallel")
        trainer.train()
        search.fused.save_pretrained(folder)
    """

    def __init__(self, trainer: Trainer, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if trainer.optimizer is not None and trainer.state.global_step:
            raise ValueError("the Trainer has begun already: make the search before train")
        self.trainer = trainer
        assert isinstance(trainer.model, nn.Module)
        self._adapt(trainer.model)
        trainer.add_callback(self)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        """Make the search."""

        def move(batch: Any) -> Any:
            return send_to_device(batch, args.device)

        def loss_fn(model: nn.Module, batch: Any) -> Tensor:
            with self.trainer.compute_loss_context_manager():
                loss = self.trainer.compute_loss(model, batch)
            return loss if isinstance(loss, Tensor) else loss[0]

        steps = state.max_steps - state.global_step
        self._start(parts["model"], loss_fn, steps, parts["train_dataloader"], move)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        """Draw the dilations of the step."""
        if self.search is not None and not self.search.done:
            # In eval mode, since norms in training refuse the single pixel of a pooled image.
            parts["model"].eval()
            self.search.begin_step(next(iter(self.search.held_out)))
            parts["model"].train()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any) -> None:
        """End the search's step, and log a new curve and the rates."""
        if self.search is not None and not self.search.done and self._step():
            self.trainer.log({**self._rates(), **self._curve()})

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any) -> None:
        """Make the plain model, and say what was found."""
        self._finish(parts["model"])

    def _say(self, text: str) -> None:
        if self.trainer.is_world_process_zero():
            super()._say(text)
