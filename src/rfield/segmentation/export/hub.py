"""Publish a run on the Hugging Face Hub: its plain network, and a card with scores and receptive field."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from rfield.receptive_field.theoretical import receptive_field_px
from rfield.segmentation.files.untrusted import read_json
from rfield.segmentation.models import ParsingNetwork
from rfield.segmentation.runs import Run, load_run
from rfield.segmentation.web.report import try_report
from rfield.surgery.fuse import fuse
from rfield.text import counted, format_pair

_PICTURES = {"curve.png": "Loss over the receptive field", "factor.png": "The receptive field in training"}


def push_run(
    run_folder: str | Path,
    repo_id: str,
    checkpoint: str = "last",
    private: bool = False,
    share: Callable[..., None] | None = None,
) -> str:
    """Upload the files of `share_run`, and return the repository's address.

    Args:
        run_folder, repo_id, checkpoint: as for `share_run`.
        private: make the repository private, if it is new.
        share: `share_space`, to upload a Space in place of a model.

    Raises:
        FileNotFoundError, ValueError: as `load_run`, `rfield.fuse` and `HubMixin.save_pretrained` do.
        OSError: if the Hub refuses the files or cannot be reached.
    """
    with tempfile.TemporaryDirectory() as folder:
        (share or share_run)(run_folder, folder, checkpoint, repo_id)
        return _upload(Path(folder), repo_id, private, None if share is None else "space")


def share_run(run_folder: str | Path, out: str | Path, checkpoint: str = "last", repo_id: str = "USER/NAME") -> None:
    """Write a run's network, fused, in the form that `rfield predict` and `ParsingNetwork.from_pretrained` read.

    The folder holds no paths of the run's config, and no data; its report.html has neither, too.

    Args:
        run_folder: a run folder of `rfield train` or `rfield fuse`.
        out: the folder for the files.
        checkpoint: `last` or `best`.
        repo_id: the name on the Hub, for the card.

    Raises:
        FileNotFoundError, ValueError: as `load_run`, `rfield.fuse` and `HubMixin.save_pretrained` do.
    """
    run = load_run(run_folder, checkpoint)
    out = Path(out)
    network = cast(ParsingNetwork, fuse(run.network))
    notes = {
        "class_names": run.class_names,
        "palette": run.palette,
        "size": run.size,
        "freeze_backbone": run.config.model.freeze_backbone,
    }
    pictures = [name for name in _PICTURES if (run.folder / name).is_file()]
    (out / "README.md").unlink(missing_ok=True)
    network.save_pretrained(out, config=notes, model_card_kwargs={"text": _card(run, run.network, pictures, repo_id)})
    for name in pictures:
        shutil.copyfile(run.folder / name, out / name)
    if (run.folder / "metrics.json").is_file():
        try_report(run.folder, out, public=True)


def _upload(folder: Path, repo_id: str, private: bool, kind: str | None) -> str:
    try:
        import huggingface_hub  # Local: it is optional.
    except ImportError as error:
        raise ValueError("the Hub needs the package huggingface_hub: pip install 'rfield[hub]'") from error
    try:
        hub = huggingface_hub.HfApi()
        sdk = "docker" if kind == "space" else None
        address: str = hub.create_repo(repo_id, private=private, exist_ok=True, repo_type=kind, space_sdk=sdk)
        hub.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="A network of rfield", repo_type=kind)
    except (OSError, ValueError):
        raise
    except Exception as error:  # Its exceptions are no OSErrors in every release.
        raise OSError(f"{repo_id} could not be uploaded: {error}") from error
    return address


def _card(run: Run, network: ParsingNetwork, pictures: list[str], repo_id: str) -> str:
    lines = [
        f"# {repo_id.rpartition('/')[2]}",
        "",
        f"{run.config.model.model} of rfield, {counted(len(run.class_names), 'class')}: {', '.join(run.class_names)}.",
        "",
        *_field(network),
        *_scores(run.folder),
        *(f"![{_PICTURES[name]}]({name})\n" for name in pictures),
        "```sh",
        "pip install 'rfield[all]'",
        f"rfield predict hf:{repo_id} images --out out",
        "```",
        "",
    ]
    return "\n".join(lines)


def _field(network: ParsingNetwork) -> list[str]:
    try:
        pixels = receptive_field_px(network)
    except ValueError:  # there is no rule for the resizes of a fused network
        return []
    dilation = network.head.effective_dilation
    return [f"Receptive field {format_pair(pixels)} px (dilation {format_pair(dilation)} in its head).", ""]


def _scores(folder: Path) -> list[str]:
    """Return the scores of the validation at the end of the training, or [] if the folder has none."""
    try:
        scores: dict[str, Any] = read_json(folder / "metrics.json")
        rows = [(name, value) for name, value in scores["per_class"].items() if value is not None]
        accuracy = scores["pixel_accuracy"]
        table = [f"| {name} | {value:.3f} |" for name, value in rows]
        head = f"Validation at the end of the training: mIoU {scores['miou']:.3f}, pixel accuracy {accuracy:.3f}."
    except (OSError, AttributeError, ValueError, KeyError, TypeError, OverflowError):
        return []
    return [head, "", "| class | IoU |", "|---|---|", *table, ""]
