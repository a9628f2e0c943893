"""How sure the answer of a search is: a verdict from the losses of the held-out images."""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rfield.search.paired import Losses, Reading, common_grid, covering, difference, mean_loss

Kind = Literal["not reliable", "at the edge", "clear", "flat", "likely"]
LEAST_IMAGES = 16
# After 100 steps less than 5 % of the running average of the weights is the start, and each of ten dilations has been
# drawn ten times.
LEAST_STEPS = 100


@dataclass(frozen=True)
class Verdict:
    """What the answer of a search is worth.

    Attributes:
        kind: `not reliable`, `at the edge`, `clear`, `flat` or `likely`; see `judge`.
        reason: why, in one line without a full stop.
        dilation: the best dilation, in feature px; None if no loss is finite.
        present: the dilation that it is compared with.
        gain: how much lower the loss is at `dilation` than at `present`; None if unknown.
        standard_error: of the gain; None if unknown, as for one image.
        flat_range: the least and the greatest of the dilations around the best that are all within one standard error
            of it; None if no loss is finite.

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
        """The fields in plain types, for a JSON file."""
        return {**vars(self), "flat_range": None if self.flat_range is None else list(self.flat_range)}


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
    """Says how sure an answer is. The first that holds, in this order:

    - *not reliable*: no loss is finite; the least loss is no better than `chance`; fewer than 16 images; a frozen
      random backbone; fewer than 100 steps; or the best dilation loses to the present one;
    - *at the edge*: the best dilation is the smallest or the largest that was read, those without a finite loss left
      out;
    - *clear*: it beats the present one by more than two standard errors;
    - *flat*: neighbours of the best are within one standard error of it;
    - *likely*: none of these.

    Errors are those of paired differences: the same images are read at all dilations. The gain is that of the last
    reading that covers both dilations, since the weights of a narrowed search know its window alone. With several
    searches the curve is the mean of theirs, and the error of the gain the larger of two: that over the images, and
    that over the searches.

    Args:
        searches: for each search its readings, in their order; the last one is the curve.
        present: the dilation to compare with; beyond the range that was read, the range's end stands for it.
        chosen: the dilation that was delivered. Default: the least of the curve.
        chance: the loss of predicting the classes' shares everywhere, see `class_share_loss`. Default: not checked.
        steps: of the shortest search. Default: not checked.
        random_backbone: whether the backbone is frozen at random weights.
        images: for each search the names of its images, where searches share some. Default: all differ.
        least_images: how many images a search needs.
        unit: what the losses are of.

    Raises:
        ValueError: if there is no reading, the losses of one are not equally many, or `present` is no dilation.

    Example:
        >>> flat = [1.0, 1.2] * 8
        >>> print(judge([[{1: flat, 2: [x - 0.3 for x in flat], 4: flat}]], present=4))
        clear: dilation 2 beats the present 4 by 0.3 ± 0
    """
    if not 0 < present < math.inf:
        raise ValueError(f"the present dilation must be above 0 and finite, got {present}")
    read = [[Reading(losses) for losses in readings] for readings in searches]
    if not read or not all(read):
        raise ValueError("a verdict needs a reading of every search, but there is none")
    last = [readings[-1] for readings in read]
    for search, own in enumerate(images or ()):
        if len(own) != last[search].count:
            raise ValueError(f"search {search} has losses of {last[search].count} images, but {len(own)} names")
    grid = common_grid(last)
    if not grid:
        return Verdict("not reliable", "no held-out loss is finite", present=present)
    low = min(reading.ends[0] for readings in read for reading in readings)
    high = max(reading.ends[1] for readings in read for reading in readings)
    near = min(max(present, low), high)
    means = {dilation: mean_loss([reading.at(dilation) for reading in last]) for dilation in grid}
    best = chosen
    if best is None:
        best = min(grid, key=lambda dilation: (means[dilation], abs(math.log(dilation / near)), dilation))
    elif abs(best - round(best)) < 1e-3:
        best = float(round(best))

    both = [covering(readings, near, best) for readings in read]
    gain, error = difference(both, near, best, images)
    alike = {}
    for dilation in grid:
        worse, own_error = difference(last, dilation, best, images)
        alike[dilation] = abs(worse) <= own_error
    below = [dilation for dilation in reversed(grid) if dilation <= best]
    above = [dilation for dilation in grid if dilation >= best]
    flat = _reach(below, alike, best), _reach(above, alike, best)

    reasons = []
    least = min(means.values())
    if chance is not None and not least < chance:
        reasons.append(f"the loss, {least:.4g}, is no better than that of the class frequencies alone, {chance:.4g}")
    count = min(reading.count for reading in last)
    if count < least_images:
        plural = "" if count == 1 else "es" if unit.endswith("ch") else "s"
        reasons.append(f"{count} {unit}{plural}, where {least_images} are needed")
    if random_backbone:
        reasons.append("the backbone is frozen at random weights")
    if steps is not None and steps < LEAST_STEPS:
        reasons.append(f"the search has {steps} step{'s' * (steps != 1)}, where {LEAST_STEPS} are needed")
    if not math.isfinite(gain):
        reasons.append(f"the loss at dilation {best:.3g} or at the present {present:.3g} is not finite")
    elif gain < 0 and near != best and not flat[0] <= near <= flat[1]:
        reasons.append(f"the present dilation {near:.3g} was read {-gain:.3g} better than {best:.3g}")

    compared = _comparison(best, present, near, gain, error)
    kind: Kind
    if reasons:
        kind, reason = "not reliable", "; ".join(reasons)
    elif (side := _edge(best, *_finite_ends(read, grid))) is not None:
        kind = "at the edge"
        reason = (
            f"dilation {best:.3g} is the {side} that was read: try a smaller output stride, or a regulator around "
            "the layers"
        )
    elif gain > 2 * error:
        kind, reason = "clear", compared
    elif flat[0] < flat[1]:
        kind = "flat"
        reason = f"all dilations from {flat[0]:.3g} to {flat[1]:.3g} are within one standard error; {compared}"
    else:
        kind, reason = "likely", compared
    known_gain, known_error = (value if math.isfinite(value) else None for value in (gain, error))
    return Verdict(kind, reason, best, present, known_gain, known_error, flat)


def _reach(dilations: Sequence[float], alike: Mapping[float, bool], best: float) -> float:
    """The farthest of the dilations, in their order, up to which all are like the best."""
    farthest = best
    for dilation in dilations:
        if not alike[dilation]:
            break
        farthest = dilation
    return farthest


def _finite_ends(searches: Sequence[Sequence[Reading]], grid: Sequence[float]) -> tuple[float, float]:
    """The smallest and the largest dilation at which every search that has read it has once found a finite loss."""
    found, missed = {*grid}, set[float]()
    for readings in searches:
        finite = {dilation for reading in readings for dilation in reading.finite}
        found |= finite
        missed |= {dilation for reading in readings for dilation in reading.losses} - finite
    known = (found - missed) | {*grid}
    return min(known), max(known)


def _edge(best: float, low: float, high: float) -> str | None:
    """Which end of the range the best dilation is, counting whole dilations where it is one."""
    step = 1.0 if best.is_integer() else 0.0
    if best <= low * (1 + 1e-3) or best - step < low:
        return "smallest"
    if best >= high * (1 - 1e-3) or best + step > high:
        return "largest"
    return None


def _comparison(best: float, present: float, near: float, gain: float, error: float) -> str:
    if near == best:
        return f"the present dilation {present:.3g} is the best that was read"
    beyond = "" if near == present else f" (read at {near:.3g}, where the range ends)"
    size = f"{abs(gain):.3g} ± {error:.2g}"
    verb = f"beats the present {present:.3g}{beyond} by" if gain >= 0 else f"is behind the present {present:.3g} by"
    return f"dilation {best:.3g} {verb} {size}"
