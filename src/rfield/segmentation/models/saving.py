"""Networks as plain values, as checkpoints, fused runs and folders of the Hub hold them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import fx, nn

from rfield.layers import LearnedFactor
from rfield.segmentation.files.format import check_format, file_format
from rfield.segmentation.models.build import build_from_spec
from rfield.segmentation.models.network import NetworkSpec, ParsingNetwork
from rfield.surgery.fuse import dilations, restore_fused


def describe_network(network: nn.Module) -> dict[str, Any]:
    """Return what `rebuild_network` needs to build a network again, in plain values.

    Returns:
        `format` and `version`, see `file_format`; `network`, see `NetworkSpec.plain`; and `fused`: None, or for a
        network without learned layers its `dilations` and `resizes` that `network` does not give, by their names.

    Raises:
        ValueError: the network was not built by `build_model`.
    """
    spec: NetworkSpec | None = getattr(network, "spec", None)
    if spec is None:
        raise ValueError("this network cannot be saved, since it has no spec: build it with build_model")
    if any(isinstance(module, LearnedFactor) for module in network.modules()):
        return {**file_format(), "network": spec.plain(), "fused": None}
    found = dilations(network)
    if spec.head.gates and isinstance(network.get_submodule("head.layers.fc6"), nn.Conv2d):
        # All inputs chose one rate, and `rfield.fuse` has left its convolution.
        rate, norm = max(found["head.layers.fc6"]), spec.head.has_norm
        spec = replace(spec, head=replace(spec.head, gates=None, rates=(), dilation=rate, norm=norm, regulate=False))
    if spec.head.regulate and not spec.head.rates:
        dilation = max(max(pair) for name, pair in found.items() if name.startswith("head."))
        spec = replace(spec, head=replace(spec.head, dilation=dilation, regulate=False, rectangular=False))
    stock = dilations(build_from_spec(spec))
    resizes = {
        name: module.meta["factor"]
        for name, module in network.named_modules()
        if isinstance(module, fx.GraphModule) and "factor" in module.meta
    }
    changed = {name: found[name] for name in stock if found[name] != stock[name]}
    return {**file_format(), "network": spec.plain(), "fused": {"dilations": changed, "resizes": resizes}}


def rebuild_network(description: Any, path: Path) -> ParsingNetwork:
    """Build the network that `describe_network` has described, with random weights.

    Args:
        description: from a file, perhaps of a stranger.
        path: the file, for messages.

    Raises:
        ValueError: the file was written by another version, or describes no network that can be built.
    """
    # A fused.json of rfield 0.1 has `dilations` alone.
    if not isinstance(description, dict) or not {"network", "dilations"} & set(description):
        raise ValueError(f"{path} is damaged or no file of rfield's: it describes no network")
    check_format(description, path)
    try:
        network = build_from_spec(NetworkSpec.from_plain(description["network"]))
        if description.get("fused") is not None:
            restore_fused(network, description["fused"])
    except Exception as error:  # Any part of a network may fail.
        raise ValueError(f"{path} describes no network that can be built: {error}") from error
    return network
