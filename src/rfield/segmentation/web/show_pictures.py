"""The images of the page: those of a data set, and uploaded ones, which are kept in memory alone."""

import dataclasses
import io
import secrets
import threading
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from rfield.segmentation.data import ParsingDataset
from rfield.segmentation.data.images import open_named, read_image, upright_size
from rfield.text import format_size

MOST_BYTES = 20 * 2**20
"""Bytes of an uploaded file."""
MOST_PIXELS = 40_000_000
"""Pixels of an uploaded image, as its header says."""
WORKING_PIXELS = 2**20
"""Pixels of an image on the page; a larger one is resized."""
MOST_UPLOADS = 32
"""Uploads that are kept; another one takes the place of the oldest."""

# Stands for the upload's name, which is a stranger's: no file of that name is opened.
_UPLOAD = Path("the uploaded file")


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image of the page.

    Attributes:
        key: `val-3` of a data set, or a random text.
        name: to show.
        pixels: uint8 Tensor[3, H, W].
        note: how it was changed, or "".
    """

    key: str
    name: str
    pixels: Tensor
    note: str = ""


class Pictures:
    """Find images by their keys.

    Args:
        dataset: its images are shown; None for uploads alone.
        split: the data set's part, for the keys.
        size: (height, width) in px to which every upload is resized, a run's working size; None keeps their own.
    """

    def __init__(self, dataset: ParsingDataset | None, split: str, size: tuple[int, int] | None) -> None:
        self._dataset = dataset
        self._split = split
        self._size = size
        self._uploads: OrderedDict[str, Picture] = OrderedDict()
        self._lock = threading.Lock()

    def listed(self) -> list[tuple[str, str]]:
        """Return key and name of each image of the data set."""
        ids = [] if self._dataset is None else self._dataset.ids
        return [(f"{self._split}-{index}", name) for index, name in enumerate(ids)]

    def find(self, key: str) -> Picture:
        """Return an image.

        Raises:
            KeyError: there is no such image, or an upload is no longer kept.
        """
        with self._lock:
            if key in self._uploads:
                self._uploads.move_to_end(key)
                return self._uploads[key]
        split, _, number = key.rpartition("-")
        known = self._dataset is not None and split == self._split and number.isascii() and number.isdecimal()
        if self._dataset is None or not known or int(number) >= len(self._dataset):
            raise KeyError(f"there is no image {key!r}: choose another one; an upload is kept until the page closes")
        pixels, note = _fitted(self._dataset[int(number)][0].as_subclass(Tensor), self._size)
        return Picture(key, self._dataset.ids[int(number)], pixels, note)

    def add(self, name: str, data: bytes) -> Picture:
        """Decode an uploaded file and keep it.

        Raises:
            ValueError: it is too large, no image, or a damaged one.
        """
        if len(data) > MOST_BYTES:
            raise ValueError(too_large(len(data)))
        try:
            with open_named(_UPLOAD, io.BytesIO(data)) as image:
                height, width = upright_size(image, _UPLOAD)
            if height * width > MOST_PIXELS:
                raise ValueError(
                    f"the uploaded image has {format_size((height, width))} px, more than {MOST_PIXELS / 1e6:.0f} "
                    "million: make it smaller"
                )
            pixels, note = _fitted(read_image(_UPLOAD, io.BytesIO(data)).as_subclass(Tensor), self._size)
        except OSError as error:
            raise ValueError(f"{error}") from error
        picture = Picture(secrets.token_urlsafe(12), name[:200], pixels, note)
        with self._lock:
            self._uploads[picture.key] = picture
            if len(self._uploads) > MOST_UPLOADS:
                self._uploads.popitem(last=False)
        return picture


def too_large(size: int | None) -> str:
    """Return the message for an upload of too many bytes; None if nobody has counted them all.

    >>> too_large(30 * 2**20)
    'the uploaded file has 30.0 MB, more than 20 MB: make it smaller'
    """
    has = "is larger than" if size is None else f"has {size / 2**20:.1f} MB, more than"
    return f"the uploaded file {has} {MOST_BYTES / 2**20:.0f} MB: make it smaller"


def _fitted(pixels: Tensor, size: tuple[int, int] | None) -> tuple[Tensor, str]:
    """Return an image at the size that the page works at, and how it was changed."""
    height, width = pixels.shape[1:]
    if size is None:
        scale = min(1.0, (WORKING_PIXELS / (height * width)) ** 0.5)
        size = (height, width) if scale == 1 else (max(1, int(height * scale)), max(1, int(width * scale)))
    if size == (height, width):
        return pixels, ""
    resized: Tensor = TF.resize(pixels, list(size), antialias=True)
    return resized.to(torch.uint8), f"resized from {format_size((height, width))} to {format_size(size)} px"
