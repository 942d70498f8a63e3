"""References inside a client's schema, and the definitions that they become in the one made of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple, Never
from urllib.parse import unquote

Schema = dict[str, Any]
# Refuses the schema: keyword, path, and why.
Refuse = Callable[[str, str, str], Never]

_DEFINITIONS: Final = "#/$defs/"


class Use(NamedTuple):
    """What was referred to, and how: one schema may be needed in several forms.

    Attributes:
        pointer: Where it stands, as a JSON pointer (RFC 6901) behind "#".
        alone: Whether it may be narrowed.
        property: A property that its objects must have; None where none is asked for.
    """

    pointer: str
    alone: bool
    property: str | None = None


class References:
    """What a schema's references point to, and the names that these places have in the new one.

    Args:
        root: The client's schema.
        refuse: Called for a reference that cannot be followed; raises.
    """

    def __init__(self, root: Schema, refuse: Refuse) -> None:
        self._root = root
        self._refuse = refuse
        # In the order of their discovery.
        self._names: dict[Use, str] = {}
        self._pending: list[Use] = []
        # Pointers that are known to lead to something else than a reference.
        self._ending: set[str] = set()
        # Where the references at pointers end.
        self._ends: dict[str, str] = {}

    def pointer(self, reference: object, path: str) -> str:
        """A reference, that stands at a path, as a pointer into the schema; its place exists."""
        if not isinstance(reference, str):
            self._refuse("$ref", path, "must be a string.")
        pointer = self._own(reference)
        if pointer is None:
            self._refuse("$ref", path, 'must point into the same schema, as in "#/$defs/name".')
        self._require_end(pointer, path)
        return pointer

    def end(
        self, node: object, is_reference: Callable[[Schema], bool], path: str
    ) -> tuple[str | None, object]:
        """What a schema refers to in the end, and where that stands.

        Args:
            node: The schema.
            is_reference: Whether one says nothing but what it refers to; others are an end.
            path: Where its reference stands.

        Returns:
            The pointer, None where it refers to nothing, and the schema at the end.
        """
        pointer = None
        followed: list[str] = []
        while isinstance(node, dict) and is_reference(node):
            pointer = self.pointer(node["$ref"], path)
            followed.append(pointer)
            # As for the circles: what was followed once is not followed again.
            pointer = self._ends.get(pointer, pointer)
            node = self.resolve(pointer, path)
        if pointer is not None:
            self._ends |= dict.fromkeys(followed, pointer)
        return pointer, node

    def resolve(self, pointer: str, path: str = "") -> object:
        """What stands at a pointer; the path is that of the reference."""
        node: object = self._root
        for part in pointer.split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            if isinstance(node, dict) and name in node:
                node = node[name]
            elif isinstance(node, list) and name.isdecimal() and int(name[:9]) < len(node):
                node = node[int(name[:9])]
            else:
                self._refuse("$ref", path, "points to nothing.")
        return node

    def use(self, use: Use) -> str:
        """A reference to a definition of the new schema."""
        if use not in self._names:
            self._names[use] = f"d{len(self._names)}"
            self._pending.append(use)
        return f"{_DEFINITIONS}{self._names[use]}"

    def pending(self) -> Iterator[tuple[str, Use]]:
        """The names of definitions that are still to be made; making one may add others."""
        while self._pending:
            use = self._pending.pop()
            yield self._names[use], use

    def _own(self, reference: str) -> str | None:
        """A reference as a pointer into this schema, where it is one."""
        base = self._root.get("$id")
        if isinstance(base, str) and base.strip("#"):
            reference = reference.removeprefix(base)
        pointer = unquote(reference) or "#"
        return pointer if pointer == "#" or pointer.startswith("#/") else None

    def _require_end(self, pointer: str, path: str) -> None:
        """Refuse references that go in a circle without saying anything."""
        seen: set[str] = set()
        following: str | None = pointer
        # What was followed to its end once is not followed again: chains would take their length's square.
        while following is not None and following not in self._ending:
            if following in seen:
                self._refuse("$ref", path, "refers to itself.")
            seen.add(following)
            node = self.resolve(following, path)
            reference = node.get("$ref") if isinstance(node, dict) else None
            following = self._own(reference) if isinstance(reference, str) else None
        self._ending |= seen


def definition(reference: str) -> str:
    """The name of the definition that a reference of a new schema points to."""
    return reference.removeprefix(_DEFINITIONS)
