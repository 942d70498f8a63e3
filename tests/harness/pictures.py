"""Images for tests, made from numbers."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # Pillow comes with the extra "vision"
    from PIL import Image


def picture(seed: int = 0, width: int = 64, height: int = 48) -> Image.Image:
    """Coloured squares of 8 × 8 pixels."""
    from PIL import Image

    random = np.random.default_rng(seed)
    squares = random.integers(0, 256, (-(-height // 8), -(-width // 8), 3), dtype=np.uint8)
    pixels = squares.repeat(8, axis=0).repeat(8, axis=1)[:height, :width]
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """The bytes of a file of a kind that Pillow knows."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(seed: int = 0, width: int = 64, height: int = 48) -> bytes:
    """A PNG file of picture()."""
    return encoded(picture(seed, width, height))


def data_url(data: bytes, kind: str = "image/png") -> str:
    """A file as a data: URL."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
