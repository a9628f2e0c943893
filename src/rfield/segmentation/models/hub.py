"""Networks as folders and on the Hugging Face Hub: config.json, model.safetensors, and a card, README.md."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from rfield.segmentation.files.untrusted import read_json, read_weights

_NEEDS_HUB = "needs the package huggingface_hub: pip install 'rfield[hub]'"

if TYPE_CHECKING:
    from huggingface_hub import PyTorchModelHubMixin
else:
    try:
        from huggingface_hub import PyTorchModelHubMixin
    except ImportError:  # It is optional.

        class PyTorchModelHubMixin:
            """Takes the place of huggingface_hub's."""

            def __init_subclass__(cls, **options: Any) -> None:
                super().__init_subclass__()

            def save_pretrained(self, *args: Any, **options: Any) -> str | None:
                """Say what is missing."""
                raise ValueError(f"saving and sharing a network {_NEEDS_HUB}")

            push_to_hub = save_pretrained


_CARD = "---\n{{ card_data }}\n---\n\n{{ text | default('A semantic segmentation network of rfield.', true) }}\n"


class HubMixin(
    PyTorchModelHubMixin,
    library_name="rfield",
    pipeline_tag="image-segmentation",
    tags=["receptive-field", "semantic-segmentation"],
    model_card_template=_CARD,
):
    """huggingface_hub's mixin for networks that `build_model` has built, fused or not.

    `push_to_hub` is that of the mixin. A name is looked up on the Hub only with the prefix hf:.
    """

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | Path, *, config: dict[str, Any] | None = None, **options: Any
    ) -> str | None:
        """Write config.json, model.safetensors, and README.md if there is none.

        Args:
            save_directory: made if it is missing.
            config: further plain values for config.json; `rfield predict` needs `class_names`, `palette` and `size`.
            options: see `PyTorchModelHubMixin.save_pretrained`; `model_card_kwargs={"text": ...}` is the card's text.

        Raises:
            ValueError: the network was not built by `build_model`, or huggingface_hub is missing.
        """
        from rfield.segmentation.models.saving import describe_network  # Local: networks are defined with this mixin.

        described = {**(config or {}), **describe_network(cast(nn.Module, self))}
        return super().save_pretrained(save_directory, config=described, **options)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Any:
        """Return the network that `save_pretrained` or `push_to_hub` has left, in eval mode.

        Args:
            pretrained_model_name_or_path: a folder, or on the Hub hf:USER/NAME.
            options: of the download, such as `revision`, see `huggingface_hub.snapshot_download`.

        Raises:
            FileNotFoundError: there is no such folder, or nothing can be downloaded.
            ValueError: a file in it cannot be understood, or was written by another version.
        """
        from rfield.segmentation.models.saving import rebuild_network

        folder = find_folder(pretrained_model_name_or_path, **options)
        path, weights = folder / "config.json", folder / "model.safetensors"
        if not path.is_file():
            raise FileNotFoundError(f"{folder} has no {path.name}{hub_hint(folder)}")
        network = rebuild_network(read_json(path), path)
        try:
            network.load_state_dict(read_weights(weights))
        except RuntimeError as error:
            raise ValueError(f"{weights} does not fit {path.name}: {error}") from error
        return network.eval()


def find_folder(name: str | Path, **options: Any) -> Path:
    """Return the folder of that name, or download a model of the Hub, hf:USER/NAME.

    Nothing is looked up on the Hub without the prefix, whether there is a folder of that name or not.

    Args:
        name: a folder, or hf:USER/NAME.
        options: of the download, see `huggingface_hub.snapshot_download`.

    Raises:
        FileNotFoundError: nothing can be downloaded.
        ValueError: huggingface_hub is missing, or hf: is followed by no name.

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
        import huggingface_hub
    except ImportError as error:
        raise ValueError(f"{name} {_NEEDS_HUB}") from error
    try:
        return Path(huggingface_hub.snapshot_download(wanted, **options))
    except Exception as error:  # No network, no such model, no access: each has its own type.
        raise FileNotFoundError(f"there is no model {wanted} from the Hub: {error}") from error


def hub_hint(folder: Path) -> str:
    """Return how to write a model of the Hub, if a missing folder's name looks like one; else "".

    >>> hub_hint(Path("someone/network")), hub_hint(Path("HF:someone/network")), hub_hint(Path("."))
    ('; a model of the Hub is hf:someone/network', '; a model of the Hub is hf:someone/network', '')
    """
    name = re.sub(r"^(hf|hub|huggingface|https?)(:/*|/)(huggingface\.co/)?", "", str(folder), flags=re.IGNORECASE)
    is_name = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not folder.exists()
    return f"; a model of the Hub is hf:{name}" if is_name else ""
