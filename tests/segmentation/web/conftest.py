"""A real browser for the tests of pages: Chromium, moved by Playwright. Without one of them the tests are skipped."""

import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

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
