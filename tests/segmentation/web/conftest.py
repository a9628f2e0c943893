"""A real browser for the tests of pages, Chromium moved by Playwright, without which they are skipped; run folders."""

import json
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest
import yaml

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

_CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
# Schemes that leave no machine.
_LOCAL = ("about", "blob", "data", "file")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "browser" in getattr(item, "fixturenames", ()):
            item.add_marker("browser")
            item.add_marker("slow")


def foreign(addresses: Iterable[str]) -> list[str]:
    """Return the requests that go to another host than 127.0.0.1.

    >>> foreign(["http://127.0.0.1:80/a", "data:,a", "http://127.0.0.1.example/"])
    ['http://127.0.0.1.example/']
    """
    parts = {address: urlsplit(address) for address in addresses}
    return [each for each, part in parts.items() if part.scheme not in _LOCAL and part.hostname != "127.0.0.1"]


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    """Chromium for the tests of one file. Playwright's event loop would disturb the tests of other files."""
    program = next(filter(None, map(shutil.which, _CHROMIUM)), None)
    if program is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=program)
        yield opened
        opened.close()


@pytest.fixture
def open_page(browser: "Browser") -> "Iterator[Callable[..., Page]]":
    """Open an address, `width` px wide; `options` are those of Playwright's `new_context`.

    At the end the test fails if a request of any page has left the machine, or if a script has failed.
    `page.requests` and `page.errors` are what it has asked for and what has failed, `page.foreign()` what must not be.
    """
    contexts, requests, errors = [], [], []

    def open_at(address: str, width: int = 1200, height: int = 900, **options: Any) -> "Page":
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        context.set_default_timeout(10_000)
        context.on("request", lambda request: requests.append(request.url))
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
        page.requests, page.errors, page.foreign = requests, errors, lambda: foreign(requests)
        page.goto(address)
        return page

    yield open_at
    for context in contexts:
        context.close()
    assert not foreign(requests)
    assert not errors


@pytest.fixture
def axe_problems() -> "Callable[[Page], list[str]]":
    """Return what axe-core finds wrong with a page that is serious or critical: each rule with its elements."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python").Axe()

    def problems(page: "Page") -> list[str]:
        return [
            f"{found['id']}: {', '.join(str(node['target']) for node in found['nodes'])}"
            for found in axe.run(page).response["violations"]
            if found["impact"] in ("serious", "critical")
        ]

    return problems


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    """Serve the page of `rfield show` with `make_app`'s arguments, and return its address."""
    uvicorn = pytest.importorskip("uvicorn")
    from rfield.segmentation.web.show import bind
    from rfield.segmentation.web.show_app import make_app

    started: list[tuple[Any, threading.Thread]] = []

    def serve(*arguments: Any) -> str:
        listener = bind("127.0.0.1", 0)
        server = uvicorn.Server(uvicorn.Config(make_app(*arguments), log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        started.append((server, thread))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"

    yield serve
    for server, thread in started:
        server.should_exit = True
        thread.join(20)


CLASSES = ("<script>alert(1)</script>", "</script><b>car", "sky & \"sea\" 'x'")
VERDICT = {
    **{"kind": "clear", "reason": "dilation 3 beats the present 1 by 0.06 ± 0.005", "dilation": 3.0, "present": 1.0},
    **{"gain": 0.06, "standard_error": 0.005, "flat_range": [3.0, 3.0]},
}
READINGS = [
    {"step": 4, "curve": [[1.0, 0.9], [3.0, 0.7], [9.0, 0.8]], "errors": [[1.0, 0.1], [3.0, 0.0], [9.0, None]]},
    {"step": 6, "curve": [[1.0, 0.5], [3.0, 0.4]], "errors": [[1.0, 0.01], [3.0, 0.0]]},
]
SEARCH = {
    **{"kind": "sampled", "steps": 6, "seconds": 0.5, "verdict": VERDICT, "readings": READINGS},
    "held_out": ["one", "two"],
}
METRICS: dict[str, Any] = {
    **{"miou": 0.5, "per_class": dict(zip(CLASSES, (0.75, 0.25, None), strict=True)), "pixel_accuracy": 0.6},
    **{"factor": 1 / 3, "effective_dilation": 3.0, "receptive_field_px": 39.0, "val_images": 2, "train_seconds": 75.0},
    **{"seed": 0, "versions": {"rfield": "0.2.0", "torch": "2.9"}, "search": SEARCH},
}


@pytest.fixture
def plain_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the chart library out of reports; its script takes seconds to make."""
    from rfield.segmentation.web import report_page

    monkeypatch.setattr(report_page, "_chart_library", lambda vl_convert: "")


@pytest.fixture
def run_folder(tmp_path: Path, make_devkit: Callable[..., Path]) -> Callable[..., Path]:
    """Write a run folder as `rfield train` leaves it, in a folder and of classes whose names are no plain words.

    `run_folder.metrics` is the content of its metrics.json, `run_folder.classes` the classes' names.
    """
    import torch

    from rfield.segmentation.config.train import TrainConfig
    from rfield.segmentation.files.atomic import write_csv
    from rfield.segmentation.models.saving import describe_network
    from rfield.segmentation.runs import build_network

    data = make_devkit({"train": ["a"], "val": ["b", "c"]}, CLASSES).rename(tmp_path / "my \"data\" & 'more'")

    def make(name: str = "run \"<i>'", metrics: dict[str, Any] | None = METRICS, **options: Any) -> Path:
        out = tmp_path / name
        (out / "checkpoints").mkdir(parents=True)
        config = TrainConfig(
            data=f"voc:{data}", out=str(out), model="small_cnn", dilation=1, head_channels=8, epochs=4, **options
        ).resolved()
        torch.manual_seed(0)
        network = build_network(config, len(CLASSES))
        state = {f"network.{key}": value for key, value in network.state_dict().items()}
        saved = {"state_dict": state, "rfield": describe_network(network), "epoch": 1}
        torch.save(saved, out / "checkpoints/last.ckpt")
        (out / "config.yaml").write_text(yaml.safe_dump(config.plain()))
        (out / "classes.json").write_text(
            json.dumps({"class_names": CLASSES, "palette": [(level, 50, 90) for level in range(256)]})
        )
        columns = ["step", "factor", "effective_dilation", "receptive_field_px", "loss"]
        write_csv(out / "factor.csv", [columns, *([step, 1, 1 + step % 3, 9, 1 / step] for step in range(1, 9))])
        if metrics is not None:
            (out / "metrics.json").write_text(json.dumps(metrics))
        return out

    make.metrics, make.classes = METRICS, CLASSES
    return make
