"""Data sets of the Hugging Face Hub, or local parquet files: a column of images and one of masks."""

import hashlib
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision.tv_tensors import Image, Mask

from rfield.segmentation.data.dataset import ParsingDataset, voc_palette
from rfield.segmentation.data.files import read_class_names
from rfield.segmentation.data.images import open_named, read_image, upright_size
from rfield.segmentation.data.listing import make_listing
from rfield.segmentation.data.mask_options import MaskOptions
from rfield.segmentation.data.masks import MaskCode, plain_labels, read_opened
from rfield.segmentation.data.pairing import SPLIT_NAMES
from rfield.segmentation.data.paths import is_inside

_IMAGES = ("image", "pixel_values", "img", "images")
_MASKS = ("mask", "label", "annotation", "segmentation", "semantic_segmentation", "labels", "masks", "annotations")
_FIRST_SAFE = 4  # From this release on, datasets runs no code of a data set.


class HuggingFaceDataset(ParsingDataset):
    """An image and a mask column of a data set that the library `datasets` reads; no code of the data set is run.

    Args:
        name: a name on the Hub, such as `USER/NAME`, or a local folder of parquet files.
        split: "train", "val" (also `validation`, `valid`), "test" or any other split.
        options: what a data config says of the masks.
        image: the column of the images; by default the one with a usual name.
        mask: the column of the masks; by default the one with a usual name, or the only other column of images.
        classes: the names of the classes in the order of the mask values; by default those in `classes.txt` of a local
            folder.

    Raises:
        ValueError: the package is missing, the data set cannot be read, or it has no such split, columns or classes.

    Reading a sample raises `OSError` for a damaged image and `ValueError` for a mask of another size or kind than
    wanted, or with a value that no class has. The messages name the data set, the split, the row and the column.
    """

    def __init__(
        self,
        name: str | os.PathLike[str],
        split: str = "train",
        options: MaskOptions | None = None,
        image: str | None = None,
        mask: str | None = None,
        classes: tuple[str, ...] = (),
    ) -> None:
        self.name = str(name)
        rows, self.split = _open(self.name, split)
        columns = [column for column, kind in rows.features.items() if type(kind).__name__ == "Image"]
        self._image = _column(self.name, image, _IMAGES, columns, [])
        self._mask = _column(self.name, mask, _MASKS, columns, [self._image])
        import datasets

        for column in (self._image, self._mask):
            rows = rows.cast_column(column, datasets.Image(decode=False))
        self._rows = rows.select_columns([self._image, self._mask])
        options = options or MaskOptions()
        own = Path(self.name) / "classes.txt"
        names = classes or read_class_names(own, ())
        if not names and options.colours is None:
            raise ValueError(
                f"hf:{self.name} does not say what its classes are; name them in a data config, such as "
                f"`classes: [road, car]`, in the order of the mask values{f', or in {own}' * Path(self.name).is_dir()}"
            )
        advice = "name all classes in the data config, or see its `ignore` and `reduce_zero_label`"
        self._listing = make_listing(
            names, MaskCode(plain_labels(len(names))), [], advice, options, own if names else None
        )
        self.class_names = self._listing.class_names
        self.mirrored_classes = self._listing.mirrored_classes
        colours = self._listing.code.colours
        self.palette = voc_palette()
        if colours is not None:
            first = {label: colour for colour, label in reversed(colours.items())}
            self.palette[: len(self.class_names)] = [first[label] for label in range(len(self.class_names))]
        self.ids = [f"{self.split}_{index:06d}" for index in range(len(rows))]

    def __getitem__(self, index: int) -> tuple[Image, Mask]:
        row = self._rows[index]
        place, data = self._file(row, index, self._image)
        image = read_image(place, data)
        place, data = self._file(row, index, self._mask)
        with open_named(place, data) as file:
            mask = read_opened(file, place, (image.shape[1], image.shape[2]), self._listing.code, self._listing.advice)
        return image, Mask(torch.from_numpy(mask.astype(np.uint8)))

    def _file(self, row: dict[str, Any], index: int, column: str) -> tuple[Path, io.BytesIO]:
        """Return how an image is called in errors, and its bytes."""
        value, place = row[column] or {}, Path(f"hf:{self.name}/{self.split}[{index}].{column}")
        data = value.get("bytes")
        if data is None and value.get("path") and is_inside(Path(value["path"]), Path(self.name)):
            data = Path(value["path"]).read_bytes()
        if data is None:
            raise ValueError(
                f"{place} holds no image ({value.get('path')!r} is not embedded); embed it in the parquet file"
            )
        return place, io.BytesIO(data)

    def fingerprint(self) -> str:
        """Return a hexadecimal hash of the rows, the columns and the meaning of the mask values."""
        code = self._listing.code
        facts = (self.name, self.split, self._rows._fingerprint, self._image, self._mask, code.labels.tolist())
        return hashlib.sha256(repr((facts, code.colours, self.class_names)).encode()).hexdigest()

    def sizes(self) -> list[tuple[int, int]]:
        """Return the (height, width) in px of every image, from their headers."""
        sizes = []
        for index, row in enumerate(self._rows.select_columns([self._image])):
            place, data = self._file(row, index, self._image)
            with open_named(place, data) as file:
                sizes.append(upright_size(file, place))
        return sizes


def _open(name: str, split: str) -> tuple[Any, str]:
    """Return the rows of a split and its own name."""
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"hf:{name} needs the package datasets: pip install 'rfield[datasets]'") from error
    if int(datasets.__version__.split(".")[0]) < _FIRST_SAFE:
        raise ValueError(
            f"datasets {datasets.__version__} may run code of a data set: pip install 'datasets>={_FIRST_SAFE}'"
        )
    try:
        splits = datasets.get_dataset_split_names(name)
        own = [split, *(word for word, split_name in SPLIT_NAMES.items() if split_name == split)]
        found = next((each for each in own if each in splits), None)
        if found is not None:
            return datasets.load_dataset(name, split=found), found
    except Exception as error:  # Of the library, of pyarrow, of the network: dozens of types.
        text = " ".join(str(error).split())
        raise ValueError(
            f"hf:{name} cannot be read: {text}; give a name on the Hub or a folder of parquet files"
        ) from error
    raise ValueError(f"hf:{name} has no split {split!r}; it has {', '.join(splits)}: name one in a data config")


def _column(name: str, given: str | None, usual: tuple[str, ...], columns: list[str], taken: list[str]) -> str:
    """Return the column of images to read: the given one, one of a usual name, or the only one left."""
    free = [column for column in columns if column not in taken]
    if given is None:
        found = [column for column in usual if column in free] or (free if len(free) == 1 else [])
    else:
        found = [given] if given in free else []
    if not found:
        what = f"no column {given!r} of images" if given else f"no column of images named {usual[0]}"
        raise ValueError(
            f"hf:{name} has {what}; its columns of images are {', '.join(columns) or 'none'}: name two in a data "
            "config, with `image` and `mask`"
        )
    return found[0]
