"""Data sets: one file for each format, their common base, checks and transforms."""

from rfield.segmentation.conventions import IGNORE_INDEX, IMAGENET_MEAN, IMAGENET_STD
from rfield.segmentation.data.ade20k import ADE20KDataset
from rfield.segmentation.data.camvid import CAMVID_CLASSES, CamVidDataset
from rfield.segmentation.data.check import check_data
from rfield.segmentation.data.check_sample import Finding
from rfield.segmentation.data.cityscapes import CITYSCAPES_CLASSES, CityscapesDataset
from rfield.segmentation.data.coco import CocoDataset
from rfield.segmentation.data.dataset import ParsingDataset, voc_palette
from rfield.segmentation.data.faces import Conversion, convert_celebamask, convert_lapa
from rfield.segmentation.data.folder import FolderDataset
from rfield.segmentation.data.helen import HELEN_CLASSES, HelenDataset
from rfield.segmentation.data.hugging_face import HuggingFaceDataset
from rfield.segmentation.data.mask_options import MaskOptions
from rfield.segmentation.data.matching import ReorderedDataset, class_difference, match_classes
from rfield.segmentation.data.opening import open_dataset
from rfield.segmentation.data.pets import PetsDataset
from rfield.segmentation.data.resized import ResizedDataset
from rfield.segmentation.data.skipping import SkippingDataset
from rfield.segmentation.data.spec import parse_spec
from rfield.segmentation.data.synthetic import SyntheticCues
from rfield.segmentation.data.transforms import (
    AugmentedDataset,
    EpochSampler,
    evaluation_transform,
    training_transform,
)
from rfield.segmentation.data.voc import VOCDataset, convert_sbd

__all__ = [
    "CAMVID_CLASSES",
    "CITYSCAPES_CLASSES",
    "HELEN_CLASSES",
    "IGNORE_INDEX",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "ADE20KDataset",
    "AugmentedDataset",
    "CamVidDataset",
    "CityscapesDataset",
    "CocoDataset",
    "Conversion",
    "EpochSampler",
    "Finding",
    "FolderDataset",
    "HelenDataset",
    "HuggingFaceDataset",
    "MaskOptions",
    "ParsingDataset",
    "PetsDataset",
    "ReorderedDataset",
    "ResizedDataset",
    "SkippingDataset",
    "SyntheticCues",
    "VOCDataset",
    "check_data",
    "class_difference",
    "convert_celebamask",
    "convert_lapa",
    "convert_sbd",
    "evaluation_transform",
    "load_dataset",
    "match_classes",
    "training_transform",
    "voc_palette",
]


def load_dataset(spec: str, split: str = "train") -> ParsingDataset:
    """Open one split of a data set.

    Args:
        spec: `voc:ROOT`, a folder in the layout of a PASCAL VOC devkit; `camvid:ROOT`, in that of the SegNet
            tutorial; `helen:ROOT`, in that of Helen face parsing; `cityscapes:ROOT`, as Cityscapes is downloaded;
            `ade20k:ROOT`, in that of ADE20K's benchmark; `pets:ROOT`, in that of the Oxford-IIIT Pet data set;
            `coco:ROOT`, annotations in COCO's format; `folder:ROOT`, with `classes.txt` and `SPLIT/images` and
            `SPLIT/masks`; `hf:NAME`, a data set of the Hugging Face Hub or a folder of parquet files; or `synthetic`;
            or the path of a .yaml file with the key `format` and the keys of that format:

            - voc: `root` (relative to the YAML file) and optionally `train`, `val`, `test`, the lists of these
              splits, and the keys below
            - camvid, helen, cityscapes, folder: `root` and optionally `size` (see below), `ignore`,
              `reduce_zero_label`, `colours`, `mask_suffix`, `mirrored` (see `MaskOptions`)
            - ade20k, pets: `root` and optionally `size`, `ignore`, `mask_suffix`, `mirrored`
            - coco: `root` and optionally `train`, `val`, `test`, the JSON files of these splits, `size`, `mirrored`
            - hf: `root` and optionally `train`, `val`, `test`, the names of these splits, `image`, `mask`, the columns,
              `classes`, a list of their names, `size`, and the keys of masks but `mask_suffix`
            - synthetic: optionally `size`, `distance`, `length`, `seed`, see `SyntheticCues`

            `size: [height, width]` in px is a working size: every image and mask is resized to it when it is read,
            and scores are computed at it, see `ResizedDataset`.
        split: the part of the data, such as "train" or "val".

    Returns:
        The samples of that split.

    Raises:
        ValueError: if the spec, the file's text, its format or one of its keys or values is not understood.
        FileNotFoundError: if the YAML file or a part of the data is missing.

    Example:
        >>> dataset = load_dataset("synthetic", split="val")
        >>> len(dataset), dataset.class_names
        (40, ('neither', 'green below', 'red right', 'both'))
    """
    return open_dataset(parse_spec(spec), split)
