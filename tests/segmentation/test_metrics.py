import math

import pytest
import torch

from rfield.segmentation.data import HELEN_CLASSES
from rfield.segmentation.metrics import confusion_matrix, helen_scores, segmentation_scores


def test_scores_equal_a_hand_computed_table() -> None:
    truth = torch.tensor([[0, 0, 0, 1], [1, 1, 2, 2]])
    preds = torch.tensor([[0, 0, 1, 1], [1, 2, 2, 0]])
    matrix = confusion_matrix(3)
    matrix.update(preds, truth)
    confusion = matrix.compute()
    assert confusion.tolist() == [[2, 1, 0], [0, 2, 1], [1, 0, 1]]  # rows = truth
    scores = segmentation_scores(confusion, ["a", "b", "c"])
    assert scores["per_class"] == {"a": 2 / 4, "b": 2 / 4, "c": 1 / 3}
    assert math.isclose(scores["miou"], (1 / 2 + 1 / 2 + 1 / 3) / 3)
    assert scores["pixel_accuracy"] == 5 / 8


def test_a_class_absent_from_truth_and_prediction_is_left_out_of_the_mean() -> None:
    scores = segmentation_scores(torch.tensor([[3, 0, 1], [0, 0, 0], [0, 0, 0]]), ["a", "absent", "only predicted"])
    assert scores["per_class"] == {"a": 0.75, "absent": None, "only predicted": 0.0}
    assert scores["miou"] == 0.375


def test_without_any_pixel_there_is_no_score() -> None:
    scores = segmentation_scores(torch.zeros(2, 2, dtype=torch.int64), ["a", "b"])
    assert scores == {"miou": None, "per_class": {"a": None, "b": None}, "pixel_accuracy": None}


def test_scores_are_plain_numbers() -> None:
    scores = segmentation_scores(torch.tensor([[4, 0], [1, 5]]), ["a", "b"])
    assert {type(scores["miou"]), type(scores["pixel_accuracy"]), *map(type, scores["per_class"].values())} == {float}


def test_the_counts_of_a_whole_data_set_are_not_rounded() -> None:
    count = 2**40 + 1  # not a float32
    assert segmentation_scores(torch.tensor([[count, 0], [0, 1]]), ["a", "b"])["pixel_accuracy"] == 1.0
    assert segmentation_scores(torch.tensor([[count, 1], [0, 1]]), ["a", "b"])["pixel_accuracy"] < 1.0


def test_a_single_class() -> None:
    matrix = confusion_matrix(1)
    matrix.update(torch.zeros(2, 5, dtype=torch.int64), torch.tensor([[0, 0, 255, 0, 0]] * 2))
    assert segmentation_scores(matrix.compute(), ["all"]) == {
        "miou": 1.0,
        "per_class": {"all": 1.0},
        "pixel_accuracy": 1.0,
    }


def test_pixels_of_truth_255_do_not_count_whatever_is_predicted() -> None:
    matrix = confusion_matrix(2)
    matrix.update(torch.tensor([[0, 1, 255]]), torch.tensor([[255, 1, 255]]))
    assert matrix.compute().tolist() == [[0, 0], [0, 1]]
    matrix.reset()
    matrix.update(torch.tensor([[0, 1]]), torch.tensor([[255, 255]]))
    assert matrix.compute().sum() == 0


def helen_confusion(counts: dict[tuple[str, str], int]) -> torch.Tensor:
    confusion = torch.zeros(11, 11, dtype=torch.int64)
    for (truth, pred), count in counts.items():
        confusion[HELEN_CLASSES.index(truth), HELEN_CLASSES.index(pred)] = count
    return confusion


def test_helen_scores_equal_a_hand_computed_table() -> None:
    scores = helen_scores(
        helen_confusion(
            {
                ("background", "background"): 1000,
                ("background", "hair"): 30,
                ("face skin", "face skin"): 90,
                ("face skin", "left brow"): 6,
                ("face skin", "nose"): 4,
                ("left brow", "left brow"): 5,
                ("left brow", "right brow"): 3,  # the other side is a hit
                ("left brow", "face skin"): 2,
                ("right brow", "right brow"): 4,
                ("left eye", "right eye"): 7,
                ("right eye", "right eye"): 8,
                ("right eye", "hair"): 1,
                ("nose", "nose"): 20,
                ("nose", "upper lip"): 2,
                ("upper lip", "upper lip"): 9,
                ("upper lip", "inner mouth"): 1,  # within the mouth is a hit of the mouth
                ("lower lip", "upper lip"): 4,
                ("lower lip", "lower lip"): 6,
                ("lower lip", "face skin"): 5,
                ("hair", "hair"): 70,
            }
        )
    )
    assert scores["f1"] == pytest.approx(
        {
            "brows": 24 / (24 + 6 + 2),  # TP 12, FP 6, FN 2
            "eyes": 30 / (30 + 0 + 1),  # TP 15
            "nose": 40 / (40 + 4 + 2),  # TP 20
            "inner mouth": 0.0,  # only predicted
            "upper lip": 18 / (18 + 6 + 1),  # TP 9; 2 of the nose, 4 of the lower lip
            "lower lip": 12 / (12 + 0 + 9),
            "mouth": 40 / (40 + 2 + 5),  # TP 20
            "face skin": 180 / (180 + 7 + 10),
            "hair": 140 / (140 + 31 + 0),
        }
    )
    assert scores["f1_overall"] == pytest.approx(134 / (134 + 12 + 10))  # TP 67, FP 6 + 0 + 4 + 2, FN 2 + 1 + 2 + 5


def test_a_part_of_the_face_that_is_nowhere_has_no_score() -> None:
    scores = helen_scores(helen_confusion({("nose", "nose"): 3, ("nose", "face skin"): 1, ("hair", "hair"): 5}))
    assert [part for part, value in scores["f1"].items() if value is None] == [
        "eyes",
        "brows",
        "inner mouth",
        "upper lip",
        "lower lip",
        "mouth",
    ]
    assert scores["f1_overall"] == scores["f1"]["nose"] == pytest.approx(6 / 7)
    nothing = helen_scores(torch.zeros(11, 11))
    assert nothing["f1_overall"] is None
    assert set(nothing["f1"].values()) == {None}


def test_helen_scores_are_plain_numbers_of_eleven_classes() -> None:
    scores = helen_scores(torch.eye(11, dtype=torch.int64))
    assert {type(scores["f1_overall"]), *map(type, scores["f1"].values())} == {float}
    with pytest.raises(ValueError, match=r"confusion must be \[11, 11\] for 11 class names, got \[21, 21\]"):
        helen_scores(torch.eye(21))
    with pytest.raises(ValueError, match="negative count"):
        helen_scores(-torch.eye(11))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_updates_add_up_and_equal_a_count_by_hand(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    preds = torch.randint(0, 21, (3, 7, 9), generator=generator)
    truth = torch.randint(0, 21, (3, 7, 9), generator=generator)
    truth[:, ::3] = 255
    matrix = confusion_matrix(21)
    for pred, mask in zip(preds.to(dtype), truth.to(dtype), strict=True):
        matrix.update(pred, mask)
    expected = [[((truth == row) & (preds == column)).sum().item() for column in range(21)] for row in range(21)]
    assert matrix.compute().tolist() == expected


def test_an_empty_batch_changes_nothing() -> None:
    matrix = confusion_matrix(2)
    matrix.update(torch.zeros(0, 4, 4, dtype=torch.int64), torch.zeros(0, 4, 4, dtype=torch.int64))
    assert matrix.confmat.sum() == 0


@pytest.mark.parametrize(
    ("preds", "truth", "message"),
    [
        (torch.tensor([[3]]), torch.tensor([[0]]), "preds holds labels from 3 to 3, but the classes are 0..2"),
        (torch.tensor([[-1]]), torch.tensor([[0]]), "preds holds labels from -1 to -1"),
        (torch.tensor([[0]]), torch.tensor([[254]]), "target holds labels from 254 to 254"),
        (torch.tensor([[0.0]]), torch.tensor([[0]]), "must be integer labels, got torch.float32 and torch.int64"),
        (torch.tensor([[0]]), torch.tensor([[0.0]]), "must be integer labels, got torch.int64 and torch.float32"),
        (torch.zeros(1, 3, 2, 2), torch.zeros(1, 2, 2, dtype=torch.int64), r"pass logits.argmax\(1\)"),
        (torch.tensor([[0]]), torch.tensor([[0.0]]), "integer labels, got torch.int64 and torch.float32"),
        (torch.tensor([[0]]), torch.tensor([[0, 1]]), r"the same shape, got \(1, 1\) and \(1, 2\)"),
    ],
)
def test_wrong_labels_are_worded_errors(preds: torch.Tensor, truth: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        confusion_matrix(3).update(preds, truth)


def test_wrong_arguments_are_worded_errors() -> None:
    for count in (1, 255):
        assert confusion_matrix(count).num_classes == count
    assert segmentation_scores(torch.tensor([[1, 0], [0, 0]]), ["a", "b"])["pixel_accuracy"] == 1.0
    with pytest.raises(ValueError, match="num_classes must be from 1 to 255, got 0"):
        confusion_matrix(0)
    with pytest.raises(ValueError, match=r"\[3, 3\] for 3 class names, got \[2, 2\]"):
        segmentation_scores(torch.eye(2), ["a", "b", "c"])
    with pytest.raises(ValueError, match="negative count"):
        segmentation_scores(torch.tensor([[1, -1], [0, 1]]), ["a", "b"])
