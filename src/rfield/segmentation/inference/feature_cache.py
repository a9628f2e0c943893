"""Compute a backbone's features once and keep them in a memory-mapped file, so that a head trains in minutes."""

import hashlib
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from rfield.segmentation.conventions import IGNORE_INDEX
from rfield.segmentation.data.dataset import ParsingDataset, exchange_classes
from rfield.segmentation.data.skipping import SkippingDataset
from rfield.segmentation.data.transforms import evaluation_transform
from rfield.segmentation.files.atomic import write_json, write_text
from rfield.segmentation.files.lock import locked
from rfield.segmentation.files.untrusted import read_json
from rfield.segmentation.models import ParsingNetwork

_FORMAT = 3
_HINT = "choose another folder (--cache), or train without --freeze-backbone"
_FLUSH_EVERY = 16
_FILES = ("features.npy", "masks.npy", "sizes.npy", "meta.json")


def default_cache_folder() -> Path:
    """Return `$XDG_CACHE_HOME/rfield`, or `~/.cache/rfield`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rfield"


def image_features(network: ParsingNetwork, image: Tensor) -> Tensor:
    """Compute the features of one image at the cache's precision, so that cached and fresh features are equal.

    Args:
        network: in eval mode; only its backbone and its padding are used.
        image: Tensor[3, H, W], normalised.

    Returns:
        float16 Tensor[C, h, w], on the network's device.

    >>> from rfield.segmentation.models import small_cnn
    >>> image_features(small_cnn(4).eval(), torch.rand(3, 30, 33)).shape
    torch.Size([32, 9, 9])
    """
    batch = image[None].to(next(network.backbone.parameters()).device).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        features: Tensor = network.backbone(network.pad(batch))
    return features[0].half()


class CachedFeatures(Dataset[tuple[Tensor, Tensor]]):
    """Features and masks of a data set's images and their mirror images, padded to one size, read from a file.

    Indexed by (epoch, index): features float16 [C, h, w] and mask int64 [H, W] of the padded image, 255 outside the
    image. Seed, epoch and index decide whether it is mirrored. A mirrored mask exchanges the data set's
    `mirrored_classes`.

    Args:
        folder: the folder that `cache_features` has written.
        seed: seed of the mirroring.
        flip: mirror every second sample.

    Attributes:
        sizes: (H, W) of every image, without padding.
        skipped: the images that could not be read and were replaced by others.
    """

    def __init__(self, folder: Path, seed: int = 0, flip: bool = True) -> None:
        try:
            arrays = [np.lib.format.open_memmap(folder / name, mode="r") for name in _FILES[:3]]
            meta = read_json(folder / "meta.json")
            self.skipped: list[int] = meta.get("skipped", [])
            self._mirrored_classes = meta["mirrored_classes"]
            self.sizes: list[tuple[int, int]] = [(h, w) for h, w in arrays[2].tolist()]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{folder} is not a feature cache: {error}; remove it") from error
        self._features, self._masks, _ = arrays
        self.seed = seed
        self.flip = flip

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        epoch, index = key
        flipped = self.flip and np.random.default_rng([self.seed, epoch, index]).random() < 0.5
        height, width = self.sizes[index]
        features = torch.from_numpy(np.array(self._features[index, int(flipped)]))
        mask = torch.from_numpy(np.array(self._masks[index])).long()
        if flipped:
            mask[:height, :width] = exchange_classes(mask[:height, :width].flip(1), self._mirrored_classes)
        return features, mask

    def plain(self, index: int) -> tuple[Tensor, Tensor]:
        """Return the features float16 [C, h, w], not mirrored, and the mask int64 [H, W] at the image's own size."""
        height, width = self.sizes[index]
        mask = np.array(self._masks[index, :height, :width])
        return torch.from_numpy(np.array(self._features[index, 0])), torch.from_numpy(mask).long()


def find_features(
    network: ParsingNetwork, dataset: ParsingDataset, folder: Path | None = None, mirrored: bool = False
) -> CachedFeatures | None:
    """Return the cache of this data, these weights and this padded size, or None if there is no complete one."""
    path = _cache_path(network, dataset, folder, mirrored)
    return CachedFeatures(path, flip=mirrored) if _is_whole(path) else None


def cache_features(
    network: ParsingNetwork,
    dataset: ParsingDataset,
    folder: Path | None = None,
    mirrored: bool = True,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> CachedFeatures:
    """Open the features of a data set. Compute missing ones first.

    Images are padded to `network.min_size`. The key of a cache consists of the data set's fingerprint, the backbone's
    layers and weights, and this size. A damaged cache (a wrong size or checksum) is computed again, an unfinished one
    is continued.

    Args:
        network: in eval mode; `min_size` holds every image.
        dataset: the images.
        folder: the folder of all caches; default `default_cache_folder()`.
        mirrored: keep the features of mirrored images too.
        seed: seed of the mirroring in training.
        progress: called with (images done, all images).

    Raises:
        ValueError: if an image is larger than `network.min_size`.
        OSError: if the disk has too little space for the estimated size of the file.
    """
    path = _cache_path(network, dataset, folder, mirrored)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"the feature cache cannot be made: {path.parent}: {error.strerror}; {_HINT}") from error
    with locked(path.with_suffix(".lock")):
        if not _is_whole(path):
            shutil.rmtree(path, ignore_errors=True)
            _compute(network, dataset, path, mirrored, progress)
    features = CachedFeatures(path, seed, mirrored)
    if isinstance(dataset, SkippingDataset):
        dataset.skip(features.skipped)
    return features


def _cache_path(network: ParsingNetwork, dataset: ParsingDataset, folder: Path | None, mirrored: bool) -> Path:
    key = hashlib.sha256()
    classes = dataset.mirrored_classes
    for part in (_FORMAT, dataset.fingerprint(), classes, network.min_size, mirrored, network.backbone):
        key.update(repr(part).encode() + b"\0")
    for name, tensor in network.backbone.state_dict().items():
        key.update(name.encode())
        key.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return (folder or default_cache_folder()) / f"features-{key.hexdigest()[:20]}"


def _is_whole(path: Path) -> bool:
    try:
        checksums = read_json(path / "checksums.json")
        return bool(checksums == {name: _checksum(path / name) for name in _FILES})
    except (OSError, ValueError):
        return False


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            value = zlib.crc32(chunk, value)
    return value


def _compute(
    network: ParsingNetwork, dataset: ParsingDataset, path: Path, mirrored: bool, progress: Callable[[int, int], None]
) -> None:
    canvas = network.min_size
    for name, size in zip(dataset.ids, dataset.sizes(), strict=True):
        if size[0] > canvas[0] or size[1] > canvas[1]:
            raise ValueError(
                f"image {name} is {size[0]}x{size[1]} px, larger than the canvas of {canvas[0]}x{canvas[1]}: "
                "give a canvas that holds every image, or leave it out"
            )
    transform = evaluation_transform()
    probe = image_features(network, torch.zeros(3, *canvas))
    shape = (len(dataset), 2 if mirrored else 1, *probe.shape)
    partial = path.with_suffix(".partial")
    done = _finished(partial, shape)
    if done == 0:
        shutil.rmtree(partial, ignore_errors=True)
    elif isinstance(dataset, SkippingDataset):
        dataset.skip(read_json(partial / "meta.json")["skipped"])
    a_sample = int(np.prod(shape[1:])) * 2 + canvas[0] * canvas[1]
    _check_room(path.parent, (len(dataset) - done) * a_sample)
    if done == 0:
        partial.mkdir(parents=True)
    mode: Any = "r+" if done else "w+"
    features = np.lib.format.open_memmap(partial / "features.npy", mode, np.float16, shape)
    masks = np.lib.format.open_memmap(partial / "masks.npy", mode, np.uint8, (len(dataset), *canvas))
    sizes = np.lib.format.open_memmap(partial / "sizes.npy", mode, np.int64, (len(dataset), 2))
    for name in _FILES[:3]:
        _reserve(partial / name)
    for index in range(done, len(dataset)):
        image, mask = transform(*dataset[index])
        features[index, 0] = image_features(network, image).cpu().numpy()
        if mirrored:
            features[index, 1] = image_features(network, image.flip(2)).cpu().numpy()
        sizes[index] = mask.shape
        masks[index] = IGNORE_INDEX
        masks[index, : mask.shape[0], : mask.shape[1]] = mask.numpy()
        if (index + 1) % _FLUSH_EVERY == 0:
            for array in (features, masks, sizes):
                array.flush()
            _write_meta(partial, dataset)
            write_text(partial / "done", str(index + 1))
        progress(index + 1, len(dataset))
    for array in (features, masks, sizes):
        array.flush()
    del features, masks, sizes, array
    _write_meta(partial, dataset)
    checksums = {name: _checksum(partial / name) for name in _FILES}
    write_json(partial / "checksums.json", checksums)
    partial.rename(path)


def _write_meta(partial: Path, dataset: ParsingDataset) -> None:
    meta: dict[str, Any] = {"mirrored_classes": dataset.mirrored_classes}
    if isinstance(dataset, SkippingDataset):
        meta["skipped"] = dataset.skipped_indices()
    write_json(partial / "meta.json", meta)


def _finished(partial: Path, shape: tuple[int, ...]) -> int:
    """Return the number of images that an interrupted computation has finished."""
    try:
        arrays = [np.lib.format.open_memmap(partial / name, mode="r") for name in _FILES[:3]]
        if arrays[0].shape != shape:
            return 0
        read_json(partial / "meta.json")
        return int((partial / "done").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 0


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"the feature cache needs {needed / 1e6:.1f} MB, but {folder} has {free / 1e6:.1f} MB free: make room, or "
            f"{_HINT}"
        )


def _reserve(path: Path) -> None:
    """Allocate a file's blocks: a mapped file that meets a full disk later ends the process without a message."""
    if not hasattr(os, "posix_fallocate"):  # macOS
        return
    try:
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror}: make room, or {_HINT}") from error
