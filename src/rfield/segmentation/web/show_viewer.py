"""One network on the page: what it is, and its labels of an image at any dilations."""

import dataclasses
import math
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.tv_tensors import Image

from rfield.layers import LearnedFactor
from rfield.receptive_field.probe import Window
from rfield.search import learned_layers
from rfield.search.factors import runs_at_integers
from rfield.segmentation.data import evaluation_transform
from rfield.segmentation.files.untrusted import read_json
from rfield.segmentation.inference.predict import compute_device
from rfield.segmentation.inspection.model_names import open_model
from rfield.segmentation.models import MultiPathHead, ParsingNetwork
from rfield.segmentation.runs import SEARCH_WEIGHTS, Run, load_run, run_at_dilations
from rfield.segmentation.web.show_curve import Curve, read_curves
from rfield.segmentation.web.show_pictures import Picture

# Of the features that are kept: the number of images, and bytes.
_CACHED_IMAGES = 8
_CACHED_BYTES = 256 * 2**20
# Of the paths' logits at the last move.
_CACHED_PATHS = 512 * 2**20
# The end of a slider without a curve, in feature px.
_GREATEST = 24.0

_SEARCH = (
    "The weights at the end of the search, averaged. They were trained at all dilations that the search has drawn, so "
    "that their labels at other dilations mean something."
)
_FINAL = (
    "The final weights. They were trained at the learned dilations alone: at other dilations the labels show what "
    "these weights do there, not what a network trained there would do."
)
_FIXED = "The final weights. Nothing is learned in this network, so that there is no dilation to move."


@dataclasses.dataclass(frozen=True)
class PathSlider:
    """The slider of one path: its learned dilation, its range, and the held-out curve."""

    learned: float
    least: float
    greatest: float
    step: float
    curve: Curve


class Viewer:
    """A network on the page. One request at a time computes with it.

    Args:
        title: its name on the page.
        model: in eval mode.
        weights: what its weights are, in a sentence.
        run: the run that it is from; None for a model of another library, which has no labels.
        sliders: one for each learned path.

    Attributes:
        lock: hold it while the network's dilations are changed and used.
        probed: along height and width what a model without a run sees, once it was measured.
    """

    def __init__(
        self, title: str, model: nn.Module, weights: str, run: Run | None = None, sliders: Sequence[PathSlider] = ()
    ) -> None:
        self.title = title
        self.model = model.to(compute_device()).requires_grad_(False)
        self.weights = weights
        self.run = run
        self.sliders = list(sliders)
        self.lock = threading.RLock()
        self.probed: list[Window] | None = None
        self._snapped = [layer for group in learned_layers(model) for layer in group if layer.snapped]
        self._transform = evaluation_transform()
        self._features: OrderedDict[str, tuple[Tensor, ...]] = OrderedDict()
        # The paths' dilations and logits at the last move, of one image.
        self._paths_of = ""
        self._paths: dict[int, tuple[tuple[float, float], Tensor]] = {}

    @property
    def network(self) -> ParsingNetwork:
        """The network of a run."""
        if self.run is None:
            raise ValueError(f"{self.title} is a model without a run: it has no labels to show")
        return self.run.network

    @property
    def frozen(self) -> bool:
        """Whether the head was trained on features in half precision, which are rounded here, too."""
        return self.run is not None and self.run.config.model.freeze_backbone

    def input(self, picture: Picture) -> Tensor:
        """Return an image as the network takes it: float32 Tensor[3, H, W], normalised, on its device."""
        normalised: Tensor = self._transform(Image(picture.pixels))
        parameter = next(self.model.parameters(), None)
        return normalised if parameter is None else normalised.to(parameter.device)

    def set_dilations(self, dilations: Sequence[float] | None) -> None:
        """Make the network run at one dilation for each learned path; None is the learned ones.

        Raises:
            ValueError: the number of dilations differs, or one is out of the sliders' reach.
        """
        if dilations is None:
            for group in learned_layers(self.model):
                for layer in group:
                    layer.dilation_override = None
                    if layer in self._snapped and not layer.snapped:
                        layer.snap()
            return
        most = max((4 * slider.greatest for slider in self.sliders), default=0)
        if not all(math.isfinite(each) and 1 <= each <= most for each in dilations):
            raise ValueError(f"dilations are numbers from 1 to {most:.4g} here, got {list(dilations)}")
        run_at_dilations(self.network, dilations)

    @torch.inference_mode()
    def labels(self, picture: Picture, dilations: Sequence[float] | None) -> tuple[Tensor, Tensor]:
        """Return the class of each pixel, and its probability in 255ths: two uint8 Tensors[H, W].

        The classes are those of `rfield predict` for an image of the same pixels.
        """
        with self.lock:
            self.set_dilations(dilations)
            logits = self._moved_logits(picture)
            labels = logits.argmax(0)
            # The largest probability is 1 / sum(exp(z - largest z)).
            confidence = logits.sub(logits.amax(0)).exp_().sum(0).reciprocal_()
            return labels.to("cpu", torch.uint8), confidence.mul_(255).round_().to("cpu", torch.uint8)

    def features(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return what the head reads of a normalised image Tensor[3, H, W]."""
        padded = self.network.pad(image[None]).contiguous(memory_format=torch.channels_last)
        features = self.network.features(padded)
        return tuple(each.half() for each in features) if self.frozen else features

    def logits(self, features: tuple[Tensor, ...], size: tuple[int, int]) -> Tensor:
        """Return the logits Tensor[K, H, W] of an image of `size` from its features."""
        logits = self.network.logits_of(_readable(features), self._padded(size))
        return logits[0, :, : size[0], : size[1]]

    def _moved_logits(self, picture: Picture) -> Tensor:
        """Return the same for an image; of several paths, only those whose dilation has changed are run.

        The others' logits are those of the last move. The sum has the order of `MultiPathHead`, so it is the same.
        """
        features, size = self._features_of(picture), (picture.pixels.shape[1], picture.pixels.shape[2])
        head, padded = self.network.head, self._padded(size)
        fits = 4 * self.network.num_classes * padded[0] * padded[1] * len(self.sliders) <= _CACHED_PATHS
        if not isinstance(head, MultiPathHead) or self.network.decoder is not None or not fits:
            return self.logits(features, size)
        if self._paths_of != picture.key:
            self._paths_of, self._paths = picture.key, {}
        for index, path in enumerate(head.heads()):
            kept = self._paths.get(index)
            if index not in head.silent and (kept is None or kept[0] != path.realised_dilation):
                self._paths[index] = path.realised_dilation, path(_readable(features)[0], padded)
        parts = [logits for _, (_, logits) in sorted(self._paths.items())]
        total: Tensor = sum(parts[1:], parts[0])
        return total[0, :, : size[0], : size[1]]

    def _padded(self, size: tuple[int, int]) -> tuple[int, int]:
        shape = self.network.pad(torch.empty(1, 3, *size, device="meta")).shape
        return shape[2], shape[3]

    def _features_of(self, picture: Picture) -> tuple[Tensor, ...]:
        """Return the features of an image, computed once. Those that were used last are kept."""
        if picture.key in self._features:
            self._features.move_to_end(picture.key)
            return self._features[picture.key]
        features = self._features[picture.key] = self.features(self.input(picture))
        while len(self._features) > _CACHED_IMAGES or (
            len(self._features) > 1 and sum(map(_bytes_of, self._features.values())) > _CACHED_BYTES
        ):
            self._features.popitem(last=False)
        return features


def open_viewer(name: str, weights: str | None, checkpoint: str) -> Viewer:
    """Open a run folder, or a model by its name as `rfield inspect` does.

    Raises:
        FileNotFoundError, ValueError: as `load_run` and `open_model` do.
    """
    if ":" in name and not Path(name).is_dir():
        source = open_model(name, weights, run_files=True)
        if not isinstance(source.model, ParsingNetwork):
            return Viewer(name, source.model, f"{source.weights[0].upper()}{source.weights[1:]}.")
    if weights is not None:
        raise ValueError(f"{name} has its own weights: leave --weights out")
    shared = (Path(name) / SEARCH_WEIGHTS).is_file()
    run = load_run(name, checkpoint, search_weights=shared)
    shared = shared or _says_search(run.folder)
    sliders = _sliders(run, shared)
    return Viewer(name, run.network, _SEARCH if shared else _FINAL if sliders else _FIXED, run, sliders)


def _sliders(run: Run, shared: bool) -> list[PathSlider]:
    groups = learned_layers(run.network)
    by_path = read_curves(run.folder)
    # The search's weights have all its paths, the final ones only those that were kept, whose curves the folder has.
    curves = [by_path.get(path, []) for path in range(len(groups))] if shared else [*by_path.values()]
    curves += [[]] * (len(groups) - len(curves))
    greatest = max((at for curve in curves for at, _, _ in curve), default=_GREATEST)
    return [_slider(group, curve, greatest) for group, curve in zip(groups, curves, strict=False)]


def _slider(group: Sequence[LearnedFactor], curve: Curve, greatest: float) -> PathSlider:
    learned = group[0].effective_dilation[0]
    end = max(math.ceil(1.5 * greatest), math.ceil(learned), 8)
    return PathSlider(learned, 1.0, float(end), 1.0 if runs_at_integers(group) else 0.25, curve)


def _says_search(folder: Path) -> bool:
    """Return whether the folder of a Space says that its weights are those of a search."""
    try:
        return read_json(folder / "config.json").get("search_weights") is True
    except (OSError, ValueError, AttributeError):
        return False


def _readable(features: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(each.float().contiguous(memory_format=torch.channels_last) for each in features)


def _bytes_of(features: tuple[Tensor, ...]) -> int:
    return sum(each.nbytes for each in features)
