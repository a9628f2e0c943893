"""Files that are written whole or not at all, whatever interrupts."""

import errno
import os
import re
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rfield.segmentation.files.atomic import atomic_write, write_error, write_text, write_weights


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
    write_text(tmp_path / "best.ckpt", "whole")
    partial = f".best.{os.getpid()}.partial.ckpt"
    assert done == [f"fsync {partial}", f"{partial} -> best.ckpt", f"fsync {tmp_path.name}"]


def write_half(path: Path) -> None:
    with atomic_write(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt


def test_an_interruption_leaves_nothing_half_written(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        write_half(path)
    assert [each.name for each in tmp_path.iterdir()] == ["last.ckpt"]
    assert path.read_bytes() == b"old"


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
def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    path.write_bytes(b"old")
    (tmp_path / f".last.{os.getpid()}.partial.ckpt").symlink_to("/dev/full")
    message = r"last.ckpt cannot be written: No space left .* untouched: make room.*--resume"
    with pytest.raises(OSError, match=message), atomic_write(path) as file:
        file.write(b"x" * 100_000)
    assert [each.name for each in tmp_path.iterdir()] == ["last.ckpt"]
    assert path.read_bytes() == b"old"
    with pytest.raises(OSError, match=r"no file was there before$"), atomic_write(tmp_path / "missing/best.ckpt"):
        pass


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_written_and_stays_a_pipe(tmp_path: Path) -> None:
    pipe = tmp_path / "scores.json"
    os.mkfifo(pipe)
    found: list[str] = []
    reader = threading.Thread(target=lambda: found.append(pipe.read_text()))
    reader.start()
    write_text(pipe, "{}")
    reader.join()
    assert found == ["{}"]
    assert pipe.is_fifo()
    assert [each.name for each in tmp_path.iterdir()] == ["scores.json"]


def test_weights_may_be_read_by_whom_other_files_may(tmp_path: Path) -> None:
    write_weights(tmp_path / "own.safetensors", {"a": torch.ones(3, 2).t()})
    (tmp_path / "plain").write_bytes(b"")
    modes = [(tmp_path / name).stat().st_mode for name in ("own.safetensors", "plain")]
    assert modes[0] == modes[1]
    assert load_file(tmp_path / "own.safetensors")["a"].tolist() == [[1, 1, 1], [1, 1, 1]]
