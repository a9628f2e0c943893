"""A plain folder of images and masks, the layout to bring one's own data in."""

import os
from pathlib import Path

import torch
from torchvision.tv_tensors import Image, Mask

from rfield.data.dataset import ParsingDataset, voc_palette
from rfield.data.files import (
    check_labels,
    fingerprint_of,
    image_sizes,
    palette_of,
    read_class_names,
    read_image,
    read_mask,
)

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
        if not self.root.is_dir():
            raise FileNotFoundError(f"{self.root} is not a folder; name the one that holds classes.txt and train")
        classes = self.root / "classes.txt"
        if not classes.is_file():
            raise FileNotFoundError(f"{classes} is missing; it must name the classes, one a line, from mask value 0 on")
        self.class_names = read_class_names(classes, ())
        pairs = _find_pairs(self.root, split)
        self.ids = list(pairs)
        self.image_paths = [image for image, _ in pairs.values()]
        self.mask_paths = [mask for _, mask in pairs.values()]
        own = palette_of(self.mask_paths[0])
        self.palette = own + voc_palette()[len(own) :]

    def __getitem__(self, index: int) -> tuple[Image, Mask]:
        image = read_image(self.image_paths[index])
        path = self.mask_paths[index]
        mask = read_mask(path, (image.shape[1], image.shape[2]))
        advice = f"correct the mask or name all classes, one a line, in {self.root / 'classes.txt'}"
        check_labels(mask, self.num_classes, path, advice)
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


def _find_pairs(root: Path, split: str) -> dict[str, tuple[Path, Path]]:
    splits = sorted(path.parent.name for path in root.glob("*/images"))
    if split not in splits:
        raise FileNotFoundError(
            f"there is no folder {split}/images in {root}; there are the splits: {', '.join(splits) or 'none'}"
        )
    folder = root / split
    images: dict[str, Path] = {}
    for path in sorted((folder / "images").iterdir()):
        if path.suffix.lower() not in _IMAGE_SUFFIXES:
            continue
        if path.stem in images:
            raise ValueError(f"{images[path.stem]} and {path} would have one mask; rename or remove one of them")
        images[path.stem] = path
    masks = {path.stem: path for path in (folder / "masks").glob("*.png")}
    without_mask = [path for name, path in images.items() if name not in masks]
    if without_mask:
        raise FileNotFoundError(
            f"{folder / 'masks' / without_mask[0].stem}.png is missing, the mask of {without_mask[0]} "
            f"({len(without_mask)} of {len(images)} images have none); add the mask or remove the image"
        )
    without_image = sorted(path for name, path in masks.items() if name not in images)
    if without_image:
        raise FileNotFoundError(
            f"{without_image[0]} is the mask of no image in {folder / 'images'} ({len(without_image)} of {len(masks)} "
            f"masks have none of {', '.join(_IMAGE_SUFFIXES)}); add the image or remove the mask"
        )
    if not images:
        raise ValueError(f"{folder / 'images'} holds no image ({', '.join(_IMAGE_SUFFIXES)})")
    return {name: (path, masks[name]) for name, path in images.items()}
