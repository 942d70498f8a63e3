"""Osaurus: a local LLM server. This package is its gRPC core."""

__version__ = "0.1.0"
