"""Find class names that mean left and right."""

import re
from collections.abc import Iterable, Sequence

# Words that may follow l and r directly, as in `lbrow`.
_PARTS = ("brow", "eyebrow", "eye", "ear", "hand", "arm", "leg", "foot", "shoe", "sock", "glove", "sleeve", "knee")


def unlisted_pairs(class_names: Sequence[str], listed: Iterable[tuple[int, int]]) -> list[tuple[str, str]]:
    """Return pairs of classes whose names mean left and right (or l and r), without those in a listed pair.

    >>> unlisted_pairs(["left_hand", "right_hand", "EyeL", "EyeR", "road"], [])
    [('left_hand', 'right_hand'), ('EyeL', 'EyeR')]
    """
    known = {index for pair in listed for index in pair}
    free = {_sided(name, swap=False): name for index, name in enumerate(class_names) if index not in known}
    pairs = []
    for plain, name in free.items():
        other = free.get(_sided(name, swap=True))
        if other is not None and _sided(name, swap=True) != plain and (other, name) not in pairs:
            pairs.append((name, other))
    return pairs


def _sided(name: str, swap: bool) -> str:
    """Return a name in lower case without separators; with `swap`, exchange left and right in it."""
    words = re.findall(r"[^\W\d_]+|\d+", re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", name))
    lower = [word.lower() for word in words]
    return "".join(map(_other_side, lower) if swap else lower)


def _other_side(word: str) -> str:
    for one, other in (("left", "right"), ("right", "left")):
        if word.startswith(one):
            return other + word.removeprefix(one)
        if word.endswith(one):
            return word.removesuffix(one) + other
    if word[:1] in ("l", "r") and word[1:] in _PARTS:
        return ("r" if word[0] == "l" else "l") + word[1:]
    return {"l": "r", "r": "l", "lt": "rt", "rt": "lt"}.get(word, word)
