"""Drawing, reading the curve, narrowing."""

import math

import pytest

from rfield.search import curve_minimum, dilation_grid


def test_curve_helpers() -> None:
    assert dilation_grid(1.0, 41.0, 14, whole=True)[:4] == [1.0, 2.0, 3.0, 4.0]
    assert len(dilation_grid(1.0, 41.0, 14, whole=False)) == 14
    assert curve_minimum({1.0: 0.1, 2.0: 0.2, 3.0: 0.3}) == 1.0
    assert curve_minimum({1.0: 0.3, 2.0: 0.1, 4.0: 0.1, 8.0: 0.3}) == pytest.approx(math.sqrt(8))
