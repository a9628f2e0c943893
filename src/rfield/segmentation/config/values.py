"""Values of options that may be given as text, and checks of ranges. Imports nothing but Python."""

import json
import math
from typing import Any

# Upper limit; larger values are taken for typos, and would fail later or fill the memory.
_LIMIT = 2**31
# What a branch of a pyramid may be beside a dilated 3x3 convolution: a 1x1 convolution, or image pooling.
BRANCH_KINDS = ("1x1", "pool")


class Size(tuple[int, int]):
    """(height, width) in px, from `520x640`, `520` or a list of two.

    >>> Size("520x640"), Size(520), Size([520, 640]), str(Size("5x6"))
    ((520, 640), (520, 520), (520, 640), '5x6')
    """

    def __new__(cls, value: Any) -> "Size":
        parts = value.lower().split("x") if isinstance(value, str) else value
        if isinstance(parts, int):
            parts = [parts]
        try:
            numbers = [int(part) for part in parts]
        except (TypeError, ValueError, OverflowError):
            numbers = []
        if len(numbers) == 1:
            numbers *= 2
        if len(numbers) != 2 or min(numbers) < 1:
            raise ValueError(f"a size is HEIGHTxWIDTH in px, such as 520x640, got {value!r}")
        return super().__new__(cls, numbers)

    def __str__(self) -> str:
        return "x".join(map(str, self))


class Range(tuple[float, float]):
    """(low, high), from `0.5,2` or a list of two.

    >>> Range("0.5,2"), Range([1, 1]), str(Range("0.5,2"))
    ((0.5, 2.0), (1.0, 1.0), '0.5,2')
    """

    def __new__(cls, value: Any) -> "Range":
        parts = value.split(",") if isinstance(value, str) else value
        try:
            low, high = (float(part) for part in parts)
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"a range is LOW,HIGH, such as 0.5,2, got {value!r}") from None
        return super().__new__(cls, (low, high))

    def __str__(self) -> str:
        return ",".join(f"{number:g}" for number in self)


class Integers(tuple[int, ...]):
    """Integers without duplicates, from `2,6,14`, one number or a list.

    >>> Integers("2,6,14"), Integers(3), Integers([0, 1]), str(Integers([0, 1]))
    ((2, 6, 14), (3,), (0, 1), '0,1')
    """

    def __new__(cls, value: Any) -> "Integers":
        parts = value.split(",") if isinstance(value, str) else [value] if isinstance(value, int) else value
        try:
            numbers = [int(part) for part in parts]
            whole = all(number == float(part) for number, part in zip(numbers, parts, strict=True))
        except (TypeError, ValueError, OverflowError):
            numbers, whole = [], False
        if not whole or not numbers or len(set(numbers)) < len(numbers):
            raise ValueError(f"a list is whole numbers with commas, none of them twice, such as 2,6,14, got {value!r}")
        return super().__new__(cls, numbers)

    def __str__(self) -> str:
        return ",".join(map(str, self))


class Numbers(tuple[float, ...]):
    """Numbers from `2,3.5,6`, one number or a list.

    >>> Numbers("2,3.5,2"), Numbers(3), str(Numbers([1, 2.5]))
    ((2.0, 3.5, 2.0), (3.0,), '1,2.5')
    """

    def __new__(cls, value: Any) -> "Numbers":
        parts = value.split(",") if isinstance(value, str) else [value] if isinstance(value, int | float) else value
        try:
            numbers = [float(part) for part in parts]
        except (TypeError, ValueError, OverflowError):
            numbers = []
        if not numbers or not all(math.isfinite(number) for number in numbers):
            raise ValueError(f"a list is numbers with commas, such as 2,3.5,6, got {value!r}")
        return super().__new__(cls, numbers)

    def __str__(self) -> str:
        return ",".join(f"{number:g}" for number in self)


class Branches(tuple[int | str, ...]):
    """Branches of a pyramid, from `1x1,6,12,pool` or a list: dilations of 3x3 convolutions, `1x1` and `pool`.

    >>> Branches("1x1,6,6,pool"), Branches([1, 2]), str(Branches("1x1,6"))
    (('1x1', 6, 6, 'pool'), (1, 2), '1x1,6')
    """

    def __new__(cls, value: Any) -> "Branches":
        parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else ()
        branches = [part.strip() if isinstance(part, str) else part for part in parts]
        branches = [int(part) if isinstance(part, str) and part.isdecimal() else part for part in branches]
        wrong = [each for each in branches if each not in BRANCH_KINDS and not (type(each) is int and each >= 1)]
        if wrong or not branches:
            raise ValueError(
                f"branches are dilations of at least 1, {' and '.join(BRANCH_KINDS)}, with commas, such as 1x1,6,12, "
                f"got {value!r}"
            )
        return super().__new__(cls, branches)

    def __str__(self) -> str:
        return ",".join(map(str, self))


class Names(tuple[str, ...]):
    """Names without duplicates, from `train,val` or a list.

    >>> Names("train,val"), Names(["test"]), str(Names(["a", "b"]))
    (('train', 'val'), ('test',), 'a,b')
    """

    def __new__(cls, value: Any) -> "Names":
        parts = value.split(",") if isinstance(value, str) else value
        known = parts if isinstance(parts, list | tuple) else ()
        names = [part.strip() for part in known if isinstance(part, str)]
        if not names or not all(names) or len(set(names)) < len(known):
            raise ValueError(f"a list is names with commas, none of them twice, such as train,val, got {value!r}")
        return super().__new__(cls, names)

    def __str__(self) -> str:
        return ",".join(self)


def split_model_file(spec: str) -> tuple[str, str] | None:
    """Return the file and the name of a model that is given as FILE.py:NAME, or None for any other model.

    >>> split_model_file("nets/unet.py:build"), split_model_file("unet.py"), split_model_file("timm:resnet18")
    (('nets/unet.py', 'build'), ('unet.py', ''), None)
    """
    if spec.endswith(".py"):
        return spec, ""
    file, _, name = spec.rpartition(":")
    return (file, name) if file.endswith(".py") else None


def parse_paths(value: Any) -> Any:
    """Return a number of paths from 1 to 255, or `auto`.

    >>> parse_paths("4"), parse_paths("auto")
    (4, 'auto')
    """
    if value == "auto":
        return value
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = 0
    if isinstance(value, bool) or (number != value and not isinstance(value, str)) or not 1 <= number <= 255:
        raise ValueError(f"paths is auto or a number from 1 to 255, got {value!r}")
    return number


def parse_groups(value: Any) -> Any:
    """Return class groups from `auto`, `small=eye,brow/large=skin,hair` (names are optional), JSON, a list or a dict.

    >>> parse_groups("small=eye,brow/large=skin"), parse_groups("eye,brow/skin"), parse_groups("auto")
    ({'small': ['eye', 'brow'], 'large': ['skin']}, [['eye', 'brow'], ['skin']], 'auto')
    """
    if not isinstance(value, str):
        groups = value
    elif value == "auto":
        return value
    else:
        try:
            groups = json.loads(value)
        except (json.JSONDecodeError, RecursionError):
            parts = [part.rpartition("=") for part in value.split("/")]
            lists = [[name.strip() for name in names.split(",")] for _, _, names in parts]
            names = [name.strip() for name, _, _ in parts]
            groups = dict(zip(names, lists, strict=True)) if all(names) else lists
    members = list(groups.values()) if isinstance(groups, dict) else groups
    if not isinstance(members, list) or not all(
        isinstance(group, list) and group and all(isinstance(name, str) and name for name in group) for group in members
    ):
        raise ValueError(f"class groups are auto or lists of names, such as small=eye,brow/large=skin, got {value!r}")
    return groups


def parse_class_weights(value: Any) -> str | tuple[float, ...] | None:
    """Return class weights from `none`, `balanced`, `1,2.5,0.5` or a list of numbers.

    >>> parse_class_weights("1,2.5"), parse_class_weights("balanced"), parse_class_weights("none")
    ((1.0, 2.5), 'balanced', None)
    """
    if value in (None, "none", "balanced"):
        return "balanced" if value == "balanced" else None
    try:
        weights = tuple(float(part) for part in (value.split(",") if isinstance(value, str) else value))
    except (TypeError, ValueError, OverflowError):
        weights = ()
    if not weights or not all(math.isfinite(weight) and weight >= 0 for weight in weights):
        raise ValueError(f"class weights are none, balanced, or one number a class, such as 1,2.5,0.5, got {value!r}")
    return weights


def positive(name: str, value: Any) -> None:
    """Raise ValueError unless a number, or each of a tuple, is in (0, 2^31).

    >>> positive("epochs", 3)
    >>> positive("dilations", (2, 0))
    Traceback (most recent call last):
    ValueError: dilations must be positive, got 0
    """
    for number in value if isinstance(value, tuple) else [value]:
        if number is None or not number > 0:
            raise ValueError(f"{name} must be positive, got {number}")
        if not number < _LIMIT:
            raise ValueError(f"{name} must be less than {_LIMIT}, got {number}")


def not_negative(name: str, value: Any) -> None:
    """Raise ValueError if a number, or one of a tuple, is negative."""
    for number in value if isinstance(value, tuple) else [value]:
        if number is None or not number >= 0:
            raise ValueError(f"{name} must not be negative, got {number}")


def port_number(name: str, value: Any) -> None:
    """Raise ValueError unless a number is one of a port, or 0 for any free one."""
    if not 0 <= value <= 65535:
        raise ValueError(f"{name} must be from 0 to 65535, got {value}")


def loggers(name: str, value: Any) -> None:
    """Raise ValueError unless all names are loggers."""
    known = ("tensorboard", "csv", "wandb", "mlflow")
    if unknown := [each for each in value if each not in known]:
        raise ValueError(f"{name} must be among {', '.join(known)}, got {', '.join(unknown)}")


def share(name: str, value: Any) -> None:
    """Raise ValueError unless a number is in (0, 1]."""
    positive(name, value)
    if value > 1:
        raise ValueError(f"{name} must be at most 1, got {value}")


def below_one(name: str, value: Any) -> None:
    """Raise ValueError unless a number is in [0, 1)."""
    if value is None or not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value}")


def ascending(name: str, value: Any) -> None:
    """Raise ValueError unless a range is positive and its low end comes first."""
    if not 0 < value[0] <= value[1]:
        raise ValueError(f"{name} must be LOW,HIGH with 0 < LOW <= HIGH, got {tuple(value)}")
