"""Sizes and numbers of things as text, for messages and tables."""

from collections.abc import Iterable


def format_size(size: Iterable[float], digits: int = 4) -> str:
    """Return a size such as (height, width) as "HEIGHTxWIDTH"; floats are rounded to `digits` significant digits.

    Example:
        >>> format_size((480, 640)), format_size((15.0, 7.25), digits=2)
        ('480x640', '15x7.2')
    """
    return "x".join(f"{value:.{digits}g}" if isinstance(value, float) else str(value) for value in size)


def format_pair(pair: Iterable[float], digits: int = 4) -> str:
    """Return (height, width) as `format_size` does, or as one number if both are the same text.

    Example:
        >>> format_pair((12.0, 12.0)), format_pair((12.0, 6.0))
        ('12', '12x6')
    """
    height, width = (format_size([value], digits) for value in pair)
    return height if height == width else f"{height}x{width}"


def counted(number: int, noun: str) -> str:
    """Return a number of things in words.

    Example:
        >>> counted(1, "image"), counted(2, "image"), counted(0, "class")
        ('1 image', '2 images', '0 classes')
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}{'es' if noun.endswith('s') else 's'}"
