"""Bytes as they are, to a server and back."""

from __future__ import annotations

import asyncio


async def exchange(url: str, *parts: bytes) -> bytes:
    """Raw bytes to the server, and all that comes back until it closes."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
        async with asyncio.timeout(60):
            return await reader.read()
    finally:
        writer.close()
