"""YAML, JSON and archives that a stranger may have made: plain values, or an error that names the file."""

import json
import zipfile
from pathlib import Path
from typing import Any

_DEEPEST = 50


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is not JSON, or nested too deeply.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged or not JSON: {error}") from error


def read_yaml(path: Path) -> Any:
    """The value in a YAML file; of its tags none makes an object.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is not YAML, has an alias, or is nested more than 50 deep.
    """
    import yaml  # Local: checkpoints and the command line's help do without it.

    try:
        text = path.read_text(encoding="utf-8")
        check_yaml(text)
        return yaml.safe_load(text)
    except OSError:
        raise
    except Exception as error:  # A value that does not fit its tag raises a dozen different types.
        raise ValueError(f"{path} is not valid YAML: {error}") from error


def check_yaml(text: str) -> None:
    """Raises ValueError for YAML that takes a parser's stack, or grows when it is written out.

    >>> check_yaml("a: [1, 2]")
    >>> check_yaml("a: &all [1, 2]\\nb: [*all, *all]")
    Traceback (most recent call last):
    ValueError: aliases, such as *all, are not read: write the value itself
    """
    import yaml

    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"aliases, such as *{event.anchor}, are not read: write the value itself")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            raise ValueError(f"it is nested more than {_DEEPEST} deep")


def swells(path: Path) -> bool:
    """Whether a file is a zip archive that holds more than the file has bytes; PyTorch's records are never packed."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return sum(record.file_size for record in archive.infolist()) > path.stat().st_size
