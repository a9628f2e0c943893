"""Files that break before and in the middle of a training."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from rfield.segmentation.config.train import TrainConfig
from rfield.segmentation.data import FolderDataset, ResizedDataset, SkippingDataset, SyntheticCues
from rfield.segmentation.inference.feature_cache import cache_features
from rfield.segmentation.models import small_cnn
from rfield.segmentation.training import fit as fit_module
from rfield.segmentation.training import train

Make = Callable[..., TrainConfig]
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:skipped")]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Six training pairs and three of val, of 33x41 px (height x width), with three classes."""
    root = tmp_path / "own"
    random = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3)):
        for folder in ("images", "masks"):
            (root / split / folder).mkdir(parents=True)
        for index in range(count):
            image = random.integers(0, 256, (33, 41, 3), dtype=np.uint8)
            PIL.Image.fromarray(image).save(root / split / f"images/{index}.png")
            mask = random.integers(0, 3, (33, 41), dtype=np.uint8)
            PIL.Image.fromarray(mask).save(root / split / f"masks/{index}.png")
    (root / "classes.txt").write_text("road\ncar\nsky\n")
    return root


@pytest.fixture
def make(make: Make, root: Path) -> Make:
    """Those of conftest.py on these files, with nothing to learn but the weights."""
    own = {"data": f"folder:{root}", "weights": "random", "search": "none", "factor_lr": None, "epochs": 2}
    return lambda out="run", **values: make(out, **own | values)


def truncate(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def break_after_the_check(monkeypatch: pytest.MonkeyPatch, *paths: Path) -> None:
    """Truncates the files when the quick check has let them pass."""
    check = fit_module.refuse_bad_data

    def checked(*args: Any) -> list[str]:
        warnings = check(*args)
        for path in paths:
            truncate(path)
        return warnings

    monkeypatch.setattr(fit_module, "refuse_bad_data", checked)


def test_a_training_is_refused_before_it_begins(make: Make, root: Path) -> None:
    PIL.Image.new("L", (33, 41)).save(root / "train/masks/4.png")
    truncate(root / "val/images/2.png")
    with pytest.raises(ValueError, match=r"masks/4.png is 41x33 px .* \| .*images/2.png is a damaged image") as caught:
        train(make())
    assert f"`rfield check-data folder:{root}` finds all" in str(caught.value)
    assert not (root.parent / "run").exists()


@pytest.mark.parametrize(("frozen", "workers"), [(False, 0), (False, 2), (True, 0)])
def test_a_file_that_breaks_meanwhile_is_named(
    make: Make, root: Path, monkeypatch: pytest.MonkeyPatch, frozen: bool, workers: int
) -> None:
    path = root / "train/images/3.png"
    break_after_the_check(monkeypatch, path)
    with pytest.raises(OSError, match=r"is a damaged image .*; replace the file$") as caught:
        train(make(freeze_backbone=frozen, workers=workers))
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize(("frozen", "workers"), [(False, 0), (False, 2), (True, 0)])
def test_bad_samples_are_skipped_and_counted(
    make: Make, root: Path, frozen: bool, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    truncate(root / "train/images/3.png")
    (root / "train/masks/5.png").write_bytes(b"no image")
    PIL.Image.new("L", (41, 33), 7).save(root / "val/masks/1.png")
    for out in ("run", "again"):  # the second time the features are found
        metrics = train(make(out, freeze_backbone=frozen, workers=workers, skip_bad=True))
        saved = json.loads((root.parent / out / "metrics.json").read_text())
        assert saved["skipped"] == metrics["skipped"] == 3
        assert metrics["skipped_samples"] == {"train": ["3", "5"], "val": ["1"]}
    first, second = (
        torch.load(root.parent / out / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for out in ("run", "again")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_that_a_bad_file_ended_goes_on(make: Make, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        break_after_the_check(patch, root / "train/images/3.png")
        with pytest.raises(OSError, match=r"images/3.png is a damaged image"):
            train(make())
    with pytest.raises(ValueError, match=r"images/3.png is a damaged image"):
        train(make(resume=True))
    assert train(make(resume=True, skip_bad=True))["skipped_samples"] == {"train": ["3"], "val": []}


def test_another_sample_takes_the_place(root: Path) -> None:
    truncate(root / "train/images/2.png")
    truncate(root / "train/masks/5.png")
    plain, skipping = FolderDataset(root), SkippingDataset(FolderDataset(root))
    order = [0, 1, 3, 3, 4, 0]
    for _ in range(2):
        for index in (5, 2, 0, 1, 3, 4):
            for got, wanted in zip(skipping[index], plain[order[index]], strict=True):
                assert torch.equal(got, wanted)
    assert (skipping.skipped(), len(skipping), skipping.ids) == (["2", "5"], 6, plain.ids)
    scored = SkippingDataset(FolderDataset(root), labelled=False)
    assert torch.equal(scored[2][0], plain[3][0])
    assert (scored[2][1] == 255).all()
    assert torch.equal(scored[3][1], plain[3][1])


def test_the_warning_names_the_file_once(root: Path) -> None:
    path = truncate(root / "train/images/2.png")
    skipping = SkippingDataset(FolderDataset(root))
    with pytest.warns(UserWarning, match="skipped: ") as caught:
        list(map(skipping.__getitem__, (2, 2, 2)))
    (warning,) = caught
    assert str(warning.message).startswith(f"skipped: {path} is a damaged image")


def test_nothing_left_is_an_error(root: Path) -> None:
    for index in range(3):
        truncate(root / f"val/images/{index}.png")
    with pytest.raises(ValueError, match="none of the 3 samples can be read; `rfield check-data` says why"):
        SkippingDataset(FolderDataset(root, "val"))[1]


def test_what_a_process_skips_is_known_to_the_others(root: Path) -> None:
    truncate(root / "train/images/2.png")
    skipping = SkippingDataset(FolderDataset(root))
    loader = torch.utils.data.DataLoader(skipping, batch_size=None, num_workers=2)
    assert len(list(loader)) == 6
    assert skipping.skipped() == ["2"]


def test_sizes_where_a_header_cannot_be_read(root: Path) -> None:
    PIL.Image.new("RGB", (20, 10)).save(root / "train/images/3.png")
    PIL.Image.new("L", (20, 10)).save(root / "train/masks/3.png")
    (root / "train/images/2.png").write_bytes(b"")
    skipping = SkippingDataset(FolderDataset(root))
    assert skipping.sizes() == [(33, 41), (33, 41), (10, 20), (10, 20), (33, 41), (33, 41)]


def test_cached_features_of_what_takes_the_place(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    PIL.Image.new("RGB", (20, 10)).save(root / "train/images/3.png")
    PIL.Image.new("L", (20, 10), 1).save(root / "train/masks/3.png")
    truncate(root / "train/images/2.png")
    network = small_cnn(3, min_size=(33, 41)).eval()
    skipping = SkippingDataset(FolderDataset(root))
    monkeypatch.setattr("rfield.segmentation.inference.feature_cache._FLUSH_EVERY", 1)

    def stop(done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache_features(network, skipping, tmp_path, progress=stop)
    fresh = SkippingDataset(FolderDataset(root))
    cached = cache_features(network, fresh, tmp_path)
    assert (cached.skipped, fresh.skipped()) == ([2], ["2"])
    assert cached.sizes[2:4] == [(10, 20)] * 2
    for got, wanted in zip(cached.plain(2), cached.plain(3), strict=True):
        assert torch.equal(got, wanted)


def test_a_working_size_is_kept(root: Path, tmp_path: Path, make: Make) -> None:
    config = tmp_path / "own.yaml"
    config.write_text("format: folder\nroot: own\nsize: [17, 21]\n")
    truncate(root / "train/images/2.png")
    train(make(data=str(config), skip_bad=True, epochs=1))
    assert json.loads((tmp_path / "run/classes.json").read_text())["size"] == [17, 21]
    assert isinstance(SkippingDataset(ResizedDataset(SyntheticCues(), (9, 9))).dataset, ResizedDataset)
