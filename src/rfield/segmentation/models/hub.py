"""Networks as folders and on the Hugging Face Hub: config.json, model.safetensors, and a card, README.md."""

import dataclasses
import re
import tempfile
from pathlib import Path
from typing import Any

from torch import fx, nn

from rfield.layers import LearnedFactor
from rfield.segmentation.files.atomic import write_json, write_text, write_weights
from rfield.segmentation.files.untrusted import read_json, read_weights
from rfield.segmentation.models.multi_path import Paths
from rfield.surgery.fuse import dilations, restore_fused

_PLAIN_CARD = "---\nlibrary_name: rfield\npipeline_tag: image-segmentation\n---\n\nA parsing network of rfield.\n"


class HubMixin(nn.Module):
    """Saving, loading and sharing of networks that a function of `rfield.segmentation.models` has built, fused or not.

    Attributes:
        recipe: the function's name as `find_model` knows it, under `model`, and its arguments; None for a network that
            was put together otherwise.
    """

    recipe: dict[str, Any] | None = None

    def save_pretrained(self, folder: str | Path, notes: dict[str, Any] | None = None, card: str = _PLAIN_CARD) -> None:
        """Writes config.json, model.safetensors and README.md.

        Args:
            folder: made if it is missing.
            notes: what config.json is to hold besides, in plain types; `rfield predict` needs `class_names`, `palette`
                and `size`.
            card: the text of README.md.

        Raises:
            ValueError: if the network was not built by a function of `rfield.segmentation.models`.
        """
        if self.recipe is None:
            raise ValueError(
                "only networks that a function of rfield.segmentation.models has built know how to be built again"
            )
        recipe = {name: value for name, value in self.recipe.items() if name not in ("name", "weights")}
        recipe["paths"] = dataclasses.asdict(recipe["paths"])
        recipe["regulate"] = any(isinstance(module, LearnedFactor) for module in self.modules())
        fused = None
        if not recipe["regulate"]:
            found, stock = dilations(self), dilations(_build(recipe))
            resizes = {
                name: module.meta["factor"]
                for name, module in self.named_modules()
                if isinstance(module, fx.GraphModule) and "factor" in module.meta
            }
            changed = {name: found[name] for name in stock if found[name] != stock[name]}
            fused = {"dilations": changed, "resizes": resizes}
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {**(notes or {}), "network": recipe, "fused": fused}
        write_json(folder / "config.json", config)
        write_text(folder / "README.md", card)
        write_weights(folder / "model.safetensors", self.state_dict())

    @classmethod
    def from_pretrained(cls, name: str | Path) -> Any:
        """The network that `save_pretrained` or `push_to_hub` has left, in eval mode.

        Args:
            name: a folder, or on the Hub hf:USER/NAME.

        Raises:
            FileNotFoundError: if there is no such folder, or nothing can be downloaded.
            ValueError: if a file in it cannot be understood.
        """
        folder = find_folder(name)
        path = folder / "config.json"
        if not path.is_file():
            raise FileNotFoundError(f"{folder} has no {path.name}{hub_hint(folder)}")
        try:
            config = read_json(path)
            network = _build(config["network"])
            if config["fused"] is not None:
                restore_fused(network, config["fused"])
        except Exception as error:  # Any part of a network may be what fails.
            raise ValueError(f"{path} is damaged or no config of rfield's: {error}") from error
        try:
            network.load_state_dict(read_weights(folder / "model.safetensors"))
        except RuntimeError as error:
            raise ValueError(f"{folder / 'model.safetensors'} does not fit {path.name}: {error}") from error
        return network.eval()

    def push_to_hub(
        self, repo_id: str, private: bool = False, notes: dict[str, Any] | None = None, card: str = _PLAIN_CARD
    ) -> str:
        """Uploads what `save_pretrained` writes, with the token that `hf auth login` has left, and returns its address.

        Raises:
            OSError: if the Hub refuses it or cannot be reached.
            ValueError: as `save_pretrained`, or if huggingface_hub is missing.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, notes, card)
            return upload_folder(Path(folder), repo_id, private)


def upload_folder(folder: Path, repo_id: str, private: bool = False) -> str:
    """Uploads a folder as a model's repository, made if it is missing, and returns its address.

    Raises:
        OSError: if the Hub refuses it or cannot be reached.
        ValueError: if huggingface_hub is missing or the name is none.
    """
    try:
        import huggingface_hub  # Local: it is optional.
    except ImportError as error:
        raise ValueError("the Hub needs the package huggingface_hub: pip install 'rfield[hub]'") from error
    try:
        hub = huggingface_hub.HfApi()
        address = hub.create_repo(repo_id, private=private, exist_ok=True)
        hub.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="A network of rfield")
    except (OSError, ValueError):
        raise
    except Exception as error:  # Its exceptions are no OSErrors in every release.
        raise OSError(f"{repo_id} could not be uploaded: {error}") from error
    return str(address)


def find_folder(name: str | Path) -> Path:
    """The folder of that name, or the download of a model on the Hub, hf:USER/NAME.

    Nothing is looked up on the Hub without the prefix, whether there is a folder of that name or not.

    Raises:
        FileNotFoundError: if nothing can be downloaded.
        ValueError: if huggingface_hub is missing, or the name is none.

    >>> find_folder(".")
    PosixPath('.')
    """
    text = str(name)
    wanted = text.removeprefix("hf:")
    if wanted == text:
        return Path(name)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", wanted):
        raise ValueError(f"{text} names no model of the Hub: give hf:USER/NAME")
    try:
        import huggingface_hub  # Local: it is optional.
    except ImportError as error:
        raise ValueError(f"{name} needs the package huggingface_hub: pip install 'rfield[hub]'") from error
    try:
        return Path(huggingface_hub.snapshot_download(wanted))
    except Exception as error:  # No network, no such model, no right to it, no name: as many types.
        raise FileNotFoundError(f"there is no model {wanted} from the Hub: {error}") from error


def hub_hint(folder: Path) -> str:
    """What to write for a model of the Hub, where a name looks like one and no such folder is here.

    >>> hub_hint(Path("someone/network")), hub_hint(Path("HF:someone/network")), hub_hint(Path("."))
    ('; a model of the Hub is hf:someone/network', '; a model of the Hub is hf:someone/network', '')
    """
    name = re.sub(r"^(hf|hub|huggingface|https?)(:/*|/)(huggingface\.co/)?", "", str(folder), flags=re.IGNORECASE)
    is_name = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not folder.exists()
    return f"; a model of the Hub is hf:{name}" if is_name else ""


def _build(recipe: dict[str, Any]) -> Any:
    from rfield.segmentation.models import find_model  # Local: networks are defined with this module's help.

    given = dict(recipe)
    build = find_model(given.pop("model"))
    paths: dict[str, Any] = {
        name: tuple(map(_tuple, value)) if isinstance(value, list) else value
        for name, value in given.pop("paths").items()
    }
    least = given.pop("min_size")
    return build(paths=Paths(**paths), min_size=_tuple(least), weights=None, **given)


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
