"""Turn a run folder into one with a plain network: fixed dilations, no learned layer."""

from pathlib import Path

import yaml

from rfield.layers import AdaptiveConv2d, GatedConv2d, LearnedFactor
from rfield.segmentation.conventions import Progress
from rfield.segmentation.data import ParsingDataset
from rfield.segmentation.files.atomic import write_json, write_text, write_weights
from rfield.segmentation.files.untrusted import read_json
from rfield.segmentation.inference.predict import evaluate_run
from rfield.segmentation.models.saving import describe_network
from rfield.segmentation.runs import load_run
from rfield.surgery.fuse import Mode, dilations, fuse
from rfield.text import format_pair


def fuse_run(
    run_folder: str | Path, out: str | Path, mode: Mode = "resize", checkpoint: str = "last"
) -> dict[str, str]:
    """Write a run's network as a plain one, into a run folder that `rfield predict` and `evaluate` read.

    The folder holds `config.yaml` (search none, the learned dilation), `classes.json`, the weights in
    `model.safetensors`, and `fused.json`, which describes the network, see `describe_network`.

    Args:
        run_folder: a run folder of `rfield train`.
        out: the folder to create; an earlier one of this kind is replaced.
        mode: see `rfield.fuse`.
        checkpoint: `last` or `best`.

    Returns:
        What each learned layer became, by its name.

    Raises:
        FileExistsError: if `out` holds a run that was trained.
        FileNotFoundError, ValueError: as `load_run` and `rfield.fuse` do.
    """
    out = Path(out)
    if not (out / "fused.json").is_file() and ((out / "config.yaml").exists() or (out / "checkpoints").exists()):
        raise FileExistsError(f"{out} holds a run that was trained: give another --out")
    run = load_run(run_folder, checkpoint)
    if not (run.folder / "config.yaml").is_file():
        raise ValueError(f"{run_folder} comes from the Hub and has no learned layers to fuse")
    plain = fuse(run.network, mode)
    description = describe_network(plain)
    head = description["network"]["head"]
    dilation = head["dilation"]
    config = run.config.replace(
        out=str(out), search="none", search_share=None, factor=1.0, rectangular=False, dilation=dilation
    )
    if run.config.model.gates and not head["gates"]:
        config = config.replace(gates=None, aspp=None, path_norm=head["norm"])
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "config.yaml", yaml.safe_dump(config.plain(), sort_keys=False))
    write_json(out / "classes.json", read_json(run.folder / "classes.json"))
    write_weights(out / "model.safetensors", plain.state_dict())
    write_json(out / "fused.json", {"run": str(run_folder), "mode": mode, **description})
    found, resizes = dilations(plain), description["fused"]["resizes"]
    layers = {name: module for name, module in run.network.named_modules() if isinstance(module, LearnedFactor)}
    return {
        name: f"resized by {format_pair(resizes[name], 3)}"
        if name in resizes
        else f"dilation {format_pair(layer.base_dilation, 3)}, learned {format_pair(layer.effective_dilation, 3)}, now "
        f"{format_pair(found[_conv_of(name, layer)], 3)}"
        for name, layer in layers.items()
    } | {
        name: f"one convolution of rate {layer.rates[layer.one_hot]}, which all images choose"
        if layer.one_hot is not None
        else f"rates {', '.join(map(str, layer.rates))}, mixed for each {layer.gates}"
        for name, layer in run.network.named_modules()
        if isinstance(layer, GatedConv2d)
    }


def score_change(
    run_folder: str | Path,
    out: str | Path,
    checkpoint: str,
    dataset: ParsingDataset,
    progress: Progress,
    ignore_names: bool,
) -> tuple[float, float]:
    """Return the mean IoU of a run's network, and that of the plain network that `fuse_run` has made from it."""
    before, after = (
        evaluate_run(run, dataset, progress, ignore_names)["miou"]
        for run in (load_run(run_folder, checkpoint), load_run(out))
    )
    return before, after


def _conv_of(name: str, layer: LearnedFactor) -> str:
    """Return the plain network's name of the convolution that a layer dilates."""
    return name if isinstance(layer, AdaptiveConv2d) else f"{name}.fc6"
