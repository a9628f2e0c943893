"""Hostile files of every kind run no code, and each is refused with an error that names it."""

import io
import json
import os
import pickle
import shutil
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save

from rfield.segmentation.cli import parse
from rfield.segmentation.config.train import TrainConfig
from rfield.segmentation.config.values import parse_groups
from rfield.segmentation.data import load_dataset
from rfield.segmentation.export.hub import _scores
from rfield.segmentation.files.untrusted import read_json, read_weights, read_yaml
from rfield.segmentation.inference.feature_cache import CachedFeatures
from rfield.segmentation.inspection.model_names import open_model
from rfield.segmentation.models import ParsingNetwork
from rfield.segmentation.models.saving import describe_network
from rfield.segmentation.runs import build_network, load_config, load_run

LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40)) + "data: *a39\n"


class Evil:
    """An object that creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def marker(tmp_path: Path) -> Any:
    """The file that hostile code would create; a test that finds it has run that code."""
    path = tmp_path / "marker"
    yield path
    assert not path.exists()


def yaml_that_runs(marker: Path) -> str:
    return f"data: !!python/object/apply:os.mkdir ['{marker}']\nout: x\nformat: voc\nroot: x\n"


def pickled(marker: Path, kind: str) -> bytes:
    buffer = io.BytesIO()
    if kind == "plain":
        return pickle.dumps(Evil(marker))
    torch.save({"state_dict": Evil(marker)}, buffer, _use_new_zipfile_serialization=kind == "zip")
    return buffer.getvalue()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with an intact checkpoint."""
    config = TrainConfig(data="synthetic", out="x", model="small_cnn", dilation=3, head_channels=2, search="none")
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config.resolved().plain()))
    (folder / "classes.json").write_text('{"class_names": ["road", "car"], "palette": [[0, 0, 0], [9, 9, 9]]}')
    network = build_network(config, 2)
    state = {f"network.{key}": value for key, value in network.state_dict().items()}
    torch.save({"state_dict": state, "rfield": describe_network(network)}, folder / "checkpoints/last.ckpt")
    load_run(folder)
    return folder


@pytest.fixture
def shared_run(run: Path, tmp_path: Path) -> Path:
    """The same network as on the Hub."""
    notes = {"class_names": ["road", "car"], "palette": [[0, 0, 0], [9, 9, 9]]}
    load_run(run).network.save_pretrained(tmp_path / "shared", config=notes)
    return tmp_path / "shared"


class TestPickles:
    @pytest.mark.parametrize("kind", ["zip", "old", "plain"])
    def test_weights(self, tmp_path: Path, marker: Path, kind: str) -> None:
        for name in ("evil.pth", "evil.safetensors"):
            (tmp_path / name).write_bytes(pickled(marker, kind))
            with pytest.raises(ValueError, match=f"{name} cannot be read as weights"):
                read_weights(tmp_path / name)
        with pytest.raises(ValueError, match=r"evil\.pth cannot be read as weights"):
            open_model("torchvision:resnet18", str(tmp_path / "evil.pth"))

    @pytest.mark.parametrize("kind", ["zip", "old", "plain"])
    def test_checkpoints(self, run: Path, marker: Path, kind: str) -> None:
        for name in ("last", "best"):
            (run / f"checkpoints/{name}.ckpt").write_bytes(pickled(marker, kind))
            with pytest.raises(ValueError, match=rf"{name}\.ckpt is damaged or not a checkpoint"):
                load_run(run, name)

    def test_weights_of_fused_and_shared_runs(self, run: Path, shared_run: Path, marker: Path) -> None:
        shutil.copy(shared_run / "config.json", run / "fused.json")
        for folder in (run, shared_run):
            (folder / "model.safetensors").write_bytes(pickled(marker, "zip"))
            (folder / "pytorch_model.bin").write_bytes(pickled(marker, "zip"))
            with pytest.raises(ValueError, match=r"model\.safetensors"):
                load_run(folder)
        with pytest.raises(ValueError, match=r"model\.safetensors"):
            ParsingNetwork.from_pretrained(shared_run)

    def test_cached_features(self, tmp_path: Path, marker: Path) -> None:
        good = {"features": np.zeros((1, 1, 2, 2, 2), np.float16), "masks": np.zeros((1, 8, 8), np.uint8)}
        for name, values in {**good, "sizes": np.full((1, 2), 8)}.items():
            np.save(tmp_path / f"{name}.npy", values)
        (tmp_path / "meta.json").write_text('{"mirrored_classes": []}')
        assert len(CachedFeatures(tmp_path)) == 1
        for name in ("features", "masks", "sizes"):
            kept = (tmp_path / f"{name}.npy").read_bytes()
            np.save(tmp_path / f"{name}.npy", np.array([Evil(marker)]), allow_pickle=True)
            with pytest.raises(ValueError, match="is not a feature cache"):
                CachedFeatures(tmp_path)
            (tmp_path / f"{name}.npy").write_bytes(kept)

    def test_a_study(self, tmp_path: Path, marker: Path) -> None:
        from rfield.segmentation.config.experiments import SweepConfig
        from rfield.segmentation.experiments.study import open_study

        (tmp_path / "study.journal").write_bytes(pickled(marker, "plain") + b"\n")
        with pytest.raises(ValueError, match=r"study\.journal cannot be used"):
            open_study(SweepConfig(data="synthetic", out=str(tmp_path)))

    def test_the_code_of_a_model_of_transformers(self, tmp_path: Path, marker: Path) -> None:
        pytest.importorskip("transformers")
        code = {"AutoConfig": "evil.Config", "AutoModelForSemanticSegmentation": "evil.Model"}
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": code}))
        (tmp_path / "evil.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
        with pytest.raises(ValueError, match=f"{tmp_path} cannot be opened"):
            open_model(f"hf:{tmp_path}")


class TestText:
    @pytest.mark.parametrize("text", ["[" * 100_000, "{a: " * 10_000, LAUGHS, "data: !!int ''", "data: !!timestamp x"])
    def test_yaml_that_breaks_parsers(self, tmp_path: Path, text: str, capfd: pytest.CaptureFixture[str]) -> None:
        path = tmp_path / "evil.yaml"
        path.write_text(text)
        for read in (read_yaml, load_config, lambda path: load_dataset(str(path))):
            with pytest.raises(ValueError, match=r"evil\.yaml is not"):
                read(path)
        with pytest.raises(SystemExit):
            parse(["train", "--config", str(path)])
        assert capfd.readouterr().err.count("\n") == 1

    def test_tags_make_no_objects(self, tmp_path: Path, marker: Path, capfd: pytest.CaptureFixture[str]) -> None:
        path = tmp_path / "evil.yaml"
        path.write_text(yaml_that_runs(marker))
        for read in (load_config, lambda path: load_dataset(str(path))):
            with pytest.raises(ValueError, match=r"evil\.yaml is not valid YAML"):
                read(path)
        with pytest.raises(SystemExit):
            parse(["train", "--config", str(path)])
        assert "python/object" in capfd.readouterr().err

    @pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "9" * 5000, "\0"])
    def test_json_that_breaks_parsers(self, run: Path, shared_run: Path, text: str) -> None:
        (run / "metrics.json").write_text(text)
        assert _scores(run) == []
        for path in (run / "classes.json", shared_run / "config.json"):
            path.write_text(text)
            with pytest.raises(ValueError, match=path.name):
                read_json(path)
            with pytest.raises(ValueError, match=path.name):
                load_run(path.parent)
        with pytest.raises(ValueError, match=r"config\.json"):
            open_model(f"hf:{shared_run}")

    @pytest.mark.parametrize(
        "change",
        [
            {"model": [1]},
            {"model": "timm:hf-hub:a/b"},
            {"head": {"head_channels": 10**12}},
            {"head": {"paths": []}},
            {"head": []},
            {"weights": "x"},
        ],
    )
    def test_networks_that_cannot_be_built(self, run: Path, shared_run: Path, change: dict[str, Any]) -> None:
        config = json.loads((shared_run / "config.json").read_text())
        (shared_run / "config.json").write_text(json.dumps({**config, "network": {**config["network"], **change}}))
        with pytest.raises(ValueError, match=r"config\.json describes no network that can be built"):
            load_run(shared_run)
        checkpoint = run / "checkpoints/last.ckpt"
        saved = torch.load(checkpoint, weights_only=True)
        saved["rfield"]["network"].update(change)
        torch.save(saved, checkpoint)
        with pytest.raises(ValueError, match=r"last\.ckpt describes no network that can be built"):
            load_run(run)

    @pytest.mark.parametrize("change", [{"model": [1]}, {"paths": []}, {"head_channels": "x"}, {"nonsense": 1}])
    def test_configs(self, run: Path, change: dict[str, Any]) -> None:
        values = yaml.safe_load((run / "config.yaml").read_text())
        (run / "config.yaml").write_text(yaml.safe_dump({**values, **change}))
        with pytest.raises(ValueError, match=r"config\.yaml is not a run's config"):
            load_run(run)

    @pytest.mark.parametrize(
        "notes",
        [{"class_names": [], "palette": []}, {"class_names": ["a", 1], "palette": []}, {"class_names": ["a"]}, [], "x"]
        + [{"class_names": ["a"], "palette": [[0, 0, level]]} for level in (256, -1, 0.5, "0")],
    )
    def test_classes(self, run: Path, notes: Any) -> None:
        (run / "classes.json").write_text(json.dumps(notes))
        with pytest.raises(ValueError, match=r"classes\.json does not say"):
            load_run(run)

    @pytest.mark.parametrize("score", [[1], {"a": 1}, "1x1", 10**400])
    def test_scores_that_are_no_numbers(self, tmp_path: Path, score: Any) -> None:
        scores = {"miou": 0.5, "pixel_accuracy": 0.9, "per_class": {"road": 0.4, "car": score}}
        (tmp_path / "metrics.json").write_text(json.dumps(scores))
        assert _scores(tmp_path) == []

    def test_class_groups_nested_deep(self) -> None:
        assert parse_groups("[" * 100_000) == [["[" * 100_000]]  # names of no class


class TestHugeHeaders:
    def test_safetensors(self, tmp_path: Path) -> None:
        tensors = {"whole": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}
        header = json.dumps(tensors).encode()
        for content in (struct.pack("<Q", 2**60) + b"{}", struct.pack("<Q", len(header)) + header):
            (tmp_path / "huge.safetensors").write_bytes(content)
            with pytest.raises(ValueError, match=r"huge\.safetensors cannot be read"):
                read_weights(tmp_path / "huge.safetensors")
        (tmp_path / "sound.safetensors").write_bytes(save({"a": torch.zeros(2)}))
        assert read_weights(tmp_path / "sound.safetensors")["a"].tolist() == [0, 0]

    def test_archives_that_swell(self, run: Path, tmp_path: Path) -> None:
        buffer = io.BytesIO()
        torch.save({"a": torch.zeros(1 << 20)}, buffer)
        packed = tmp_path / "bomb.pth"
        with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
            for name in source.namelist():
                target.writestr(name, source.read(name))
        assert packed.stat().st_size < 1 << 16
        with pytest.raises(ValueError, match=r"bomb\.pth .*larger than the file"):
            read_weights(packed)
        shutil.copy(packed, run / "checkpoints/last.ckpt")
        with pytest.raises(ValueError, match=r"last\.ckpt .*larger than the file"):
            load_run(run)

    def test_tensors_larger_than_their_record(self, tmp_path: Path) -> None:
        buffer = io.BytesIO()
        torch.save({"a": torch.arange(10.0)}, buffer)
        with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(tmp_path / "huge.pth", "w") as target:
            for name in source.namelist():
                record = source.read(name)
                target.writestr(name, record.replace(b"K\n", b"J" + struct.pack("<i", 2**30)))
        with pytest.raises(ValueError, match=r"huge\.pth cannot be read"):
            read_weights(tmp_path / "huge.pth")
