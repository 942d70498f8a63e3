"""KV caches of prompts and answers, kept for requests that begin with the same tokens.

Token sequences are cut into blocks. A block is named by a hash over its tokens and its
predecessor's name, so equal beginnings share their blocks whatever request they came from, and a
name stands for everything before it (the scheme of vLLM's automatic prefix caching, arXiv:2309.06180
and its block hashes). A block owns its keys and values; nothing refers to a batch's tensors.

Only models whose layers all keep a plain KV cache take part: their cache of n tokens holds the
caches of all shorter beginnings. Rotating and recurrent caches cannot be cut back.
"""

from __future__ import annotations

from osaurus_grpc.models.platform import mx  # isort: skip  # first: it loads the BLAS before MLX

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_lm.models.cache import BatchKVCache, KVCache

BLOCK_TOKENS = 16


class FoundCache(KVCache):  # type: ignore[misc]  # mlx-lm ships no types
    """One layer's cache of a beginning that was found, with room for the tokens that follow.

    Alone in a prompt batch, it becomes the batch's cache as it is: mlx-lm copies a cache to merge it
    and again to lengthen it, and on a long conversation those copies are what a turn costs.
    """

    @classmethod
    def merge(cls, caches: Sequence[KVCache]) -> BatchKVCache:
        """The batch cache of these rows."""
        if len(caches) > 1:
            return BatchKVCache.merge(caches)
        (only,) = caches
        merged = BatchKVCache([0])
        merged.state = only.keys, only.values, mx.array([only.offset]), merged.left_padding, only.offset
        return merged


@dataclass(frozen=True, slots=True)
class Prefix:
    """A reused beginning of a prompt.

    Attributes:
        length: Its tokens.
        caches: One a layer, for a batch to take over.
    """

    length: int
    caches: list[FoundCache]


@dataclass(frozen=True, slots=True)
class _Block:
    """Keys and values of BLOCK_TOKENS tokens: shape (2 * layers, kv_heads, BLOCK_TOKENS, head_dim)."""

    state: mx.array

    @property
    def nbytes(self) -> int:
        return int(self.state.nbytes)


class PromptCache:
    """A bounded store of one model's blocks, least recently used first out.

    Lives on the MLX thread.

    Args:
        max_bytes: Of keys and values; 0 turns the store off.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        # A block is always touched after its successors, so the oldest one has none: dropping it
        # never leaves a block that cannot be reached.
        self._blocks: OrderedDict[bytes, _Block] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values held."""
        return self._bytes

    @staticmethod
    def supports(caches: Sequence[Any]) -> bool:
        """Whether a model with these caches, one a layer, takes part."""
        return bool(caches) and all(type(cache) is KVCache for cache in caches)

    def match_length(self, tokens: Sequence[int]) -> int:
        """Tokens at the beginning of a prompt that lookup() would find."""
        return len(self._known(tokens)) * BLOCK_TOKENS

    def lookup(self, tokens: Sequence[int]) -> Prefix | None:
        """The longest known beginning of a prompt, its last token left out: that one is always computed.

        The caches have room for the rest of the prompt and the first tokens of an answer.
        """
        names = self._known(tokens)
        if not names:
            return None
        for name in reversed(names):
            self._blocks.move_to_end(name)
        length = len(names) * BLOCK_TOKENS
        states = [self._blocks[name].state for name in names]
        planes, heads, _, dim = states[0].shape
        step = FoundCache.step
        room = -(-(len(tokens) + 1) // step) * step - length
        states.append(mx.zeros((planes, heads, room, dim), dtype=states[0].dtype))
        # One array a layer, so that each can be written to in place.
        arrays = [mx.contiguous(plane) for plane in mx.split(mx.concatenate(states, axis=2), planes)]
        caches = []
        for keys, values in zip(arrays[: planes // 2], arrays[planes // 2 :], strict=True):
            cache = FoundCache()
            cache.state = keys, values, length
            caches.append(cache)
        return Prefix(length, caches)

    def is_missing(self, tokens: Sequence[int]) -> bool:
        """Whether store() would add anything."""
        names = list(_names(tokens))
        return bool(self._max_bytes and names and names[-1] not in self._blocks)

    def store(self, tokens: Sequence[int], extract: Callable[[int, int], list[mx.array]]) -> None:
        """Keep what is new of a sequence's cache.

        Args:
            tokens: The tokens whose keys and values are in the cache, in order.
            extract: Gives the keys of all layers and then their values for the tokens from the first
                argument up to the second, each of shape (kv_heads, tokens, head_dim).
        """
        names = list(_names(tokens))
        known = 0
        while known < len(names) and names[known] in self._blocks:
            known += 1
        start, end = known * BLOCK_TOKENS, len(names) * BLOCK_TOKENS
        if start < end:
            states = extract(start, end)
            # Copies: a slice would keep the whole tensor, and with it the batch it came from.
            added = [mx.contiguous(part) for part in mx.split(mx.stack(states), len(names) - known, axis=2)]
            mx.eval(added)
            for name, state in zip(names[known:], added, strict=True):
                self._blocks[name] = _Block(state)
                self._bytes += self._blocks[name].nbytes
        for name in reversed(names):
            self._blocks.move_to_end(name)
        self._evict(self._max_bytes)

    def shrink(self, max_bytes: int) -> None:
        """Drop the least recently used blocks until no more than so many bytes are held."""
        self._evict(max_bytes)

    def clear(self) -> None:
        """Drop everything."""
        self._blocks.clear()
        self._bytes = 0

    def _known(self, tokens: Sequence[int]) -> list[bytes]:
        known = []
        for name in _names(tokens[:-1]):
            if name not in self._blocks:
                break
            known.append(name)
        return known

    def _evict(self, max_bytes: int) -> None:
        while self._bytes > max_bytes:
            _, block = self._blocks.popitem(last=False)
            self._bytes -= block.nbytes


def _names(tokens: Sequence[int]) -> Iterator[bytes]:
    """Names of a sequence's whole blocks, in order."""
    name = b""
    for start in range(0, len(tokens) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        block = array("i", tokens[start : start + BLOCK_TOKENS]).tobytes()
        name = hashlib.blake2b(name + block, digest_size=16).digest()
        yield name
