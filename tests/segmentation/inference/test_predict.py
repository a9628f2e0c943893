"""Score and label with networks that are not trained."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
import yaml
from torchvision.transforms.v2 import functional as TF
from torchvision.tv_tensors import Mask

from rfield.segmentation.cli import main
from rfield.segmentation.config.train import TrainConfig
from rfield.segmentation.data import (
    HelenDataset,
    ParsingDataset,
    ResizedDataset,
    SyntheticCues,
    evaluation_transform,
    voc_palette,
)
from rfield.segmentation.inference.feature_cache import cache_features
from rfield.segmentation.inference.predict import (
    evaluate,
    evaluate_run,
    feature_logits,
    find_images,
    predict_logits,
    predict_run,
)
from rfield.segmentation.inference.tiling import Tiler
from rfield.segmentation.models.saving import describe_network
from rfield.segmentation.runs import build_network, load_run

CLASSES = ("sky", "sea", "land")
PALETTE = [(9, 8, 7), *voc_palette()[1:]]
MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """The folder of a run of a random network with strong opinions."""

    def make(name: str = "run", **values: object) -> Path:
        out = tmp_path / name
        (out / "checkpoints").mkdir(parents=True)
        given = {"model": "small_cnn", "dilation": 2, "head_channels": 8, "cache": str(tmp_path / "cache")}
        config = TrainConfig(data="synthetic", out=str(out), **given | values).resolved()  # type: ignore[arg-type]
        torch.manual_seed(0)
        network = build_network(config, len(CLASSES))
        for parameter in network.head.parameters():
            if parameter.dim() > 1:
                parameter.data *= 20
        (out / "config.yaml").write_text(yaml.safe_dump(config.plain()))
        (out / "classes.json").write_text(json.dumps({"class_names": CLASSES, "palette": PALETTE}))
        state = {f"network.{key}": value for key, value in network.state_dict().items()}
        torch.save({"state_dict": state, "rfield": describe_network(network)}, out / "checkpoints/last.ckpt")
        return out

    return make


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """A folder of images of all kinds and sizes, and of other files."""
    folder = tmp_path / "image_folder"
    (folder / "deeper").mkdir(parents=True)
    random = np.random.default_rng(0)
    for name, mode, size in (
        ("odd.jpg", "RGB", (37, 23)),
        ("grey.png", "L", (30, 18)),
        ("clear.png", "RGBA", (16, 33)),
        ("palette.PNG", "P", (21, 20)),
        ("dot.bmp", "RGB", (1, 1)),
        ("deeper/other.jpg", "RGB", (9, 9)),
    ):
        pixels = random.integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
        PIL.Image.fromarray(pixels).convert("RGB" if mode == "P" else mode).convert(mode).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def test_a_run_comes_back_as_it_was(make_run: MakeRun) -> None:
    folder = make_run(factor=1.6, canvas=(40, 50), search="gradient")
    run = load_run(folder)
    assert (run.folder, run.class_names, run.palette) == (folder, CLASSES, PALETTE)
    assert run.network.min_size == (40, 50)
    assert run.network.head.effective_dilation[0] == pytest.approx(2 / 1.6)
    assert not run.network.training
    saved = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    for key, value in run.network.state_dict().items():
        assert torch.equal(value, saved[f"network.{key}"])


def test_what_is_missing_in_a_run_folder_is_named(make_run: MakeRun, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere is not a run folder: there is no such folder; give"):
        load_run(tmp_path / "nowhere")
    folder = make_run()
    with pytest.raises(FileNotFoundError, match="has no checkpoint 'best'; it has last"):
        load_run(folder, "best")
    (folder / "checkpoints/last.ckpt").unlink()
    with pytest.raises(FileNotFoundError, match="has no checkpoint 'last'; it has none yet"):
        load_run(folder)
    (folder / "classes.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"not a run folder: it has no classes\.json"):
        load_run(folder)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.yaml", "data: [", r"config\.yaml is not valid YAML"),
        ("config.yaml", "data: synthetic\nout: x\nmodel: small_cnn", r"last\.ckpt is damaged or not a checkpoint of"),
        ("classes.json", "{", r"classes\.json is damaged"),
        ("classes.json", "[]", r"classes\.json does not say what rfield writes of the classes"),
        ("classes.json", '{"class_names": ["sky"], "palette": [[1, 2]]}', r"classes\.json does not say what"),
        ("checkpoints/last.ckpt", "", r"last\.ckpt is damaged"),
        ("checkpoints/last.ckpt", "nonsense", r"last\.ckpt is damaged"),
    ],
)
def test_damaged_files_of_a_run_are_named(make_run: MakeRun, name: str, text: str, message: str) -> None:
    folder = make_run()
    (folder / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_run(folder)


def test_unknown_models_are_named() -> None:
    with pytest.raises(ValueError, match=r"model 'unet' is not known; the known ones are .*largefov_vgg16, small_cnn"):
        build_network(TrainConfig(data="synthetic", out="x", model="unet"), 3)


class ThreeClasses(SyntheticCues):
    """Synthetic cues with one class less."""

    class_names = CLASSES  # type: ignore[assignment]

    def __getitem__(self, index: int):  # type: ignore[no-untyped-def]
        image, mask = super().__getitem__(index)
        mask[mask == 3] = 255
        return image, mask


@pytest.fixture
def scored() -> ThreeClasses:
    return ThreeClasses("val", size=(30, 35), distance=8, length=3)


@pytest.mark.parametrize("search", ["none", "gradient"])
def test_cached_and_fresh_features_score_the_same_bit_for_bit(
    make_run: MakeRun, scored: ThreeClasses, tmp_path: Path, search: str
) -> None:
    run = load_run(make_run(freeze_backbone=True, canvas=(32, 37), search=search, factor=1.3))
    cached = cache_features(run.network, scored, tmp_path / "cache", mirrored=False)
    for index in range(len(scored)):
        image, _ = evaluation_transform()(*scored[index])
        fresh = predict_logits(run.network, image, frozen=True)
        assert fresh.shape == (3, 30, 35)
        assert torch.equal(feature_logits(run.network, cached.plain(index)[0], (30, 35)), fresh)
        torch.testing.assert_close(fresh, predict_logits(run.network, image), rtol=0.05, atol=0.05)
    with_cache = evaluate(run.network, scored, frozen=True, features=cached)
    assert evaluate(run.network, scored, frozen=True) == with_cache
    assert evaluate_run(run, scored) == with_cache


def test_scores_are_those_of_the_predictions(make_run: MakeRun, scored: ThreeClasses) -> None:
    run = load_run(make_run())
    hits, union = torch.zeros(3), torch.zeros(3)
    for index in range(len(scored)):
        image, mask = evaluation_transform()(*scored[index])
        pred = predict_logits(run.network, image).argmax(0)
        for label in range(3):
            true, taken = (mask == label), (pred == label) & (mask != 255)
            hits[label] += (true & taken).sum()
            union[label] += (true | taken).sum()
    seen: list[tuple[int, int]] = []
    scores = evaluate(run.network, scored, progress=lambda done, total: seen.append((done, total)))
    assert list(scores["per_class"].values()) == pytest.approx((hits / union).tolist())
    assert scores["miou"] == pytest.approx((hits / union).mean().item())
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_other_classes_are_refused(make_run: MakeRun) -> None:
    run = load_run(make_run())
    with pytest.raises(
        ValueError, match="trained on 3 classes, but the data set has 4: sky, sea, land missing, neither, "
    ):
        evaluate_run(run, SyntheticCues("val", length=1))


@pytest.mark.parametrize("frozen", [False, True])
def test_masks_have_the_images_size_and_the_data_s_palette(
    make_run: MakeRun, image_folder: Path, tmp_path: Path, frozen: bool
) -> None:
    run = load_run(make_run(freeze_backbone=frozen, canvas=(24, 24) if frozen else None))
    images = find_images(str(image_folder))
    assert [path.name for path in images] == ["clear.png", "dot.bmp", "grey.png", "odd.jpg", "palette.PNG"]
    out = tmp_path / "a" / "b"
    assert list(predict_run(run, images, out)) == [out / f"{path.stem}.png" for path in images]
    for path in images:
        with PIL.Image.open(path) as file:
            pil_image = file.convert("RGB")
        with PIL.Image.open(out / f"{path.stem}.png") as mask:
            assert (mask.mode, mask.size) == ("P", pil_image.size)
            assert tuple(mask.getpalette()[:3]) == PALETTE[0]  # type: ignore[index]
            labels = np.array(mask)
        image = torch.from_numpy(np.array(pil_image)).permute(2, 0, 1).float() / 255
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        logits = predict_logits(run.network, (image - mean[:, None, None]) / std[:, None, None], frozen)
        assert (labels == logits.argmax(0).numpy()).mean() > 0.99
        with PIL.Image.open(out / f"{path.stem}_overlay.jpg") as overlay:
            assert (overlay.mode, overlay.size) == ("RGB", pil_image.size)
    assert len(list(out.iterdir())) == 2 * len(images), "nothing half-written is left"


def test_images_are_seen_at_the_size_of_the_training_data(
    make_run: MakeRun, image_folder: Path, tmp_path: Path
) -> None:
    """Masks are the network's at that size, resized to the image's own."""
    folder = make_run()
    classes = json.loads((folder / "classes.json").read_text())
    (folder / "classes.json").write_text(json.dumps(classes | {"size": [12, 20]}))
    run = load_run(folder)
    assert run.size == (12, 20)
    (target,) = predict_run(run, [image_folder / "odd.jpg"], tmp_path / "out")
    with PIL.Image.open(target) as mask, PIL.Image.open(image_folder / "odd.jpg") as pil_image:
        assert mask.size == pil_image.size
        labels, small = np.array(mask), pil_image.resize((20, 12), PIL.Image.Resampling.BILINEAR)
    image, _ = evaluation_transform()(TF.to_image(small), Mask(torch.zeros(12, 20, dtype=torch.uint8)))
    logits = predict_logits(run.network, image)[None]
    expected = F.interpolate(logits, labels.shape, mode="bilinear")[0].argmax(0).numpy()
    assert (labels == expected).mean() > 0.97


def test_one_file_and_a_glob(image_folder: Path) -> None:
    assert find_images(str(image_folder / "odd.jpg")) == [image_folder / "odd.jpg"]
    assert [path.name for path in find_images(f"{image_folder}/*.png")] == ["clear.png", "grey.png"]
    assert [path.name for path in find_images(f"{image_folder}/**/*.jpg")] == ["other.jpg", "odd.jpg"]
    strange = image_folder / "[strange].png"
    (image_folder / "grey.png").rename(strange)
    assert find_images(str(strange)) == [strange]


@pytest.mark.parametrize("pattern", ["empty", "nowhere", "image_folder/*.gif", "image_folder/nowhere.jpg"])
def test_no_image_is_an_error(image_folder: Path, pattern: str) -> None:
    (image_folder.parent / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no image found at .*: give an image, a folder of images or a glob"):
        find_images(str(image_folder.parent / pattern))


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "header"])
def test_a_broken_image_is_named(make_run: MakeRun, image_folder: Path, tmp_path: Path, damage: str) -> None:
    path = image_folder / "grey.png"
    content = path.read_bytes()
    broken = {"cut": content[: len(content) // 2], "text": b"no image", "empty": b"", "header": content[:40]}
    path.write_bytes(broken[damage])
    with pytest.raises(ValueError, match=r"grey\.png cannot be read as an image"):
        list(predict_run(load_run(make_run()), [path], tmp_path / "out"))
    assert not list((tmp_path / "out").iterdir())


def test_two_images_of_one_name_are_refused_first(make_run: MakeRun, image_folder: Path, tmp_path: Path) -> None:
    PIL.Image.new("RGB", (5, 5)).save(image_folder / "odd.png")
    with pytest.raises(ValueError, match=r"two images are named odd, and .* would hold only one result"):
        list(predict_run(load_run(make_run()), find_images(str(image_folder)), tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_mask_never_replaces_its_image(make_run: MakeRun, image_folder: Path) -> None:
    before = (image_folder / "grey.png").read_bytes()
    with pytest.raises(ValueError, match=r"the mask of .*grey\.png would replace it: give another --out"):
        list(predict_run(load_run(make_run()), [image_folder / "grey.png"], image_folder / ".." / "image_folder"))
    assert (image_folder / "grey.png").read_bytes() == before
    assert len(list(predict_run(load_run(make_run("other")), [image_folder / "odd.jpg"], image_folder))) == 1


def test_the_command(make_run: MakeRun, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    main(["predict", str(make_run()), str(image_folder / "*.png"), "--out", str(out)])
    captured = capsys.readouterr()
    assert captured.out == f"2 masks and overlays are in {out}\n"
    assert captured.err == ""
    assert sorted(path.name for path in out.iterdir()) == [
        "clear.png",
        "clear_overlay.jpg",
        "grey.png",
        "grey_overlay.jpg",
    ]
    (image_folder / "grey.png").write_bytes(b"")
    with pytest.raises(SystemExit) as exit_:
        main(["predict", str(tmp_path / "run"), str(image_folder / "grey.png"), "--out", str(out)])
    assert exit_.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("kind", ["run", pytest.param("onnx", marks=pytest.mark.slow)])
def test_an_image_that_cannot_be_read_is_passed_over_and_named(
    make_run: MakeRun,
    image_folder: Path,
    tmp_path: Path,
    onnx_file: Callable[[Sequence[str]], Path],
    capsys: pytest.CaptureFixture[str],
    kind: str,
) -> None:
    model = make_run()
    if kind == "onnx":
        pytest.importorskip("onnxruntime")
        model = onnx_file(load_run(model).class_names)
    (image_folder / "clear.png").write_bytes(b"no image")
    (image_folder / "odd.jpg").write_bytes((image_folder / "odd.jpg").read_bytes()[:300])
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as exit_:
        main(["predict", str(model), str(image_folder), "--out", str(out)])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(
        f"rfield predict: 2 of 5 images are not labelled, the others are in {out}: {image_folder}/clear.png"
    )
    assert "odd.jpg cannot be read as an image" in error
    assert error.count("\n") == 1
    assert sorted(path.stem for path in out.glob("*.png")) == ["dot", "grey", "palette"]


def test_a_full_disk_ends_the_labelling(
    make_run: MakeRun, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("rfield.segmentation.inference.predict._save", full)
    with pytest.raises(OSError, match="no space left"):
        list(predict_run(load_run(make_run()), find_images(str(image_folder)), tmp_path / "out"))


@pytest.mark.parametrize("size", [None, [90, 130]])
def test_a_small_memory_budget_changes_no_label(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: list[int] | None
) -> None:
    runs: list[tuple[int, ...]] = []
    real = Tiler._logits
    monkeypatch.setattr(Tiler, "_logits", lambda self, part: runs.append(part.shape) or real(self, part))
    folder = make_run(dilation=2)
    classes = json.loads((folder / "classes.json").read_text())
    (folder / "classes.json").write_text(json.dumps(classes | {"size": size}))
    PIL.Image.effect_noise((151, 120), 80).convert("RGB").save(tmp_path / "large.png")
    for out, words in (("whole", []), ("tiles", ["--memory-budget", "0.0003"])):
        main(["predict", str(folder), str(tmp_path / "large.png"), "--out", str(tmp_path / out), *words])
    assert len(runs) > 3
    with PIL.Image.open(tmp_path / "whole/large.png") as one, PIL.Image.open(tmp_path / "tiles/large.png") as other:
        assert len(np.unique(np.array(one))) > 1
        assert (np.array(one) == np.array(other)).mean() > 0.9999


@pytest.mark.parametrize(
    ("run", "budget", "message"), [("x.onnx", "1", "for run folders"), ("x", "0", "must be positive, got 0")]
)
def test_a_budget_that_means_nothing_is_refused(
    run: str, budget: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["predict", run, "image.png", "--memory-budget", budget])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("size", [None, (12, 9)])
def test_faces_are_scored_by_their_parts_too(tmp_path: Path, size: tuple[int, int] | None) -> None:
    """Also at a working size; both kinds of scores have the same counts."""
    random = np.random.default_rng(0)
    for folder in ("images", "labels/a"):
        (tmp_path / folder).mkdir(parents=True)
    PIL.Image.fromarray(random.integers(0, 256, (20, 16, 3), dtype=np.uint8)).save(tmp_path / "images/a.jpg")
    labels = random.integers(0, 7, (20, 16))  # no mouth, no hair
    for label in range(11):
        PIL.Image.fromarray(np.uint8(255 * (labels == label))).save(tmp_path / f"labels/a/a_lbl{label:02d}.png")
    (tmp_path / "tuning.txt").write_text("1 , a")
    faces: ParsingDataset = HelenDataset(tmp_path, "val")
    faces = faces if size is None else ResizedDataset(faces, size)
    torch.manual_seed(0)
    network = build_network(TrainConfig(data="synthetic", out="x", model="small_cnn"), 11).eval()
    scores = evaluate(network, faces)
    assert set(scores) == {"miou", "per_class", "pixel_accuracy", "f1", "f1_overall"}
    image, mask = evaluation_transform()(*faces[0])
    pred = predict_logits(network, image).argmax(0)
    assert pred.shape == (size or (20, 16))
    eyes, found = (mask == 4) | (mask == 5), (pred == 4) | (pred == 5)
    assert scores["f1"]["eyes"] == pytest.approx(2 * (eyes & found).sum().item() / (eyes.sum() + found.sum()).item())
    nose = (mask == 6).sum() + (pred == 6).sum()
    assert scores["f1"]["nose"] == pytest.approx(2 * ((mask == 6) & (pred == 6)).sum().item() / nose.item())


def test_output_stride() -> None:
    config = TrainConfig(data="synthetic", out="x", model="efficientnet_lite0", head_channels=4)
    assert build_network(config, 2).stride == 8
    assert build_network(config.replace(output_stride=16), 2).stride == 16
    with pytest.raises(ValueError, match="largefov_vgg16 has an output_stride of 8, got 16; leave it out"):
        build_network(config.replace(model="largefov_vgg16", output_stride=16), 2)
