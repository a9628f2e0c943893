"""The page's server without a browser: labels, fields, uploads, and whom it answers."""

import gzip
import io
import json
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from rfield.layers import LearnedFactor
from rfield.segmentation.cli import main
from rfield.segmentation.config.inspect import ShowConfig
from rfield.segmentation.config.train import TrainConfig
from rfield.segmentation.data.images import read_image
from rfield.segmentation.models import small_cnn
from rfield.segmentation.runs import Run
from rfield.segmentation.web import show, show_pictures
from rfield.segmentation.web.show_curve import read_curves
from rfield.segmentation.web.show_field import pixel_field
from rfield.segmentation.web.show_pictures import Picture, Pictures
from rfield.segmentation.web.show_viewer import PathSlider, Viewer, open_viewer


@pytest.fixture
def run(whole_run: Callable[..., Any]) -> Path:
    return Path(whole_run(search="sampled", paths=2, dilation=3).run.out)


def a_picture(seed: int = 0, size: tuple[int, int] = (52, 61)) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_labels_are_those_of_predict(run: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(a_picture())
    viewer = open_viewer(str(run), None, "last")
    assert "end of the search" in viewer.weights
    picture = Pictures(None, "val", None).add("a.png", a_picture())
    for dilations in ([2, 5], None, [7, 1]):
        words = [] if dilations is None else ["--dilations", ",".join(map(str, dilations))]
        main(
            [
                "predict",
                str(run),
                str(tmp_path / "a.png"),
                "--out",
                str(tmp_path / "out"),
                "--weights",
                "search",
                *words,
            ]
        )
        labels, confidence = viewer.labels(picture, dilations)
        assert np.array_equal(labels, np.asarray(PIL.Image.open(tmp_path / "out/a.png")))
        assert confidence.min() >= 255 // viewer.network.num_classes
    with pytest.raises(ValueError, match="got 1 dilation, but the network has 2"):
        viewer.labels(picture, [2])
    with pytest.raises(ValueError, match="numbers from 1 to"):
        viewer.labels(picture, [0.5, float("nan")])


def test_final_weights_are_said_to_be_final(run: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run/search_weights.safetensors").unlink()
    viewer = open_viewer(str(tmp_path / "run"), None, "last")
    assert "trained at the learned dilations alone" in viewer.weights
    assert [slider.curve for slider in viewer.sliders] == list(read_curves(run).values())
    (tmp_path / "run/metrics.json").write_text('{"search": {"factors": [1]}}', encoding="utf-8")
    assert open_viewer(str(tmp_path / "run"), None, "last").sliders[0].curve == []


def test_a_snapped_regulator_moves_and_comes_back() -> None:
    torch.manual_seed(0)
    network = small_cnn(4, dilation=6, head_channels=8).eval()
    layer = next(module for module in network.modules() if isinstance(module, LearnedFactor))
    layer.set_factor(2.0)
    layer.snap()
    config = TrainConfig(data="synthetic", out="none", model="small_cnn")
    run = Run(Path("none"), config, tuple("abcd"), [(0, 0, 0)] * 4, network)
    viewer = Viewer("network", network, "", run, [PathSlider(3.0, 1.0, 8.0, 0.25, [])])
    picture = Pictures(None, "val", None).add("a", a_picture())
    learned = [viewer.labels(picture, dilations)[1] for dilations in (None, [8], [3], None)]
    assert not torch.equal(learned[0], learned[1])
    assert torch.equal(learned[0], learned[3])
    assert layer.snapped


def test_the_box_holds_all_that_a_pixel_sees(run: Path) -> None:
    viewer = open_viewer(str(run), None, "last")
    picture = Pictures(None, "val", None).add("a", a_picture(size=(97, 101)))
    found = pixel_field(viewer, picture, [1, 2], 52, 48, 0.95)
    assert found.theoretical is not None
    top, left, bottom, right = found.theoretical
    # On the grid of features: the backbone sees 15 px, fc6 at dilation 2 and stride 4 sees 16 px more.
    assert (bottom - top, right - left) == (31, 31)
    assert ((top + bottom - 1) / 2, (left + right - 1) / 2) == (48, 52)
    inside = torch.zeros_like(found.heat, dtype=torch.bool)
    inside[int(top) : int(bottom), int(left) : int(right)] = True
    assert not found.heat[~inside].any()
    assert found.heat[int(top) + 1].any()
    assert found.heat[int(bottom) - 2].any()
    assert found.square[0] >= top
    assert found.heat.max() == 255
    labels, confidence = viewer.labels(picture, [1, 2])
    best, before, _ = found.scores[0]
    assert best == labels[48, 52]
    assert before == pytest.approx(float(confidence[48, 52]) / 255, abs=0.004)
    assert sum(share for _, share in found.votes) == pytest.approx(1, abs=0.01)
    corner = pixel_field(viewer, picture, [1, 2], 0, 0, 0.99)
    assert corner.theoretical is not None
    assert corner.theoretical[0] < 0
    with pytest.raises(ValueError, match="x 101, y 0 lies outside of the image of 101x97 px"):
        pixel_field(viewer, picture, None, 101, 0, 0.95)


def test_hiding_what_a_pixel_does_not_see_changes_nothing(run: Path) -> None:
    viewer = open_viewer(str(run), None, "last")
    picture = Pictures(None, "val", None).add("a", a_picture(size=(65, 65)))
    scores = [pixel_field(viewer, picture, [1, 1], 32, 32, share).scores for share in (0.5, 0.99)]
    change = [max(abs(before - after) for _, before, after in each) for each in scores]
    assert change[1] < change[0]


def test_a_model_without_a_run_has_a_field_alone() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 5, stride=4, padding=2), torch.nn.Conv2d(4, 2, 3, padding=1)
    ).eval()
    viewer = Viewer("model", model, "Random weights.")
    picture = Pictures(None, "val", None).add("a", a_picture(size=(64, 64)))
    found = pixel_field(viewer, picture, None, 32, 32, 0.95)
    assert found.theoretical == (26, 26, 39, 39)
    assert (found.votes, found.scores) == ([], [])
    with pytest.raises(ValueError, match="has no labels"):
        viewer.labels(picture, None)


def test_uploads_are_bounded_and_no_file_of_their_name_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = Pictures(None, "val", None)
    kept = pictures.add("/etc/passwd", a_picture())
    assert torch.equal(pictures.find(kept.key).pixels, read_image(Path("a"), io.BytesIO(a_picture())))
    monkeypatch.setattr(show_pictures, "MOST_UPLOADS", 2)
    others = [pictures.add("a", a_picture(seed)) for seed in (1, 2)]
    assert pictures.find(others[0].key) is others[0]
    with pytest.raises(KeyError, match="there is no image"):
        pictures.find(kept.key)
    for data in (b"", b"GIF89a", a_picture()[:200], b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9"):
        with pytest.raises(ValueError, match="the uploaded file"):
            pictures.add("a.png", data)
    monkeypatch.setattr(show_pictures, "MOST_PIXELS", 3000)
    with pytest.raises(ValueError, match="52x61 px, more than"):
        pictures.add("a", a_picture())
    monkeypatch.setattr(show_pictures, "WORKING_PIXELS", 793)
    resized = pictures.add("a", a_picture(size=(26, 61)))
    assert (tuple(resized.pixels.shape), resized.note) == ((3, 18, 43), "resized from 26x61 to 18x43 px")
    assert Pictures(None, "val", (8, 9)).add("a", a_picture(size=(26, 61))).pixels.shape == (3, 8, 9)


class _Client:
    def __init__(self, address: str) -> None:
        self.address = address

    def __call__(self, path: str, data: bytes | None = None, **headers: str) -> tuple[int, Any, Any]:
        method = "GET" if data is None else "PUT"
        request = urllib.request.Request(self.address + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                body = answer.read()
                zipped = answer.headers.get("content-encoding") == "gzip"
                return answer.status, gzip.decompress(body) if zipped else body, answer.headers
        except urllib.error.HTTPError as error:
            return error.code, error.read(), error.headers


def test_the_server_answers_its_own_page_alone(
    run: Path, serve: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = _Client(serve([open_viewer(str(run), None, "last")], Pictures(None, "val", None), ["127.0.0.1"]))
    status, page, headers = client("/")
    assert status == 200
    assert b"rfield" in page
    assert "script-src 'self'" in headers["content-security-policy"]
    assert (headers["x-content-type-options"], headers["cache-control"]) == ("nosniff", "no-store")
    for host in ("evil.example", "127.0.0.1.evil.example", "", "127.0.0.1@evil.example"):
        assert client("/setup", Host=host)[0] in (400, 403), host
    assert client("/setup", Host="127.0.0.1:1")[0] == 200
    _, answer, _ = client("/upload?name=%22%3Cb%3E.png", a_picture())
    key = json.loads(answer)["key"]
    assert json.loads(answer)["name"] == '"<b>.png'
    assert len(client(f"/labels?image={key}")[1]) == 2 * 52 * 61
    for path, expected, said in [
        ("/labels?image=val-0", 404, "there is no image"),
        ("/labels?model=2", 404, "there is no network"),
        (f"/labels?image={key}&dilations=2,x", 400, "dilations are numbers"),
        (f"/labels?image={key}&dilations=2,1e9", 400, "numbers from 1 to"),
        (f"/field?image={key}&x=0&y=nan&share=0.95", 400, "y must be a number"),
        (f"/field?image={key}&x=0&y=0&share=0.1", 400, "the share is one of"),
    ]:
        status, body, _ = client(path)
        assert (status, said in json.loads(body)["error"]) == (expected, True), path
    assert client("/upload", b"no image")[0] == 400
    assert client("/../show.py")[0] == 404
    monkeypatch.setattr("rfield.segmentation.web.show_app.MOST_BYTES", 100)
    status, body, _ = client("/upload", a_picture())
    assert (status, "make it smaller" in json.loads(body)["error"]) == (413, True)


def test_addresses_ports_and_images(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with show.bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=rf"127\.0\.0\.1, port {port}: address already in use; give another"):
            show.bind("127.0.0.1", port)
    with pytest.raises(OSError, match="give another --host"):
        show.bind("no-such-host.invalid", 0)
    assert show.allowed_hosts("10.0.0.1") == ["10.0.0.1", "127.0.0.1", "localhost"]
    viewer = open_viewer(str(run), None, "last")
    pictures = show.open_pictures([viewer], None, None)
    key, _ = pictures.listed()[0]
    assert isinstance(pictures.find(key), Picture)
    for wrong in ("val-99", "val--1", "train-0", "val-x", ""):
        with pytest.raises(KeyError):
            pictures.find(wrong)
    assert viewer.run is not None
    viewer.run.config.data.data = "folder:/nowhere"
    assert show.open_pictures([viewer], None, None).listed() == []
    assert "has uploads alone" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError):
        show.open_pictures([viewer], "folder:/nowhere", None)
    with pytest.raises(ValueError, match="port must be from 0 to 65535"):
        ShowConfig(run="run", port=70000)
