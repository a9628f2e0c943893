"""The samples that a data set's lists and folders name, for the loaders (stop at a fault) and the check (go on)."""

import dataclasses
import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from rfield.segmentation.conventions import IGNORE_INDEX
from rfield.segmentation.data.mask_options import MaskOptions
from rfield.segmentation.data.masks import UNKNOWN, Colour, MaskCode
from rfield.segmentation.data.paths import NearMisses, is_inside

Refuse = Callable[[Path, Exception], None]
T = TypeVar("T")


@dataclass(frozen=True)
class Entry:
    """The files of one sample: an image and its mask, or the maps of its classes."""

    name: str
    image: Path
    masks: tuple[Path, ...]


@dataclass(frozen=True)
class Listing:
    """One split of a data set, before any of its samples is opened.

    Attributes:
        class_names: the classes' names.
        code: the meaning of the values of the masks.
        entries: the samples.
        advice: what to do about mask values that no class has.
        mirrored_classes: pairs of classes that a mirrored image exchanges.
        near: finds similar names of missing files.
    """

    class_names: tuple[str, ...]
    code: MaskCode
    entries: list[Entry]
    advice: str = ""
    mirrored_classes: tuple[tuple[int, int], ...] = ()
    near: NearMisses = dataclasses.field(default_factory=NearMisses, compare=False)

    @property
    def files(self) -> list[Path]:
        """Return the images, then the masks or maps."""
        return [*(entry.image for entry in self.entries), *(path for entry in self.entries for path in entry.masks)]


def make_listing(
    class_names: tuple[str, ...],
    code: MaskCode,
    entries: list[Entry],
    advice: str,
    options: MaskOptions,
    own_names: Path | None,
    mirrored: tuple[tuple[str, str], ...] = (),
) -> Listing:
    """Return a listing with the options of a data config.

    Args:
        class_names: those of the format or the data set.
        code: the meaning of the values without options.
        entries: the samples.
        advice: what to do about values that no class has.
        options: those of the data config.
        own_names: the file that names the classes; None if the names are the format's.
        mirrored: the format's own pairs, by class name.

    Raises:
        ValueError: if the options do not fit the classes.
    """
    if options.colours is not None:
        class_names, code = _in_colours(class_names, options, own_names, code.maps)
        advice = "correct the mask, or name the colour in the data config, under `colours` or `ignore`"
    else:
        labels = code.labels.copy()
        if options.reduce_zero_label:
            labels[1:IGNORE_INDEX] = code.labels[: IGNORE_INDEX - 1]
            labels[0] = IGNORE_INDEX
            if own_names is None and class_names[0] == "background":
                class_names = class_names[1:]
        labels[(labels >= len(class_names)) & (labels != IGNORE_INDEX)] = UNKNOWN
        labels[[value for value in options.ignore if isinstance(value, int)]] = IGNORE_INDEX
        code = dataclasses.replace(code, labels=labels)
    if options.mirrored is None:
        mirrored = tuple(pair for pair in mirrored if set(pair) <= set(class_names))
    else:
        mirrored = options.mirrored
    return Listing(class_names, code, entries, advice, _indices(mirrored, class_names))


def _in_colours(
    class_names: tuple[str, ...], options: MaskOptions, own_names: Path | None, maps: bool
) -> tuple[tuple[str, ...], MaskCode]:
    """Return the classes of masks that hold colours: those of classes.txt, else of the config, in its order."""
    colours = options.colours or {}
    if maps:
        raise ValueError("colours do not fit this format, whose masks are grey maps of one class each; leave them out")
    if own_names is None:
        class_names = tuple(colours)
    elif set(colours) != set(class_names):
        missing = [name for name in class_names if name not in colours]
        extra = [name for name in colours if name not in class_names]
        lacks = f"colours lacks {', '.join(missing)}" if missing else f"colours has {', '.join(extra)}"
        raise ValueError(f"{lacks}, but {own_names} names the classes; give a colour to each of them and to no other")
    table: dict[Colour, int] = {}
    named = [(class_names.index(name), colour) for name, own in colours.items() for colour in own]
    ignored = [(IGNORE_INDEX, colour) for colour in options.ignore if not isinstance(colour, int)]
    for label, colour in named + ignored:
        if table.setdefault(colour, label) != label:
            raise ValueError(f"the colour {list(colour)} occurs twice in colours and ignore; give it to one of them")
    return class_names, MaskCode(np.full(256, UNKNOWN, np.int16), table)


def _indices(pairs: Iterable[tuple[str, str]], class_names: tuple[str, ...]) -> tuple[tuple[int, int], ...]:
    for name in (name for pair in pairs for name in pair):
        if name not in class_names:
            close = difflib.get_close_matches(name, class_names, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"mirrored names {name!r}, but the classes are {', '.join(class_names)}{hint}")
    return tuple((class_names.index(one), class_names.index(other)) for one, other in pairs)


def raise_error(path: Path, error: Exception) -> None:
    """Stop at the first fault; `path` is its file."""
    raise error


def list_entries(items: Iterable[T], make: Callable[[T], Entry], source: Path, refuse: Refuse) -> list[Entry]:
    """Return an entry for each item. Pass each ValueError or OSError of `make` to `refuse`."""
    entries = []
    for item in items:
        try:
            entries.append(make(item))
        except (ValueError, OSError) as error:  # noqa: PERF203
            refuse(source, error)
    return entries


def entries_inside(entries: Iterable[Entry], root: Path, refuse: Refuse) -> list[Entry]:
    """Return the entries without files that are links out of the root, and refuse the others. Folders may be links."""
    inside = []
    for entry in entries:
        links = [path for path in (entry.image, *entry.masks) if path.is_symlink()]
        outside = [path for path in links if not is_inside(path, *_folders_between(root, path))]
        for path in outside:
            refuse(path, ValueError(f"{path} is a link to a file outside {root}; put the file itself there"))
        if not outside:
            inside.append(entry)
    return inside


def _folders_between(root: Path, path: Path) -> list[Path]:
    return [folder for folder in path.parents if folder.is_relative_to(root)]
