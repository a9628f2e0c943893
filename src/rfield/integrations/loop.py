"""What the callbacks for training loops share: adapt, hold samples out, search, report, fuse."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

from torch import Tensor, nn

from rfield.layers import AdaptiveConv2d, LearnedFactor
from rfield.search import SampledSearch, learned_layers
from rfield.search.held_out import HeldOut
from rfield.surgery.adapt import Select, Share, adapt
from rfield.surgery.fuse import fuse


class LoopSearch:
    """A sampled search that a training loop of another library drives by its callbacks.

    Args:
        select, share, axes: which convolutions to learn, see `rfield.adapt`.
        search_share: share of the training's steps that the search takes; the rest trains at the rates found.
        held_out: batches to read the curve on. Default: samples of the training loader, see `HeldOut`.
        seed: of the search and of the samples held out.

    Attributes:
        search: the running `SampledSearch`; None before the training, and after one that was resumed when its search
            had ended.
        fused: after the training the model without rfield's layers, see `rfield.fuse`.
    """

    def __init__(
        self,
        select: Select | None = None,
        share: Share | None = None,
        axes: Literal[1, 2] = 1,
        search_share: float = 0.6,
        held_out: Iterable[Any] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 < search_share <= 1:
            raise ValueError(f"search_share must be above 0 and at most 1, got {search_share}")
        self.select, self.share, self.axes = select, share, axes
        self.search_share, self.held_out, self.seed = search_share, held_out, seed
        self.search: SampledSearch | None = None
        self.fused: nn.Module | None = None
        self._samples: HeldOut | None = None
        self._report = ""
        self._shown = 0

    def report(self) -> str:
        """Return what the search has found: rates before and now, and how sure they are."""
        return self.search.report() if self.search is not None else self._report

    def _adapt(self, model: nn.Module) -> None:
        """Adapt a model, and freeze its factors before an optimizer or a wrapper sees them."""
        if any(isinstance(module, LearnedFactor) for module in model.modules()):
            return  # by an earlier fit, or by the user
        adapt(model, self.select, self.share, self.axes)
        for group in learned_layers(model):
            group[0].freeze_factor()
            for layer in group:
                layer.in_search = True

    def _start(
        self,
        model: nn.Module,
        loss_fn: Callable[[nn.Module, Any], Tensor],
        steps: int,
        loader: Any,
        move: Callable[[Any], Any],
    ) -> None:
        """Make the search.

        Args:
            model, loss_fn: see `SampledSearch`.
            steps: number of steps of the training that are left.
            loader: the training loader.
            move: brings a held-out batch to the model's device.
        """
        layers = [module for module in model.modules() if isinstance(module, AdaptiveConv2d)]
        if layers and all(layer.snapped for layer in layers):
            self._report = self._report or "the receptive field was final before this training"
            return
        batches: Any = self.held_out
        if batches is None:
            batches = self._samples = HeldOut(loader, self.seed)
            self._say(self._samples.note())
        steps = max(1, round(self.search_share * steps))
        self.search = SampledSearch(model, loss_fn, steps, _Moved(batches, move), self.seed)

    def _step(self) -> bool:
        """End an optimizer step; return whether the curve has been read in it."""
        assert self.search is not None
        self.search.step()
        count = len(self.search.readings[0, 0])
        is_new, self._shown = count > self._shown, count
        if is_new:
            self._say(f"step {self.search.step_index} of {self.search.steps}: {self.search.report()}")
        if self.search.done:
            self._give_back()
        return is_new

    def _rates(self) -> dict[str, float]:
        """Return the present dilations along the height by the names to log them under."""
        assert self.search is not None
        return {f"dilation/{name}": group[0].effective_dilation[0] for name, group in self._named()}

    def _curve(self) -> dict[str, float]:
        """Return the held-out losses of the last reading by the names to log them under."""
        assert self.search is not None
        return {
            f"held_out_loss/{name}/dilation_{dilation:.3g}": loss
            for index, (name, _) in enumerate(self._named())
            for dilation, loss in self.search.readings[index, 0][-1][1].items()
        }

    def _named(self) -> Iterator[tuple[str, list[LearnedFactor]]]:
        assert self.search is not None
        return zip(self.search.group_names(), self.search.groups, strict=True)

    def _finish(self, model: nn.Module) -> None:
        """Give the samples back, make the plain model and say what was found."""
        self._give_back()
        self.fused = fuse(model)
        self._say(self.report())

    def _give_back(self) -> None:
        if self._samples is not None:
            self._samples.give_back()
            self._samples = None

    def _say(self, text: str) -> None:
        """Print a line; callbacks of several processes do so in the first."""
        print(f"rfield: {text}")


class _Moved:
    """Batches that are moved to a device whenever they are read."""

    def __init__(self, batches: Iterable[Any], move: Callable[[Any], Any]) -> None:
        self.batches, self.move = batches, move

    def __iter__(self) -> Iterator[Any]:
        return map(self.move, self.batches)
