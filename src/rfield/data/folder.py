"""A plain folder of images and masks, the layout to bring one's own data in."""

import os
from pathlib import Path

import torch
from torchvision.tv_tensors import Image, Mask

from rfield.data.dataset import ParsingDataset, voc_palette
from rfield.data.files import check_labels, fingerprint_of, read_class_names, read_mask
from rfield.data.images import image_sizes, palette_of, read_image
from rfield.data.listing import Entry, Listing, Refuse, entries_inside, plain_labels, raise_error

_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


class FolderDataset(ParsingDataset):
    """Pairs of `SPLIT/images/NAME.jpg` (or .jpeg, .png) and `SPLIT/masks/NAME.png`.

    A mask is a palette image or 8-bit grey; its values are the lines of `classes.txt`, counted from 0, and 255 where
    there is no label. A palette in the first mask gives the colours. Files of other kinds in `images` are left out.

    Args:
        root: the folder that holds `classes.txt` (one class a line) and the splits.
        split: a folder in it: "train", "val", "test" or another.

    Raises:
        FileNotFoundError: if the root, `classes.txt`, the split, the image of a mask or the mask of an image is
            missing.
        ValueError: if `classes.txt` is empty or names a class twice, the split is empty, or two images have one name.

    Reading a sample raises `OSError` for a damaged file and `ValueError` for a mask of another size than its image,
    of another kind than palette or 8-bit grey, or with a value that is neither a class nor 255; both name the file.

    Example:
        >>> import tempfile, PIL.Image
        >>> scratch = tempfile.TemporaryDirectory()
        >>> root = Path(scratch.name)
        >>> for folder in ("images", "masks"):
        ...     (root / "train" / folder).mkdir(parents=True)
        >>> PIL.Image.new("RGB", (16, 12)).save(root / "train/images/one.jpg")
        >>> PIL.Image.new("L", (16, 12), 1).save(root / "train/masks/one.png")
        >>> _ = (root / "classes.txt").write_text("road\\ncar")
        >>> dataset = FolderDataset(root, "train")
        >>> image, mask = dataset[0]
        >>> tuple(image.shape), dataset.class_names[mask[0, 0]]
        ((3, 12, 16), 'car')
        >>> scratch.cleanup()
    """

    def __init__(self, root: str | os.PathLike[str], split: str = "train") -> None:
        self.root = Path(root)
        listing = list_folder(self.root, split)
        self.class_names, self.advice = listing.class_names, listing.advice
        self.ids = [entry.name for entry in listing.entries]
        self.image_paths = [entry.image for entry in listing.entries]
        self.mask_paths = [entry.masks[0] for entry in listing.entries]
        own = palette_of(self.mask_paths)
        self.palette = own + voc_palette()[len(own) :]

    def __getitem__(self, index: int) -> tuple[Image, Mask]:
        image = read_image(self.image_paths[index])
        path = self.mask_paths[index]
        mask = read_mask(path, (image.shape[1], image.shape[2]), self.image_paths[index])
        check_labels(mask, self.num_classes, path, self.advice)
        return image, Mask(torch.from_numpy(mask))

    def fingerprint(self) -> str:
        """A hexadecimal hash of the class names, and every file's name, size and time of change."""
        return fingerprint_of(self.root, [*self.image_paths, *self.mask_paths], "folder", self.class_names)

    def sizes(self) -> list[tuple[int, int]]:
        """The (height, width) in px of every image, read from the files' headers.

        Raises:
            OSError: if a file is not an image; the message names it.
        """
        return image_sizes(self.image_paths)


def list_folder(root: Path, split: str, refuse: Refuse = raise_error) -> Listing:
    """The photographs in the folders of a split; one without a mask and what else does not fit goes to `refuse`.

    Raises:
        FileNotFoundError: if the root, `classes.txt` or the split is missing.
        ValueError: if `classes.txt` does not fit, or there is no photograph.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder; name the one that holds classes.txt and train")
    classes = root / "classes.txt"
    if not classes.is_file():
        raise FileNotFoundError(f"{classes} is missing; it must name the classes, one a line, from mask value 0 on")
    class_names = read_class_names(classes, ())
    splits = sorted(path.parent.name for path in root.glob("*/images"))
    if split not in splits:
        raise FileNotFoundError(
            f"there is no folder {split}/images in {root}; there are the splits: {', '.join(splits) or 'none'}"
        )
    images, masks = root / split / "images", root / split / "masks"
    photographs: dict[str, Path] = {}
    for path in sorted(path for path in images.iterdir() if path.suffix.lower() in _IMAGE_SUFFIXES):
        other = photographs.setdefault(path.stem, path)
        if other != path:
            refuse(path, ValueError(f"{other} and {path} would have one mask; rename or remove one of them"))
    own = {path.stem: path for path in masks.glob("*.png")}
    _refuse_single(photographs, own, images, masks, refuse)
    if not photographs:
        raise ValueError(f"{images} holds no image ({', '.join(_IMAGE_SUFFIXES)})")

    pairs = [Entry(name, image, (own[name],)) for name, image in photographs.items() if name in own]
    advice = f"correct the mask or name all classes, one a line, in {classes}"
    return Listing(class_names, plain_labels(len(class_names)), entries_inside(pairs, root, refuse), advice)


def _refuse_single(
    photographs: dict[str, Path], own: dict[str, Path], images: Path, masks: Path, refuse: Refuse
) -> None:
    """Photographs without a mask and masks without a photograph."""
    without_mask = [path for name, path in photographs.items() if name not in own]
    for path in without_mask:
        error = FileNotFoundError(
            f"{masks / path.stem}.png is missing, the mask of {path} "
            f"({len(without_mask)} of {len(photographs)} images have none); add the mask or remove the image"
        )
        refuse(masks / f"{path.stem}.png", error)
    without_image = sorted(path for name, path in own.items() if name not in photographs)
    for path in without_image:
        error = FileNotFoundError(
            f"{path} is the mask of no image in {images} ({len(without_image)} of {len(own)} "
            f"masks have none of {', '.join(_IMAGE_SUFFIXES)}); add the image or remove the mask"
        )
        refuse(path, error)
