"""Sets of dilations: what is parallel, the shares, and the joint choice."""

import itertools
import math
import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfield.layers import AdaptiveConv2d
from rfield.search import learned_layers
from rfield.search.sets import Combinations, parallel_factors, shares


def branches(*dilations: int) -> nn.ModuleList:
    return nn.ModuleList(AdaptiveConv2d(1, 1, 3, padding=d, dilation=d) for d in dilations)


class TestParallelFactors:
    def test_finds_each_list_on_its_own_and_leaves_single_factors_out(self) -> None:
        model = nn.ModuleDict({"stem": branches(2)[0], "one": branches(1, 2, 3), "two": branches(4, 5)})
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
    @pytest.mark.parametrize("allow_absent", [False, True])
    def test_the_best_of_all_is_that_of_a_slow_search(self, allow_absent: bool) -> None:
        table, logits, target = combinations(3, 3)
        options = [[*range(3), *([None] if allow_absent else [])]] * 3
        slow = {}
        for combination in itertools.product(*options):
            parts = [own[place] for own, place in zip(logits, combination, strict=True) if place is not None]
            if parts:
                slow[combination] = float(F.cross_entropy(sum(parts[1:], parts[0]), target))
        best = table.search(allow_absent, random.Random(0))
        assert best == min(slow, key=lambda each: slow[each])
        assert {each: table.loss(each) for each in slow} == pytest.approx(slow, rel=1e-5)
        assert table.loss((None, None, None)) == math.inf

    def test_too_many_are_searched_by_coordinates_and_swaps_cannot_better_the_result(self) -> None:
        table, *_ = combinations(5, 5)
        best = table.search(False, random.Random(0))
        assert len(table.losses) < 1500 < 5**5
        for path, place in itertools.product(range(5), range(5)):
            assert table.loss((*best[:path], place, *best[path + 1 :])) >= table.loss(best)

    def test_a_loss_that_is_not_finite_never_wins(self) -> None:
        table, *_ = combinations(2, 2)
        best = table.search(False, random.Random(0))
        table.losses[best] = [math.nan, *table.losses[best][1:]]
        assert table.search(False, random.Random(0)) != best

    def test_best_of_each_size_and_its_error(self) -> None:
        table, *_ = combinations(3, 2)
        table.search(True, random.Random(0))
        sizes = table.best_of_each_size()
        assert list(sizes) == [1, 2, 3]
        assert all(sum(place is not None for place in each) == size for size, each in sizes.items())
        one, three = sizes[1], sizes[3]
        columns = torch.tensor([table.losses[one], table.losses[three]]).diff(dim=0)
        assert table.error(one, three) == pytest.approx(float(columns.std()) / math.sqrt(5), rel=1e-4)
        assert table.rates((1, None, 0)) == ((2.0,), None, (21.0,))
