"""The parser of the command line: flags are the fields of the commands' configs, and a mistake is one line.

Imports no torch, so that `rfield --help` answers at once.
"""

import argparse
import difflib
import importlib.util
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from jsonargparse import ActionYesNo, ArgumentParser, DefaultHelpFormatter, get_loader, set_loader, set_parsing_settings
from jsonargparse.typing import register_type

from rfield import __version__
from rfield.segmentation.config.options import Config, Options
from rfield.segmentation.config.values import Branches, Integers, Names, Numbers, Range, Size, split_model_file
from rfield.segmentation.files.untrusted import check_yaml

# Each command's config and function; the function's docstring is the command's help.
Commands = Mapping[str, tuple[type[Config] | type[Options], Callable[[Any], None]]]

_NUMBERS = {"int": "whole number", "float": "number"}
_load_yaml = get_loader("yaml")
# Prints a script that completes commands and flags in a shell.
_COMPLETION = "--print_completion"


def _load_checked_yaml(text: str) -> Any:
    """Refuse a YAML file that overflows the parser's stack or grows without bound."""
    try:
        check_yaml(text)
        return _load_yaml(text)
    except Exception as error:  # A value that does not fit its tag raises a dozen different types.
        raise ValueError(f"not valid YAML: {error}") from error


set_loader("yaml", _load_checked_yaml, exceptions=(ValueError,))
set_parsing_settings(docstring_parse_attribute_docstrings=True, add_print_completion_argument=True)
for _kind in (Size, Range, Integers, Numbers, Branches, Names):
    register_type(_kind, list)


def parse(commands: Commands, words: Sequence[str]) -> tuple[str, Any]:
    """Return the name of a command and its config, from the words of the command line.

    A mistake is one line on stderr and exit status 2.
    """
    command = words[0] if words and words[0] in commands else None
    completion = command is None and any(word.startswith(_COMPLETION) for word in words)
    if completion and any("shtab" in word for word in words) and importlib.util.find_spec("shtab") is None:
        print(f"rfield: {_COMPLETION} needs the package shtab: pip install shtab", file=sys.stderr)
        sys.exit(2)
    parser, options = make_parser(commands, command, completion)
    try:
        values = parser.parse_args(list(words))[command or ""].as_dict()
        del values["config"]
        _refuse_model_files(values, words)
        return command or "", commands[command or ""][0](**values)
    except (_MistakeError, ValueError, argparse.ArgumentTypeError) as error:
        page = "rfield" if command is None else f"rfield {command}"
        message = _plain_message(str(error), commands)
        hint = _did_you_mean(message, words, commands, options)
        print(f"{page}: {message}{hint} (see {page} --help)", file=sys.stderr)
        sys.exit(2)


def _refuse_model_files(values: Mapping[str, Any], words: Sequence[str]) -> None:
    """Raise ValueError for a model in a Python file that the command line itself does not name, since it runs code."""
    for key in ("model", "against"):
        value = values.get(key)
        is_file = isinstance(value, str) and split_model_file(value) is not None
        if is_file and not any(word == value or word.endswith(f"={value}") for word in words):
            raise ValueError(
                f"{key} {value} in a config file would run that Python file: give it on the command line itself"
            )


def make_parser(commands: Commands, command: str | None, every: bool = False) -> tuple[ArgumentParser, list[str]]:
    """Return the parser of the whole command line, and the flags of one command, or of rfield itself for None.

    The other commands have a name and a help text, and no flags, unless `every` command is wanted.
    """
    parser = _Parser(
        prog="rfield",
        allow_abbrev=False,
        description="Semantic segmentation networks that learn their receptive field.",
    )
    parser.add_argument(
        "--version", action="version", version=f"rfield {__version__}", help="Show the version and exit."
    )
    subcommands = parser.add_subcommands(
        title="commands", description="`rfield COMMAND --help` shows the options of a command.", metavar="COMMAND"
    )
    flags = list(parser._option_string_actions)
    for name, (config_class, function) in commands.items():
        own = _Parser(allow_abbrev=False, description=function.__doc__)
        if every or name == command:
            own.add_argument("--config", action="config", help="A .yaml file with any of these values.")
            _add_options(own, config_class)
            flags = list(own._option_string_actions)
        subcommands.add_subcommand(name, own, help=function.__doc__)
        own.prog = f"rfield {name}"
    return parser, flags


def _add_options(parser: ArgumentParser, config_class: type[Config] | type[Options]) -> None:
    if not issubclass(config_class, Config):
        parser.add_class_arguments(config_class, as_group=False, as_positional=True)
        return
    fixed = set(config_class.fixed)
    for name, group in config_class.groups().items():
        parser.add_argument_group(name, group.__doc__).add_class_arguments(group, as_group=False, skip={*fixed})
    parser.set_defaults({name: value for name, value in config_class.defaults.items() if name not in fixed})


class _MistakeError(Exception):
    """A command line that cannot be understood."""


class _Help(DefaultHelpFormatter):
    """Help without Python's words for types, and without a default where the text says what none means."""

    def _get_type_str(self, action: argparse.Action) -> str | None:
        text = (super()._get_type_str(action) or "").replace(" | null", "")
        chosen = re.fullmatch(r"(?:Optional\[)?Literal\[(.*?)\]+", text)
        if chosen:
            return None if action.choices or action.metavar else f"one of {chosen[1].replace(chr(39), '')}"
        return _NUMBERS.get(text)

    def _get_help_string(self, action: argparse.Action) -> str:
        text, place = super()._get_help_string(action), "default: %(default)s"
        if action.default is None:
            return text.replace(f", {place}", "").replace(f" ({place})", "")
        if isinstance(action, ActionYesNo):
            return text.replace(place, f"default: {'yes' if action.default else 'no'}")
        return text


class _Parser(ArgumentParser):
    """A parser whose flags have hyphens, whose switches are pairs, and which leaves mistakes to `parse`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=_Help, **options)

    def add_argument(self, *names: str, **options: Any) -> Any:  # Groups have the same: jsonargparse copies it.
        kind = getattr(options.get("action"), "_typehint", options.get("type"))
        if kind in (bool, bool | None):
            options = {key: value for key, value in options.items() if key not in ("type", "metavar")}
            options["action"] = ActionYesNo(yes_prefix="", no_prefix="no-")
        names = tuple(re.sub("(?<!^--print)(?<=.)_", "-", name) if name[0] == "-" else name for name in names)
        return super().add_argument(*names, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise _MistakeError(message) from ex


def _plain_message(message: str, commands: Commands) -> str:
    """Return the parser's message in one line, without Python's words for types."""
    message = " ".join(message.split())
    for name in commands:
        message = message.replace(f" {name}.", " ")
    key = r'^Parser key "([\w.]+)": '
    # A union of types lists the errors of all: that of our own type says what to give.
    union = r"Does not validate against any .*"
    message = re.sub(rf"{key}(?:{union}?)?Not of type \w+: (.*?)(?: - Expected a .*)?$", r"\1: \2", message)
    subtypes = r"Subtypes: \[(.*?)(?:, NoneType)?\] Errors: .* Given value: (.*)$"
    message = re.sub(rf"{key}{union} {subtypes}", r"\1: expected \2, got \3", message)
    message = re.sub(rf"{key}Expected an? (.*?)\. Got value: ", r"\1: expected \2, got ", message)
    message = re.sub(r"^Parser key \"config\": File does not exist: '(.*)'", r"there is no config file \1", message)
    message = re.sub(r'^expected "subcommand" .* not provided\.$', f"give a command: {', '.join(commands)}", message)
    message = re.sub(r"<class '(\w+)'>", r"\1", message)
    message = re.sub(r"expected (int|float)\b", lambda found: f"expected a {_NUMBERS[found[1]]}", message)
    return re.sub(r"(?:typing\.)?Literal\[(.*?)\]", r"one of \1", message.replace(", NoneType", ""))


def _did_you_mean(message: str, words: Sequence[str], commands: Commands, flags: Sequence[str]) -> str:
    """Return the end of a message: the command, flags or key that a mistyped one is most like."""
    if words and words[0] in commands:
        known = list(flags)
        given = [word.partition("=")[0] for word in words[1:] if re.match("--?[A-Za-z]", word)]
        given += re.findall(r"does not accept option '([\w-]+)'", message)
        wanted = [f"--{name.lstrip('-').lower().replace('_', '-')}" for name in given if name not in known]
    else:
        known = [*commands, *flags]
        wanted = [words[0].lower().replace("_", "-")] if words else []
    near = [match for name in wanted for match in difflib.get_close_matches(name, known, n=1)]
    return f"; did you mean {' and '.join(near)}?" if near else ""
