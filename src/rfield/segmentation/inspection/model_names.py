"""Open models by name: a Python file's, torchvision's, smp's, timm's, one of the Hugging Face Hub, or a run folder."""

import dataclasses
import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rfield.layers import LearnedFactor
from rfield.segmentation.config.values import split_model_file
from rfield.segmentation.files.untrusted import no_pickles, read_json, read_weights
from rfield.segmentation.inspection.model_files import build_from_file
from rfield.segmentation.models.weights import fit_keys, state_dict_mismatches
from rfield.segmentation.runs import build_network, load_run
from rfield.text import counted


@dataclasses.dataclass(frozen=True)
class Source:
    """A model and its origin."""

    name: str
    model: nn.Module
    """In eval mode."""
    weights: str
    """The origin of its weights, in words."""
    start: nn.Module | None = None
    """For a run with a learned receptive field: the same weights with the receptive field of the start."""


def open_model(spec: str, weights: str | None = None, run_files: bool = False) -> Source:
    """Build a model by its name.

    Args:
        spec: `torchvision:NAME`; `smp:NAME` or `smp:NAME/ENCODER`; `timm:NAME`, its last feature map; `hf:ID`, a folder
            or a model of the Hub (from transformers or `rfield push`); or a run folder.
        weights: None leaves models of torchvision, smp and timm random and downloads nothing. `default` downloads the
            weights that the library publishes. A .pth or .safetensors file is a state dict with the model's keys,
            alone or wrapped as training scripts save it (see `read_weights`); no code in it is run, and its last
            layer may have another number of classes. Runs and models of the Hub have their own weights.
        run_files: accept `FILE.py:NAME`, which runs that file (see `build_from_file`). Only for a name that the user
            gave on the command line.

    Raises:
        FileNotFoundError: if there is no such folder, file or model.
        ValueError: if the name is unknown, the library is missing, or the weights do not fit.

    Example:
        >>> open_model("torchvision:resnet18").weights
        'random weights'
    """
    if (file := split_model_file(spec)) is not None:
        if not run_files:
            raise ValueError(f"{spec} would run a Python file, which only the command line itself may name")
        if weights == "default":
            raise ValueError(f"{spec} has no published weights: leave --weights out, or give a file")
        model = build_from_file(*file)
        return Source(spec, model.eval(), "its own weights" if weights is None else _load(model, Path(weights)))
    kind, colon, name = spec.partition(":")
    if not colon or kind not in _SOURCES:
        if colon and not Path(spec).exists():
            raise ValueError(
                f"{spec} is not a model: give {', '.join(f'{kind}:NAME' for kind in _SOURCES)}, FILE.py:NAME or a run "
                "folder"
            )
        kind, name = "", spec
    if not name:
        raise ValueError(f"{spec} names no model")
    if kind in ("", "hf"):
        if weights is not None:
            raise ValueError(f"{spec} has its own weights: leave --weights out")
        source = _run(spec) if kind == "" else _hub(name)
        return dataclasses.replace(source, model=source.model.eval())
    model = _SOURCES[kind](name, weights == "default")
    word = {None: "random weights", "default": f"{kind}'s weights"}.get(weights) or _load(model, Path(str(weights)))
    return Source(spec, model.eval(), word)


def _torchvision(name: str, pretrained: bool) -> nn.Module:
    from torchvision import models

    if name not in (known := models.list_models()):
        raise ValueError(_unknown(f"torchvision:{name}", known))
    options: dict[str, Any] = {"weights": "DEFAULT" if pretrained else None}
    if "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters:
        options["weights_backbone"] = None
    model: nn.Module = _build(f"torchvision:{name}", models.get_model, name, **options)
    return model


def _smp(name: str, pretrained: bool) -> nn.Module:
    try:
        import segmentation_models_pytorch as smp
    except ImportError as error:
        raise _missing("smp:", "segmentation_models_pytorch", "smp") from error
    name, _, encoder = name.partition("/")
    known = [key for key, value in vars(smp).items() if isinstance(value, type) and issubclass(value, nn.Module)]
    if name not in known:
        raise ValueError(_unknown(f"smp:{name}", known))
    if encoder and not encoder.startswith("tu-") and encoder not in (encoders := smp.encoders.get_encoder_names()):
        raise ValueError(_unknown(f"smp:{name}/{encoder}", encoders, encoder))
    options = {"encoder_name": encoder} if encoder else {}
    weights = "imagenet" if pretrained else None
    model: nn.Module = _build(f"smp:{name}", getattr(smp, name), encoder_weights=weights, **options)
    return model


class _ChannelsFirst(nn.Module):
    """Return the last map of a timm feature extractor with channels last as [N, C, H, W]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        features: Tensor = self.model(image)[-1]
        return features.permute(0, 3, 1, 2)


def _timm(name: str, pretrained: bool) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise _missing("timm:", "timm", "all") from error
    if not timm.is_model(name):
        raise ValueError(_unknown(f"timm:{name}", timm.list_models(), name.partition(".")[0]))
    options: dict[str, Any] = {"pretrained": pretrained, "features_only": True, "out_indices": (-1,)}
    try:  # lets transformers accept any image size
        with no_pickles():
            model: nn.Module = timm.create_model(name, **options, dynamic_img_size=True)
    except TypeError:
        model = _build(f"timm:{name}", timm.create_model, name, **options)
    return _ChannelsFirst(model) if str(getattr(model, "output_fmt", "NCHW")).endswith("NHWC") else model


def _hub(name: str) -> Source:
    local = Path(name) / "config.json"
    config = local if local.is_file() else _hub_config(name)
    notes = read_json(config)
    if not isinstance(notes, dict):
        raise ValueError(f"{config} cannot be read as a model's config: it holds no keys and values")
    if "network" in notes:
        return dataclasses.replace(_run(name if Path(name).is_dir() else f"hf:{name}"), name=f"hf:{name}")
    try:
        import transformers
    except ImportError as error:
        raise _missing("hf:", "transformers", "hf") from error
    load = transformers.AutoModelForSemanticSegmentation.from_pretrained
    return Source(
        f"hf:{name}", _build(f"hf:{name}", load, name, use_safetensors=True, trust_remote_code=False), "its own weights"
    )


def _hub_config(name: str) -> Path:
    try:
        import huggingface_hub
    except ImportError as error:
        raise _missing("hf:", "huggingface_hub", "hub") from error
    try:
        return Path(huggingface_hub.hf_hub_download(name, "config.json"))
    except Exception as error:  # each cause has its own type of exception
        raise FileNotFoundError(
            f"there is no folder {name} with a config.json, and no model {name} from the Hub: {error}"
        ) from error


def _run(folder: str) -> Source:
    run = load_run(folder)
    network, start = run.network, None
    if run.config.search.search != "none" and any(isinstance(module, LearnedFactor) for module in network.modules()):
        start = build_network(run.config, len(run.class_names))
        learned = ("log_factor", "snapped")
        state = {key: value for key, value in network.state_dict().items() if not key.endswith(learned)}
        start.load_state_dict({**start.state_dict(), **state})
        start.eval()
    return Source(str(folder), network, "trained weights", start)


_SOURCES: dict[str, Callable[..., Any]] = {"torchvision": _torchvision, "smp": _smp, "timm": _timm, "hf": _hub}


def _build(spec: str, build: Callable[..., Any], *args: Any, **options: Any) -> Any:
    try:
        with no_pickles():
            return build(*args, **options)
    except Exception as error:  # each library has its own types
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"{spec} cannot be opened: {reason}") from error


def _load(model: nn.Module, path: Path) -> str:
    """Load weights from a file. Last layers with another number of classes keep their initial values.

    Returns:
        The origin of its weights, in words.
    """
    own = model.state_dict()
    state, unused = fit_keys(read_weights(path, published="default"), own)
    auxiliary = [key for key in state if key not in own and "aux" in key.partition(".")[0].lower()]
    unused += auxiliary
    last = _class_layers(model, state)
    state = {key: value for key, value in state.items() if key not in auxiliary and key.rpartition(".")[0] not in last}
    shapes = {
        key: tuple(tensor.shape)
        for key, tensor in own.items()
        if key.rpartition(".")[0] not in last and (key in state or not key.endswith("num_batches_tracked"))
    }
    if faults := state_dict_mismatches(state, shapes, ()):
        raise ValueError(f"{path} does not fit the model: {_first_names(faults)}")
    model.load_state_dict(state, strict=False)
    word = f"the weights of {path}"
    if last:
        theirs, ours = next(iter(last.values()))
        kept = "layer keeps its" if len(last) == 1 else "layers keep their"
        word += f", which have {counted(theirs, 'class')} instead of {ours}: the last {kept} initial values"
        word += f" ({', '.join(last)})"
    return word + (f"; the file's {_first_names(unused)} are not used" if unused else "")


def _class_layers(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """Return the last layers with different numbers of classes: (the file's, the model's), by the layer's name.

    A layer counts as one of the last if all shapes that differ do so only in the outputs, and by the same two numbers.
    """
    found: dict[str, tuple[int, int]] = {}
    for key, tensor in model.state_dict().items():
        if key not in state or state[key].shape == tensor.shape:
            continue
        name = key.rpartition(".")[0]
        transposed = isinstance(model.get_submodule(name), nn.modules.conv._ConvTransposeNd) and tensor.dim() > 1
        sides = [list(each.shape) for each in (state[key], tensor)]
        if min(map(len, sides)) <= transposed:
            return {}
        numbers = tuple(side.pop(int(transposed)) for side in sides)
        if sides[0] != sides[1] or found.setdefault(name, numbers) != numbers:
            return {}
    return found if len(set(found.values())) == 1 else {}


def _first_names(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _unknown(spec: str, known: Iterable[str], name: str | None = None) -> str:
    names = sorted(known)
    lower = {key.lower(): key for key in names}
    wanted = (name or spec.partition(":")[2]).lower()
    near = [lower[key] for key in difflib.get_close_matches(wanted, lower, n=3, cutoff=0.5)]
    hint = f"is it {' or '.join(near)}?" if near else f"there are {', '.join(names[:8])} ..."
    return f"{spec} is not known; {hint}"


def _missing(prefix: str, package: str, extra: str) -> ValueError:
    return ValueError(f"{prefix} needs the package {package}: pip install 'rfield[{extra}]'")
