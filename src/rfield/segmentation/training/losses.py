"""Training losses: means over the labelled pixels of a batch, and the classes' weights in them."""

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rfield.search.factors import mean_over_processes
from rfield.segmentation.config.train import Loss as LossName
from rfield.segmentation.data import IGNORE_INDEX, ParsingDataset

Loss = Callable[[Tensor, Tensor], Tensor]
"""Maps logits, float Tensor[N, K, H, W], and labels, int64 Tensor[N, H, W] with 255 for none, to a scalar."""


def norm_over_processes(norm: Tensor) -> Tensor:
    """What to divide a sum over this process's pixels by, so that the processes' mean is that over all their pixels.

    Each process of a distributed run has to ask, with its own number of pixels, or their weight. Where no gradients
    are taken, as when a search reads its curve, each is on its own. Never 0.

    >>> norm_over_processes(torch.tensor([12, 0]))
    tensor([12.,  1.])
    """
    norm = norm.float()
    norm = mean_over_processes(norm) if torch.is_grad_enabled() else norm
    return norm.where(norm > 0, 1.0)


def cross_entropy(
    logits: Tensor, mask: Tensor, class_weights: Sequence[float] | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """Mean cross-entropy of the labelled pixels; 0 where there are none.

    With class weights the mean is weighted too, as PyTorch has it: by the weights of the pixels' own classes. It is
    reckoned in float32 at least.

    Args:
        logits: Tensor[N, K, H, W].
        mask: int64 Tensor[N, H, W], 255 where a pixel has no label.
        class_weights: K numbers.
        label_smoothing: the share of a pixel's label that is spread over all classes.

    Example:
        >>> mask = torch.tensor([[[0, 1, 255]]])
        >>> round(cross_entropy(torch.zeros(1, 4, 1, 3), mask).item(), 4)  # log 4
        1.3863
    """
    logits = _precise(logits)
    weights = None if class_weights is None else logits.new_tensor(class_weights)
    total = F.cross_entropy(
        logits, mask, weights, ignore_index=IGNORE_INDEX, reduction="sum", label_smoothing=label_smoothing
    )
    labelled = mask != IGNORE_INDEX
    if weights is None:
        return total / norm_over_processes(labelled.sum())
    return total / norm_over_processes((weights[mask.where(labelled, 0)] * labelled).sum())


def _precise(logits: Tensor) -> Tensor:
    """In float32 at least: sums over the pixels of a batch exceed float16, and bfloat16 rounds them."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def make_loss(
    kind: LossName,
    num_classes: int,
    class_weights: Sequence[float] | None = None,
    label_smoothing: float = 0.0,
) -> Loss:
    """Return the loss of a run.

    Focal (Lin et al., ICCV 2017, gamma 2: every class against the rest, their mean) and Dice (Milletari et al., 3DV
    2016: of each class over the whole batch; one that has no pixel in it counts as 0) are those of
    segmentation_models_pytorch. A batch without any label has a loss of 0.

    In a distributed training the pixels of cross-entropy and focal are those of all processes, and the loss is the
    mean of what they return, as DistributedDataParallel has it. Dice is that of each process's own images.

    Args:
        kind: `--loss`.
        num_classes: classes K.
        class_weights: K numbers; how much each class counts.
        label_smoothing: for cross-entropy.

    Raises:
        ValueError: the weights are not K, one is negative or all are 0, smoothing with another loss, or the package
            is missing.

    Example:
        >>> loss = make_loss("cross_entropy", 2, class_weights=(1.0, 3.0))
        >>> logits = torch.tensor([[[[0.0, 2.0]], [[0.0, 0.0]]]])
        >>> round(loss(logits, torch.tensor([[[1, 0]]])).item(), 4)  # (3 log 2 + log(1 + exp(-2))) / 4
        0.5516
    """
    if class_weights is not None:
        if len(class_weights) != num_classes:
            raise ValueError(
                f"class_weights are one number a class: the data has {num_classes}, got {len(class_weights)}"
            )
        if min(class_weights) < 0 or max(class_weights) == 0:
            raise ValueError(f"class_weights must not be negative, nor all 0, got {list(class_weights)}")
    if label_smoothing and kind != "cross_entropy":
        raise ValueError(f"label_smoothing goes with the loss cross_entropy, not {kind}")
    if kind == "cross_entropy":
        return lambda logits, mask: cross_entropy(logits, mask, class_weights, label_smoothing)
    return _library_loss(kind, class_weights)


def _library_loss(kind: LossName, class_weights: Sequence[float] | None) -> Loss:
    try:
        from segmentation_models_pytorch.losses import DiceLoss, FocalLoss
    except ImportError as error:
        raise ValueError(f"loss {kind} needs segmentation-models-pytorch: pip install 'rfield[losses]'") from error
    weights = None if class_weights is None else list(class_weights)
    if kind == "dice":
        dice: Loss = DiceLoss("multiclass", ignore_index=IGNORE_INDEX, class_weights=weights)
        return lambda logits, mask: dice(_precise(logits), mask)
    # Summed there and divided here: its own mean over no labelled pixel would not be a number.
    focal = FocalLoss("multiclass", ignore_index=IGNORE_INDEX, reduction="sum", class_weights=weights)
    return lambda logits, mask: focal(_precise(logits), mask) / norm_over_processes((mask != IGNORE_INDEX).sum())


def median_frequency_weights(masks: Iterable[Tensor], num_classes: int) -> tuple[float, ...]:
    """Weights that balance the classes: the median frequency over a class's own (Eigen and Fergus, ICCV 2015).

    A class's frequency is its share of the labelled pixels in the images that show it. A class in no image weighs 1.

    Args:
        masks: integer Tensor[H, W] of each image, 255 where a pixel has no label.
        num_classes: classes K.

    Raises:
        ValueError: no pixel has a label.

    Example:
        >>> [round(weight, 4) for weight in median_frequency_weights([torch.tensor([[0, 0, 1, 255]])], 3)]
        [0.75, 1.5, 1.0]
    """
    pixels = torch.zeros(num_classes, dtype=torch.float64)
    shown = torch.zeros_like(pixels)
    for mask in masks:
        counts = torch.bincount(mask[mask != IGNORE_INDEX].long(), minlength=num_classes)
        pixels += counts
        shown += counts.sum() * (counts > 0)
    known = pixels > 0
    if not known.any():
        raise ValueError("no pixel of the training masks has a label, so that classes cannot be balanced")
    frequency = pixels / shown
    # The mean of the two in the middle, unlike Tensor.median.
    weights = torch.where(known, frequency[known].quantile(0.5) / frequency, 1.0)
    return tuple(weights.tolist())


def class_weights(
    setting: str | Sequence[float] | None,
    dataset: ParsingDataset,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[float, ...] | None:
    """A run's class weights: as given, or balanced over the masks of the training set.

    Every process of a distributed run reads all masks, so that all have the same weights.

    Args:
        setting: `TrainConfig.class_weights`.
        dataset: the training set.
        progress: called with (masks done, masks in all).

    >>> from rfield.segmentation.data import SyntheticCues
    >>> len(class_weights("balanced", SyntheticCues("val", size=(33, 33), distance=12)) or ())
    4
    """
    if setting != "balanced":
        return None if setting is None else tuple(float(weight) for weight in setting)

    def masks() -> Iterable[Tensor]:
        for index in range(len(dataset)):
            yield dataset[index][1]
            progress(index + 1, len(dataset))

    return median_frequency_weights(masks(), dataset.num_classes)
