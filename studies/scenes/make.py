"""Make the data set of scenes that the package ships, from images of three textures.

    pip install scikit-image
    python studies/scenes/make.py FOLDER

The textures brick, grass and gravel are those that scikit-image's wheel ships. All three are CC0; so is the data set.
Each scene is a mosaic of brick and grass, with a disc of gravel in each tile. A pixel of gravel is labelled by what
lies around the disc. A small field sees gravel alone, a large one sees other tiles: the best field lies between.
"""

import sys
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageDraw
import skimage

CLASSES = ("brick", "grass", "gravel in brick", "gravel in grass")
# Distinct for the colour-blind (Okabe and Ito, 2008).
COLOURS = ((213, 94, 0), (0, 158, 115), (240, 228, 66), (0, 114, 178))
SIZE, TILE = 160, 96  # px
RADII = (29, 35)
COUNTS = {"train": 48, "val": 12}
TINTS = {"brick": (1.15, 0.72, 0.6), "grass": (0.75, 1.05, 0.5), "gravel": (1.0, 0.97, 0.9)}


def texture(name: str) -> np.ndarray:
    """The middle of a texture at half its size, float [256, 256, 3]."""
    path = Path(skimage.__file__).parent / "data" / f"{name}.png"
    grey = PIL.Image.open(path).convert("L").resize((256, 256), PIL.Image.Resampling.LANCZOS)
    return np.asarray(grey, np.float64)[..., None] * np.array(TINTS[name])


def scene(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """An image uint8 [160, 160, 3] and its mask uint8 [224, 224]."""
    around = np.zeros((SIZE, SIZE), np.uint8)
    disc = PIL.Image.new("1", (SIZE, SIZE))
    draw = PIL.ImageDraw.Draw(disc)
    shift = random.integers(-TILE // 2, TILE // 2, 2)
    for row in range(-1, SIZE // TILE + 2):
        for column in range(-1, SIZE // TILE + 2):
            top, left = np.array([row, column]) * TILE + shift
            around[max(top, 0) : max(top + TILE, 0), max(left, 0) : max(left + TILE, 0)] = random.integers(2)
            y, x = np.array([top, left]) + TILE / 2 + random.integers(-5, 6, 2)
            radius = random.integers(*RADII, endpoint=True)
            draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=1)
    gravel = np.asarray(disc)
    layers = [np.roll(texture(name), random.integers(0, 256, 2), (0, 1))[:SIZE, :SIZE] for name in TINTS]
    image = np.select([gravel[..., None], around[..., None] == 0], [layers[2], layers[0]], layers[1])
    image = image * random.uniform(0.8, 1.15)
    return image.clip(0, 255).astype(np.uint8), around + 2 * gravel.astype(np.uint8)


def main(folder: Path) -> None:
    """Write the data set in the layout `folder`."""
    random = np.random.default_rng(0)
    for split, count in COUNTS.items():
        for kind in ("images", "masks"):
            (folder / split / kind).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            image, values = scene(random)
            PIL.Image.fromarray(image).save(
                folder / split / f"images/{split}_{index:02d}.jpg", quality=75, optimize=True
            )
            mask = PIL.Image.fromarray(values)
            mask.putpalette([level for colour in COLOURS for level in colour])
            mask.save(folder / split / f"masks/{split}_{index:02d}.png", optimize=True)
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
