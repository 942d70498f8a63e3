"""Which files of a repository or folder a model needs."""

from __future__ import annotations

import re

from osaurus_grpc.models.inspection import POOLING_FILE, is_pickle, is_weights

_NEEDED = re.compile(
    r"""config.*\.json | generation_config\.json | model\.safetensors\.index\.json
    | .*token.*\.json | special_tokens_map\.json | vocab\.json | tekken\.json | chat_template.*\.json
    | (video_)?(pre)?processor_config\.json | .*\.jinja
    | vocab\.txt | merges\.txt | .*\.tiktoken | (tokenizer|spiece|tiktoken|sentencepiece\.bpe)\.model
    | (LICEN[CS]E|NOTICE|USE_POLICY).*""",
    re.VERBOSE,
)


def is_needed(name: str) -> bool:
    """Whether a file is one to bring in: weights as safetensors, configuration, tokenizer, template, licence.

    Never code, never a format that can run code when it is opened, nothing in subfolders.
    """
    if name == POOLING_FILE:
        return True  # how an embedding model makes its vectors; the one exception
    if re.search(r"[/\\\0]", name) or name.endswith(".py") or is_pickle(name):
        return False
    return is_weights(name) or bool(_NEEDED.fullmatch(name))
