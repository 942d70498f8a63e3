"""An image file as pixels, within limits that hold before anything is decoded."""

from __future__ import annotations

import contextlib
import io
from typing import TYPE_CHECKING, Final

from osaurus_grpc.errors import InvalidRequestError

if TYPE_CHECKING:  # Pillow comes with the extra "vision"
    from PIL import Image

MAX_PIXELS: Final = 64_000_000
# What model cards name and clients send. Others have decoders that are less looked after.
_FORMATS: Final = ("PNG", "JPEG", "WEBP", "GIF")


def decode(data: bytes, *, field: str) -> Image.Image:
    """The first frame of an image file, upright, in RGB; what is transparent lies on white.

    CPU-bound; takes up to 4 bytes a pixel.

    Args:
        data: A PNG, JPEG, WebP or GIF file. What it says it is does not count.
        field: Where it is in the request.

    Raises:
        InvalidRequestError: It is none of these, damaged, or has more than MAX_PIXELS pixels.
    """
    from PIL import Image, ImageOps

    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(field) from error  # the warning is one where warnings are errors
    except Exception as error:  # Pillow's readers raise anything on damaged files
        raise InvalidRequestError(
            "The image is no PNG, JPEG, WebP or GIF file that can be read.", field=field
        ) from error
    with image:
        if image.width * image.height > MAX_PIXELS:
            raise _too_large(field)
        try:
            image.load()
        except Exception as error:  # as above
            raise InvalidRequestError("The image file is damaged.", field=field) from error
        with contextlib.suppress(Exception):  # what cameras note beside the pixels may be damaged alone
            ImageOps.exif_transpose(image, in_place=True)
        return _opaque(image)


def _too_large(field: str) -> InvalidRequestError:
    return InvalidRequestError(f"The image has more than {MAX_PIXELS} pixels.", field=field)


def _opaque(image: Image.Image) -> Image.Image:
    """In RGB, on white where it is transparent."""
    from PIL import Image

    if not image.has_transparency_data:
        return image.convert("RGB")
    layered = image.convert("RGBA")
    ground = Image.new("RGB", layered.size, "white")
    ground.paste(layered, mask=layered.getchannel("A"))
    return ground
