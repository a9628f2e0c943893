"""What every config is made of: groups of options that check themselves. Imports nothing but Python."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar, TypeVar

_AnyConfig = TypeVar("_AnyConfig", bound="Config")


def option(
    default: Any, *, parse: Callable[[Any], Any] | None = None, check: Callable[[str, Any], None] | None = None
) -> Any:
    """Return a dataclass field whose value is read and checked when its group is made.

    Args:
        default: its default; None stands for no value, which is neither read nor checked.
        parse: makes the value from text or from plain types; raises ValueError.
        check: raises ValueError, with the option's name, if the value is out of range.
    """
    return dataclasses.field(default=default, metadata={"parse": parse, "check": check})


class Options:
    """A group of options: base of dataclasses whose fields are flags, and whose fields' docstrings are their help."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            parse, check = field.metadata.get("parse"), field.metadata.get("check")
            if value is None and field.default is None:
                continue
            if parse is not None:
                value = parse(value)
                setattr(self, field.name, value)
            if check is not None:
                check(field.name, value)


class Config:
    """A config made of groups: base of dataclasses whose fields are groups of options, or other configs.

    It is built from the flat names of all options, as flags and YAML files give them.

    Raises:
        TypeError: if an option is missing or unknown.
        ValueError: if a value is out of range, or does not fit another one.
    """

    defaults: ClassVar[Mapping[str, Any]] = {}
    """Defaults that differ from those of the groups."""
    fixed: ClassVar[Collection[str]] = ()
    """Options that have no flag, since the command decides them."""

    def __init__(self, **options: Any) -> None:
        values = {**self.defaults, **options}
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            kind: Any = field.type
            names = [name for group in _groups(field.name, kind).values() for name in _names(group)]
            setattr(self, field.name, kind(**{name: values.pop(name) for name in names if name in values}))
        if values:
            raise TypeError(f"there is no option {', '.join(values)}")
        self.check()

    def check(self) -> None:
        """Raise ValueError if options of several groups do not fit together."""

    @classmethod
    def groups(cls) -> dict[str, type[Options]]:
        """Return the groups by name, those of inner configs included."""
        fields = dataclasses.fields(cls)  # type: ignore[arg-type]
        return {name: group for field in fields for name, group in _groups(field.name, field.type).items()}

    def flat(self) -> dict[str, Any]:
        """Return all values by the options' names."""
        values: dict[str, Any] = {}
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            part = getattr(self, field.name)
            values |= part.flat() if isinstance(part, Config) else {name: getattr(part, name) for name in _names(part)}
        return values

    def plain(self) -> dict[str, Any]:
        """Return all values but `resume` in plain types, as YAML files and checkpoints hold them."""
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in self.flat().items()}
        values.pop("resume", None)
        return values

    def replace(self: _AnyConfig, **options: Any) -> _AnyConfig:
        """Return the same config with other values of some options."""
        return type(self)(**{**self.flat(), **options})


def _groups(name: str, kind: Any) -> dict[str, type[Options]]:
    return kind.groups() if issubclass(kind, Config) else {name: kind}


def _names(group: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(group)]
