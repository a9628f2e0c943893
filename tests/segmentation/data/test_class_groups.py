import numpy as np
import pytest
import torch
from torchvision.tv_tensors import Image, Mask

from rfield.segmentation.data import ParsingDataset, SyntheticCues
from rfield.segmentation.data.class_groups import class_groups, class_sizes, group_by_size


class Squares(ParsingDataset):
    """Two squares of 4 px of class 1 and one of 20 px of class 2 on a background; no class 3; a void frame."""

    class_names = ("background", "left eye", "face skin", "hat")

    def __init__(self) -> None:
        self.palette = [(0, 0, 0)] * 4
        self.ids = ["a", "b"]

    def __getitem__(self, index: int) -> tuple[Image, Mask]:
        mask = np.zeros((64, 64), np.uint8)
        mask[4:8, 4:8] = mask[4:8, 20:24] = 1
        mask[30:50, 30:50] = 2
        mask[:, 0] = 255
        return Image(torch.zeros(3, 64, 64, dtype=torch.uint8)), Mask(torch.from_numpy(mask))

    def fingerprint(self) -> str:
        return "squares"

    def sizes(self) -> list[tuple[int, int]]:
        return [(64, 64)] * 2


def test_sizes_are_those_of_regions_not_of_classes() -> None:
    sizes = class_sizes(Squares())
    assert sizes == {0: pytest.approx(np.sqrt(64 * 63 - 32 - 400)), 1: 4.0, 2: 20.0}


def test_auto_groups_by_size_smallest_first() -> None:
    assert class_groups("auto", 2, Squares()) == {"small (4-4 px)": (1,), "large (20-60 px)": (0, 2)}
    three = class_groups("auto", 3, Squares())
    assert three == {"small (4-4 px)": (1,), "middle (20-20 px)": (2,), "large (60-60 px)": (0,)}
    four = group_by_size({0: 1.0, 1: 2.0, 2: 30.0, 3: 64.0}, 4)
    assert (list(four.values()), list(four)[1]) == ([(0,), (1,), (2,), (3,)], "size 2 (2-2 px)")
    # The logarithms in each group spread least: with their numbers as weights.
    assert list(group_by_size({5: 1.0, 3: 1.9, 2: 3.7, 7: 9.0}, 2).values()) == [(3, 5), (2, 7)]


def test_regions_touch_at_corners_and_up_to_200_masks_are_measured() -> None:
    class Many(Squares):
        seen: list[int] = []  # noqa: RUF012

        def __getitem__(self, index: int) -> tuple[Image, Mask]:
            self.seen.append(index)
            mask = np.eye(12, dtype=np.uint8)
            mask[:2, 4:6] = mask[:2, 7:9] = mask[:2, 10:12] = mask[6:10, :4] = 2
            return Image(torch.zeros(3, 12, 12, dtype=torch.uint8)), Mask(torch.from_numpy(mask))

    many = Many()
    many.ids = ["a"] * 400
    # Half of the pixels of class 2 lie in the largest of its four squares.
    assert {value: round(size**2) for value, size in class_sizes(many).items() if value} == {1: 12, 2: 16}
    assert many.seen == list(range(0, 400, 2))


def test_classes_by_name_or_by_a_word_of_it() -> None:
    groups = class_groups({"small": ["eye"], "large": ["face skin", "background"]}, 2, Squares())
    assert groups == {"small": (1,), "large": (0, 2)}
    assert class_groups([["left"], ["hat", "skin"]], 2, Squares()) == {"group 1": (1,), "group 2": (2, 3)}


@pytest.mark.parametrize(
    ("groups", "paths", "message"),
    [
        ({"a": ["eye"]}, 2, "need 2 class groups, got 1: a"),
        ([["eye"], ["nose"]], 2, "no class 'nose'; the classes are background, left eye"),
        ([["eye"], []], 2, "'group 2' is empty"),
        ("size", 2, "or auto; got 'size'"),
        ("auto", 4, "the masks contain 3"),
    ],
)
def test_errors(groups: object, paths: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        class_groups(groups, paths, Squares())


def test_real_dataset_type() -> None:
    assert len(class_groups("auto", 2, SyntheticCues("train"))) == 2
