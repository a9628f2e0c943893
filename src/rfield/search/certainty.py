"""Judge how reliable the result of a search is, from the losses of the held-out images."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rfield.search.paired import Evaluation, Losses, common_grid, difference, last_covering, mean_loss

Kind = Literal["not reliable", "at the edge", "clear", "flat", "likely"]
LEAST_IMAGES = 16
# After 100 steps the initial weights make up less than 5 % of the weights' moving average, and each of ten dilations
# has been drawn ten times.
LEAST_STEPS = 100


@dataclass(frozen=True)
class Verdict:
    """How reliable the result of a search is.

    Attributes:
        kind: `not reliable`, `at the edge`, `clear`, `flat` or `likely`; see `judge`.
        reason: why, in one line without a full stop.
        dilation: the best dilation, in feature px; None if no loss is finite.
        present: the dilation that it is compared with, in feature px.
        gain: how much lower the loss is at `dilation` than at `present`; None if unknown.
        standard_error: standard error of the gain; None if unknown, for example for a single image.
        flat_range: the least and the greatest dilation of the neighbourhood of the best in which all losses are within
            one standard error of the best one's; None if no loss is finite.

    Example:
        >>> str(Verdict("clear", "dilation 6 beats the present 12 by 0.02 ± 0.004", 6.0, 12.0, 0.02, 0.004, (5.0, 7.0)))
        'clear: dilation 6 beats the present 12 by 0.02 ± 0.004'
    """

    kind: Kind
    reason: str
    dilation: float | None = None
    present: float | None = None
    gain: float | None = None
    standard_error: float | None = None
    flat_range: tuple[float, float] | None = None

    def __str__(self) -> str:
        return f"{self.kind}: {self.reason}"

    def plain(self) -> dict[str, Any]:
        """Return the fields as plain types, for a JSON file."""
        return {**vars(self), "flat_range": None if self.flat_range is None else list(self.flat_range)}


def shortcomings(
    count: int,
    steps: int | None,
    random_backbone: bool,
    least_images: int = LEAST_IMAGES,
    unit: str = "held-out image",
) -> list[str]:
    """Return why a search is too small for a reliable answer, whatever it found; empty if it is large enough.

    Args:
        count: number of held-out losses that each curve is the mean of.
        steps, random_backbone, least_images, unit: see `judge`.

    >>> shortcomings(2, 200, random_backbone=False)
    ['2 held-out images, where 16 are needed']
    """
    reasons = []
    if count < least_images:
        plural = "" if count == 1 else "es" if unit.endswith("ch") else "s"
        reasons.append(f"{count} {unit}{plural}, where {least_images} are needed")
    if random_backbone:
        reasons.append("the backbone is frozen at random weights")
    if steps is not None and steps < LEAST_STEPS:
        reasons.append(f"the search has {steps} step{'s' * (steps != 1)}, where {LEAST_STEPS} are needed")
    return reasons


def judge(
    searches: Sequence[Sequence[Losses]],
    present: float,
    *,
    chosen: float | None = None,
    chance: float | None = None,
    steps: int | None = None,
    random_backbone: bool = False,
    images: Sequence[Sequence[Hashable]] | None = None,
    least_images: int = LEAST_IMAGES,
    unit: str = "held-out image",
) -> Verdict:
    """Judge how reliable the result of a search is: return the first kind that applies.

    - *not reliable*: no loss is finite; the least loss is no better than `chance`; fewer than 16 images; a frozen
      random backbone; fewer than 100 steps; or the best dilation is worse than the present one;
    - *at the edge*: the best dilation is the smallest or the largest that was evaluated, not counting those without a
      finite loss;
    - *clear*: it is better than the present one by more than two standard errors;
    - *flat*: the losses of its neighbours are within one standard error of its loss;
    - *likely*: none of these.

    Standard errors are those of paired differences, since the same images are evaluated at all dilations. The gain is
    taken from the last evaluation that covers both dilations, because the weights of a narrowed search have trained on
    its window only. With several searches, the curve is the mean of their curves, and the error of the gain is the
    larger of that over the images and that over the searches.

    Args:
        searches: for each search its evaluations, in order, each {dilation: losses, one per image}; the last one is the
            search's curve.
        present: the dilation to compare with, in feature px; outside of the evaluated range, the range's end is used.
        chosen: the dilation that the search ended at. Default: the minimum of the curve.
        chance: the loss of always predicting the classes' shares, see `class_share_loss`. Default: not checked.
        steps: number of steps of the shortest search. Default: not checked.
        random_backbone: whether the backbone is frozen at random weights.
        images: for each search the names of its images, if searches have images in common. Default: all differ.
        least_images: number of images that a search needs.
        unit: what each loss belongs to, for the reason's text.

    Raises:
        ValueError: if a search has no evaluation, the numbers of losses or names differ, or `present` is not positive
            and finite.

    Example:
        >>> flat = [1.0, 1.2] * 8
        >>> print(judge([[{1: flat, 2: [x - 0.3 for x in flat], 4: flat}]], present=4))
        clear: dilation 2 beats the present 4 by 0.3 ± 0
    """
    evaluations = _checked(searches, present, images)
    last = [own[-1] for own in evaluations]
    grid = common_grid(last)
    if not grid:
        return Verdict("not reliable", "no held-out loss is finite", present=present)
    found = _compare(evaluations, grid, present, chosen, images)

    reasons = []
    if chance is not None and not found.least_loss < chance:
        reasons.append(
            f"the loss, {found.least_loss:.4g}, is no better than that of the class frequencies alone, {chance:.4g}"
        )
    count = min(each.count for each in last)
    reasons += shortcomings(count, steps, random_backbone, least_images, unit)
    reasons += found.objections()

    kind: Kind = "not reliable"
    reason = "; ".join(reasons)
    if not reasons:
        kind, reason = found.kind(_finite_ends(evaluations, grid))
    gain, error = (value if math.isfinite(value) else None for value in (found.gain, found.error))
    return Verdict(kind, reason, found.best, present, gain, error, found.flat_range)


def _checked(
    searches: Sequence[Sequence[Losses]], present: float, images: Sequence[Sequence[Hashable]] | None
) -> list[list[Evaluation]]:
    """Return the evaluations of each search; raise ValueError for arguments of `judge` that do not fit together."""
    if not 0 < present < math.inf:
        raise ValueError(f"the present dilation must be above 0 and finite, got {present}")
    evaluations = [[Evaluation(losses) for losses in own] for own in searches]
    if not evaluations or not all(evaluations):
        raise ValueError("a verdict needs a reading of every search, but there is none")
    for search, names in enumerate(images or ()):
        count = evaluations[search][-1].count
        if len(names) != count:
            raise ValueError(f"search {search} has losses of {count} images, but {len(names)} names")
    return evaluations


@dataclass(frozen=True)
class _Comparison:
    """The best dilation compared with the present one.

    Attributes:
        best, present: see `Verdict`.
        reference: the present dilation, or the end of the evaluated range that is nearest to it.
        gain: how much lower the loss is at `best` than at `reference`.
        error: standard error of the gain.
        flat_range: see `Verdict`.
        least_loss: the least mean loss of the curve.
    """

    best: float
    present: float
    reference: float
    gain: float
    error: float
    flat_range: tuple[float, float]
    least_loss: float

    def objections(self) -> list[str]:
        """Return why the losses themselves make the result unreliable."""
        if not math.isfinite(self.gain):
            return [f"the loss at dilation {self.best:.3g} or at the present {self.present:.3g} is not finite"]
        is_flat = self.flat_range[0] <= self.reference <= self.flat_range[1]
        if self.gain < 0 and self.reference != self.best and not is_flat:
            return [f"the present dilation {self.reference:.3g} was read {-self.gain:.3g} better than {self.best:.3g}"]
        return []

    def kind(self, finite_ends: tuple[float, float]) -> tuple[Kind, str]:
        """Return the kind and the reason of a result to which there are no objections."""
        if (side := _edge(self.best, *finite_ends)) is not None:
            return "at the edge", (
                f"dilation {self.best:.3g} is the {side} that was read: try a smaller output stride, or a regulator "
                "around the layers"
            )
        if self.gain > 2 * self.error:
            return "clear", str(self)
        low, high = self.flat_range
        if low < high:
            return "flat", f"all dilations from {low:.3g} to {high:.3g} are within one standard error; {self}"
        return "likely", str(self)

    def __str__(self) -> str:
        best, present, reference = f"{self.best:.3g}", f"{self.present:.3g}", f"{self.reference:.3g}"
        if self.reference == self.best:
            return f"the present dilation {present} is the best that was read"
        beyond = "" if self.reference == self.present else f" (read at {reference}, where the range ends)"
        size = f"{abs(self.gain):.3g} ± {self.error:.2g}"
        verb = f"beats the present {present}{beyond} by" if self.gain >= 0 else f"is behind the present {present} by"
        return f"dilation {best} {verb} {size}"


def _compare(
    searches: Sequence[Sequence[Evaluation]],
    grid: Sequence[float],
    present: float,
    chosen: float | None,
    images: Sequence[Sequence[Hashable]] | None,
) -> _Comparison:
    """Compare the best dilation, `chosen` or else the minimum of the mean curve, with the present one."""
    last = [own[-1] for own in searches]
    low = min(each.ends[0] for own in searches for each in own)
    high = max(each.ends[1] for own in searches for each in own)
    reference = min(max(present, low), high)
    means = {dilation: mean_loss([each.at(dilation) for each in last]) for dilation in grid}
    best = chosen
    if best is None:
        # Of equal losses, the one nearest to the present dilation.
        best = min(grid, key=lambda dilation: (means[dilation], abs(math.log(dilation / reference)), dilation))
    elif abs(best - round(best)) < 1e-3:
        best = float(round(best))
    gain, error = difference([last_covering(own, reference, best) for own in searches], reference, best, images)
    flat_range = _flat_range(last, grid, best, images)
    return _Comparison(best, present, reference, gain, error, flat_range, min(means.values()))


def _flat_range(
    evaluations: Sequence[Evaluation],
    grid: Sequence[float],
    best: float,
    images: Sequence[Sequence[Hashable]] | None,
) -> tuple[float, float]:
    """Return the ends of the range around the best dilation in which all losses are within one standard error."""
    ends = []
    for side in (
        [dilation for dilation in reversed(grid) if dilation <= best],
        [dilation for dilation in grid if dilation >= best],
    ):
        end = best
        for dilation in side:
            worse, error = difference(evaluations, dilation, best, images)
            if not abs(worse) <= error:
                break
            end = dilation
        ends.append(end)
    return ends[0], ends[1]


def _finite_ends(searches: Sequence[Sequence[Evaluation]], grid: Sequence[float]) -> tuple[float, float]:
    """Return the least and the greatest dilation with a finite loss in every search that has evaluated it."""
    finite_anywhere, missing = {*grid}, set[float]()
    for own in searches:
        finite = {dilation for each in own for dilation in each.finite}
        finite_anywhere |= finite
        missing |= {dilation for each in own for dilation in each.losses} - finite
    known = (finite_anywhere - missing) | {*grid}
    return min(known), max(known)


def _edge(best: float, low: float, high: float) -> str | None:
    """Return which end of the range the best dilation is, or None; an integer is also at an end if none lies beyond."""
    step = 1.0 if best.is_integer() else 0.0
    if best <= low * (1 + 1e-3) or best - step < low:
        return "smallest"
    if best >= high * (1 - 1e-3) or best + step > high:
        return "largest"
    return None
