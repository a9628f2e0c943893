"""The page of `rfield show` in a browser: sliders, clicks, uploads and links, compared pixel by pixel."""

import base64
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image
import pytest
import yaml

from rfield.segmentation import plots
from rfield.segmentation.export.space import share_space
from rfield.segmentation.web import show
from rfield.segmentation.web.show_field import pixel_field
from rfield.segmentation.web.show_pictures import MOST_BYTES, Pictures
from rfield.segmentation.web.show_viewer import Viewer, open_viewer

HOSTILE = "<script>document.title='owned'</script>"


@pytest.fixture
def viewers(whole_run: Callable[..., Any], tmp_path: Path) -> list[Viewer]:
    """A run of two paths, in a folder with quotes, and with a class whose name is a script."""
    folder = tmp_path / "a \"run\" of 'mine' <b>"
    shutil.copytree(whole_run(search="sampled", paths=2, dilation=3).run.out, folder)
    classes = json.loads((folder / "classes.json").read_text(encoding="utf-8"))
    classes["class_names"][0] = HOSTILE
    (folder / "classes.json").write_text(json.dumps(classes), encoding="utf-8")
    return [open_viewer(str(folder), None, "last")]


def until(page: Any, expression: str) -> None:
    """Wait for something in the page. `wait_for_function` would need `eval`, which the page forbids."""
    for _ in range(400):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(25)
    pytest.fail(f"{expression} does not become true; the page says: {page.locator('#alert').inner_text()}")


def settle(page: Any) -> None:
    """Wait until the page has drawn what it asked for."""
    field = "(!state.pixel || (m.field && m.field.pixel === state.pixel))"
    until(page, f"state.models.length && state.models.every((m) => m.labels && !m.busy && {field})")


def canvas(page: Any, number: int = 0) -> tuple[npt.NDArray[np.uint8], dict[str, int], int]:
    """Return a canvas's pixels [H, W, 3], the area of the image that it shows, and its px for each of them."""
    read = "(number) => { const { canvas, frame } = state.models[number]; return [canvas.toDataURL(), frame]; }"
    address, frame = page.evaluate(read, number)
    image = PIL.Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2])))
    return np.asarray(image.convert("RGB")), frame["area"], frame["zoom"]


def assert_drawn(page: Any, viewer: Viewer, pictures: Pictures, key: str, dilations: list[float] | None) -> None:
    """The canvas shows the labels over the image, in the colours of `rfield predict`."""
    picture = pictures.find(key)
    labels, _ = viewer.labels(picture, dilations)
    assert viewer.run is not None
    expected = plots.overlay(
        picture.pixels.permute(1, 2, 0).numpy(), labels.numpy(), np.array(viewer.run.palette, np.uint8)
    )
    pixels, _, zoom = canvas(page)
    drawn = pixels[zoom // 2 :: zoom, zoom // 2 :: zoom].astype(int)
    assert np.abs(drawn - expected).max() <= 2, "but for rounding"
    sure = page.evaluate("Array.from(state.models[0].labels)")
    assert np.array_equal(np.array(sure, np.uint8).reshape(labels.shape), labels)


def test_sliders_move_the_labels(
    viewers: list[Viewer],
    serve: Callable[..., str],
    open_page: Callable[..., Any],
    axe_problems: Callable[..., list[str]],
) -> None:
    pictures = show.open_pictures(viewers, None, None)
    address = serve(viewers, pictures, ["127.0.0.1"])
    page = open_page(address)
    settle(page)
    assert_drawn(page, viewers[0], pictures, "val-0", None)
    assert page.title().startswith(viewers[0].title)
    assert page.locator("script").count() == 1, "no name has become a script"
    assert HOSTILE in page.locator(".legend").first.inner_text() or HOSTILE in page.evaluate(
        "state.models[0].about.classes[0].name"
    )
    assert axe_problems(page) == []
    # With the keyboard: three steps to the right.
    slider = page.locator("#path-0-1-range")
    start = viewers[0].sliders[1].learned
    slider.focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    settle(page)
    moved = [viewers[0].sliders[0].learned, start + 3]
    assert page.locator("#path-0-1-number").input_value() == f"{start + 3:g}"
    assert_drawn(page, viewers[0], pictures, "val-0", moved)
    page.locator("#path-0-0-number").fill("7")
    settle(page)
    moved[0] = 7
    assert_drawn(page, viewers[0], pictures, "val-0", moved)
    learned, _ = viewers[0].labels(pictures.find("val-0"), None)
    labels, _ = viewers[0].labels(pictures.find("val-0"), moved)
    assert f"{100 * float((labels != learned).float().mean()):.1f} %" in page.locator(".result").inner_text()
    until(page, "document.querySelector('#live').textContent.includes('Dilations 7')")
    # The link restores it, in a dark scheme and on a phone.
    page.get_by_label("Difference").check()
    until(page, "location.search.includes('view=difference')")
    again = open_page(page.url, width=390, color_scheme="dark")
    settle(again)
    assert again.locator("#path-0-0-number").input_value() == "7"
    assert again.evaluate("state.view") == "difference"
    assert again.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert axe_problems(again) == []
    pixels, _, zoom = canvas(again)
    drawn = pixels[zoom // 2 :: zoom, zoom // 2 :: zoom]
    same = (labels == learned).numpy()
    assert (np.ptp(drawn[same].astype(int), axis=1) <= 2).all(), "the image is grey where nothing differs"
    again.get_by_role("button", name="Back to the learned").click()
    settle(again)
    assert "dilations" not in again.evaluate("new URLSearchParams(state.models[0].query()).toString()")


def test_a_click_draws_what_the_pixel_sees(
    viewers: list[Viewer],
    serve: Callable[..., str],
    open_page: Callable[..., Any],
    axe_problems: Callable[..., list[str]],
) -> None:
    pictures = show.open_pictures(viewers, None, None)
    page = open_page(serve(viewers * 2, pictures, ["127.0.0.1"]) + "/?dilations2=1,2")
    settle(page)
    # Two networks side by side, the second one moved.
    boxes = [page.locator("canvas").nth(number).bounding_box() for number in (0, 1)]
    assert boxes[0]["x"] + boxes[0]["width"] < boxes[1]["x"]
    height, width = pictures.find("val-0").pixels.shape[1:]
    place = {"x": (4 + 0.5) * boxes[1]["width"] / width, "y": (20 + 0.5) * boxes[1]["height"] / height}
    page.locator("#share").select_option("0.5")
    page.locator("canvas").nth(1).click(position=place)
    settle(page)
    assert page.evaluate("state.pixel") == {"x": 4, "y": 20}
    found = pixel_field(viewers[0], pictures.find("val-0"), [1, 2], 4, 20, 0.5)
    assert found.theoretical is not None
    pixels, area, zoom = canvas(page, 1)
    assert area["left"] < 0, "the padding that it reads is drawn"
    top, left, bottom, right = (round(side) for side in found.theoretical)
    blue = np.array([0x56, 0xB4, 0xE9])
    row, column = (top + bottom) // 2, (left + right) // 2
    for y, x in ((top, column), (bottom, column), (row, left), (row, right)):
        at = min((y - area["top"]) * zoom, pixels.shape[0] - 1), min((x - area["left"]) * zoom, pixels.shape[1] - 1)
        near = pixels[max(0, at[0] - 1) : at[0] + 2, max(0, at[1] - 1) : at[1] + 2].reshape(-1, 3)
        assert np.abs(near.astype(int) - blue).sum(1).min() < 90, (y, x)
    heat = np.array(page.evaluate("Array.from(state.models[1].field.heat)"), np.uint8).reshape(height, width)
    assert np.array_equal(heat, found.heat)
    seen = page.locator(".seen").nth(1)
    assert f"{right - left}\u00d7{bottom - top} px" in seen.locator(".boxes").inner_text()
    assert f"{found.scores[0][2]:.3f}" in seen.locator(".scores").inner_text()
    assert axe_problems(page) == []
    # By the keyboard, in place of a click; the link keeps it.
    page.locator("#x").fill("30")
    page.locator("#y").fill("7")
    page.keyboard.press("Enter")
    until(page, "state.models.every((m) => m.field && m.field.pixel.x === 30)")
    until(page, "location.search.includes('x=30&y=7')")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download as PNG").nth(1).click()
    assert download.value.suggested_filename == "rfield-field-1-2.png"
    saved = np.asarray(PIL.Image.open(download.value.path()).convert("RGB"))
    assert np.array_equal(saved, canvas(page, 1)[0])
    page.get_by_role("button", name="Clear").first.click()
    assert page.locator(".seen").first.is_hidden()


def test_an_image_is_uploaded_to_a_space(
    viewers: list[Viewer], serve: Callable[..., str], open_page: Callable[..., Any], tmp_path: Path
) -> None:
    share_space(viewers[0].title, tmp_path / "space", repo_id="me/it's: <b>")
    front, text = (tmp_path / "space/README.md").read_text(encoding="utf-8").split("---\n")[1:3]
    assert yaml.safe_load(front)["title"] == "it's: <b>"
    assert "weights of its search" in text
    written = [file for file in (tmp_path / "space").rglob("*") if file.suffix not in (".safetensors", "")]
    assert not [file for file in written if str(tmp_path) in file.read_text(encoding="utf-8")], "no path of the run"
    space = open_viewer(str(tmp_path / "space/shown"), None, "last")
    assert (space.weights, space.sliders) == (viewers[0].weights, viewers[0].sliders)
    pictures = show.open_pictures([space], None, None)
    page = open_page(serve([space], pictures, None))
    page.get_by_text("Upload an image to begin").wait_for()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG")
    name = "<img src=x onerror=alert(1)>.png"
    page.locator("#file").set_input_files({"name": name, "mimeType": "image/png", "buffer": file.getvalue()})
    settle(page)
    assert page.locator("#image option").inner_text() == name
    assert_drawn(page, viewers[0], pictures, page.evaluate("state.image"), None)
    page.locator("#path-0-0-number").fill("5")
    settle(page)
    assert_drawn(page, viewers[0], pictures, page.evaluate("state.image"), [5, viewers[0].sliders[1].learned])
    too_large = tmp_path / "large.png"
    with too_large.open("wb") as large:
        large.truncate(MOST_BYTES + 1)
    page.locator("#file").set_input_files(too_large)
    assert "more than 20 MB: make it smaller" in page.get_by_role("alert").inner_text()
    page.locator("#file").set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": b"no image"})
    page.get_by_text("The uploaded file cannot be opened as an image").wait_for()
    page.errors.clear()  # The browser's line on the refused upload.
