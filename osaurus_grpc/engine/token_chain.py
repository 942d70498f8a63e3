"""Names for the beginnings of a token sequence, by which requests that begin alike are found.

A sequence is cut into blocks. A block is named by a hash over its tokens and its predecessor's name,
so a name stands for everything before it too, and two sequences have a name in common exactly where
they are equal up to there (the scheme of vLLM's automatic prefix caching, arXiv:2309.06180, and its
block hashes).
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

BLOCK_TOKENS = 16
_NAME_BYTES = 16


class Chain:
    """The names of a sequence's whole blocks, in order; it grows with the sequence.

    Args:
        tokens: The sequence so far.
    """

    __slots__ = ("names",)

    def __init__(self, tokens: Sequence[int] = ()) -> None:
        self.names: list[bytes] = []
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Name the blocks that have become whole.

        Args:
            tokens: The whole sequence, whose beginning is named already.
        """
        names = self.names
        name = names[-1] if names else b""
        for start in range(len(names) * BLOCK_TOKENS, len(tokens) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
            block = array("i", tokens[start : start + BLOCK_TOKENS]).tobytes()
            name = hashlib.blake2b(name + block, digest_size=_NAME_BYTES).digest()
            names.append(name)

    def copy(self) -> Chain:
        """A chain of the same names that grows by itself."""
        chain = Chain()
        chain.names = list(self.names)
        return chain

    def common_blocks(self, other: Chain) -> int:
        """How many blocks the two begin with in common, by bisection."""
        low, high = 0, min(len(self.names), len(other.names))
        while low < high:
            middle = (low + high + 1) // 2
            if self.names[middle - 1] == other.names[middle - 1]:
                low = middle
            else:
                high = middle - 1
        return low
