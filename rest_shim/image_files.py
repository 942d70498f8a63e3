"""What kind of image a file is, by its first bytes; what anybody says it is does not count."""

from __future__ import annotations

from typing import Final

UNKNOWN_TYPE: Final = "application/octet-stream"
# The kinds that the core reads.
_SIGNATURES: Final = (
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF87a", "image/gif"),
    (b"GIF89a", "image/gif"),
)


def media_type(data: bytes) -> str:
    """The media type of an image file, or UNKNOWN_TYPE."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    return next((kind for signature, kind in _SIGNATURES if data.startswith(signature)), UNKNOWN_TYPE)
