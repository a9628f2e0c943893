"""Locks: one process at a time writes to a folder."""

import subprocess
import sys
from pathlib import Path

import pytest

from rfield.segmentation.files.lock import only_writer


def test_an_empty_folder_that_the_lock_made_goes_with_it(tmp_path: Path) -> None:
    made, filled, there = tmp_path / "made", tmp_path / "filled", tmp_path / "there"
    there.mkdir()
    with only_writer(made), only_writer(filled), only_writer(there):
        (filled / "result").write_text("kept")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["filled", "there"]
    assert [path.name for path in filled.iterdir()] == ["result"]


def test_a_lock_whose_owner_has_died_is_taken(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("1 on another computer")
    refused = pytest.raises(BlockingIOError, match=r"is being written by process \d+: wait until it has ended")
    with only_writer(tmp_path), refused, only_writer(tmp_path):
        pass
    with only_writer(tmp_path):
        pass


def test_another_process_is_named(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from rfield.segmentation.files.lock import only_writer
with only_writer(Path({str(tmp_path)!r})):
    print("held", flush=True)
    input()
"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(BlockingIOError, match=rf"written by process {other.pid} on "), only_writer(tmp_path):
            pass
        other.kill()
    with only_writer(tmp_path):
        pass
