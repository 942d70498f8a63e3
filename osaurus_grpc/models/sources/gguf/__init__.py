"""Converts GGUF files into MLX model folders."""

from osaurus_grpc.models.sources.gguf.convert import ConvertProgress, convert

__all__ = ["ConvertProgress", "convert"]
