"""Each kind of verdict, and the limits between them."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rfield.layers import AdaptiveConv2d
from rfield.search import SampledSearch, class_share_loss, judge, standard_errors
from rfield.search.paired import Losses

DILATIONS = (1.0, 2.0, 4.0, 8.0, 16.0)


def reading(means: list[float], spread: float = 0.0, images: int = 32, dilations: Any = DILATIONS) -> Losses:
    """Return losses with these means; at each dilation different halves of the images lie `spread` above and below."""
    noise = [[1 - 2 * (place >> index & 1) for place in range(images)] for index in range(len(means))]
    return {
        dilation: [mean + spread * sign for sign in signs]
        for dilation, mean, signs in zip(dilations, means, noise, strict=True)
    }


VALLEY = [1.0, 0.8, 0.5, 0.8, 1.0]


class TestKinds:
    def test_clear(self) -> None:
        verdict = judge([[reading(VALLEY, 0.1)]], present=16)
        assert (verdict.kind, verdict.dilation, verdict.present) == ("clear", 4.0, 16)
        assert verdict.gain == pytest.approx(0.5)
        assert str(verdict).startswith("clear: dilation 4 beats the present 16 by 0.5 ± 0.")

    @pytest.mark.parametrize(
        ("present", "gain", "kind"),
        [
            ([1.0, 3.0], 2.0, "likely"),
            ([1.001, 3.001], 2.001, "clear"),
            ([0.999, 2.999], 1.999, "likely"),
            ([0.0, 2.0], 1.0, "flat"),
            ([0.001, 2.001], 1.001, "likely"),
        ],
    )
    def test_the_bounds_are_one_and_two_standard_errors(self, present: list[float], gain: float, kind: str) -> None:
        losses = {1.0: [9.0, 9.0], 2.0: [0.0, 0.0], 4.0: present, 8.0: [9.0, 9.0]}
        verdict = judge([[losses]], present=4, least_images=2)
        assert verdict.kind == kind
        assert (verdict.gain, verdict.standard_error) == (pytest.approx(gain), pytest.approx(1.0))

    def test_flat_names_its_range_and_not_what_lies_beyond_a_bump(self) -> None:
        losses = reading([0.5, 0.9, 0.51, 0.5, 0.505], 0.1)
        verdict = judge([[losses]], present=16)
        assert (verdict.kind, verdict.dilation, verdict.flat_range) == ("flat", 8.0, (4.0, 16.0))
        assert "all dilations from 4 to 16 are within one standard error" in verdict.reason

    def test_likely_gives_the_gain_and_its_error(self) -> None:
        verdict = judge([[reading([2.0, 1.0, 0.5, 1.0, 0.53], 0.1)]], present=16)
        assert verdict.kind == "likely"
        assert verdict.reason == f"dilation 4 beats the present 16 by 0.03 ± {verdict.standard_error:.2g}"
        assert 0.015 < (verdict.standard_error or 0) < 0.03

    def test_the_present_dilation_may_be_the_best(self) -> None:
        verdict = judge([[reading(VALLEY)]], present=4)
        assert str(verdict) == "likely: the present dilation 4 is the best that was read"
        assert (verdict.gain, verdict.standard_error) == (0.0, 0.0)

    @pytest.mark.parametrize(
        ("means", "best", "side"), [(sorted(VALLEY), 1, "smallest"), (sorted(VALLEY)[::-1], 16, "largest")]
    )
    def test_at_the_edge_comes_before_clear(self, means: list[float], best: float, side: str) -> None:
        verdict = judge([[reading(means)]], present=4)
        assert (verdict.kind, verdict.dilation) == ("at the edge", best)
        assert verdict.reason.startswith(
            f"dilation {best} is the {side} that was read: try a smaller output stride, or a"
        )

    @pytest.mark.parametrize(
        ("chosen", "kind"),
        [(41.0, "at the edge"), (40.0, "clear"), (2.0, "clear"), (1.0, "at the edge"), (1.9, "clear")],
    )
    def test_a_whole_dilation_is_at_the_edge_if_the_next_one_is_beyond(self, chosen: float, kind: str) -> None:
        losses = reading([0.5, 0.1, 1.0, 0.1, 0.5], dilations=(1.0, 1.9, 6.4, 40.5, 41.3))
        assert judge([[losses]], present=6.4, chosen=chosen).kind == kind
        # From 2.5 on, the next integer dilation is 3.
        losses = reading(VALLEY, dilations=(2.5, 3, 4, 5, 6))
        assert judge([[losses]], present=6, chosen=3).kind == "at the edge"
        # Within a thousandth of an end it is at the end, and so near to a whole number it is that number.
        for near, beside, start in ((2.502, 2.6, 6), (5.995, 5.5, 2.5)):
            assert judge([[losses]], present=start, chosen=near).kind == "at the edge"
            assert judge([[losses]], present=start, chosen=beside).kind == "clear"
        assert [judge([[losses]], 6, chosen=near).dilation for near in (4.0005, 3.9995, 4.05)] == [4, 4, 4.05]


class TestNotReliable:
    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"chance": 0.5}, "the loss, 0.5, is no better than that of the class frequencies alone, 0.5"),
            ({"chance": math.nan}, "no better"),
            ({"random_backbone": True}, "the backbone is frozen at random weights"),
            ({"steps": 99}, "the search has 99 steps, where 100 are needed"),
            ({"least_images": 33}, "32 held-out images, where 33 are needed"),
        ],
    )
    def test_comes_first_and_says_why(self, options: dict[str, Any], reason: str) -> None:
        assert judge([[reading(VALLEY)]], 16, chance=0.51, steps=100).kind == "clear"
        for means in (VALLEY, sorted(VALLEY), [0.5] * 5):
            verdict = judge([[reading(means)]], 16, **options)
            assert verdict.kind == "not reliable"
            assert reason in verdict.reason
            assert "\n" not in str(verdict)

    def test_all_reasons_are_listed(self) -> None:
        verdict = judge([[reading(VALLEY, images=2)]], 16, chance=0.1, steps=1, random_backbone=True)
        assert verdict.reason.count("; ") == 3
        assert "2 held-out images" in verdict.reason
        assert "1 step," in verdict.reason

    @pytest.mark.parametrize("images", [1, 15])
    def test_fewer_than_16_images(self, images: int) -> None:
        verdict = judge([[{d: [mean] * images for d, mean in zip(DILATIONS, VALLEY, strict=True)}]], 16)
        assert verdict.kind == "not reliable"
        assert f"{images} held-out image{'s' * (images > 1)}, where 16 are needed" in verdict.reason
        assert (verdict.dilation, verdict.gain) == (4.0, 0.5)
        assert verdict.standard_error == (None if images == 1 else 0.0)

    def test_losses_that_are_not_finite_are_never_the_best(self) -> None:
        losses = {**reading(VALLEY), 4.0: [math.nan, *[-9.0] * 31], 8.0: [math.inf] * 32}
        verdict = judge([[losses]], present=16)
        assert (verdict.kind, verdict.dilation) == ("clear", 2.0)
        verdict = judge([[losses]], present=8)
        assert verdict.kind == "not reliable"
        assert "the loss at dilation 2 or at the present 8 is not finite" in verdict.reason
        assert (verdict.gain, verdict.standard_error) == (None, None)
        assert judge([[losses]], present=1, chosen=4).kind == "not reliable"
        verdict = judge([[losses], [{**reading(VALLEY), 2.0: [math.nan] * 32}]], present=16)
        assert (verdict.kind, verdict.dilation) == ("at the edge", 16.0), "of what both have read"
        with pytest.raises(ValueError, match="a reading of every search"):
            judge([[losses], []], present=1)
        verdict = judge([[{1.0: [math.nan] * 16, 2.0: [math.inf] * 16}]], present=1)
        assert str(verdict) == "not reliable: no held-out loss is finite"

    def test_a_dilation_without_a_finite_loss_is_no_end_of_the_range(self) -> None:
        """Dilation 2 is the smallest with a finite loss; whether 1 is better is unknown."""
        bad = {1.0: [math.nan] * 32, 16.0: [math.inf] * 32}
        for means, best in (([0, 0.4, 0.5, 0.8, 0], 2.0), ([0, 0.8, 0.5, 0.4, 0], 8.0)):
            losses = {**reading(means), **bad}
            for searches in ([[losses]], [[losses], [reading([0.7, *means[1:4], 0.9])]]):
                verdict = judge(searches, present=4)
                assert (verdict.kind, verdict.dilation) == ("at the edge", best)
        early, late = {**reading(VALLEY), 1.0: [math.nan] * 32}, reading([0.7, 0.4, 0.5], dilations=(1.0, 2.0, 4.0))
        assert judge([[early, late]], present=16).kind == "clear", "what was bad once may be good later"

    def test_a_result_that_the_curve_contradicts(self) -> None:
        verdict = judge([[reading(VALLEY)]], present=4, chosen=8)
        assert (verdict.kind, verdict.gain) == ("not reliable", pytest.approx(-0.3))
        assert "the present dilation 4 was read 0.3 better than 8" in verdict.reason
        # As good as the present one: no objection, even with worse dilations between them.
        assert judge([[reading([0.5, 0.9, 0.5, 0.9, 0.9])]], present=1, chosen=4).kind == "likely"


class TestComparison:
    def test_ties_stay_where_the_network_is(self) -> None:
        for present in (2.0, 8.0):
            verdict = judge([[reading([0.5] * 5)]], present)
            assert (verdict.kind, verdict.dilation, verdict.flat_range) == ("flat", present, (1.0, 16.0))
        assert judge([[reading([0.9, 0.5, 0.5, 0.5, 0.9])]], 16).dilation == 8

    def test_two_candidates_are_both_an_edge(self) -> None:
        assert judge([[reading([1.0, 0.5], dilations=(1, 2))]], 1).kind == "at the edge"
        assert judge([[reading([0.5], dilations=(1,))]], 1).kind == "at the edge"

    def test_differences_are_paired(self) -> None:
        """The losses differ a hundred times as much between images as between dilations."""
        hard = torch.linspace(0, 50, 32, dtype=torch.float64)
        losses = {d: (hard + mean).tolist() for d, mean in zip(DILATIONS, VALLEY, strict=True)}
        verdict = judge([[losses]], 16)
        assert verdict.kind == "clear"
        assert (verdict.standard_error or 0) < 1e-9
        assert standard_errors([losses])[16.0] < 1e-9

    def test_a_narrowed_search_is_compared_where_both_were_evaluated(self) -> None:
        wide, narrow = reading(VALLEY), reading([0.4, 0.3, 0.4], dilations=(3.0, 4.0, 5.0))
        verdict = judge([[wide, narrow]], 16, chosen=4)
        assert (verdict.kind, verdict.gain, verdict.flat_range) == ("clear", pytest.approx(0.5), (4.0, 4.0))
        assert judge([[wide, narrow]], 3).gain == pytest.approx(0.1)
        assert judge([[wide, narrow]], 4.5, chosen=3).kind != "at the edge", "an end of the window is none of the range"

    def test_between_and_beyond_the_evaluated_dilations(self) -> None:
        verdict = judge([[reading(VALLEY)]], present=math.sqrt(8 * 16))
        assert verdict.gain == pytest.approx(0.4)
        verdict = judge([[reading(VALLEY)]], present=99)
        assert verdict.gain == pytest.approx(0.5)
        assert "the present 99 (read at 16, where the range ends) by 0.5" in verdict.reason

    def test_searches_that_disagree_are_less_sure(self) -> None:
        one, two = reading([2.0, 2.0, 0.5, 2.0, 0.6]), reading([2.0, 2.0, 0.5, 2.0, 1.0])
        verdict = judge([[one], [two]], 16)
        assert (verdict.kind, verdict.gain) == ("likely", pytest.approx(0.3))
        assert verdict.standard_error == pytest.approx(0.2), "sample deviation over the root of two"

    def test_an_image_of_two_searches_counts_once(self) -> None:
        losses = reading(VALLEY, 0.1)
        names = [[f"image {place}" for place in range(32)]] * 2
        alone = judge([[losses]], 16).standard_error or 0
        assert judge([[losses], [losses]], 16, images=names).standard_error == pytest.approx(alone)
        apart = judge([[losses], [losses]], 16).standard_error or 0
        assert apart == pytest.approx(alone * math.sqrt(31 / 63))

    def test_bad_input(self) -> None:
        for searches in ([], [[]]):
            with pytest.raises(ValueError, match="needs a reading"):
                judge(searches, 1)
        with pytest.raises(ValueError, match=r"same images at every dilation, one or more, got \[1, 2\]"):
            judge([[{1: [1.0], 2: [1.0, 2.0]}]], 1)
        with pytest.raises(ValueError, match=r"one or more, got \[\]"):
            judge([[{}]], 1)
        with pytest.raises(ValueError, match="above 0"):
            judge([[{0: [1.0]}]], 1)
        for present in (0, -1, math.nan, math.inf):
            with pytest.raises(ValueError, match=f"the present dilation must be above 0 and finite, got {present}"):
                judge([[reading(VALLEY)]], present)
        with pytest.raises(ValueError, match="losses of 32 images, but 3 names"):
            judge([[reading(VALLEY)]], 1, images=[[1, 2, 3]])


def test_clear_is_rare_where_nothing_differs() -> None:
    """400 flat curves of 28 images: each image's deviations are smooth over the dilations, or independent."""
    generator = torch.Generator().manual_seed(0)
    place = torch.linspace(-1.5, 1.5, 10)
    shares = {}
    for smooth in (True, False):
        kinds: Counter[str] = Counter()
        for _ in range(200):
            slope, bend = torch.randn(2, 28, 1, generator=generator)
            noise = torch.randn(28, 10, generator=generator)
            losses = 1 + (0.1 * (slope * place + bend * place.square()) + 0.01 * noise if smooth else 0.1 * noise)
            columns = {2.0**step: losses[:, step].tolist() for step in range(10)}
            kinds[judge([[columns]], 16).kind] += 1
        shares[smooth] = kinds["clear"] / 200
    assert shares[True] <= 0.02
    assert shares[False] <= 0.15


class TestStandardErrors:
    def test_those_of_differences_to_the_least(self) -> None:
        losses = {1.0: [1.0, 3.0, 2.0], 2.0: [0.0, 1.0, 2.0], 4.0: [math.nan, 1.0, 1.0]}
        errors = standard_errors([losses])
        assert errors[1.0] == pytest.approx(1 / math.sqrt(3))
        assert errors[2.0] == 0
        assert math.isnan(errors[4.0])
        mixed = [{dilation: [1.0, 2.0] for dilation in own} for own in ((64.0, 2.5), (1.5, 40.0, 3.0))]
        assert [*standard_errors(mixed)] == [1.5, 2.5, 3.0, 40.0, 64.0]
        assert all(math.isnan(error) for error in standard_errors([{1.0: [1.0], 2.0: [2.0]}]).values())
        nowhere = standard_errors([{1.0: [math.nan, 1.0], 2.0: [math.inf, 2.0]}])
        assert nowhere.keys() == {1.0, 2.0}
        assert all(math.isnan(error) for error in nowhere.values())


class TestClassShareLoss:
    def test_no_constant_prediction_does_better(self) -> None:
        torch.manual_seed(0)
        counts, weights = torch.randint(0, 90, (5, 3)), torch.tensor([0.5, 3.0, 1.0])
        least = class_share_loss(counts, weights)
        shares = counts / counts.sum(1, keepdim=True)

        def loss(logits: Tensor) -> float:
            return float(-(shares * weights * logits.log_softmax(0)).sum(1).mean())

        best = (shares.mean(0) * weights).log()
        assert loss(best) == pytest.approx(least, rel=1e-6)
        assert all(loss(best + torch.randn(3)) > least for _ in range(50))

    def test_absent_classes_and_images_without_labels(self) -> None:
        assert class_share_loss(torch.tensor([[4, 4, 0], [0, 0, 0]])) == pytest.approx(math.log(2))
        assert str(class_share_loss(torch.tensor([[5]]))) == "0.0", "not -0.0"
        with pytest.raises(ValueError, match="no pixel has a label"):
            class_share_loss(torch.zeros(2, 3))


class TestSampledSearch:
    def finished(self, batches: int, steps: int) -> SampledSearch:
        """Return a finished search with fixed weights; the target is the image 3 px to the right."""
        conv = nn.Conv2d(1, 1, 3, padding=1, bias=False)
        with torch.no_grad():
            conv.weight.zero_()[0, 0, 1, 2] = 1
        model = nn.Sequential(AdaptiveConv2d.from_conv(conv))
        model[0].set_factor(1 / 8)
        generator = torch.Generator().manual_seed(0)
        held_out = [torch.randn(1, 1, 12, 12, generator=generator) for _ in range(batches)]

        def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
            return (model(batch)[..., :-3] - batch[..., 3:]).square().mean() + 0 * model[0].weight.sum()

        search = SampledSearch(model, loss_fn, steps, held_out)
        for _ in range(steps):
            search.loss(held_out[0])
            search.step()
        return search

    def test_says_how_sure_it_is(self) -> None:
        search = self.finished(16, 100)
        verdict = search.verdict()
        assert (verdict.kind, verdict.dilation, verdict.present) == ("clear", 3.0, pytest.approx(8))
        assert search.verdict(chance=0.0).kind == "not reliable"
        assert search.verdict(random_backbone=True).kind == "not reliable"
        errors = search.errors()
        assert errors.keys() == search.curve().keys()
        assert errors[3.0] == 0 < max(errors.values())

    def test_is_not_reliable_after_few_steps_on_few_batches(self) -> None:
        reason = self.finished(2, 7).verdict().reason
        assert "2 held-out batches, where 16 are needed" in reason
        assert "7 steps" in reason

    def test_needs_an_evaluated_curve(self) -> None:
        search = SampledSearch(
            nn.Sequential(AdaptiveConv2d(1, 1, 3)), lambda model, batch: batch, 5, held_out=[torch.zeros(1)]
        )
        with pytest.raises(ValueError, match="needs a reading"):
            search.verdict()
