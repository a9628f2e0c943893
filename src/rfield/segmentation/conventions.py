"""Conventions that several packages share: the value of unlabelled pixels, image normalisation, progress callbacks."""

from collections.abc import Callable

IGNORE_INDEX = 255
"""Mask value of pixels without a label."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Mean of the red, green and blue channels of images from 0 to 1, by which every image is normalised."""

IMAGENET_STD = (0.229, 0.224, 0.225)
"""Standard deviation of these channels."""

Progress = Callable[[int, int], None]
"""Called as `progress(done, total)`."""
