"""Sets of dilations: what is parallel, the shares, and the joint choice."""

import itertools
import math
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfield.layers import AdaptiveConv2d
from rfield.search import SampledSearch, learned_layers
from rfield.search.sets import Combinations, PathLogits, parallel_factors, shares


def branches(*dilations: int) -> nn.ModuleList:
    return nn.ModuleList(AdaptiveConv2d(1, 1, 3, padding=d, dilation=d) for d in dilations)


class TestParallelFactors:
    def test_finds_each_list_on_its_own_and_leaves_single_factors_out(self) -> None:
        model = nn.ModuleDict({"stem": branches(2), "one": branches(1, 2, 3), "two": branches(4, 5)})
        assert parallel_factors(model, learned_layers(model)) == [[1, 2, 3], [4, 5]]

    def test_a_shared_factor_and_two_factors_in_one_branch_are_no_set(self) -> None:
        shared = branches(1, 2)
        shared[1].share_factor(shared[0])
        assert parallel_factors(shared, learned_layers(shared)) == []
        deep = nn.ModuleList([nn.Sequential(*branches(1, 2)), nn.Sequential(*branches(1, 2)), *branches(3, 3)])
        assert parallel_factors(deep, learned_layers(deep)) == [[4, 5]]


def test_shares_meet_and_cover_the_range() -> None:
    found = shares(2.0, 30.0, 3)
    assert (found[0][0], found[-1][1]) == (2.0, 30.0)
    assert all(left[1] == right[0] for left, right in itertools.pairwise(found))
    ratios = [high / low for low, high in found]
    assert max(ratios) == pytest.approx(min(ratios))


def combinations(
    paths: int, count: int, images: int = 5, seed: int = 0
) -> tuple[Combinations, list[list[Tensor]], Tensor]:
    generator = torch.Generator().manual_seed(0)
    pixels, classes = 40, 3
    logits = [[torch.randn(pixels, classes, generator=generator) for _ in range(count)] for _ in range(paths)]
    target = torch.randint(classes, (pixels,), generator=generator)
    image = torch.arange(pixels) % images
    candidates = [[(float(10 * path + place + 1),) for place in range(count)] for path in range(paths)]
    return Combinations(candidates, logits, target, torch.ones(pixels), image), logits, target


class TestCombinations:
    def test_a_path_of_rate_0_has_no_dilation(self) -> None:
        table = combinations(3, 1)[0]
        table.candidates = [[(0.0,)], [(3.0,)], [(0.0, 2.0)]]
        found = [table._has_dilation(each) for each in ((0, None, None), (0, 0, None), (None, None, 0), (None,) * 3)]
        assert found == [False, True, True, False]

    @pytest.mark.parametrize("allow_absent", [False, True])
    def test_the_best_of_all_is_that_of_a_slow_search(self, allow_absent: bool) -> None:
        table, logits, target = combinations(3, 3)
        options = [[*range(3), *([None] if allow_absent else [])]] * 3
        slow = {}
        for combination in itertools.product(*options):
            parts = [own[place] for own, place in zip(logits, combination, strict=True) if place is not None]
            if parts:
                slow[combination] = float(F.cross_entropy(sum(parts[1:], parts[0]), target))
        best = table.search(1 if allow_absent else 3, 3, random.Random(0))
        assert best == min(slow, key=lambda each: slow[each])
        assert {each: table.loss(each) for each in slow} == pytest.approx(slow, rel=1e-5)
        assert table.loss((None, None, None)) == math.inf

    def test_too_many_are_searched_by_coordinates_and_swaps_cannot_better_the_result(self) -> None:
        table, *_ = combinations(5, 5)
        best = table.search(5, 5, random.Random(0))
        assert len(table.losses) < 1500 < 5**5
        for path, place in itertools.product(range(5), range(5)):
            assert table.loss((*best[:path], place, *best[path + 1 :])) >= table.loss(best)

    def test_a_loss_that_is_not_finite_never_wins(self) -> None:
        table, *_ = combinations(2, 2)
        best = table.search(2, 2, random.Random(0))
        table.losses[best] = [math.nan, *table.losses[best][1:]]
        assert table.search(2, 2, random.Random(0)) != best

    def test_best_of_each_size_and_its_error(self) -> None:
        table, *_ = combinations(3, 2)
        table.search(1, 3, random.Random(0))
        sizes = table.best_of_each_size()
        assert list(sizes) == [1, 2, 3]
        assert all(sum(place is not None for place in each) == size for size, each in sizes.items())
        one, three = sizes[1], sizes[3]
        columns = torch.tensor([table.losses[one], table.losses[three]]).diff(dim=0)
        assert table.error(one, three) == pytest.approx(float(columns.std()) / math.sqrt(5), rel=1e-4)
        assert table.rates((1, None, 0)) == ((2.0,), None, (21.0,))

    def test_sizes_of_too_many_combinations_hold_those_of_a_greedy_selection(self) -> None:
        table, *_ = combinations(5, 5)
        table.search(1, 5, random.Random(0))
        assert len(table.losses) < 1500
        sizes = table.best_of_each_size()
        assert list(sizes) == [1, 2, 3, 4, 5]
        alone = {
            (path, place): (None,) * path + (place,) + (None,) * (4 - path) for path in range(5) for place in range(5)
        }
        assert table.loss(sizes[1]) == min(table.loss(each) for each in alone.values())

    def test_the_fewest_paths_within_one_standard_error(self) -> None:
        table, *_ = combinations(2, 1)
        table.losses = {(0, None): [1.0, 1.2, 1.1], (None, 0): [2.0, 2.0, 2.0], (0, 0): [0.9, 1.2, 1.15]}
        assert table.fewest() == (0, None)  # 0.017 worse than both, with an error of 0.044
        table.losses[0, 0] = [0.8, 1.0, 0.9]
        assert table.fewest() == (0, 0)

    def test_paths_without_a_dilation_may_take_the_place_of_others_but_not_of_all(self) -> None:
        table, logits, target = combinations(4, 3)
        table = Combinations(
            [*table.candidates[:2], [(0.0,)], [(0.0,)]], [*logits[:2], logits[2][:1], logits[3][:1]], target,
            torch.ones(len(target)), torch.zeros(len(target), dtype=torch.long),
        )  # fmt: skip
        slow = {}
        for combination in itertools.product(*[[None, *range(len(own))] for own in table.candidates]):
            if sum(place is not None for place in combination) == 2 and combination[:2] != (None, None):
                slow[combination] = table.loss(combination)
        assert table.search(2, 2, random.Random(0)) == min(slow, key=lambda each: slow[each])
        assert all(each[:2] != (None, None) for each in table.best_of_each_size().values())
        # Descent finds no better exchange or change either.
        found = table._descend(
            (0, 0, None, None), [[None, *range(len(own))] for own in table.candidates], slow.__contains__
        )
        assert found in slow

    def test_guided_paths_each_choose_what_their_own_weights_prefer(self) -> None:
        table, logits, target = combinations(2, 4)
        weights = [torch.where(target == own, 50.0, 0.1) for own in (0, 1)]
        guided = Combinations(table.candidates, logits, target, torch.ones(40), torch.arange(40) % 5, weights)
        best = guided.search_guided(guided.search(2, 2, random.Random(0)))

        def own_loss(combination: tuple[int, ...], path: int) -> float:
            losses = F.cross_entropy(logits[0][combination[0]] + logits[1][combination[1]], target, reduction="none")
            return float((losses * weights[path]).mean())

        for path, place in itertools.product(range(2), range(4)):
            other = (place, best[1]) if path == 0 else (best[0], place)
            assert own_loss(other, path) >= own_loss(best, path) - 1e-6
        assert sum(guided.curve(best, 1, 0)[11.0]) / 5 == pytest.approx(own_loss((best[0], 0), 1), rel=1e-5)
        assert table.search_guided((0, 0)) == (0, 0)

    def test_what_a_class_loses_without_a_path(self) -> None:
        table, logits, target = combinations(2, 1)
        costs = table.class_costs((0, 0))
        for index in range(3):
            own = target == index
            whole, alone = (
                float(F.cross_entropy(each[own], target[own])) for each in (logits[0][0] + logits[1][0], logits[0][0])
            )
            assert costs[index][1] == pytest.approx(alone - whole, rel=1e-4)
        assert [row[1] for row in table.class_costs((0, None))] == [None] * 3


class Branches(nn.Module):
    """Branches whose logits are known: class 0, which is right, wins by how near a branch runs to its best dilation."""

    def __init__(self, *best: float | None, axes: int = 1) -> None:
        super().__init__()
        self.best = best
        self.paths = nn.ModuleList(AdaptiveConv2d(1, 1, 3, padding=4, dilation=4, factor=(1.0,) * axes) for _ in best)

    def forward(self, image: Tensor) -> Tensor:
        return torch.stack([path(image) for path in self.paths]).sum(0)

    @staticmethod
    def loss(model: nn.Module, image: Tensor) -> Tensor:
        return model(image).square().mean()

    def read(self, model: nn.Module, image: Tensor) -> PathLogits:
        model(image)
        logits = []
        for path, best in zip(self.paths, self.best, strict=True):
            height, width = path.realised_dilation
            # A branch without a best dilation is always wrong.
            score = -3.0 if best is None else 1 - math.log(height / best) ** 2 - math.log(width / best) ** 2
            logits.append(torch.tensor([[score, 0.0]] * 6))
        return PathLogits(logits, torch.zeros(6, dtype=torch.long), torch.ones(6))

    def search(self, steps: int = 20, **options: Any) -> SampledSearch:
        batches = [torch.randn(1, 1, 40, 48, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
        return SampledSearch(self, self.loss, steps, batches, read_paths=self.read, **options)

    @staticmethod
    def run(search: SampledSearch, steps: int) -> None:
        for _ in range(steps):
            search.loss(search.held_out[0])  # type: ignore[index]
            search.step()


class TestSampledSearchOfASet:
    def test_starts_from_shares_and_divides_what_is_wanted_anew(self) -> None:
        model = Branches(2.0, 5.0, 8.0, None)
        search = model.search(narrowings={0.25: 2.5, 0.5: 1.5})
        Branches.run(search, 1)
        # Half of the longer side: the outer taps of larger kernels see mostly zeros.
        assert [search._windows[index, 0] for index in range(4)] == shares(1.0, 24.0, 4)
        drawn = []
        for _ in range(4):
            Branches.run(search, 1)
            drawn.append(search.trajectory[-1][1])
        assert all(1 <= a <= 3 <= 4 <= c and c <= 11 and d >= 10 for a, _, c, d in drawn)
        (first,) = search.set_readings
        assert [rate and rate[0] for rate in first["best"][0]["rates"]] == [2, 5, 8, None]
        assert first["best"][0]["error"] == 0
        assert [sum(rate is not None for rate in each["rates"]) for each in first["sizes"]] == [1, 2, 3, 4]
        # The fourth branch serves nothing beyond 12.
        assert [search._windows[index, 0] for index in range(4)] == shares(2.0, 12.0, 4)
        Branches.run(search, 15)
        assert search.done
        assert [path.effective_dilation[0] for path in model.paths][:3] == [2, 5, 8]
        assert len(search.set_readings) == len(search.readings[0, 0]) == 3
        assert min(search.curve(1), key=search.curve(1).__getitem__) == 5

    def test_height_and_width_are_chosen_apart(self) -> None:
        model = Branches(3.0, 8.0, axes=2)
        Branches.run(model.search(), 20)
        assert [path.effective_dilation for path in model.paths] == [(3, 3), (8, 8)]

    def test_resumes_exactly(self) -> None:
        whole, stopped = Branches(2.0, 9.0).search(), Branches(2.0, 9.0).search()
        Branches.run(whole, 20)
        Branches.run(stopped, 7)
        resumed = Branches(2.0, 9.0).search(seed=1)
        resumed.load_state_dict(stopped.state_dict())
        Branches.run(resumed, 13)
        assert resumed.trajectory == whole.trajectory
        assert resumed.set_readings == whole.set_readings

    def test_branches_of_a_model_that_is_not_read_apart_start_from_shares_too(self) -> None:
        model = Branches(2.0, 9.0)
        batch = torch.randn(1, 1, 40, 48)
        search = SampledSearch(model, Branches.loss, 20, [batch])
        search.loss(batch)
        assert [search._windows[index, 0] for index in range(2)] == shares(1.0, 24.0, 2)

    def test_ends_with_the_fewest_branches_that_are_enough(self) -> None:
        model = Branches(2.0, 5.0, None)
        search = model.search(fewest=True)
        Branches.run(search, 20)
        assert search.left_out == [2]
        last = search.set_readings[-1]
        assert [rate and rate[0] for rate in last["chosen"]["rates"]] == [2, 5, None]
        # Class 0 would lose by either branch, and there are no pixels of class 1.
        assert all(cost > 0.1 for cost in last["class_costs"][0][:2])
        assert last["class_costs"][0][2] is None
        assert last["class_costs"][1] == [None, None, None]
        resumed = Branches(2.0, 5.0, None).search(fewest=True)
        resumed.load_state_dict(search.state_dict())
        assert resumed.left_out == [2]
        with pytest.raises(ValueError, match="fewest needs read_paths"):
            SampledSearch(Branches(1.0), Branches.loss, 5, [torch.zeros(1)], fewest=True)

    def test_bad_input_is_named(self) -> None:
        alone = nn.Sequential(AdaptiveConv2d(1, 1, 3, padding=2, dilation=2))
        with pytest.raises(ValueError, match=r"one set of parallel branches .* got 1 factors with the sets \[\]"):
            SampledSearch(alone, Branches.loss, 5, [torch.zeros(1)], read_paths=Branches(1.0).read)
        model = Branches(2.0, 9.0)
        search = SampledSearch(model, Branches.loss, 1, [torch.randn(1, 1, 40, 48)], read_paths=Branches(1.0).read)
        with pytest.raises(ValueError, match="logits of 1 paths, but there are 2 factors"):
            Branches.run(search, 1)
        model = Branches(math.nan, 2.0)
        with pytest.raises(ValueError, match="step 1: no combination of dilations has a finite loss"):
            Branches.run(model.search(steps=1), 1)
