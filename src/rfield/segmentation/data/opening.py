"""Open one split of the data set that a source describes."""

from collections.abc import Callable
from pathlib import Path

from rfield.segmentation.data.ade20k import ADE20KDataset
from rfield.segmentation.data.camvid import CamVidDataset
from rfield.segmentation.data.cityscapes import CityscapesDataset
from rfield.segmentation.data.coco import CocoDataset
from rfield.segmentation.data.dataset import ParsingDataset
from rfield.segmentation.data.folder import FolderDataset
from rfield.segmentation.data.helen import HelenDataset
from rfield.segmentation.data.hugging_face import HuggingFaceDataset
from rfield.segmentation.data.mask_options import MaskOptions
from rfield.segmentation.data.pets import PetsDataset
from rfield.segmentation.data.resized import ResizedDataset
from rfield.segmentation.data.spec import DataSource
from rfield.segmentation.data.synthetic import SyntheticCues
from rfield.segmentation.data.voc import VOCDataset

_FOLDERS: dict[str, Callable[[Path, str, MaskOptions], ParsingDataset]] = {
    "voc": VOCDataset,
    "camvid": CamVidDataset,
    "helen": HelenDataset,
    "cityscapes": CityscapesDataset,
    "ade20k": ADE20KDataset,
    "pets": PetsDataset,
    "coco": CocoDataset,
    "folder": FolderDataset,
}


def open_dataset(source: DataSource, split: str) -> ParsingDataset:
    """Open one split. Errors name the data config, if there is one.

    Raises:
        ValueError: a value is not understood.
        FileNotFoundError: a part of the data is missing.
    """
    try:
        dataset = _open(source, split)
    except FileNotFoundError as error:
        if source.file is None:
            raise
        raise FileNotFoundError(f"{source.file}: {error}") from error
    except ValueError as error:
        if source.file is None:
            raise
        raise ValueError(f"{source.file}: {error}") from error
    return dataset if source.size is None else ResizedDataset(dataset, source.size)


def _open(source: DataSource, split: str) -> ParsingDataset:
    if source.root is None:
        return SyntheticCues(split, **source.options)
    own = source.splits.get(split, split)
    if source.format == "hf":
        return HuggingFaceDataset(source.root, own, source.masks, **source.options)
    return _FOLDERS[source.format](source.root, own, source.masks)
