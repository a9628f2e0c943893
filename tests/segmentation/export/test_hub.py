"""Networks as folders and on the Hub, with simulated downloads and uploads."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import PIL.Image
import pytest
import torch
import yaml

from rfield.layers import LearnedFactor
from rfield.segmentation.cli import main, parse
from rfield.segmentation.config.export import PushConfig
from rfield.segmentation.config.train import TrainConfig
from rfield.segmentation.data import SyntheticCues
from rfield.segmentation.export.fused_run import fuse_run
from rfield.segmentation.export.hub import push_run, share_run
from rfield.segmentation.files.format import FORMAT
from rfield.segmentation.models import ParsingNetwork, hub, small_cnn
from rfield.segmentation.models.hub import find_folder
from rfield.segmentation.models.saving import describe_network
from rfield.segmentation.runs import build_network, load_run
from rfield.surgery.fuse import fuse

IMAGE = torch.randn(1, 3, 61, 45, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder whose search has ended, with scores and the curve's picture."""
    out = tmp_path / "run"
    (out / "checkpoints").mkdir(parents=True)
    config = TrainConfig(
        data="/secret/data", out=str(out), model="small_cnn", dilation=4, head_channels=8, canvas=(70, 70)
    ).resolved()
    torch.manual_seed(0)
    network = build_network(config, 4)
    for module in network.modules():
        if isinstance(module, LearnedFactor):
            module.set_factor(4 / 7)
            module.snap()
    (out / "config.yaml").write_text(yaml.safe_dump(config.plain()))
    data = SyntheticCues("val")
    (out / "classes.json").write_text(json.dumps({"class_names": data.class_names, "palette": data.palette}))
    state = {f"network.{key}": value for key, value in network.state_dict().items()}
    torch.save({"state_dict": state, "rfield": describe_network(network)}, out / "checkpoints/last.ckpt")
    scores = {"miou": 0.625, "pixel_accuracy": 0.75, "per_class": dict.fromkeys(data.class_names, 0.625)}
    scores |= {"effective_dilation": 7.0, "receptive_field_px": 71.0, "val_images": 4, "train_seconds": 5.0}
    (out / "metrics.json").write_text(json.dumps(scores))
    PIL.Image.new("RGB", (4, 4)).save(out / "curve.png")
    return out


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"mechanism": "dilation", "min_size": (70, 50)},
        {"paths": 2, "class_groups": ((1,), (2, 3)), "gradient_weight": 5.0},
        {"rates": (1, 3)},
        {"rectangular": True, "mechanism": "dilation", "decoder": True},
    ],
)
def test_round_trip(values: dict[str, Any], fused: bool, tmp_path: Path) -> None:
    network = small_cnn(4, head_channels=8, **values)
    for index, module in enumerate(module for module in network.modules() if isinstance(module, LearnedFactor)):
        module.set_factor(0.62 + index)
    network = fuse(network) if fused else network
    network.eval().save_pretrained(tmp_path)
    loaded = ParsingNetwork.from_pretrained(tmp_path)
    assert loaded.min_size == network.min_size
    with torch.no_grad():
        assert torch.equal(loaded(IMAGE), network(IMAGE))
    learned = [module for module in loaded.modules() if isinstance(module, LearnedFactor)]
    assert bool(learned) == (not fused and "rates" not in values)
    assert "library_name: rfield" in (tmp_path / "README.md").read_text()


def test_share(run: Path, tmp_path: Path) -> None:
    share_run(run, tmp_path / "shared", repo_id="me/fields")
    files = {file.name for file in (tmp_path / "shared").iterdir()}
    assert files == {"README.md", "config.json", "model.safetensors", "curve.png", "report.html"}
    card = (tmp_path / "shared/README.md").read_text()
    for part in ("mIoU 0.625", "Receptive field 71 px", "](curve.png)", "rfield predict hf:me/fields"):
        assert part in card
    report = (tmp_path / "shared/report.html").read_text(encoding="utf-8")
    assert "Dilation 7: each output pixel sees 71 px" in report
    for text in (card, report, (tmp_path / "shared/config.json").read_text()):
        assert "secret" not in text
        assert str(tmp_path) not in text
    before, after = load_run(run), load_run(tmp_path / "shared")
    config = TrainConfig(
        data="", out=str(tmp_path / "shared"), model="small_cnn", dilation=7, search="none", canvas=(70, 70)
    )
    assert after.config == config
    written = run / "config.yaml"
    written.write_text(written.read_text().replace("freeze_backbone: false", "freeze_backbone: true"))
    share_run(run, tmp_path / "frozen")
    out = str(tmp_path / "frozen")
    assert load_run(out).config == config.replace(out=out, freeze_backbone=True)
    with pytest.raises(ValueError, match="frozen comes from the Hub and has no learned layers to fuse"):
        fuse_run(out, tmp_path / "fused")
    small_cnn(4, dilation=2).save_pretrained(
        tmp_path / "plain", config={"class_names": "abcd", "palette": [[0] * 3] * 4}
    )
    assert load_run(tmp_path / "plain").config.model.canvas is None
    assert (after.class_names, after.palette, after.size) == (before.class_names, before.palette, None)
    with torch.no_grad():
        assert torch.allclose(before.network(IMAGE), after.network(IMAGE), rtol=0, atol=1e-5)


def test_predict_and_evaluate_from_the_hub(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    share_run(run, tmp_path / "shared")
    asked = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda repo_id: asked.append(repo_id) or str(tmp_path / "shared")
    )
    PIL.Image.effect_noise((40, 30), 80).convert("RGB").save(tmp_path / "image.png")
    name = "hf:me/fields"
    for model, out in ((name, "there"), (str(run), "here")):
        main(["predict", model, "image.png", "--out", out])
    assert (tmp_path / "there/image.png").read_bytes() == (tmp_path / "here/image.png").read_bytes()
    assert asked == ["me/fields"]
    main(["evaluate", name, "--data", "synthetic", "--json", "scores.json"])
    assert 0 <= json.loads((tmp_path / "scores.json").read_text())["miou"] <= 1
    with pytest.raises(SystemExit):
        main(["evaluate", name])
    assert "does not say what it was trained on: give --data" in capsys.readouterr().err


def test_push(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    sent: dict[str, Any] = {}

    class Hub:
        def __init__(self, token: str | None = None) -> None:
            pass

        def create_repo(self, repo_id: str, private: bool, exist_ok: bool, **kind: Any) -> huggingface_hub.RepoUrl:
            sent.update(repo_id=repo_id, private=private, **kind)
            assert exist_ok, "a run may be pushed again"
            return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

        def upload_folder(self, repo_id: str, folder_path: Path, **options: Any) -> str:
            sent["files"] = sorted(file.name for file in folder_path.iterdir())
            assert options["commit_message"]
            return f"{repo_id} is there"

    assert parse(["push", "r", "me/fields"]) == ("push", PushConfig("r", "me/fields"))
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub.hub_mixin, "HfApi", Hub)
    push_run(run, "me/fields")
    assert sent["private"] is False
    main(["push", str(run), "me/fields", "--private"])
    assert capsys.readouterr().out == "the network is at https://huggingface.co/me/fields\n"
    assert sent == {
        "repo_id": "me/fields",
        "private": True,
        "repo_type": None,
        "space_sdk": None,
        "files": ["README.md", "config.json", "curve.png", "model.safetensors", "report.html"],
    }
    main(["push", str(run), "me/fields", "--space"])
    assert capsys.readouterr().out == "the page is at https://huggingface.co/me/fields\n"
    assert (sent["repo_type"], sent["space_sdk"]) == ("space", "docker")
    assert sent["files"] == ["Dockerfile", "README.md", "network", "requirements.txt", "shown"]
    assert small_cnn(2).push_to_hub("me/other") == "me/other is there"
    assert sent["files"] == ["README.md", "config.json", "model.safetensors"]


@pytest.mark.parametrize(
    "words",
    [
        "evaluate runs/typo",
        "predict runs/typo image.png",
        "fuse runs/typo --out plain",
        "export runs/typo --out model.onnx",
        "push runs/typo me/fields",
        "inspect runs/typo",
    ],
)
def test_a_missing_folder_is_never_looked_up_on_the_hub(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("snapshot_download", "hf_hub_download", "HfApi"):
        monkeypatch.setattr(huggingface_hub, name, lambda *args, **options: pytest.fail("the Hub was asked"))
    with pytest.raises(SystemExit) as exit_:
        main(words.split())
    assert exit_.value.code == 2
    message = "runs/typo is not a run folder: there is no such folder; a model of the Hub is hf:runs/typo\n"
    assert capsys.readouterr().err.endswith(message)
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError, match=r"runs/typo has no config\.json; a model of the Hub is hf:runs/typo"):
        ParsingNetwork.from_pretrained("runs/typo")


@pytest.mark.parametrize(
    "name", ["HF:me/fields", "hf//me/fields", "huggingface:me/fields", "https://huggingface.co/me/fields"]
)
def test_a_prefix_that_is_mistyped_is_named(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"; a model of the Hub is hf:me/fields$"):
        load_run(name)


@pytest.mark.parametrize("name", ["hf:", "hf:/me/fields", "hf:me/fields/x", "hf:me fields"])
def test_what_is_no_name_is_not_looked_up(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args: pytest.fail("the Hub was asked"))
    with pytest.raises(ValueError, match=r"names no model of the Hub: give hf:USER/NAME"):
        find_folder(name)


def test_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(repo_id: str) -> str:
        raise RuntimeError("no network")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(FileNotFoundError, match="there is no model me/fields from the Hub: no network"):
        find_folder("hf:me/fields")
    (tmp_path / "runs").mkdir()
    with pytest.raises(FileNotFoundError, match="runs/typo is not a run folder"):
        load_run("runs/typo")
    network = small_cnn(2)
    network.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="does not say what rfield writes of the classes"):
        load_run(tmp_path / "saved")
    config = json.loads((tmp_path / "saved/config.json").read_text())
    config["network"]["head"]["head_channels"] = 4
    (tmp_path / "saved/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"does not fit config\.json"):
        ParsingNetwork.from_pretrained(tmp_path / "saved")
    (tmp_path / "saved/config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config\.json is damaged or no file of rfield's"):
        ParsingNetwork.from_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="it has no spec: build it with build_model"):
        ParsingNetwork(network.backbone, network.head).save_pretrained(tmp_path)


def test_without_huggingface_hub_one_line_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    spec = importlib.util.spec_from_file_location("without_hub", hub.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(ValueError, match=r"needs the package huggingface_hub: pip install 'rfield\[hub\]'"):
        module.HubMixin().push_to_hub("me/fields")
    with pytest.raises(ValueError, match=r"hf:me/fields needs the package huggingface_hub"):
        module.find_folder("hf:me/fields")


def test_files_of_other_versions_are_refused_by_name(run: Path, tmp_path: Path) -> None:
    small_cnn(2).save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved/config.json").read_text())
    checkpoint = run / "checkpoints/last.ckpt"
    saved = torch.load(checkpoint, weights_only=True)
    assert (config["format"], saved["rfield"]["format"]) == (FORMAT, FORMAT)
    old, new = "0.1, .*: train again, or use rfield 0.1$", "9.9, .*: update it with pip install --upgrade rfield$"
    for described, message in (({}, old), ({"format": FORMAT + 1, "version": "\n9.9\x1b"}, new)):
        (tmp_path / "saved/config.json").write_text(json.dumps({"network": config["network"], **described}))
        with pytest.raises(ValueError, match=rf"config\.json was written by rfield {message}"):
            ParsingNetwork.from_pretrained(tmp_path / "saved")
        torch.save({"state_dict": saved["state_dict"], **({"rfield": described} if described else {})}, checkpoint)
        (run / "config.yaml").write_text("a_field_of_that_version: 1")
        with pytest.raises(ValueError, match=rf"last\.ckpt was written by rfield {message}"):
            load_run(run)
