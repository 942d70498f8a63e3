"""A constraint's place in the batch: it is kept in step with its row, and its errors are the row's own."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from osaurus_grpc.engine.types import Constraint
from osaurus_grpc.errors import EngineError, OsaurusError

logger = logging.getLogger(__name__)


class Guard:
    """Leads one row's constraint. Lives on the MLX thread; nothing here raises.

    Args:
        constraint: The request's; left as it is, a fork is used.
        generated: Tokens generated before the batch was rebuilt, to be replayed; empty at first.

    Attributes:
        failure: Set once the constraint has failed: the row must end with this error.
    """

    def __init__(self, constraint: Constraint, generated: Sequence[int]) -> None:
        self.failure: OsaurusError | None = None
        self._constraint = constraint
        try:
            self._constraint = constraint.fork()
            for token_id in generated:
                self._constraint.accept(token_id)
        except Exception as error:  # noqa: BLE001  (the row's own failure, whatever it is)
            self._fail(error)

    @property
    def is_done(self) -> bool:
        """The row must end here, though not with an end-of-sequence token."""
        return self.failure is None and self._constraint.is_done

    def feed(self, token_id: int) -> None:
        """Take a token that was generated."""
        if self.failure is None:
            try:
                self._constraint.accept(token_id)
            except Exception as error:  # noqa: BLE001  (the row's own failure, whatever it is)
                self._fail(error)

    def mask(self) -> npt.NDArray[np.uint32] | None:
        """Tokens that may come next, as Constraint.mask(); None after a failure, or where none may."""
        if self.failure is not None or self._constraint.is_done:
            return None
        try:
            return self._constraint.mask()
        except Exception as error:  # noqa: BLE001  (the row's own failure, whatever it is)
            self._fail(error)
            return None

    def _fail(self, error: Exception) -> None:
        if isinstance(error, OsaurusError):
            self.failure = error
        else:
            logger.error("event=constraint_failed", exc_info=error)
            self.failure = EngineError()
