"""Cityscapes in the folders it is downloaded in: `leftImg8bit` and `gtFine`, by city."""

import os
from pathlib import Path

import numpy as np
import torch
from torchvision.datasets import Cityscapes
from torchvision.tv_tensors import Image, Mask

from rfield.data.dataset import IGNORE_INDEX, ParsingDataset, voc_palette
from rfield.data.files import fingerprint_of, read_mask
from rfield.data.images import image_sizes, read_image
from rfield.data.listing import UNKNOWN, Entry, Listing, Refuse, entries_inside, raise_error

_SPLITS = ("train", "val", "test")
_SCORED = sorted((entry for entry in Cityscapes.classes if not entry.ignore_in_eval), key=lambda entry: entry.train_id)
_TRAIN_IDS = np.full(256, UNKNOWN, np.int16)
for _entry in Cityscapes.classes:
    if _entry.id >= 0:  # the licence plate, -1, is never drawn
        _TRAIN_IDS[_entry.id] = _entry.train_id
_IMAGE_SUFFIX = "_leftImg8bit.png"
_MASK_SUFFIX = "_gtFine_labelIds.png"

CITYSCAPES_CLASSES = tuple(entry.name for entry in _SCORED)


class CityscapesDataset(ParsingDataset):
    """Street scenes of Cityscapes (Cordts et al., CVPR 2016), fine annotations, with the 19 classes that are scored.

    `leftImg8bit/SPLIT/CITY/ID_leftImg8bit.png` is a photograph, `gtFine/SPLIT/CITY/ID_gtFine_labelIds.png` its label
    ids 0..33, which become the 19 train ids; all other ids become 255. The masks of the test split hold no scored
    class: its truth is not published. Names, colours and ids are torchvision's table.

    Args:
        root: the folder that holds `leftImg8bit` and `gtFine`.
        split: "train", "val" or "test".

    Raises:
        FileNotFoundError: if one of the folders or a mask is missing, or there are no photographs.
        OSError: if the folders cannot be listed.
        ValueError: if the split has another name.

    Reading a sample raises `OSError` for a damaged file and `ValueError` for a mask of another size than its image,
    of another kind than 8-bit grey or palette, or with an id that Cityscapes does not have; all name the file.

    Example:
        >>> import tempfile, PIL.Image
        >>> scratch = tempfile.TemporaryDirectory()
        >>> root = Path(scratch.name)
        >>> for folder in ("leftImg8bit", "gtFine"):
        ...     (root / folder / "val/ulm").mkdir(parents=True)
        >>> PIL.Image.new("RGB", (16, 12)).save(root / "leftImg8bit/val/ulm/ulm_0_0_leftImg8bit.png")
        >>> PIL.Image.new("L", (16, 12), 26).save(root / "gtFine/val/ulm/ulm_0_0_gtFine_labelIds.png")
        >>> dataset = CityscapesDataset(root, "val")
        >>> image, mask = dataset[0]
        >>> dataset.ids, tuple(image.shape), dataset.class_names[mask[0, 0]]
        (['ulm_0_0'], (3, 12, 16), 'car')
        >>> scratch.cleanup()
    """

    class_names = CITYSCAPES_CLASSES

    def __init__(self, root: str | os.PathLike[str], split: str = "train") -> None:
        self.root = Path(root)
        listing = list_cityscapes(self.root, split)
        self.image_paths = [entry.image for entry in listing.entries]
        self.mask_paths = [entry.masks[0] for entry in listing.entries]
        self.ids = [entry.name for entry in listing.entries]
        missing = [mask for mask in self.mask_paths if not mask.is_file()]
        if missing:
            raise FileNotFoundError(
                f"{missing[0]} is missing ({len(missing)} of the {len(self)} masks of the split {split!r}); "
                f"unpack gtFine_trainvaltest.zip of Cityscapes in {self.root} again"
            )
        colours = [entry.color for entry in _SCORED]
        self.palette = colours + voc_palette()[len(colours) : IGNORE_INDEX] + [(0, 0, 0)]

    def __getitem__(self, index: int) -> tuple[Image, Mask]:
        image = read_image(self.image_paths[index])
        path = self.mask_paths[index]
        label_ids = read_mask(path, (image.shape[1], image.shape[2]), self.image_paths[index])
        mask = _TRAIN_IDS[label_ids]
        unknown = label_ids[mask == UNKNOWN]
        if unknown.size:
            raise ValueError(
                f"{path} holds {unknown.size} px of the label ids {np.unique(unknown).tolist()}, which Cityscapes does "
                "not have (it has 0..33); use the file as it was downloaded"
            )
        return image, Mask(torch.from_numpy(mask.astype(np.uint8)))

    def fingerprint(self) -> str:
        """A hexadecimal hash of every file's name, size and time of change."""
        return fingerprint_of(self.root, [*self.image_paths, *self.mask_paths], "Cityscapes")

    def sizes(self) -> list[tuple[int, int]]:
        """The (height, width) in px of every image, read from the files' headers.

        Raises:
            OSError: if a file is not an image; the message names it.
        """
        return image_sizes(self.image_paths)


def list_cityscapes(root: Path, split: str, refuse: Refuse = raise_error) -> Listing:
    """The photographs in the folders of a split; one whose files lie elsewhere goes to `refuse`.

    Raises:
        FileNotFoundError: if a folder is missing or there are no photographs.
        OSError: if there are files among the cities.
        ValueError: if the split has another name.
    """
    if split not in _SPLITS:
        raise ValueError(f"Cityscapes has no split {split!r}; it has {', '.join(_SPLITS)}")
    for folder, archive in (("leftImg8bit", "leftImg8bit_trainvaltest.zip"), ("gtFine", "gtFine_trainvaltest.zip")):
        if not (root / folder / split).is_dir():
            raise FileNotFoundError(
                f"{root / folder / split} is not a folder; unpack {archive} of Cityscapes in {root}"
            )
    cities = sorted((root / "leftImg8bit" / split).iterdir())
    files = [path for path in cities if not path.is_dir()]
    if files:
        raise OSError(
            f"{root} cannot be read as Cityscapes ({files[0]} is a file); leftImg8bit/{split} must hold one folder for "
            "each city"
        )
    # In the order of their names: the file system's is another on every machine.
    images = [path for city in cities for path in sorted(city.glob(f"*{_IMAGE_SUFFIX}"))]
    if not images:
        raise FileNotFoundError(f"{root / 'leftImg8bit' / split} holds no photograph CITY/ID{_IMAGE_SUFFIX}")

    masks = root / "gtFine" / split
    pairs = []
    for image in images:
        name = image.name.removesuffix(_IMAGE_SUFFIX)
        pairs.append(Entry(name, image, (masks / image.parent.name / f"{name}{_MASK_SUFFIX}",)))
    advice = "Cityscapes has the label ids 0..33; use the file as it was downloaded"
    return Listing(CITYSCAPES_CLASSES, _TRAIN_IDS, entries_inside(pairs, root, refuse), advice)
