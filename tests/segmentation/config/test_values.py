"""Values of options that are read from text, and checks of ranges."""

import copy
import pickle
from typing import Any

import pytest

from rfield.segmentation.config.values import (
    Integers,
    Names,
    Range,
    Size,
    ascending,
    below_one,
    not_negative,
    parse_class_weights,
    positive,
    share,
)


@pytest.mark.parametrize("value", ["520x640", "520X640", [520, 640], (520, 640), ["520", "640"]])
def test_sizes(value: Any) -> None:
    assert Size(value) == (520, 640)


@pytest.mark.parametrize("value", ["", "x", "520x", "520x640x3", "0x5", [1, 2, 3], [], None, 5.5, "-5", "a", 0])
def test_wrong_sizes_say_what_a_size_is(value: Any) -> None:
    with pytest.raises(ValueError, match="a size is HEIGHTxWIDTH in px, such as 520x640, got"):
        Size(value)


@pytest.mark.parametrize("value", ["1", "a,b", "1,2,3", [1], 5, None, ""])
def test_wrong_ranges_say_what_a_range_is(value: Any) -> None:
    with pytest.raises(ValueError, match=r"a range is LOW,HIGH, such as 0\.5,2, got"):
        Range(value)


@pytest.mark.parametrize("value", ["2,6", [2, 6], (2, 6), ["2", "6"], " 2, 6"])
def test_lists(value: Any) -> None:
    assert Integers(value) == (2, 6)


@pytest.mark.parametrize("value", ["", "2,", "2;6", "2,2", [], [1, 1], 2.5, [2.5], "2.5", None, {"a": 1}, [None]])
def test_wrong_lists_say_what_a_list_is(value: Any) -> None:
    with pytest.raises(
        ValueError, match="a list is whole numbers with commas, none of them twice, such as 2,6,14, got"
    ):
        Integers(value)


@pytest.mark.parametrize("value", ["train,val", ["train", "val"], " train, val"])
def test_names(value: Any) -> None:
    assert Names(value) == ("train", "val")


@pytest.mark.parametrize("value", ["", "even", "1,", "1,-2", [], [float("nan")], "inf", 3, ["a"], {"a": 1}])
def test_wrong_class_weights_say_what_they_are(value: Any) -> None:
    with pytest.raises(ValueError, match="class weights are none, balanced, or one number a class, such as"):
        parse_class_weights(value)


@pytest.mark.parametrize("value", ["", "train,", "a,a", [], ["a", 1], None, 3])
def test_wrong_names_say_what_a_list_is(value: Any) -> None:
    with pytest.raises(ValueError, match="a list is names with commas, none of them twice, such as train,val, got"):
        Names(value)


@pytest.mark.parametrize("value", [Size("5x6"), Range("0.5,2"), Integers("2,6"), Names("a,b")])
def test_values_are_plain_tuples_to_the_rest(value: Any) -> None:
    """A spawned worker gets them pickled, help shows them as they are given, and text gives them back."""
    assert pickle.loads(pickle.dumps(value)) == value == tuple(value)
    assert type(copy.deepcopy(value)) is type(value)
    assert type(value)(str(value)) == value


@pytest.mark.parametrize(
    ("check", "good", "bad", "message"),
    [
        (positive, 1, 0, "x must be positive, got 0"),
        (positive, (1, 2), (1, -2), "x must be positive, got -2"),
        (positive, 1.5, float("nan"), "x must be positive, got nan"),
        (positive, 2**31 - 1, 2**31, "x must be less than 2147483648, got 2147483648"),
        (not_negative, 0, -1, "x must not be negative, got -1"),
        (not_negative, (0, 1), (0, -1), "x must not be negative, got -1"),
        (share, 1.0, 1.5, "x must be at most 1, got 1.5"),
        (share, 0.1, 0, "x must be positive, got 0"),
        (below_one, 0.0, 1.0, r"x must be in \[0, 1\), got 1.0"),
        (below_one, 0.9, -0.1, r"x must be in \[0, 1\), got -0.1"),
        (ascending, (1.0, 1.0), (2.0, 1.0), r"x must be LOW,HIGH with 0 < LOW <= HIGH, got \(2.0, 1.0\)"),
        (ascending, (0.1, 1.0), (0.0, 1.0), "x must be LOW,HIGH"),
        (positive, 1, None, "x must be positive, got None"),
    ],
)
def test_checks(check: Any, good: Any, bad: Any, message: str) -> None:
    check("x", good)
    with pytest.raises(ValueError, match=f"^{message}"):
        check("x", bad)
