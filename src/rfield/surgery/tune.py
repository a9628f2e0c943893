"""Find the dilations that the convolutions of a user's own network should have, and how sure the answer is."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rfield.layers.dilation import round_dilation
from rfield.receptive_field.probe import copy_model
from rfield.search import SampledSearch, Verdict, judge
from rfield.search.held_out import HeldOut
from rfield.search.paired import Evaluation, common_grid
from rfield.surgery.adapt import Select, Share, adapt

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class TunedFactor:
    """The answer for one factor and axis.

    Attributes:
        layers: for each layer of the factor, by its name, the dilation now and the best one.
        side: `height` or `width`; empty for a square receptive field.
        curve: {dilation of the first layer: held-out loss}, the mean over the seeds.
        verdict: how sure the answer is.
    """

    layers: dict[str, tuple[int, int]]
    side: str
    curve: dict[float, float]
    verdict: Verdict

    def __str__(self) -> str:
        before, after = (", ".join(str(pair[place]) for pair in self.layers.values()) for place in (0, 1))
        side = f", {self.side}" if self.side else ""
        losses = ", ".join(f"{dilation:.3g}: {loss:.4g}" for dilation, loss in self.curve.items())
        return f"{', '.join(self.layers)}{side}: {before} -> {after}; {self.verdict}\n  held-out loss at {losses}"


@dataclass(frozen=True)
class Tuned:
    """The answer of `tune`; `print` shows it.

    Attributes:
        factors: one for each factor and axis.
    """

    factors: list[TunedFactor]

    @property
    def dilations(self) -> dict[str, tuple[int, int]]:
        """Return the dilations (height, width) that are sure enough to be recommended, for `rfield.set_dilations`."""
        found: dict[str, tuple[int, int]] = {}
        for factor in self.factors:
            if factor.verdict.kind in ("clear", "likely"):
                for name, (_, best) in factor.layers.items():
                    height, width = found.get(name, self._now(name))
                    found[name] = (
                        best if factor.side != "width" else height,
                        best if factor.side != "height" else width,
                    )
        return found

    def _now(self, name: str) -> tuple[int, int]:
        now = [factor.layers[name][0] for factor in self.factors if name in factor.layers]
        return now[0], now[-1]

    def __str__(self) -> str:
        code = f"rfield.set_dilations(model, {self.dilations})" if self.dilations else "nothing is recommended"
        return "\n".join([*map(str, self.factors), code])


def tune(
    model: nn.Module,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    loader: Any,
    select: Select | None = None,
    share: Share | None = None,
    axes: Literal[1, 2] = 1,
    steps: int | None = None,
    lr: float = 1e-4,
    seeds: Sequence[int] = (0, 1, 2),
    progress: Progress | None = None,
) -> Tuned:
    """Find the dilations that a network's convolutions should have, and how sure the answer is.

    For each seed, a copy of the network is trained at randomly drawn dilations, so that it works at all of them, and
    its loss on held-out training samples is read at each (`rfield.SampledSearch`). The best dilation is the minimum of
    the mean curve, and `rfield.search.judge` says how sure it is. The network itself stays as it is.

    Args:
        model: from its pretrained weights, or trained; freeze what need not follow the dilations.
        loss_fn: `loss_fn(model, batch)` returns the scalar loss.
        loader: `DataLoader` of the training samples, of a data set with a length and an index.
        select, share, axes: which convolutions, see `rfield.adapt`.
        steps: training steps for each seed. Default: ten epochs of the loader, at least 100.
        lr: learning rate of AdamW.
        seeds: of the draws, the held-out samples, and the loader's order where it follows torch's seed.
        progress: called with (steps done, all steps).

    Raises:
        ValueError: as `rfield.adapt`, `rfield.SampledSearch` and `rfield.search.held_out.HeldOut`; or if the loader has
            no batches.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> network = nn.Sequential(nn.Conv2d(1, 1, 3, padding=2, dilation=2))
        >>> loader = DataLoader(torch.randn(6, 1, 8, 8), batch_size=2)
        >>> found = tune(network, lambda model, batch: model(batch).square().mean(), loader, steps=3, seeds=[0])
        >>> found.factors[0].verdict.kind, found.dilations
        ('not reliable', {})
    """
    if not seeds:
        raise ValueError("tune needs a seed or more, got none")
    searches, images = [], []
    for place, seed in enumerate(seeds):
        held_out = HeldOut(loader, seed)
        try:
            if len(loader) < 1:
                raise ValueError("the loader has no batch: give a smaller batch_size, or drop_last=False")
            steps = max(100, 10 * len(loader)) if steps is None else steps
            copied = copy_model(model)
            adapt(copied, select, share, axes)
            search = SampledSearch(copied, loss_fn, steps, held_out, seed, narrowings={})
            torch.manual_seed(seed)
            optimizer = torch.optim.AdamW([p for p in copied.parameters() if p.requires_grad], lr)
            copied.train()
            for done, batch in enumerate(itertools.islice(_endless(loader), steps)):
                if progress is not None:
                    progress(place * steps + done, steps * len(seeds))
                search.loss(batch).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                optimizer.zero_grad()
                search.step()
        finally:
            held_out.give_back()
        searches.append(search)
        images.append(held_out.indices)
    if progress is not None and steps is not None:
        progress(steps * len(seeds), steps * len(seeds))
    return Tuned([_factor(searches, images, index, axis) for index, axis in searches[0].readings])


def _endless(loader: Iterable[Any]) -> Iterator[Any]:
    while True:
        yield from loader


def _factor(searches: Sequence[SampledSearch], images: Sequence[Sequence[int]], index: int, axis: int) -> TunedFactor:
    """Return the joint answer of the searches for one factor and axis."""
    first = searches[0]
    losses: list[Mapping[float, list[float]]] = [search.losses[index, axis][-1][1] for search in searches]
    start = first.starts[index][axis]
    verdict = judge([[each] for each in losses], start, steps=first.steps, images=images, unit="held-out sample")
    best = start if verdict.dilation is None else verdict.dilation
    group, names = first.groups[index], first.group_names()[index].split(", ")
    scales = [layer.base_dilation[axis] / group[0].base_dilation[axis] for layer in group]
    layers = {
        name: (round_dilation(start * scale), round_dilation(best * scale))
        for name, scale in zip(names, scales, strict=True)
    }
    side = ("height", "width")[axis] if len(first.starts[index]) > 1 else ""
    evaluations = [Evaluation(each) for each in losses]
    curve = {
        dilation: sum(float(each.at(dilation).mean()) for each in evaluations) / len(evaluations)
        for dilation in common_grid(evaluations)
    }
    return TunedFactor(layers, side, curve, verdict)
