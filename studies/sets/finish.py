"""Ways to search a set of dilations and to finish its training: trains what is missing, and prints a table.

python studies/sets/finish.py runs/finish --data ../shared/data --settings nuclei,coffee --seeds 0,1,2
python studies/sets/finish.py runs/finish --report [--into studies/sets/finish.json]

Finishes that follow the same search start from one search, of the same seed. All is the library's own but the loop.
"""

import argparse
import copy
import itertools
import json
import random
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sets import SETTINGS
from torch import Tensor
from torch.utils.data import DataLoader

from rfield.search import SampledSearch
from rfield.search.factors import override_dilation
from rfield.segmentation.config.train import TrainConfig
from rfield.segmentation.data import IGNORE_INDEX, EpochSampler
from rfield.segmentation.inference.predict import evaluate
from rfield.segmentation.training.fit import Built, Data, build, prepare_data
from rfield.segmentation.training.module import Batch
from rfield.segmentation.training.optimizer import make_optimizer

# {search: (its share of the steps, {finish: what it does})}.
FINISHES = {
    "sampled.6": (0.6, ("plain", "ema", "twice")),
    "sampled.45": (0.45, ("plain",)),
    "sampled.3": (0.3, ("plain", "ema", "anew", "neighbours90", "distil")),
    "sampled.25": (0.25, ("plain",)),
    "hold.3": (0.3, ("anew",)),
    "fair.3": (0.3, ("plain",)),
}
SEARCHES = {
    "sampled": "of the steps drawn",
    "hold": "of the steps drawn, at the full learning rate",
    "fair": "of the steps drawn, each batch in four parts with dilations of their own",
}
ENDS = {
    "plain": "at the chosen set",
    "ema": "from the averaged weights",
    "anew": "a learning-rate schedule of its own",
    "neighbours90": "three neighbouring dilations of each path, until 90 % of the steps",
    "twice": "the images that were held out occur twice an epoch",
    "distil": "each path alone learns the sum's probabilities too",
}
PARTS = 4


class FairSearch(SampledSearch):
    """A search that draws `PARTS` times a step, so that four candidates have been drawn once after each step."""

    part = 0

    def loss(self, batch: Batch) -> Tensor:
        losses = []
        for self.part in range(PARTS):
            rows = slice(self.part, None, PARTS)
            losses.append(super().loss((batch[0][rows], batch[1][rows])))
        return torch.stack(losses).mean()

    def _draw_dilation(self, index: int, axis: int, draw: random.Random) -> float:
        step = self.step_index
        self.step_index = step * PARTS + self.part
        try:
            return super()._draw_dilation(index, axis, self._random("dilation", index))
        finally:
            self.step_index = step


class Sampler(EpochSampler):
    """An order in which some images occur twice, each in the place of another."""

    twice: frozenset[int] = frozenset()

    def order(self) -> Iterator[tuple[int, int]]:
        others = [index for index in range(len(self.dataset)) if index not in self.twice]
        left_out = random.Random(repr((self.seed, self.epoch))).sample(others, len(self.twice))
        instead = dict(zip(left_out, sorted(self.twice), strict=True))
        return ((epoch, instead.get(index, index)) for epoch, index in super().order())


class Training:
    """The training of a head on cached features, step by step."""

    def __init__(self, data: Data, built: Built) -> None:
        self.data, self.built, self.module = data, built, built.module
        self.network = built.module.network
        optim = data.config.optim
        self.sampler = Sampler(built.train_samples, seed=data.config.run.seed)
        self.loader = DataLoader(built.train_samples, optim.batch_size, sampler=self.sampler)
        self.steps = optim.epochs * len(self.loader)
        self.optimizer = make_optimizer(self.network, data.config)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.network.train()
        self.network.backbone.eval()

    def batches(
        self, start: int, stop: int, held_out: frozenset[int], twice: frozenset[int] = frozenset()
    ) -> Iterator[tuple[int, Batch]]:
        """Yield the steps from `start` on; the held-out images come back when the epoch of that step ends."""
        for epoch in range(start // len(self.loader), self.steps // len(self.loader)):
            first = max(0, start - epoch * len(self.loader))
            self.sampler.set_epoch(epoch)
            self.sampler.seen = epoch, first * (self.loader.batch_size or 1)
            self.sampler.held_out = held_out if first or not start else frozenset()
            self.sampler.twice = frozenset() if self.sampler.held_out else twice
            for place, batch in enumerate(self.loader, epoch * len(self.loader) + first):
                if place == stop:
                    return
                yield place, (batch[0], batch[1])

    def step(self, loss: Callable[[], Tensor], rate: float) -> None:
        """Take one optimizer step at a share of the full learning rates."""
        for group, full in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = full * rate
        with torch.autocast("cpu", torch.bfloat16):
            value = loss()
        value.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def loss(self, batch: Batch) -> Tensor:
        return self.module._loss(self.network, batch)

    def score(self) -> float:
        self.network.eval()
        found = evaluate(self.network, self.data.val_set, True, self.built.val_features)
        return 100 * found[SETTINGS[setting_of(self.data.config)][4]]


def setting_of(config: TrainConfig) -> str:
    return Path(config.data.data).name


def poly(step: int, start: int, stop: int) -> float:
    return max(0.0, 1 - (step - start) / (stop - start)) ** 0.9


def training(setting: str, seed: int, options: argparse.Namespace, **flags: Any) -> Training:
    spec, model, epochs, _, _ = SETTINGS[setting]
    kind, name = spec.split(":")
    config = TrainConfig(
        data=f"{kind}:{options.data / name}",
        model=model,
        freeze_backbone=True,
        head_channels=options.channels,
        epochs=epochs,
        seed=seed,
        precision="bf16-mixed",
        out=str(options.root / setting / "none"),
        **flags,
    )
    data = prepare_data(config, lambda done, total: None)
    return Training(data, build(data, lambda done, total: None))


def search_set(run: Training, kind: str, share: float) -> int:
    """Search; return the step at which the search has ended."""
    end = round(share * run.steps)
    search = run.module._make_search(end)
    assert isinstance(search, SampledSearch)
    if kind == "fair":
        search.__class__ = FairSearch
    run.module.search = search
    for step, batch in run.batches(0, end, run.built.drawn):
        run.step(partial(search.loss, batch), 1.0 if kind == "hold" else poly(step, 0, run.steps))
        with torch.autocast("cpu", torch.bfloat16):
            search.step()
        run.module._seen = run.module._paths_seen = None
    assert search.done
    return end


def neighbours(dilation: float) -> list[int]:
    """Return a dilation and the two that a ratio of about 1.35 leads to.

    >>> neighbours(1), neighbours(8)
    ([1, 1, 2], [6, 8, 11])
    """
    rate = round(dilation)
    return [max(1, min(rate - 1, round(rate / 1.35))), rate, max(rate + 1, round(rate * 1.35))]


def finish(run: Training, kind: str, start: int) -> None:
    """Train from `start` to the last step."""
    search = run.module.search
    assert isinstance(search, SampledSearch)
    if kind == "ema":
        named = dict(run.network.named_parameters())
        with torch.no_grad():
            for name, average in search.averaged.weights.items():
                named[name].copy_(average)
    drawn_until = round(0.9 * run.steps) if kind == "neighbours90" else 0
    own = [neighbours(group[0].effective_dilation[0]) for group in search.groups]
    twice = run.built.drawn if kind == "twice" else frozenset[int]()
    for step, batch in run.batches(start, run.steps, run.built.drawn, twice):
        for index, group in enumerate(search.groups):
            draw = random.Random(repr((search.seed, step, index)))
            if step < drawn_until:
                override_dilation(group, [draw.choice(own[index])])
            else:
                group[0].dilation_override = None
        one = distilled if kind == "distil" else Training.loss
        run.step(partial(one, run, batch), poly(step, start if kind == "anew" else 0, run.steps))
    for group in search.groups:
        group[0].dilation_override = None


def distilled(run: Training, batch: Batch) -> Tensor:
    """Return the loss of the sum, and half that of each path alone, times the paths, to the sum's probabilities."""
    input, mask, size = run.module._target(run.network, batch)
    paths = [path(input, size).float() for path in run.network.head.paths]
    total = sum(paths[1:], paths[0])
    known = mask != IGNORE_INDEX
    target = total.detach().softmax(1).movedim(1, -1)[known]
    alone = [F.cross_entropy(len(paths) * each.movedim(1, -1)[known], target) for each in paths]
    return run.module.criterion(total, mask) + 0.5 * torch.stack(alone).mean()


def learned(setting: str, seed: int, options: argparse.Namespace) -> None:
    """Run the searches and finishes that are missing."""
    for name, (share, finishes) in FINISHES.items():
        missing = [each for each in finishes if wanted(setting, f"{name}-{each}", seed, options)]
        if not missing:
            continue
        run = training(setting, seed, options, paths=4, search="sampled")
        start = search_set(run, name.partition(".")[0], share)
        search = run.module.search
        assert search is not None
        rates = [group[0].effective_dilation[0] for group in search.groups]
        states = copy.deepcopy((run.network.state_dict(), run.optimizer.state_dict()))
        for each in missing:
            run.network.load_state_dict(copy.deepcopy(states[0]))
            run.optimizer.load_state_dict(copy.deepcopy(states[1]))
            run.network.head.train()
            finish(run, each, start)
            write(setting, f"{name}-{each}", seed, options, run.score(), rates)


def fixed(setting: str, method: str, rates: list[int], seed: int, options: argparse.Namespace) -> None:
    """Train a fixed set from the start; `held.6` holds images out as long as a search does."""
    if wanted(setting, method, seed, options):
        run = training(setting, seed, options, aspp=",".join(map(str, rates)), path_norm=True, search="none")
        held = frozenset[int]()
        if method.endswith("held.6"):
            held = training(setting, seed, options, paths=4, search="sampled").built.drawn
        middle = round(0.6 * run.steps)
        for step, batch in itertools.chain(run.batches(0, middle, held), run.batches(middle, run.steps, held)):
            run.step(partial(run.loss, batch), poly(step, 0, run.steps))
        write(setting, method, seed, options, run.score(), rates)


def place(setting: str, method: str, seed: int, options: argparse.Namespace) -> Path:
    return options.root / setting / f"{method}-seed{seed}.json"


def wanted(setting: str, method: str, seed: int, options: argparse.Namespace) -> bool:
    return (not options.methods or method in options.methods.split("/")) and not place(
        setting, method, seed, options
    ).is_file()


def write(setting: str, method: str, seed: int, options: argparse.Namespace, score: float, rates: list[float]) -> None:
    row = {"setting": setting, "method": method, "seed": seed, "score": score, "rates": rates}
    path = place(setting, method, seed, options)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(row))
    print(row, flush=True)


def table(rows: list[dict[str, Any]]) -> str:
    """Return a table for each data set: the scores, and the differences to the default and to 1, 2, 4, 8 by seed."""
    lines = []
    for setting in dict.fromkeys(row["setting"] for row in rows):
        found: dict[str, dict[int, dict[str, Any]]] = {}
        for row in rows:
            if row["setting"] == setting:
                found.setdefault(row["method"], {})[row["seed"]] = row
        lines += [f"### {setting}", "", "| method | score | beyond the default | beyond fixed 1, 2, 4, 8 | dilations |"]
        lines += ["|---|---|---|---|---|"]
        for method, own in sorted(found.items(), key=lambda item: -paired(item[1], found["sampled.6-plain"])[0]):
            cells = [mean(own), *(paired(own, found.get(base, {})) for base in ("sampled.6-plain", "fixed-1,2,4,8"))]
            rates = "; ".join(", ".join(f"{rate:g}" for rate in sorted(row["rates"])) for row in own.values())
            lines.append(f"| {described(method)} | {' | '.join(map(shown, cells))} | {rates} |")
        lines.append("")
    return "\n".join(lines)


def described(method: str) -> str:
    """Return what a method does.

    >>> described("sampled.3-ema"), described("fixed-1,2,4,8")
    ('0.3 of the steps drawn; then from the averaged weights', 'fixed-1,2,4,8')
    """
    search, _, end = method.partition("-")
    kind, _, share = search.partition(".")
    return f"0.{share} {SEARCHES[kind]}; then {ENDS[end]}" if kind in SEARCHES else method


def mean(own: dict[int, dict[str, Any]]) -> tuple[float, float, int]:
    return summed([row["score"] for row in own.values()])


def paired(own: dict[int, dict[str, Any]], base: dict[int, dict[str, Any]]) -> tuple[float, float, int]:
    return summed([row["score"] - base[seed]["score"] for seed, row in own.items() if seed in base])


def summed(values: list[float]) -> tuple[float, float, int]:
    """Return mean, standard error and count."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return statistics.mean(values) if values else float("nan"), error, len(values)


def shown(cell: tuple[float, float, int]) -> str:
    value, error, count = cell
    return "-" if not count else f"{value:.2f}" if count == 1 else f"{value:.2f} ± {error:.2f} ({count})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder of the results")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the data sets")
    parser.add_argument("--settings", default="nuclei,coffee")
    parser.add_argument("--methods", help="only these, with slashes between them, as the table names them")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--report", action="store_true", help="train nothing")
    parser.add_argument("--into", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    for seed in () if options.report else map(int, options.seeds.split(",")):
        for setting in options.settings.split(","):
            learned(setting, seed, options)
            for method in ("fixed-1,2,4,8", "fixed-1,2,4,8-held.6"):
                fixed(setting, method, [1, 2, 4, 8], seed, options)
            base = place(setting, "sampled.3-plain", seed, options)
            if base.is_file():
                numbers = [round(rate) for rate in json.loads(base.read_text())["rates"]]
                fixed(setting, "fixed-set-of-sampled.3", numbers, seed, options)
    rows = [json.loads(path.read_text()) for path in sorted(options.root.glob("*/*.json"))]
    print(table(rows))
    if options.into:
        options.into.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


if __name__ == "__main__":
    main()
