"""Fixtures for every test: the real photographs and weights, where they are at hand."""

from pathlib import Path

import pytest

SHARED = Path(__file__).parents[1] / ".." / "shared"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if SHARED.is_dir():
        return
    skip = pytest.mark.skip(reason="needs ../shared, the real photographs and weights, beside the repository")
    for item in items:
        if item.get_closest_marker("shared"):
            item.add_marker(skip)


@pytest.fixture
def shared() -> Path:
    """The folder ../shared beside the repository; mark the test with `shared`, so that it is skipped without it."""
    return SHARED
