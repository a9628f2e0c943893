"""The flags of `rfield inspect`. Imports nothing but Python."""

import dataclasses
from typing import Literal

from rfield.segmentation.config.train import parse_size


@dataclasses.dataclass
class InspectConfig:
    """Measuring what a network sees."""

    model: str = dataclasses.field(metadata={"positional": True})
    """torchvision:NAME, smp:NAME or smp:NAME/ENCODER, timm:NAME, hf:ID, or a run folder."""
    out: str | None = None
    """Folder for inspect.json, layers.csv and effective.png. Default: nothing is written."""
    size: tuple[int, int] = dataclasses.field(default=(512, 512), metadata={"parse": parse_size})
    """(height, width) of the images in px."""
    weights: str | None = None
    """Weights of a model of torchvision, smp or timm, for the effective field: default (those that the library
    publishes; downloads them), or a .pth or .safetensors file of its state dict. Default: random."""
    images: str | None = None
    """Images to measure the effective field on: an image, a folder or a glob. Default: random noise."""
    count: int = 4
    """So many images at most; 0 leaves the effective field out."""
    measure: Literal["luo", "replknet"] = "luo"
    """How contributions are counted: gradients by absolute value, or as RepLKNet's published script counts them."""
    against: str | None = None
    """Another model or run to draw beside it, as the state before. Default: for a run whose receptive field was
    learned, the same weights where its receptive field started."""
    against_weights: str | None = None
    """Weights of that model, as in weights."""
    seed: int = 0
    """Of random weights and images."""

    def __post_init__(self) -> None:
        self.size = parse_size(self.size)
        if self.against_weights is not None and self.against is None:
            raise ValueError("against_weights needs against, the model that they are of")
        if self.count < 0:
            raise ValueError(f"count must not be negative, got {self.count}")
