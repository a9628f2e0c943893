"""Assign classes to each of several paths."""

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations, pairwise

import numpy as np
import scipy.ndimage

from rfield.segmentation.conventions import IGNORE_INDEX
from rfield.segmentation.data.dataset import ParsingDataset

ClassGroups = dict[str, tuple[int, ...]]

# Number of masks on which the sizes of classes are measured, spread over the split.
_MASKS = 200


def class_groups(
    groups: str | Sequence[Sequence[str]] | Mapping[str, Sequence[str]], paths: int, dataset: ParsingDataset
) -> ClassGroups:
    """Return the classes of each path, by the group's name.

    Args:
        groups: the classes that each path serves, with or without names of groups; or "auto": by the typical size of
            the classes' regions, the smallest first. A class is given by its name or by a word of it: `eye` means
            `left eye` and `right eye`. A class may be in several groups, or in none.
        paths: the required number of groups.
        dataset: its masks are measured if `groups` is "auto".

    Raises:
        ValueError: for another number of groups, an empty group, or an unknown class.
    """
    if isinstance(groups, str):
        if groups != "auto":
            raise ValueError(f"class groups must be lists of class names, or auto; got {groups!r}")
        return group_by_size(class_sizes(dataset), paths)
    named = dict(groups) if isinstance(groups, Mapping) else {f"group {i + 1}": g for i, g in enumerate(groups)}
    if len(named) != paths:
        raise ValueError(f"{paths} paths need {paths} class groups, got {len(named)}: {', '.join(named)}")
    resolved = {}
    for name, members in named.items():
        indices = {index for member in members for index in _find(member, dataset.class_names)}
        if not indices:
            raise ValueError(f"class group {name!r} is empty")
        resolved[str(name)] = tuple(sorted(indices))
    return resolved


def class_sizes(dataset: ParsingDataset) -> dict[int, float]:
    """Measure the typical size of each class's regions in px.

    It is the side of a square as large as the region in which the class's median pixel lies.

    Up to 200 masks, evenly spread over the split, are measured. A class that occurs in none of them is left out.
    """
    areas: dict[int, list[np.ndarray]] = {}
    for index in range(0, len(dataset), max(1, len(dataset) // _MASKS)):
        for value, found in region_areas(np.asarray(dataset[index][1]).squeeze()).items():
            areas.setdefault(value, []).append(found)
    return {value: _median_side(np.concatenate(found)) for value, found in sorted(areas.items())}


def region_areas(mask: np.ndarray) -> dict[int, np.ndarray]:
    """Return for each class of a mask, [H, W], the areas in px of its connected regions."""
    areas = {}
    for value in np.unique(mask):
        if value != IGNORE_INDEX:
            regions, _ = scipy.ndimage.label(mask == value, structure=np.ones((3, 3)))
            areas[int(value)] = np.bincount(regions.ravel())[1:]
    return areas


def object_sizes(images: Sequence[Mapping[int, np.ndarray]]) -> list[float | None]:
    """Return the typical size in px of each image's objects: the regions of all classes but the most frequent one.

    It is the side of a square as large as the region in which the median pixel of the image's objects lies.

    Args:
        images: the areas of each class's regions in each image, see `region_areas`.

    Returns:
        One size for each image, None if it has no object.

    >>> object_sizes([{0: np.array([900]), 1: np.array([4, 100])}, {0: np.array([1000])}])
    [10.0, None]
    """
    pixels: dict[int, int] = {}
    for areas in images:
        for value, found in areas.items():
            pixels[value] = pixels.get(value, 0) + int(found.sum())
    background = max(pixels, key=lambda value: pixels[value], default=None)
    objects = [[found for value, found in areas.items() if value != background] for areas in images]
    return [_median_side(np.concatenate(found)) if found else None for found in objects]


def group_by_size(sizes: Mapping[int, float], count: int) -> ClassGroups:
    """Sort classes by size, and cut them so that the logarithms of the sizes in each group spread least.

    Raises:
        ValueError: if there are fewer classes than groups.

    >>> group_by_size({0: 90.0, 1: 8.0, 2: 10.0, 3: 70.0}, 2)
    {'small (8-10 px)': (1, 2), 'large (70-90 px)': (0, 3)}
    """
    if len(sizes) < count:
        raise ValueError(f"{count} paths need at least {count} classes, but the masks contain {len(sizes)}")
    ordered = sorted(sizes, key=lambda value: sizes[value])
    logs = np.log([sizes[value] for value in ordered])

    def spread(cuts: Iterable[int]) -> float:
        return sum(float(np.var(logs[a:b]) * (b - a)) for a, b in pairwise((0, *cuts, len(logs))))

    cuts = min(combinations(range(1, len(ordered)), count - 1), key=spread)
    names = ("small", "large") if count == 2 else ("small", "middle", "large") if count == 3 else ()
    groups = {}
    for place, (a, b) in enumerate(pairwise((0, *cuts, len(ordered)))):
        name = names[place] if names else f"size {place + 1}"
        groups[f"{name} ({sizes[ordered[a]]:.0f}-{sizes[ordered[b - 1]]:.0f} px)"] = tuple(sorted(ordered[a:b]))
    return groups


def _median_side(areas: np.ndarray) -> float:
    ordered = np.sort(areas)
    middle = np.searchsorted(np.cumsum(ordered), ordered.sum() / 2)
    return float(np.sqrt(ordered[middle]))


def _find(member: str, class_names: Sequence[str]) -> list[int]:
    """Return the class of this name, or those with this word in their name."""
    exact = [index for index, name in enumerate(class_names) if name == member]
    found = exact or [
        index for index, name in enumerate(class_names) if member in name.split() or member in re.split(r"[\W_]+", name)
    ]
    if not found:
        raise ValueError(f"there is no class {member!r}; the classes are {', '.join(class_names)}")
    return found
