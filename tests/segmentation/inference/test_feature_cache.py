"""The feature cache returns the same numbers as fresh features, even after damage to its files."""

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor

from rfield.segmentation.data import ParsingDataset, SyntheticCues, VOCDataset, evaluation_transform
from rfield.segmentation.inference import feature_cache as cache_module
from rfield.segmentation.inference.feature_cache import (
    CachedFeatures,
    cache_features,
    default_cache_folder,
    find_features,
    image_features,
)
from rfield.segmentation.models import ParsingNetwork, small_cnn

MakeDevkit = Callable[..., Path]
CANVAS = (18, 22)


def make_network(seed: int = 0, canvas: tuple[int, int] = CANVAS) -> ParsingNetwork:
    torch.manual_seed(seed)
    return small_cnn(3, min_size=canvas).eval()


@pytest.fixture
def dataset(make_devkit: MakeDevkit) -> VOCDataset:
    """Three images of 12x16 px and one of 9x22."""
    root = make_devkit({"train": ["a", "b", "c", "wide"]})
    random = np.random.default_rng(1)
    PIL.Image.fromarray(random.integers(0, 256, (9, 22, 3), dtype=np.uint8)).save(root / "JPEGImages/wide.jpg")
    PIL.Image.fromarray(random.integers(0, 3, (9, 22), dtype=np.uint8)).save(root / "SegmentationClass/wide.png")
    return VOCDataset(root, "train")


def contents(cached: CachedFeatures) -> list[Tensor]:
    """Return all samples of a cache."""
    samples = [cached[epoch, index] for epoch in range(4) for index in range(len(cached))]
    return [tensor for sample in samples + [cached.plain(i) for i in range(len(cached))] for tensor in sample]


def assert_same(one: CachedFeatures, other: CachedFeatures) -> None:
    assert one.sizes == other.sizes
    for a, b in zip(contents(one), contents(other), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def cache_of(folder: Path) -> Path:
    (found,) = (path for path in folder.iterdir() if path.is_dir())
    return found


def count_images(monkeypatch: pytest.MonkeyPatch, fail_at: int | None = None) -> list[int]:
    """Count calls of `image_features` in the returned list; call number `fail_at` raises."""
    calls: list[int] = []

    def counted(network: ParsingNetwork, image: Tensor) -> Tensor:
        if fail_at is not None and len(calls) == fail_at:
            raise KeyboardInterrupt
        calls.append(1)
        return image_features(network, image)

    monkeypatch.setattr(cache_module, "image_features", counted)
    return calls


def test_features_are_the_fresh_ones_bit_for_bit(tmp_path: Path, dataset: VOCDataset) -> None:
    network = make_network()
    cached = cache_features(network, dataset, tmp_path / "cache", seed=3)
    assert cached.sizes == [(12, 16), (12, 16), (12, 16), (9, 22)]
    flips = 0
    for index in range(len(dataset)):
        image, mask = evaluation_transform()(*dataset[index])
        height, width = mask.shape
        features, own_mask = cached.plain(index)
        assert features.dtype == torch.float16
        assert features.shape == (32, 6, 7)  # the canvas, padded to 21x25 px
        assert torch.equal(features, image_features(network, image))
        assert torch.equal(own_mask, mask)
        assert own_mask.dtype == torch.int64
        for epoch in range(6):
            features, canvas_mask = cached[epoch, index]
            assert canvas_mask.shape == CANVAS
            flipped = not torch.equal(canvas_mask[:height, :width], mask)
            flips += flipped
            shown, wanted = (image.flip(2), mask.flip(1)) if flipped else (image, mask)
            assert torch.equal(features, image_features(network, shown))
            assert torch.equal(canvas_mask[:height, :width], wanted)
            assert (canvas_mask[height:] == 255).all()
            assert (canvas_mask[:, width:] == 255).all()
    assert 6 <= flips <= 18


def test_mirrored_masks_have_classes_exchanged(
    tmp_path: Path, dataset: VOCDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = cache_features(make_network(), dataset, tmp_path)
    monkeypatch.setattr(VOCDataset, "mirrored_classes", ((0, 2),))
    assert find_features(make_network(), dataset, tmp_path, mirrored=True) is None
    exchanging = cache_features(make_network(), dataset, tmp_path)
    names = torch.arange(256)
    names[[0, 2]] = names[[2, 0]]
    mirrored = 0
    for key in [(epoch, index) for epoch in range(6) for index in range(len(dataset))]:
        features, mask = exchanging[key]
        assert torch.equal(features, plain[key][0])
        is_mirrored = not torch.equal(features, plain.plain(key[1])[0])
        mirrored += is_mirrored
        assert torch.equal(mask, names[plain[key][1]] if is_mirrored else plain[key][1])
    assert 6 <= mirrored <= 18
    for index in range(len(dataset)):
        assert torch.equal(exchanging.plain(index)[1], plain.plain(index)[1])


def test_mirroring_depends_on_seed_epoch_and_index_alone(tmp_path: Path, dataset: VOCDataset) -> None:
    def flips(seed: int, order: list[tuple[int, int]]) -> dict[tuple[int, int], bool]:
        cached = cache_features(make_network(), dataset, tmp_path / "cache", seed=seed)
        return {(e, i): torch.equal(cached[e, i][0], cached.plain(i)[0]) for e, i in order}

    keys = [(epoch, index) for epoch in range(5) for index in range(4)]
    assert flips(0, keys) == flips(0, keys[::-1])
    assert flips(0, keys) != flips(1, keys)
    assert len({tuple(flips(0, keys)[epoch, index] for index in range(4)) for epoch in range(5)}) > 1


def test_without_mirroring(tmp_path: Path, dataset: VOCDataset) -> None:
    cached = cache_features(make_network(), dataset, tmp_path / "cache", mirrored=False)
    for epoch in range(5):
        assert torch.equal(cached[epoch, 0][0], cached.plain(0)[0])
    assert np.load(cache_of(tmp_path / "cache") / "features.npy", mmap_mode="r").shape[1] == 1


def test_a_second_opening_computes_nothing(
    tmp_path: Path, dataset: VOCDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = cache_features(make_network(), dataset, tmp_path)
    calls = count_images(monkeypatch)
    assert_same(first, cache_features(make_network(), dataset, tmp_path))
    found = find_features(make_network(), dataset, tmp_path, mirrored=True)
    assert found is not None
    assert_same(first, found)
    assert not calls


def test_progress(tmp_path: Path, dataset: VOCDataset) -> None:
    seen: list[tuple[int, int]] = []
    cache_features(make_network(), dataset, tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def touch_mask(dataset: VOCDataset) -> None:
    path = dataset.mask_paths[1]
    os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns + 1))


def shorten_list(dataset: VOCDataset) -> None:
    (dataset.root / "ImageSets/Segmentation/train.txt").write_text("a\nb\n")


def repaint_image(dataset: VOCDataset) -> None:
    PIL.Image.new("RGB", (16, 12), "red").save(dataset.image_paths[0])


@pytest.mark.parametrize("change", [touch_mask, shorten_list, repaint_image])
def test_changed_data_have_another_cache(
    tmp_path: Path, dataset: VOCDataset, change: Callable[[VOCDataset], None]
) -> None:
    cache_features(make_network(), dataset, tmp_path / "cache")
    change(dataset)
    changed = VOCDataset(dataset.root, "train")
    assert find_features(make_network(), changed, tmp_path / "cache", mirrored=True) is None
    fresh = cache_features(make_network(), changed, tmp_path / "other")
    assert_same(cache_features(make_network(), changed, tmp_path / "cache"), fresh)


def test_other_weights_canvas_or_mirroring_have_another_cache(tmp_path: Path, dataset: VOCDataset) -> None:
    cache_features(make_network(), dataset, tmp_path)
    assert find_features(make_network(), dataset, tmp_path, mirrored=True) is not None
    assert find_features(make_network(), dataset, tmp_path, mirrored=False) is None
    assert find_features(make_network(seed=1), dataset, tmp_path, mirrored=True) is None
    assert find_features(make_network(canvas=(19, 22)), dataset, tmp_path, mirrored=True) is None
    other_head = make_network()
    torch.nn.init.ones_(next(other_head.head.parameters()))
    assert find_features(other_head, dataset, tmp_path, mirrored=True) is not None


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100 if path.stat().st_size > 100 else path.stat().st_size // 2)


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-20] ^= 4
    path.write_bytes(content)


def delete(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("name", ["features.npy", "masks.npy", "sizes.npy", "meta.json", "checksums.json"])
@pytest.mark.parametrize("damage", [truncate, flip_a_byte, delete])
def test_a_torn_cache_is_found_and_rebuilt(
    tmp_path: Path, dataset: VOCDataset, name: str, damage: Callable[[Path], None]
) -> None:
    network = make_network()
    whole = cache_features(network, dataset, tmp_path / "whole")
    cache_features(network, dataset, tmp_path / "torn")
    damage(cache_of(tmp_path / "torn") / name)
    assert find_features(network, dataset, tmp_path / "torn", mirrored=True) is None
    assert_same(cache_features(network, dataset, tmp_path / "torn"), whole)
    assert find_features(network, dataset, tmp_path / "torn", mirrored=True) is not None


def interrupted(
    folder: Path, dataset: ParsingDataset, monkeypatch: pytest.MonkeyPatch, images: int, flush_every: int = 2
) -> None:
    """Interrupt the computation of a mirrored cache after a number of images."""
    with monkeypatch.context() as patch:
        patch.setattr(cache_module, "_FLUSH_EVERY", flush_every)
        count_images(patch, fail_at=2 + 2 * images)  # one call is for the shape; this one is in the middle of an image
        with pytest.raises(KeyboardInterrupt):
            cache_features(make_network(), dataset, folder)
    assert find_features(make_network(), dataset, folder, mirrored=True) is None


@pytest.mark.parametrize(("images", "kept"), [(0, 0), (1, 0), (2, 2), (3, 2)])
def test_an_interrupted_computation_goes_on(
    tmp_path: Path, dataset: VOCDataset, monkeypatch: pytest.MonkeyPatch, images: int, kept: int
) -> None:
    whole = cache_features(make_network(), dataset, tmp_path / "whole")
    interrupted(tmp_path / "cut", dataset, monkeypatch, images)
    calls = count_images(monkeypatch)
    assert_same(cache_features(make_network(), dataset, tmp_path / "cut"), whole)
    assert len(calls) == 1 + 2 * (4 - kept)
    assert not list((tmp_path / "cut").glob("*.partial"))


@pytest.mark.parametrize("name", ["features.npy", "masks.npy", "done"])
@pytest.mark.parametrize("damage", [truncate, delete])
def test_a_damaged_unfinished_computation_begins_anew(
    tmp_path: Path,
    dataset: VOCDataset,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    damage: Callable[[Path], None],
) -> None:
    whole = cache_features(make_network(), dataset, tmp_path / "whole")
    interrupted(tmp_path / "cut", dataset, monkeypatch, 3)
    damage(cache_of(tmp_path / "cut") / name)
    assert_same(cache_features(make_network(), dataset, tmp_path / "cut"), whole)


def with_free_bytes(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    usage: Any = type("Usage", (), {"free": free})
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda path: usage)


def test_a_disk_without_room_is_refused_first(
    tmp_path: Path, dataset: VOCDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = 4 * (2 * 32 * 6 * 7 * 2 + CANVAS[0] * CANVAS[1])
    with_free_bytes(monkeypatch, needed - 1)
    calls = count_images(monkeypatch)
    with pytest.raises(
        OSError, match=r"the feature cache needs 0.0 MB, .* 0.0 MB free: make room, .*--cache.*--freeze-backbone"
    ):
        cache_features(make_network(), dataset, tmp_path)
    assert len(calls) == 1
    assert not [path for path in tmp_path.iterdir() if path.is_dir() and path.name.startswith("features")]
    with_free_bytes(monkeypatch, needed)

    def fallocate(handle: int, start: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    # Another program has filled the disk in the meantime.
    with monkeypatch.context() as full:
        full.setattr(os, "posix_fallocate", fallocate)
        with pytest.raises(OSError, match=r"features.npy cannot be written: No space left.*: make room, .*--cache"):
            cache_features(make_network(), dataset, tmp_path)
    assert len(calls) == 2
    assert len(cache_features(make_network(), dataset, tmp_path)) == 4
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"the feature cache cannot be made: .*/file/below: Not a directory; .*--cache"):
        cache_features(make_network(), dataset, tmp_path / "file" / "below")


def test_what_is_computed_already_needs_no_more_room(
    tmp_path: Path, dataset: VOCDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(tmp_path / "cut", dataset, monkeypatch, 3)
    with_free_bytes(monkeypatch, 2 * (2 * 32 * 6 * 7 * 2 + CANVAS[0] * CANVAS[1]))
    assert len(cache_features(make_network(), dataset, tmp_path / "cut")) == 4


@pytest.mark.parametrize("canvas", [(18, 21), (11, 22)])
def test_an_image_larger_than_the_canvas_is_named(tmp_path: Path, dataset: VOCDataset, canvas: tuple[int, int]) -> None:
    name = "wide is 9x22" if canvas[1] == 21 else "a is 12x16"
    with pytest.raises(ValueError, match=f"image {name} px, larger than the canvas of {canvas[0]}x{canvas[1]}"):
        cache_features(make_network(canvas=canvas), dataset, tmp_path)


def test_any_data_set_can_be_cached(tmp_path: Path) -> None:
    dataset = SyntheticCues("val", size=(21, 33), distance=8, length=3)
    cached = cache_features(make_network(canvas=(21, 33)), dataset, tmp_path)
    assert cached.sizes == [(21, 33)] * 3
    assert torch.equal(cached.plain(2)[1], torch.as_tensor(dataset[2][1]).long())


def test_default_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_cache_folder() == Path("/somewhere/rfield")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_folder() == Path.home() / ".cache/rfield"


def test_one_process_computes_at_a_time(tmp_path: Path, dataset: VOCDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock is held from the search for a cache until the cache is complete, and then released."""
    looked: list[bool] = []
    (is_whole, compute) = cache_module._is_whole, cache_module._compute

    def is_free() -> bool:
        (path,) = tmp_path.glob("*.lock")
        with path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

    def watched(call: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: (looked.append(is_free()), call(*args), looked.append(is_free()))[1]

    monkeypatch.setattr(cache_module, "_is_whole", watched(is_whole))
    monkeypatch.setattr(cache_module, "_compute", watched(compute))
    cache_features(make_network(), dataset, tmp_path)
    assert looked == [False] * 4
    assert is_free()


def test_features_are_on_the_disk_before_they_are_called_done(
    tmp_path: Path, dataset: VOCDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    flush, replace, rename = np.memmap.flush, os.replace, Path.rename

    def flushed(array: Any) -> None:
        events.append(f"flush {Path(array.filename).name}")
        flush(array)

    def written(partial: Path, path: Path) -> None:
        events.append(f"write {path.name}" + f" {partial.read_text()}" * (path.name == "done"))
        replace(partial, path)

    def renamed(path: Path, target: Path) -> Path:
        events.append("rename")
        return rename(path, target)

    monkeypatch.setattr(np.memmap, "flush", flushed)
    monkeypatch.setattr(os, "replace", written)
    monkeypatch.setattr(Path, "rename", renamed)
    monkeypatch.setattr(cache_module, "_FLUSH_EVERY", 3)
    cache_features(make_network(), dataset, tmp_path)
    flushes = ["flush features.npy", "flush masks.npy", "flush sizes.npy"]
    assert events[:5] == [*flushes, "write meta.json", "write done 3"]
    assert [event for event in events[5:] if not event.startswith("flush")] == [
        "write meta.json",
        "write checksums.json",
        "rename",
    ]
    assert events[5:8] == flushes
