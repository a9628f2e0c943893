"""Files that survive a kill, a full disk and damage."""

import contextlib
import errno
import os
import re
from pathlib import Path

import pytest
import torch

from rfield.segmentation.files.checkpoints import (
    damage,
    find_checkpoint,
    settle_checkpoints,
    write_error,
    written_whole,
)

STATE = {"state_dict": {"weight": torch.arange(1000.0)}, "epoch": 3}


def save(path: Path, epoch: int) -> None:
    with written_whole(path) as file:
        torch.save({**STATE, "epoch": epoch}, file)


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


def test_the_order_is_write_sync_rename_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(handle: int) -> None:
        done.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{handle}')).name}")
        real_fsync(handle)

    def replace(source: Path, target: Path) -> None:
        done.append(f"{Path(source).name} -> {Path(target).name}")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    save(tmp_path / "best.ckpt", 0)
    assert done == ["fsync best.ckpt.partial", "best.ckpt.partial -> best.ckpt", f"fsync {tmp_path.name}"]


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
        assert damage(settled) is None
        assert epoch_of(settled) in (1, 2)
        save(settled, 3)
        assert epoch_of(settled) == 3
        assert epoch_of(folder / "previous.ckpt") in (1, 2)


def test_every_flipped_byte_of_a_record_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    save(path, 0)
    whole = path.read_bytes()
    assert damage(path) is None
    start = whole.index(STATE["state_dict"]["weight"].numpy().tobytes())
    for place in (start, start + 1234, start + 3999):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert "checksum" in str(damage(path))
    for length in (0, 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert damage(path)
    path.write_bytes(whole[:start] + bytes(4000) + whole[start + 4000 :])
    assert "checksum" in str(damage(path))


def test_a_torn_one_is_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last, previous = tmp_path / "last.ckpt", tmp_path / "previous.ckpt"
    assert settle_checkpoints(tmp_path) is None
    save(last, 0)
    assert find_checkpoint(tmp_path) == last
    save(last, 1)
    assert find_checkpoint(tmp_path) == last
    assert capsys.readouterr().err == ""
    os.truncate(last, last.stat().st_size // 2)
    (tmp_path / "last.ckpt.partial").write_bytes(b"half")
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


def test_of_two_torn_ones_the_last_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last, previous = tmp_path / "last.ckpt", tmp_path / "previous.ckpt"
    for epoch in range(2):
        save(last, epoch)
    for path in (last, previous):
        os.truncate(path, path.stat().st_size // 2)
    assert find_checkpoint(tmp_path) == last
    assert settle_checkpoints(tmp_path) == last
    assert names(tmp_path) == ["last.ckpt", "previous.ckpt"]
    last.unlink()
    assert find_checkpoint(tmp_path) == last
    assert settle_checkpoints(tmp_path) is None
    assert capsys.readouterr().err == ""


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


def write_half(path: Path) -> None:
    with written_whole(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt


def test_an_interruption_leaves_nothing_half_written(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    save(path, 0)
    with pytest.raises(KeyboardInterrupt):
        write_half(path)
    assert names(tmp_path) == ["last.ckpt"]
    assert epoch_of(path) == 0


@pytest.mark.parametrize(
    ("number", "name", "end"),
    [
        (errno.ENOSPC, "last.ckpt", r": make room on the disk, then go on \(rfield train: with --resume\)$"),
        (errno.EDQUOT, "factor.csv", r": make room on the disk, then go on \(rfield train: with --resume\)$"),
        (errno.EFBIG, "metrics.json", r": make room on the disk$"),
        (errno.EACCES, "last.ckpt", r"; as it was$"),
    ],
)
def test_what_to_do_about_a_file_that_cannot_be_written(number: int, name: str, end: str) -> None:
    error = write_error(Path(name), OSError(number, os.strerror(number)), "as it was")
    with pytest.raises(OSError, match=rf"^{name} cannot be written: {os.strerror(number)}; as it was"):
        raise error
    assert re.search(end, str(error))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    save(path, 0)
    (tmp_path / "last.ckpt.partial").symlink_to("/dev/full")
    message = r"last.ckpt cannot be written: No space left .* untouched: make room.*--resume"
    with pytest.raises(OSError, match=message), written_whole(path) as file:
        file.write(b"x" * 100_000)
    assert names(tmp_path) == ["last.ckpt"]
    assert epoch_of(path) == 0
    with pytest.raises(OSError, match=r"nothing stood there before$"), written_whole(tmp_path / "missing/best.ckpt"):
        pass
