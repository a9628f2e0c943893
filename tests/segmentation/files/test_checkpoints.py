"""Checkpoints that survive a kill and damage."""

import contextlib
import io
import os
from pathlib import Path

import pytest
import torch

from rfield.segmentation.files.checkpoints import (
    checkpoint_error,
    find_checkpoint,
    settle_checkpoints,
    write_checkpoint,
)

STATE = {"state_dict": {"weight": torch.arange(1000.0)}, "epoch": 3}


def save(path: Path, epoch: int) -> None:
    buffer = io.BytesIO()
    torch.save({**STATE, "epoch": epoch}, buffer)
    write_checkpoint(path, buffer.getbuffer())


def epoch_of(path: Path) -> int:
    epoch: int = torch.load(path, weights_only=True)["epoch"]
    return epoch


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("links", [True, False])
def test_the_last_two_are_kept(tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not links:

        def refuse(*paths: Path) -> None:
            raise OSError("no links here")

        monkeypatch.setattr(os, "link", refuse)
    for epoch in range(4):
        save(tmp_path / "last.ckpt", epoch)
    assert names(tmp_path) == ["last.ckpt", "previous.ckpt"]
    assert [epoch_of(tmp_path / name) for name in names(tmp_path)] == [3, 2]
    save(tmp_path / "best.ckpt", 1)
    assert epoch_of(tmp_path / "previous.ckpt") == 2


@pytest.mark.parametrize("links", [True, False])
def test_a_kill_between_any_two_calls_leaves_a_whole_checkpoint(
    tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = ("fsync", "link", "replace")
    real = {name: getattr(os, name) for name in calls}

    class Kill(BaseException):
        pass

    for cut in range(9):
        folder = tmp_path / str(cut)
        folder.mkdir()
        save(folder / "last.ckpt", 0)
        save(folder / "last.ckpt", 1)
        left = [cut]
        with monkeypatch.context() as patch:
            for name in calls:

                def call(*args: object, name: str = name, left: list[int] = left) -> None:
                    if left[0] == 0:
                        raise Kill
                    left[0] -= 1
                    if name == "link" and not links:
                        raise OSError("no links here")
                    real[name](*args)

                patch.setattr(os, name, call)
            with contextlib.suppress(Kill):
                save(folder / "last.ckpt", 2)
        settled = settle_checkpoints(folder)
        assert settled == folder / "last.ckpt"
        assert checkpoint_error(settled) is None
        assert epoch_of(settled) in (1, 2)
        save(settled, 3)
        assert epoch_of(settled) == 3
        assert epoch_of(folder / "previous.ckpt") in (1, 2)


def test_every_flipped_byte_of_a_record_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    save(path, 0)
    whole = path.read_bytes()
    assert checkpoint_error(path) is None
    start = whole.index(STATE["state_dict"]["weight"].numpy().tobytes())
    for place in (start, start + 1234, start + 3999):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert "checksum" in str(checkpoint_error(path))
    for length in (0, 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert checkpoint_error(path)
    path.write_bytes(whole[:start] + bytes(4000) + whole[start + 4000 :])
    assert "checksum" in str(checkpoint_error(path))


def test_a_torn_one_is_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last, previous = tmp_path / "last.ckpt", tmp_path / "previous.ckpt"
    assert settle_checkpoints(tmp_path) is None
    save(last, 0)
    assert find_checkpoint(tmp_path) == last
    save(last, 1)
    assert find_checkpoint(tmp_path) == last
    assert capsys.readouterr().err == ""
    os.truncate(last, last.stat().st_size // 2)
    (tmp_path / ".last.1.partial.ckpt").write_bytes(b"half")
    assert find_checkpoint(tmp_path) == previous
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "last.ckpt cannot be used" in error
    assert settle_checkpoints(tmp_path) == last
    assert names(tmp_path) == ["last.ckpt"]
    assert epoch_of(last) == 0
    last.rename(previous)
    assert find_checkpoint(tmp_path) == previous
    assert "it is missing" in capsys.readouterr().err
    assert find_checkpoint(tmp_path, "best") == tmp_path / "best.ckpt"


def test_where_both_are_torn_the_last_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last, previous = tmp_path / "last.ckpt", tmp_path / "previous.ckpt"
    save(last, 0)
    save(last, 1)
    for path in (last, previous):
        os.truncate(path, path.stat().st_size // 2)
    assert find_checkpoint(tmp_path) == last
    assert settle_checkpoints(tmp_path) == last
    assert names(tmp_path) == ["last.ckpt", "previous.ckpt"]
    assert capsys.readouterr().err == "", "nothing is said of a checkpoint that is not used"
    last.unlink()
    assert find_checkpoint(tmp_path) == last
    assert settle_checkpoints(tmp_path) is None


def test_a_torn_previous_is_no_help_and_no_harm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last, previous = tmp_path / "last.ckpt", tmp_path / "previous.ckpt"
    save(last, 0)
    previous.write_bytes(b"torn")
    assert find_checkpoint(tmp_path) == last
    assert find_checkpoint(tmp_path, "best") == tmp_path / "best.ckpt"
    assert capsys.readouterr().err == ""
