"""The fixtures that watch a page: a request that leaves the machine, and markup that a screen reader cannot read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

_PAGE = '<!doctype html><html lang="en"><title>t</title><main><h1>t</h1>{}<input id="a"></main></html>'


def test_a_page_is_watched(
    open_page: Callable[..., Any], axe_problems: Callable[[Any], list[str]], tmp_path: Path
) -> None:
    path = tmp_path / "page.html"
    path.write_text(_PAGE.format('<img src="http://rfield.invalid/a.png" alt="">'), encoding="utf-8")
    page = open_page(path.as_uri())
    assert [problem.split(":")[0] for problem in axe_problems(page)] == ["label"]
    assert page.foreign() == ["http://rfield.invalid/a.png"]
    assert page.errors
    path.write_text(_PAGE.format('<label for="a">a</label>'), encoding="utf-8")
    page.goto(path.as_uri())
    assert axe_problems(page) == []
    page.requests.clear()  # Or the fixture would fail this test.
    page.errors.clear()
