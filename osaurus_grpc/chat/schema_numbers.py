"""What schemas say of numbers, written so that the grammar library, which has floats only, reads it right."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal
from typing import Final

from osaurus_grpc.chat.schema_keywords import Schema
from osaurus_grpc.chat.schema_references import Refuse

# The automaton of a multiple has as many states as the number has values.
_MAX_MULTIPLE: Final = 10_000
# All multiples of a schema together.
_MAX_MULTIPLES: Final = 1_000_000
_MAX_COUNT: Final = 2**31 - 1
# The largest float below 2^63.
_LARGEST_INTEGER: Final = 2**63 - 1024
_LARGEST_EXACT: Final = 2**53
# From an excluded whole number to the first one that is admitted.
_LEAST_STEP: Final = 1e-12

# Refuses what is right and not enforced, unless that is to be left out: keyword, path, and why.
Cannot = Callable[[str, str, str], None]


class Numbers:
    """The numbers of one schema.

    Args:
        refuse: Called for what is wrong; raises.
        cannot: Called for what cannot be enforced; raises, or returns where that is left out.
    """

    def __init__(self, refuse: Refuse, cannot: Cannot) -> None:
        self._refuse = refuse
        self._cannot = cannot
        self._shared_multiple = 1
        self._multiples = 0

    def are_exact(self, key: str, values: Iterable[object], path: str) -> bool:
        """Refuse numbers that the library would round; False where they are left out."""
        for value in values:
            if isinstance(value, dict | list):
                inner = value.values() if isinstance(value, dict) else value
                if not self.are_exact(key, inner, path):
                    return False
            elif isinstance(value, int) and abs(value) > _LARGEST_EXACT:
                self._cannot(key, path, f"holds {str(value)[:40]}, which is too large a number to enforce.")
                return False
        return True

    def size(self, key: str, value: object, path: str) -> int:
        """A number of characters, items or properties."""
        # JSON has one kind of number: 3.0 is a whole one, true is none.
        count = (
            int(value) if isinstance(value, int) or (isinstance(value, float) and value.is_integer()) else -1
        )
        if isinstance(value, bool) or not 0 <= count <= _MAX_COUNT:
            self._refuse(key, path, f"must be a whole number from 0 to {_MAX_COUNT}.")
        return count

    def put_bound(self, out: Schema, key: str, value: object, path: str, types: list[str] | None) -> None:
        """Put a bound of numbers of these types there, one that the library reads as it is meant."""
        bound = self._bound(key, value, path)
        if types == ["integer"]:
            out[key] = bound
        else:
            _put_inward(out, key, bound)

    def put_multiple(self, out: Schema, value: object, path: str, alone: bool) -> None:
        """Put a multipleOf there; alone where no other multiple is asked of the same value."""
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            self._refuse("multipleOf", path, "must be a number above 0.")
        coefficient = int("".join(map(str, Decimal(str(value)).normalize().as_tuple().digits)))
        exponent = int(Decimal(str(value)).normalize().as_tuple().exponent)
        coefficient *= 10 ** min(max(exponent, 0), 9)
        if not alone:
            # Several that meet make their least common multiple.
            self._shared_multiple = math.lcm(self._shared_multiple, coefficient)
        if max(coefficient, self._shared_multiple) > _MAX_MULTIPLE or exponent < -9:
            self._cannot(
                "multipleOf", path, f"cannot be enforced; up to {_MAX_MULTIPLE} can, and nine decimals."
            )
            return
        self._multiples += coefficient
        if self._multiples > _MAX_MULTIPLES:
            self._cannot("multipleOf", path, "cannot be enforced: there are too many multiples.")
            return
        out["multipleOf"] = value

    def _bound(self, key: str, value: object, path: str) -> int | float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            self._refuse(key, path, "must be a number.")
        if isinstance(value, float) or abs(value) <= _LARGEST_EXACT:
            return value
        try:
            rounded = float(value)
        except OverflowError:
            self._refuse(key, path, "is too large a number to enforce.")
        if key.lower().endswith("minimum"):
            return int(rounded if rounded >= value else math.nextafter(rounded, math.inf))
        return int(rounded if rounded <= value else math.nextafter(rounded, -math.inf))


def bound_integers(out: Schema, types: Sequence[str]) -> None:
    """Keep unbounded integers within 64 bits."""
    if "integer" not in types or "number" in types:
        return
    if "minimum" not in out and "exclusiveMinimum" not in out:
        out["minimum"] = -_LARGEST_INTEGER
    if "maximum" not in out and "exclusiveMaximum" not in out:
        out["maximum"] = _LARGEST_INTEGER


def _put_inward(out: Schema, key: str, bound: float) -> None:
    """Put a bound of numbers there; an excluded one is moved inward, and then included.

    The library admits a whole one all the same where the other bound has the same whole part (0 to 0.5),
    and next to any it admits digits that make no other float.
    """
    if key.startswith("exclusive") and abs(bound) < _LARGEST_EXACT:
        # The library reads the last digits of a float inexactly.
        step = max(_LEAST_STEP if int(bound) == bound else 0.0, 8 * math.ulp(bound))
        key, bound = ("minimum", bound + step) if key == "exclusiveMinimum" else ("maximum", bound - step)
    narrower = max if key.lower().endswith("minimum") else min
    out[key] = narrower(out.get(key, bound), bound)
