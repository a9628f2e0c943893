"""Score data sets and label images with a run's network."""

import glob
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from rfield.segmentation import plots
from rfield.segmentation.conventions import Progress
from rfield.segmentation.data import HELEN_CLASSES, ParsingDataset, evaluation_transform, match_classes
from rfield.segmentation.data.images import image_files, is_image_name, read_single_image
from rfield.segmentation.files.atomic import atomic_write
from rfield.segmentation.inference.feature_cache import CachedFeatures, find_features, image_features
from rfield.segmentation.inference.tiling import DEFAULT_BUDGET, Tile, Tiler, join_tiles
from rfield.segmentation.metrics import confusion_matrix, helen_scores, segmentation_scores
from rfield.segmentation.models import ParsingNetwork
from rfield.segmentation.runs import Run


def _silent(done: int, total: int) -> None:
    """Ignore the progress."""


def compute_device() -> torch.device:
    """Return the device for training and use: the GPU if CUDA finds one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@torch.inference_mode()
def predict_logits(network: ParsingNetwork, image: Tensor, frozen: bool = False) -> Tensor:
    """Compute the logits of one whole image at its own size.

    Args:
        network: in eval mode.
        image: Tensor[3, H, W], normalised.
        frozen: round the features as the feature cache does, because the head was trained on those.

    Returns:
        Tensor[K, H, W], on the network's device.
    """
    if not frozen:
        batch = image[None].to(next(network.parameters()).device)
        logits: Tensor = network(batch.contiguous(memory_format=torch.channels_last))
        return logits[0]
    return feature_logits(network, image_features(network, image), (image.shape[1], image.shape[2]))


@torch.inference_mode()
def feature_logits(network: ParsingNetwork, features: Tensor, size: tuple[int, int]) -> Tensor:
    """Compute the logits Tensor[K, H, W] of one image of `size` = (H, W) from its features Tensor[C, h, w]."""
    device = next(network.head.parameters()).device
    batch = features[None].to(device).float().contiguous(memory_format=torch.channels_last)
    padded = ((features.shape[1] - 1) * network.stride + 1, (features.shape[2] - 1) * network.stride + 1)
    logits: Tensor = network.head(batch, output_size=padded)
    return logits[0, :, : size[0], : size[1]]


def evaluate(
    network: ParsingNetwork,
    dataset: ParsingDataset,
    frozen: bool = False,
    features: CachedFeatures | None = None,
    progress: Progress = _silent,
) -> dict[str, Any]:
    """Score whole images at their own size.

    Args:
        network: in eval mode, on the device to compute on.
        dataset: the images and masks, of the same classes.
        frozen: the network's head was trained on cached features.
        features: the cache of this data set, if there is one; the result is the same without it.
        progress: called with (images done, all images).

    Returns:
        The results of `segmentation_scores`, and of `helen_scores` for the classes of Helen's faces.

    Raises:
        ValueError: if the numbers of classes differ.
    """
    transform = evaluation_transform()

    def label(index: int) -> tuple[Tensor, Tensor]:
        if features is not None:
            cached, mask = features.plain(index)
            return feature_logits(network, cached, (mask.shape[0], mask.shape[1])), mask
        image, mask = transform(*dataset[index])
        return predict_logits(network, image, frozen), mask

    return score(label, network.num_classes, dataset, progress)


def score(
    label: Callable[[int], tuple[Tensor, Tensor]],
    num_classes: int,
    dataset: ParsingDataset,
    progress: Progress = _silent,
) -> dict[str, Any]:
    """Score a function that labels the samples of a data set, as `evaluate` does.

    Args:
        label: returns the logits Tensor[K, H, W] and the mask Tensor[H, W] of a sample, by its index.
        num_classes: K.
        dataset: its classes and its length are used.
        progress: called with (images done, all images).

    Raises:
        ValueError: if the data set has not K classes.
    """
    if dataset.num_classes != num_classes:
        raise ValueError(
            f"the network was trained on {num_classes} classes, but the data set has {dataset.num_classes}: "
            f"{', '.join(dataset.class_names)}"
        )
    confusion = confusion_matrix(num_classes)
    for index in range(len(dataset)):
        logits, mask = label(index)
        if index == 0:
            confusion = confusion.to(logits.device)
        confusion.update(logits.argmax(0), mask.to(logits.device))
        progress(index + 1, len(dataset))
    counts = confusion.compute()
    faces = helen_scores(counts) if dataset.class_names == HELEN_CLASSES else {}
    return {**segmentation_scores(counts, dataset.class_names), **faces}


def evaluate_run(
    run: Run, dataset: ParsingDataset, progress: Progress = _silent, ignore_names: bool = False
) -> dict[str, Any]:
    """Score a run's network on a data set of its classes, with the feature cache of the data if there is one.

    Raises:
        ValueError: if the data set has other classes, see `rfield.segmentation.data.match_classes`.
    """
    dataset = match_classes(dataset, run.class_names, ignore_names)
    frozen = run.config.model.freeze_backbone
    features = None
    if frozen:
        folder = Path(run.config.run.cache) if run.config.run.cache else None
        features = find_features(run.network, dataset, folder)
    network = run.network.to(compute_device())
    return evaluate(network, dataset, frozen, features, progress)


def find_images(pattern: str) -> list[Path]:
    """Return the images of a file, a folder (without its subfolders) or a glob, sorted.

    Raises:
        FileNotFoundError: if there is none.
    """
    path = Path(pattern)
    if path.is_dir():
        found = image_files(path)
    else:
        found = [path] if path.is_file() else [Path(name) for name in glob.glob(pattern, recursive=True)]
        # Files of the system, such as Thumbs.db, are ignored if the glob also finds images.
        found = [file for file in found if is_image_name(file.name)] or found
    images = sorted(file for file in found if file.is_file())
    if not images:
        raise FileNotFoundError(f"no image found at {pattern}: give an image, a folder of images or a glob")
    return images


def predict_run(run: Run, images: Sequence[Path], out: Path, memory_budget: float = DEFAULT_BUDGET) -> Iterator[Path]:
    """Label images with a run's network, see `label_images`; above `memory_budget` bytes in tiles, see `Tiler`."""
    tiler = Tiler(run.network.to(compute_device()), run.config.model.freeze_backbone, memory_budget)
    yield from label_images(tiler, run.palette, run.size, images, out)


def label_images(
    logits_of: Callable[[Tensor], Tensor | Iterable[Tile]],
    colours: list[tuple[int, int, int]],
    size: tuple[int, int] | None,
    images: Sequence[Path],
    out: Path,
) -> Iterator[Path]:
    """Label images: write a palette PNG `NAME.png` and an overlay `NAME_overlay.jpg` of each, at its own size.

    An image that cannot be read or labelled is skipped, and named at the end.

    Args:
        logits_of: maps a normalised image Tensor[3, H, W] to logits Tensor[K, H, W], or to tiles of them.
        colours: red, green and blue of each class, 0..255.
        size: (height, width) in px to which images are resized first; None keeps their own.
        images: files to label.
        out: folder for the results; created if it is missing.

    Yields:
        The mask's path, after each image.

    Raises:
        ValueError: if two images would have the same result, before anything is written; after the last image, if any
            could not be read or labelled.
    """
    stems = Counter(image.stem for image in images)
    for image in images:
        if stems[image.stem] > 1:
            raise ValueError(f"two images are named {image.stem}, and {out} would hold only one result: {image}")
        if (out / f"{image.stem}.png").resolve() == image.resolve():
            raise ValueError(f"the mask of {image} would replace it: give another --out")
    out.mkdir(parents=True, exist_ok=True)
    transform = evaluation_transform()
    palette = np.array(colours, dtype=np.uint8)
    failed: list[str] = []
    for path in images:
        try:
            whole = read_single_image(path)
        except ValueError as error:
            failed.append(str(error))
            continue
        image = transform(whole if size is None else TF.resize(whole, list(size), antialias=True))
        try:
            own = None if size is None else (whole.shape[1], whole.shape[2])
            labels = _labels(logits_of(image), (image.shape[1], image.shape[2]), own)
        except ValueError as error:
            failed.append(f"{path}: {error}")
            continue
        mask = PIL.Image.fromarray(labels)
        mask.putpalette(palette.tobytes())
        target = out / f"{path.stem}.png"
        _save(mask, target)
        overlay = plots.overlay(whole.permute(1, 2, 0).numpy(), labels, palette)
        _save(PIL.Image.fromarray(overlay), out / f"{path.stem}_overlay.jpg")
        yield target
    if failed:
        reasons = "; ".join(failed)
        if len(images) == 1:
            raise ValueError(reasons)
        raise ValueError(f"{len(failed)} of {len(images)} images are not labelled, the others are in {out}: {reasons}")


def _labels(
    found: Tensor | Iterable[Tile], size: tuple[int, int], wanted: tuple[int, int] | None
) -> npt.NDArray[np.uint8]:
    """Return the class of each pixel of an image of `size` = (H, W), or of that image resized to `wanted`."""
    tiles = [(0, 0, found)] if isinstance(found, Tensor) else found
    if wanted is None:
        labels = torch.empty(size, dtype=torch.uint8)
        for top, left, logits in tiles:
            part = logits.argmax(0).to(torch.uint8)
            labels[top : top + part.shape[0], left : left + part.shape[1]] = part
        return labels.numpy()
    # Class by class, because all resized logits together would need as much memory as the whole image's.
    best: Tensor | None = None
    labels = torch.zeros(wanted, dtype=torch.uint8)
    for index, logits in enumerate(join_tiles(tiles, size)):
        resized = F.interpolate(logits[None, None], wanted, mode="bilinear")[0, 0].cpu()
        if best is not None:
            labels[resized > best] = index
        best = resized if best is None else torch.maximum(best, resized)
    return labels.numpy()


def _save(image: PIL.Image.Image, path: Path) -> None:
    """Write an image file."""
    with atomic_write(path, sync=False) as file:
        image.save(file, "PNG" if path.suffix == ".png" else "JPEG", quality=92)
