"""Say which layout a folder has, and the command to go on with."""

from collections.abc import Callable
from pathlib import Path

from rfield.segmentation.data.files import read_lines
from rfield.segmentation.data.folder import splits_of
from rfield.segmentation.data.images import image_files
from rfield.segmentation.data.labelme import find_labelme
from rfield.segmentation.data.pairing import find_pairs
from rfield.segmentation.data.paths import subfolders
from rfield.text import counted


def looks_like(root: Path) -> str:
    """Return what a folder looks like and the command to run, in a sentence; what else it holds if it is none."""
    for layout, fits in _LAYOUTS.items():
        if fits(root):
            return f"{root} looks like {layout}: run `rfield check-data {layout}:{root}`"
    for source, holds in {"celebamask": "CelebA-HQ-img", "lapa": "train/landmarks"}.items():
        if (root / holds).is_dir():
            return f"{root} looks like {source}: run `rfield convert {source} {root} NEW_FOLDER`"
    inner = [path for path in subfolders(root) if any(fits(path) for fits in _LAYOUTS.values())]
    if len(inner) == 1:
        return looks_like(inner[0])
    try:
        labelme = find_labelme(root)
        count = len(labelme or find_pairs(root))
    except (ValueError, OSError) as error:
        return f"{root} has none of the layouts that are read, and cannot be converted: {error}"
    what = "LabelMe files" if labelme else "masks"
    return f"{root} looks like {counted(count, 'image')} with {what}: run `rfield convert masks {root} NEW_FOLDER`"


def _is_camvid(root: Path) -> bool:
    try:
        lines = read_lines(root / "train.txt")[:1]
    except (OSError, ValueError):
        return False
    return any(len(line.split()) == 2 for line in lines)


def _is_folder(root: Path) -> bool:
    found = splits_of(root)
    return (root / "classes.txt").is_file() and any(image_files(images) for images, _ in found.values())


_LAYOUTS: dict[str, Callable[[Path], bool]] = {
    "voc": lambda root: (root / "ImageSets/Segmentation").is_dir(),
    "cityscapes": lambda root: (root / "leftImg8bit").is_dir(),
    "helen": lambda root: (root / "exemplars.txt").is_file(),
    "camvid": _is_camvid,
    "ade20k": lambda root: (root / "annotations/training").is_dir(),
    "pets": lambda root: (root / "annotations/trimaps").is_dir(),
    "folder": _is_folder,
    "coco": lambda root: (
        any((root / split / "_annotations.coco.json").is_file() for split in ("train", "valid"))
        or any((root / "annotations").glob("*.json"))
    ),
}
