"""The data set of a listing, for all layouts of image and mask files."""

import os
from pathlib import Path

import torch
from torchvision.tv_tensors import Image, Mask

from rfield.segmentation.data.dataset import ParsingDataset, voc_palette
from rfield.segmentation.data.files import fingerprint_of
from rfield.segmentation.data.images import image_sizes, palette_of, read_image
from rfield.segmentation.data.listing import Listing
from rfield.segmentation.data.masks import read_mask


class ListedDataset(ParsingDataset):
    """The samples of a listing.

    Reading a sample raises `OSError` for a damaged file and `ValueError` for a mask of another size than its image, of
    a wrong kind, or with a value that no class has; both name the file.

    Args:
        root: the folder of the data set.
        listing: one of its splits.
        colours: the colours of the classes, if the masks do not define them.
    """

    def __init__(
        self, root: str | os.PathLike[str], listing: Listing, colours: list[tuple[int, int, int]] | None = None
    ) -> None:
        self.root = Path(root)
        self.listing = listing
        self.class_names = listing.class_names
        if listing.mirrored_classes != self.mirrored_classes:
            self.mirrored_classes = listing.mirrored_classes
        self.ids = [entry.name for entry in listing.entries]
        self.image_paths = [entry.image for entry in listing.entries]
        self.mask_paths = [entry.masks[0] for entry in listing.entries]
        if listing.code.colours is not None:
            first = {label: colour for colour, label in reversed(listing.code.colours.items())}
            colours = [first[label] for label in range(len(listing.class_names))]
        elif colours is None:
            colours = _class_colours(palette_of(self.mask_paths), listing)
        self.palette = colours + voc_palette()[len(colours) :]

    def __getitem__(self, index: int) -> tuple[Image, Mask]:
        entry = self.listing.entries[index]
        image = read_image(entry.image)
        size = (image.shape[1], image.shape[2])
        mask = read_mask(entry.masks, size, self.listing.code, self.listing.advice, entry.image)
        return image, Mask(torch.from_numpy(mask))

    def fingerprint(self) -> str:
        """Return a hexadecimal hash of the names, the mask values' meaning, and all files' names, sizes and times."""
        code = self.listing.code
        facts = (type(self).__name__, self.ids, self.class_names, code.labels.tolist(), code.colours, code.maps)
        return fingerprint_of(self.root, self.listing.files, *facts)

    def sizes(self) -> list[tuple[int, int]]:
        """Return the (height, width) in px of every image, from the files' headers.

        Raises:
            OSError: if a file is not an image; the message names it.
        """
        return image_sizes(self.image_paths)


def _class_colours(levels: list[tuple[int, int, int]], listing: Listing) -> list[tuple[int, int, int]]:
    """Return the colours of the classes and the remaining values, from the colours of the masks' values."""
    by_value = levels + voc_palette()[len(levels) :]
    labels = listing.code.labels.tolist()
    classes = range(len(listing.class_names))
    shift = next((labels.index(label) - label for label in classes if label in labels), 0)
    own = [labels.index(label) if label in labels else label + shift for label in classes]  # some values are ignored
    return [by_value[value] for value in own] + by_value[len(own) :]
