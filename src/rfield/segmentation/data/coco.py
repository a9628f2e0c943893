"""Annotations in COCO's JSON format, as COCO, Roboflow, CVAT and Label Studio write them: instances or panoptic."""

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torchvision.tv_tensors import Image, Mask

from rfield.segmentation.conventions import IGNORE_INDEX
from rfield.segmentation.data.coco_masks import panoptic_ids, segment_pixels
from rfield.segmentation.data.dataset import ParsingDataset, voc_palette
from rfield.segmentation.data.files import draw_names, fingerprint_of
from rfield.segmentation.data.images import image_sizes, read_image
from rfield.segmentation.data.listing import make_listing
from rfield.segmentation.data.mask_options import MaskOptions
from rfield.segmentation.data.masks import MaskCode, plain_labels
from rfield.segmentation.data.pairing import SPLIT_NAMES, images_below, split_of
from rfield.segmentation.files.untrusted import read_json

_VAL = 0.2
_BACKGROUND = "background"
_MOST_CLASSES = 254


class CocoDataset(ParsingDataset):
    """Images with segments in COCO's JSON format (Lin et al., ECCV 2014; Kirillov et al., CVPR 2019 for panoptic).

    The annotations of a split are in `SPLIT/_annotations.coco.json`, or in a JSON file whose name has the split's name
    as a word, right in the root, in `annotations` or in `SPLIT` (`valid` and `validation` do for val). If there is one
    JSON file without such a name, a fifth of its images, always the same ones, is val. An image is found by its
    `file_name` or by the last part of it, anywhere below the root.

    Instances become the class of their category on a background, smaller ones over larger ones, crowds below all.
    Panoptic segments become their category's class, and pixels without a segment have no label.

    Args:
        root: the folder that holds the images and annotations.
        split: "train", "val", "test", or a JSON file in the root.
        options: of them `mirrored` alone.

    Raises:
        FileNotFoundError: the root, the annotations or an image is missing.
        ValueError: the annotations are not understood; names the file, the place in it and the value.

    Reading a sample raises `OSError` for a damaged file and `ValueError` for a segment that is not understood or an
    image of another size than annotated.

    Example:
        >>> CocoDataset("no/coco")
        Traceback (most recent call last):
        FileNotFoundError: no/coco is not a folder; give the one that holds the images and annotations
    """

    def __init__(self, root: str | os.PathLike[str], split: str = "train", options: MaskOptions | None = None) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise FileNotFoundError(f"{self.root} is not a folder; give the one that holds the images and annotations")
        self.source, shared = _find_annotations(self.root, split)
        content = _read(self.source)
        self._panoptic = any("segments_info" in each for each in content["annotations"])
        self._classes, self.class_names = _classes(content, self.source, self._panoptic)
        listing = make_listing(self.class_names, MaskCode(plain_labels(1)), [], "", options or MaskOptions(), None)
        self.mirrored_classes = listing.mirrored_classes
        self.palette = voc_palette()
        self._annotations: dict[Any, list[int]] = {}
        self._content = content["annotations"]
        for index, each in enumerate(self._content):
            self._annotations.setdefault(each.get("image_id"), []).append(index)
        self._images = content["images"]
        if shared:
            val = draw_names([str(each.get("file_name")) for each in self._images], _VAL)
            self._images = [each for each in self._images if (str(each.get("file_name")) in val) == (split == "val")]
        if not self._images:
            raise ValueError(f"{self.source} has no image for the split {split!r}")
        self._files = _Files(self.root, split)
        self.image_paths = [self._files.find(str(each.get("file_name")), self.source) for each in self._images]
        self.ids = [path.stem for path in self.image_paths]

    def __getitem__(self, index: int) -> tuple[Image, Mask]:
        image = read_image(self.image_paths[index])
        about = self._images[index]
        size = (image.shape[1], image.shape[2])
        said = about.get("height", size[0]), about.get("width", size[1])
        if said != size:
            raise ValueError(
                f"{self.source}: {about['file_name']} is annotated at {said[0]}x{said[1]} px (height x width), but "
                f"{self.image_paths[index]} has {size[0]}x{size[1]}; use the image that was annotated"
            )
        own = self._annotations.get(about.get("id"), [])
        mask = self._panoptic_mask(own, size) if self._panoptic else self._instance_mask(own, size)
        return image, Mask(torch.from_numpy(mask))

    def _instance_mask(self, own: list[int], size: tuple[int, int]) -> npt.NDArray[np.uint8]:
        drawn = []
        for index in own:
            each = self._content[index]
            where = f"{self.source}: annotations[{index}]"
            pixels = segment_pixels(each.get("segmentation"), size, where)
            drawn.append((not each.get("iscrowd"), -int(pixels.sum()), index, self._class(each, where), pixels))
        mask = np.zeros(size, np.uint8)
        for _, _, _, label, pixels in sorted(drawn, key=lambda each: each[:3]):
            mask[pixels] = label
        return mask

    def _panoptic_mask(self, own: list[int], size: tuple[int, int]) -> npt.NDArray[np.uint8]:
        mask = np.full(size, IGNORE_INDEX, np.uint8)
        for index in own:
            each = self._content[index]
            where = f"{self.source}: annotations[{index}]"
            ids = panoptic_ids(self._files.find(str(each.get("file_name")), self.source), size)
            for place, segment in enumerate(each.get("segments_info", ())):
                mask[ids == segment.get("id")] = self._class(segment, f"{where}.segments_info[{place}]")
        return mask

    def _class(self, of: dict[str, Any], where: str) -> int:
        category = of.get("category_id")
        if category not in self._classes:
            raise ValueError(f"{where}: category_id {category!r} is no category of the file")
        return self._classes[category]

    def fingerprint(self) -> str:
        """Return a hexadecimal hash of the names and classes, and of every file's name, size and time of change."""
        return fingerprint_of(self.root, [self.source, *self.image_paths], self.ids, self.class_names)

    def sizes(self) -> list[tuple[int, int]]:
        """Return the (height, width) in px of every image, from the files' headers."""
        return image_sizes(self.image_paths)


def _find_annotations(root: Path, split: str) -> tuple[Path, bool]:
    """Return the JSON file of a split, and whether it holds several splits that are still to be drawn."""
    if split.endswith(".json"):
        if not (root / split).is_file() or not (root / split).resolve().is_relative_to(root.resolve()):
            raise FileNotFoundError(f"{root / split} is no file in {root}; give the path below the root")
        return root / split, False
    own = [word for word, name in SPLIT_NAMES.items() if name == split] or [split]
    folders = [root, root / "annotations", *(root / word for word in own)]
    files = [path for folder in folders for path in sorted(folder.glob("*.json")) if not path.name.startswith(".")]
    named = [path for path in files if path.parent.name in own or {*own} & _words(path)]
    # COCO's own captions and keypoints lie beside the segments.
    named = [path for path in named if _words(path) & {"instances", "panoptic"}] or named
    whole = [path for path in files if not _words(path) & {*SPLIT_NAMES} and path.parent in folders[:2]]
    found = named or (whole if split in ("train", "val") else [])
    if len(found) == 1:
        return found[0], not named
    names = ", ".join(str(path.relative_to(root)) for path in found or files) or "none"
    raise FileNotFoundError(
        f"{root} has {len(found)} JSON files of annotations for the split {split!r} (there are: {names}); name one in "
        f"a data config, such as `{split}: annotations/{split}.json`"
    )


def _words(path: Path) -> set[str]:
    return {*re.split(r"[^a-z]+", path.stem.lower())}


def _read(path: Path) -> dict[str, Any]:
    content = read_json(path)
    for key in ("images", "annotations", "categories"):
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(each, dict) for each in entries):
            raise ValueError(f"{path} has no list {key!r} of objects, as annotations in COCO's format have")
    if not any(each.get("segmentation") or "segments_info" in each for each in content["annotations"]):
        raise ValueError(f"{path} holds no segments, only boxes or nothing; export polygons or masks")
    return dict(content)


def _classes(content: dict[str, Any], path: Path, panoptic: bool) -> tuple[dict[Any, int], tuple[str, ...]]:
    """Return the class of each category, and the names; instances have a background."""
    used = {segment.get("category_id") for segment in _segments(content["annotations"])}
    parents = {each.get("supercategory") for each in content["categories"]}
    # Roboflow adds a first category that only groups the others.
    categories = [
        each for each in content["categories"] if each.get("id") in used or each.get("name") not in parents
    ] or content["categories"]
    names = [str(each.get("name")).strip() for each in categories]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not 1 <= len(names) <= _MOST_CLASSES or not all(isinstance(each.get("id"), int) for each in categories):
        problem = f"{twice[0]!r} is there twice" if twice else f"there are {len(names)}"
        raise ValueError(f"{path}: 1 to {_MOST_CLASSES} categories with an id and a name are needed, but {problem}")
    if not panoptic:
        names = [_BACKGROUND, *(name for name in names if name != _BACKGROUND)]
    return {each["id"]: names.index(str(each.get("name")).strip()) for each in categories}, tuple(names)


def _segments(annotations: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for each in annotations:
        yield from each.get("segments_info", [each])


class _Files:
    """Find files of images below a root by the names in annotations."""

    def __init__(self, root: Path, split: str) -> None:
        self.root, self.split = root, split
        paths = [path for paths in images_below(root).values() for path in paths]
        self._all = {*paths}
        self._by_name: dict[str, list[Path]] = {}
        for path in paths:
            self._by_name.setdefault(path.name, []).append(path)

    def find(self, name: str, listed_in: Path) -> Path:
        parts = PurePosixPath(name.replace("\\", "/"))
        for folder in (listed_in.parent, self.root, listed_in.with_suffix("")):
            if folder / parts in self._all:
                return folder / parts
        found = self._by_name.get(parts.name, [])
        if len(found) > 1:
            found = [path for path in found if split_of(path.relative_to(self.root)) == self.split] or found
        if len(found) != 1:
            raise FileNotFoundError(
                f"{listed_in} names the image {name!r}, but {self.root} has {len(found) or 'none'} of that name; put "
                "it where file_name says, or correct the name"
            )
        return found[0]
