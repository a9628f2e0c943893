"""Compute the scores of a whole data set from its confusion matrix."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix

from rfield.segmentation.conventions import IGNORE_INDEX
from rfield.segmentation.data import HELEN_CLASSES

_HELEN_PARTS = {
    "eyes": ("left eye", "right eye"),
    "brows": ("left brow", "right brow"),
    "nose": ("nose",),
    "inner mouth": ("inner mouth",),
    "upper lip": ("upper lip",),
    "lower lip": ("lower lip",),
    "mouth": ("upper lip", "inner mouth", "lower lip"),
    "face skin": ("face skin",),
    "hair": ("hair",),
}


def confusion_matrix(num_classes: int) -> MulticlassConfusionMatrix:
    """Return a metric that counts the pixels of every true class by predicted class.

    Update it with predicted labels and true labels, integer tensors of one shape; pixels whose true label is 255
    do not count. `compute()` gives int64 [num_classes, num_classes], rows = truth. It is summed over processes.

    Args:
        num_classes: number of classes, 1 to 255.

    Returns:
        The metric. Its `update(preds, target)` raises `ValueError` for preds that are no labels (pass
        `logits.argmax(1)`), for unequal shapes, and for a label outside 0..num_classes-1.

    Raises:
        ValueError: if `num_classes` is out of its range.

    Example:
        >>> matrix = confusion_matrix(2)
        >>> matrix.update(torch.tensor([[0, 1, 1, 0]]), torch.tensor([[0, 0, 1, 255]]))
        >>> matrix.compute()
        tensor([[1, 1],
                [0, 1]])
    """
    if not 1 <= num_classes <= IGNORE_INDEX:
        raise ValueError(f"num_classes must be from 1 to {IGNORE_INDEX}, got {num_classes}")
    return _LabelConfusionMatrix(num_classes)


class _LabelConfusionMatrix(MulticlassConfusionMatrix):
    """Count labels, with cheap checks.

    Torchmetrics' own checks sort all pixels and accept labels above the last class, and under deterministic algorithms
    it needs pixels x classes x classes numbers of memory.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes, ignore_index=IGNORE_INDEX, validate_args=False)

    def update(self, preds: Tensor, target: Tensor) -> None:
        if preds.is_floating_point() or target.is_floating_point():
            raise ValueError(
                f"preds and target must be integer labels, got {preds.dtype} and {target.dtype}; for logits, pass "
                "logits.argmax(1)"
            )
        if preds.shape != target.shape:
            raise ValueError(
                f"preds and target must have the same shape, got {tuple(preds.shape)} and {tuple(target.shape)}; for "
                "logits, pass logits.argmax(1)"
            )
        if not target.numel():
            return
        ignored = target == IGNORE_INDEX
        preds, target = preds.masked_fill(ignored, 0).long(), target.masked_fill(ignored, 0).long()
        for name, labels in (("preds", preds), ("target", target)):
            least, greatest = (bound.item() for bound in labels.aminmax())
            if least < 0 or greatest >= self.num_classes:
                raise ValueError(
                    f"{name} holds labels from {least} to {greatest}, but the classes are 0..{self.num_classes - 1} "
                    f"(and {IGNORE_INDEX} in target); do model and data set have the same classes?"
                )
        # Counting ignored pixels in an extra bin is several times faster than selecting the others.
        bins = (target * self.num_classes + preds).masked_fill(ignored, self.num_classes**2).flatten()
        counts = torch.bincount(bins, minlength=self.num_classes**2 + 1)[:-1]
        self.confmat += counts.reshape(self.num_classes, self.num_classes)


def segmentation_scores(confusion: Tensor, class_names: Sequence[str]) -> dict[str, Any]:
    """Compute mean and per-class intersection over union, and pixel accuracy.

    Args:
        confusion: Tensor[K, K], pixels by true class (row) and predicted class (column).
        class_names: the K names.

    Returns:
        Plain numbers, 0..1: `miou`, the mean over the classes that are present in truth or prediction (None if
        none is); `per_class`, name to IoU, None for an absent class; `pixel_accuracy` (None without any pixel).

    Raises:
        ValueError: if `confusion` is not a square of as many classes as there are names, or has a negative count.

    Example:
        >>> scores = segmentation_scores(torch.tensor([[3, 1, 0], [0, 4, 0], [0, 0, 0]]), ["road", "car", "boat"])
        >>> scores["per_class"]
        {'road': 0.75, 'car': 0.8, 'boat': None}
        >>> round(scores["miou"], 3), scores["pixel_accuracy"]
        (0.775, 0.875)
    """
    counts = _counts(confusion, len(class_names))
    hits = counts.diagonal()
    union = counts.sum(0) + counts.sum(1) - hits
    total = counts.sum().item()
    iou = [(hit / area).item() if area > 0 else None for hit, area in zip(hits, union, strict=True)]
    present = [value for value in iou if value is not None]
    return {
        "miou": sum(present) / len(present) if present else None,
        "per_class": dict(zip(class_names, iou, strict=True)),
        "pixel_accuracy": hits.sum().item() / total if total > 0 else None,
    }


def helen_scores(confusion: Tensor) -> dict[str, Any]:
    """Compute the F1 of the parts of faces, as papers report them for Helen (Smith et al., CVPR 2013).

    All are pixel counts over the whole data set, not means over images. Left and right are merged: a pixel of the left
    eye that is predicted as the right one counts as found. The mouth merges upper lip, inner mouth and lower lip in the
    same way. Papers differ here: compare only with scores that are counted in the same way.

    Args:
        confusion: Tensor[11, 11], pixels by true class (row) and predicted class (column), in the order of
            `rfield.segmentation.data.HELEN_CLASSES`.

    Returns:
        Plain numbers, 0..1: `f1`, part to 2 TP / (2 TP + FP + FN), None for a part that is absent from truth and
        prediction; `f1_overall`, the same of the summed TP, FP and FN of brows, eyes, nose and mouth.

    Raises:
        ValueError: if `confusion` is not [11, 11] or has a negative count.

    Example:
        >>> confusion = torch.zeros(11, 11, dtype=torch.int64)
        >>> confusion[4, 5], confusion[5, 0], confusion[6, 6] = 2, 1, 4
        >>> scores = helen_scores(confusion)
        >>> scores["f1"]["eyes"], scores["f1"]["nose"], scores["f1"]["hair"], round(scores["f1_overall"], 3)
        (0.8, 1.0, None, 0.923)
    """
    counts = _counts(confusion, len(HELEN_CLASSES))
    tallies = {}
    for part, members in _HELEN_PARTS.items():
        indices = [HELEN_CLASSES.index(name) for name in members]
        hits = counts[indices][:, indices].sum()
        tallies[part] = (hits, counts[indices].sum() + counts[:, indices].sum())
    overall = [tallies[part] for part in ("brows", "eyes", "nose", "mouth")]
    return {
        "f1": {part: _f1(hits, area) for part, (hits, area) in tallies.items()},
        "f1_overall": _f1(*(torch.stack(column).sum() for column in zip(*overall, strict=True))),
    }


def _f1(hits: Tensor, area: Tensor) -> float | None:
    """Return 2 TP / area; `area` is the sum of true and predicted pixels, 2 TP + FP + FN."""
    return (2 * hits / area).item() if area > 0 else None


def _counts(confusion: Tensor, num_classes: int) -> Tensor:
    if confusion.numel() == 1:
        confusion = confusion.reshape(1, 1)  # torchmetrics returns a scalar for one class
    if confusion.shape != (num_classes, num_classes):
        raise ValueError(
            f"confusion must be [{num_classes}, {num_classes}] for {num_classes} class names, got "
            f"{list(confusion.shape)}"
        )
    if (confusion < 0).any():
        raise ValueError("confusion holds a negative count; give a sum of counts, not a difference")
    return confusion.detach().cpu().double()
