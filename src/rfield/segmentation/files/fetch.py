"""Download files so that a broken download goes on where it ended, and unpack archives of strangers."""

import hashlib
import http.client
import tarfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_CHUNK = 2**20
_TRIES = 3
_TIMEOUT = 60  # seconds without a byte
_GROWTH = 20  # maximum ratio of an archive's contents to its size
_SMALL = 2**30  # bytes that are never too many
_MB = 10**6


@dataclass(frozen=True)
class RemoteFile:
    """A file to download.

    Attributes:
        url: its address.
        checksum: `ALGORITHM:HEXADECIMAL` as its source publishes it; "" if it publishes none.
    """

    url: str
    checksum: str = ""

    @property
    def name(self) -> str:
        """Return the last part of the address."""
        return self.url.rpartition("/")[2]


def fetch(file: RemoteFile, folder: Path, progress: Callable[[int, int], None]) -> Path:
    """Download a file into a folder, or go on with a part that an earlier call has left.

    Args:
        file: what to download.
        folder: where to; the part is called `NAME.part`.
        progress: called with the numbers of MB done and of all.

    Returns:
        The complete file, whose checksum is right if there is one.

    Raises:
        OSError: the server cannot be reached, the download breaks off, or the checksum is wrong.
    """
    target = folder / file.name
    if target.is_file():
        return target
    part = folder / f"{file.name}.part"
    for attempt in range(1, _TRIES + 1):
        try:
            total = _continue(file.url, part, progress)
        except (OSError, http.client.HTTPException) as error:
            problem = str(getattr(error, "reason", "") or error or type(error).__name__)
            if getattr(error, "code", 500) < 500 or attempt == _TRIES:
                raise OSError(f"{file.url} cannot be downloaded: {problem}; run the command again to go on") from error
            continue
        size = part.stat().st_size
        if total is None or size == total:
            break
        if attempt == _TRIES:
            raise OSError(f"{file.url} broke off after {size:,} of {total:,} bytes; run the command again to go on")
    _check(part, file)
    part.rename(target)
    return target


def _continue(url: str, part: Path, progress: Callable[[int, int], None]) -> int | None:
    """Append what a part lacks, and return the size of the whole file in bytes, if the server says it."""
    have = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        answer = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        return have  # Nothing is lacking; the checksum or the archive shows whether it is right.
    with answer:
        if answer.status != http.HTTPStatus.PARTIAL_CONTENT:
            have = 0  # The server sends the whole file.
        length = answer.headers.get("Content-Length")
        total = have + int(length) if length else None
        if not have:
            part.unlink(missing_ok=True)
        with part.open("ab") as out:
            done = have
            while chunk := answer.read(_CHUNK):
                out.write(chunk)
                done += len(chunk)
                progress(done // _MB, (total or done) // _MB)
    return total


def _check(part: Path, file: RemoteFile) -> None:
    algorithm, _, wanted = file.checksum.partition(":")
    if not wanted:
        return
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with part.open("rb") as content:
        while chunk := content.read(_CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != wanted:
        part.unlink()
        raise OSError(
            f"{file.url} arrived damaged, or has changed: its {algorithm} is {digest.hexdigest()}, expected {wanted}; "
            "it is removed, run the command again to download it anew"
        )


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a .zip, .tar or .tar.gz archive; nothing is written outside of the folder.

    Raises:
        OSError: the archive is damaged, leads out of the folder, or would grow without bound. The message names it.
    """
    most = max(_SMALL, _GROWTH * archive.stat().st_size)
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as packed:
                _refuse_large(sum(entry.file_size for entry in packed.infolist()), most)
                packed.extractall(folder)  # It strips what would lead out, and compares each file's CRC.
        else:
            with tarfile.open(archive) as packed_tar:
                done = 0
                for entry in packed_tar:
                    done += entry.size
                    _refuse_large(done, most)
                    packed_tar.extract(entry, folder, filter="data")
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, tarfile.TarError, RuntimeError, zlib.error) as error:
        raise OSError(f"{archive} cannot be unpacked: {error}; remove it and run the command again") from error


def _refuse_large(size: int, most: int) -> None:
    if size > most:
        raise ValueError(f"it would grow to more than {most:,} bytes")
