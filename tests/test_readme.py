"""Every Python block of the README runs; every command is parsed, and run on a few of the photographs it names."""

import re
import shlex
from pathlib import Path

import pytest

from rfield.cli import COMMANDS, main, parse

README = (Path(__file__).parents[1] / "README.md").read_text()
LINKS = re.findall(r"\]\(([^)#]+)", README)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[list[str]]:
    lines = "\n".join(blocks("sh")).splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith("rfield ")]


def test_python_blocks_run_one_after_the_other() -> None:
    namespace: dict[str, object] = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), namespace)
    assert len(blocks("python")) >= 2


def test_commands_are_parsed() -> None:
    assert {words[0] for words in commands()} <= set(COMMANDS)
    assert len(commands()) >= 3
    for words in commands():
        parse(words)


@pytest.mark.parametrize("link", LINKS)
def test_links_lead_somewhere(link: str) -> None:
    assert (Path(__file__).parents[1] / link).exists()


def test_the_two_set_up_commands_are_the_makefile_s() -> None:
    targets = re.findall(r"^make (\w+)", "\n".join(blocks("sh")), re.MULTILINE)
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    assert targets == ["demo", "test"]
    assert all(f"\n{target}: " in makefile for target in targets)


@pytest.mark.shared
def test_commands_run_on_a_few_photographs(
    shared: Path, small_msrc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for words in commands():
        words = [
            word.replace("../shared/data/msrc21_voc", str(small_msrc)).replace("../shared", str(shared))
            for word in words
        ]
        if words[0] == "train":
            words[words.index("--epochs") + 1] = "2"
        main(words)
    shown = capsys.readouterr().out
    assert shown.count("mIoU") == 2
    assert len(list((tmp_path / "out").glob("*.png"))) == len(list((small_msrc / "JPEGImages").iterdir()))
