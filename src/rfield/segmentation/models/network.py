"""Segmentation networks: an image in, the logits of every pixel out."""

from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfield.segmentation.models.backbones import Backbone
from rfield.segmentation.models.decoder import Decoder
from rfield.segmentation.models.heads import HeadSpec, SinglePathHead
from rfield.segmentation.models.hub import HubMixin
from rfield.segmentation.models.multi_path import MultiPathHead


@dataclass(frozen=True)
class NetworkSpec:
    """A network without its weights, in plain values, as checkpoints save it; `build_from_spec` builds it."""

    model: str
    """A name of `MODELS`, or timm:NAME."""
    num_classes: int
    head: HeadSpec
    output_stride: int
    """Input px between neighbouring features."""
    min_size: int | tuple[int, int] | None = None
    """Least side in px, or (height, width), that images are padded to."""
    decoder: bool = False
    """Sharper borders by a finer map of the backbone, see `Decoder`."""

    def plain(self) -> dict[str, Any]:
        """Return the values as a dict of plain types."""
        return asdict(self)

    @classmethod
    def from_plain(cls, values: Any) -> "NetworkSpec":
        """Return the spec that `plain` gave, from JSON, too.

        Raises:
            TypeError, ValueError, KeyError: a value is missing, unknown or outside its range.

        >>> spec = NetworkSpec("small_cnn", 2, HeadSpec(), 4, min_size=(33, 41))
        >>> NetworkSpec.from_plain({**spec.plain(), "min_size": [33, 41]}) == spec
        True
        """
        size = values["min_size"]
        head = HeadSpec(**values["head"])
        return cls(**{**values, "head": head, "min_size": tuple(size) if isinstance(size, list) else size})


class ParsingNetwork(nn.Module, HubMixin):
    """A backbone and a head: labels every pixel of images of any size.

    The receptive-field arithmetic is exact for image sides of k * stride + 1 px only, so images are padded right
    and bottom to such a size and the logits are cropped back. The halves can be run one by one:
    `network.backbone(network.pad(image))` gives features, `network.head(features, output_size)` logits; with a
    decoder the head gives features too, and `network.logits(network.pad(image))` runs all three.

    Args:
        backbone: maps Tensor[N, 3, H, W] to Tensor[N, C, h, w].
        head: maps Tensor[N, C, h, w] to Tensor[N, K, H, W].
        min_size: least side in px, or (height, width), that images are padded to.
        decoder: makes logits of the head's output and a finer map of the backbone.
        spec: how `build_from_spec` builds it again, for checkpoints and `save_pretrained`.

    Attributes:
        stride: input px between neighbouring features.
        logit_stride: input px between neighbouring logits if no size is asked for.
        num_classes: number of classes K.

    Raises:
        ValueError: the head does not fit the backbone or the decoder, or `min_size` is below 1.

    Example:
        >>> from rfield.segmentation.models.backbones import small_cnn_backbone
        >>> network = ParsingNetwork(small_cnn_backbone(), SinglePathHead(32, num_classes=5, spec=HeadSpec(dilation=4)))
        >>> image = torch.randn(2, 3, 30, 41)
        >>> network.pad(image).shape
        torch.Size([2, 3, 33, 41])
        >>> network(image).shape
        torch.Size([2, 5, 30, 41])
    """

    def __init__(
        self,
        backbone: Backbone,
        head: SinglePathHead | MultiPathHead,
        min_size: int | tuple[int, int] | None = None,
        decoder: Decoder | None = None,
        spec: NetworkSpec | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        if head.in_channels != backbone.out_channels:
            raise ValueError(
                f"the head takes {head.in_channels} channels, but the backbone gives {backbone.out_channels}; "
                f"build the head with in_channels={backbone.out_channels}"
            )
        if decoder is not None:
            if head.num_classes != decoder.in_channels:
                raise ValueError(
                    f"the decoder takes {decoder.in_channels} channels, but the head gives {head.num_classes}; "
                    f"build the head with num_classes={decoder.in_channels}"
                )
            decoder.start(head)
        least = (1, 1) if min_size is None else (min_size, min_size) if isinstance(min_size, int) else min_size
        if len(least) != 2 or min(least) < 1:
            raise ValueError(f"min_size must be at least 1 px, one number or (height, width), got {min_size!r}")
        self.backbone = backbone
        self.head = head
        self.decoder = decoder
        self.stride = backbone.stride
        self.logit_stride = backbone.stride if decoder is None else backbone.fine_stride
        self.num_classes = head.num_classes if decoder is None else decoder.num_classes
        self.min_size = least

    def chain(self) -> list[nn.Module]:
        """Return the modules in the order of execution."""
        return [self.backbone, self.head] if self.decoder is None else [self.backbone, self.head, self.decoder]

    def pad(self, image: Tensor) -> Tensor:
        """Pad right and bottom with zeros, the mean of normalised images, to sides of k * stride + 1 px.

        Args:
            image: Tensor[N, 3, H, W], normalised.

        Returns:
            Tensor[N, 3, H', W'] with H' >= H, W' >= W, neither below `min_size`.

        Raises:
            ValueError: `image` has another rank, another number of channels, no pixels or whole numbers.
        """
        if image.dim() != 4 or image.shape[1] != 3 or 0 in image.shape:
            raise ValueError(
                f"expected images of shape (N, 3, H, W) with N, H, W of at least 1, got {tuple(image.shape)}; "
                "a single image needs image[None], a grey one must be repeated to three channels"
            )
        if not image.is_floating_point():
            raise ValueError(
                f"expected a normalised floating-point image, got {image.dtype}; divide by 255, subtract the "
                "mean and divide by the standard deviation that the backbone was trained with"
            )
        missing = []
        for size, least in zip(image.shape[-2:], self.min_size, strict=True):
            # Traceable, and no division of negative numbers, which ONNX rounds the other way.
            steps = (cast(int, torch.sym_max(size, least)) + self.stride - 2) // self.stride
            missing.append(steps * self.stride + 1 - size)
        return F.pad(image, (0, missing[1], 0, missing[0]))

    def take_out_silent_paths(self) -> None:
        """Take the paths out of the head that its weights make add nothing; see `MultiPathHead.leave_out`."""
        head = self.head
        if not isinstance(head, MultiPathHead):
            return
        head.find_silent()
        kept = [path for index, path in enumerate(head.heads()) if index not in head.silent]
        if len(kept) == len(head.paths):
            return
        if len(kept) == 1:
            self.head = kept[0]
        else:
            head.paths, head.silent = nn.ModuleList(kept), frozenset()
        if self.spec is not None:
            extra = tuple(path.branch for path in kept if path.branch)
            learned = len(kept) - len(extra)
            spec = replace(
                self.spec.head, paths=learned, extra_paths=extra, norm=self.spec.head.has_norm, class_groups=None
            )
            self.spec = replace(self.spec, head=spec)

    def forward(self, image: Tensor) -> Tensor:
        """Map normalised images Tensor[N, 3, H, W] to logits Tensor[N, K, H, W].

        Raises:
            ValueError: `image` has another rank, another number of channels, no pixels or whole numbers.
        """
        padded = self.pad(image)
        logits = self.logits(padded, output_size=(padded.shape[-2], padded.shape[-1]))
        return logits[..., : image.shape[-2], : image.shape[-1]]

    def logits(self, padded: Tensor, output_size: tuple[int, int] | None = None, mask: Tensor | None = None) -> Tensor:
        """Map images from `pad` to logits.

        Args:
            padded: Tensor[N, 3, H, W].
            output_size: height and width of the logits; `None` gives one every `logit_stride` px.
            mask: labels, for the published guidance of a `MultiPathHead`.

        Returns:
            Tensor[N, K, *output_size].
        """
        return self.logits_of(self.features(padded), output_size, mask)

    def features(self, padded: Tensor) -> tuple[Tensor, ...]:
        """Return what the head reads, of images from `pad`: the features, with the decoder's finer map before them."""
        return (self.backbone(padded),) if self.decoder is None else self.backbone.pyramid(padded)

    def logits_of(
        self, features: tuple[Tensor, ...], output_size: tuple[int, int] | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Return the logits of `features`; `output_size` and `mask` as for `logits`."""
        guidance = () if mask is None or not isinstance(self.head, MultiPathHead) else (mask,)
        logits: Tensor
        if self.decoder is None:
            logits = self.head(features[0], output_size, *guidance)
            return logits
        fine, coarse = features
        context = self.head(coarse, (fine.shape[-2], fine.shape[-1]), *guidance)
        logits = self.decoder(fine, context, output_size)
        return logits
