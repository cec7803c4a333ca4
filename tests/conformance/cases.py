"""A case of another project: what it runs on a server, and what it compares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from poolrpc import PoolClient

    Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class Case:
    """A case of a suite.

    Attributes:
        suite: The suite, as in the page.
        operator: The operator or the layer that it is about.
        name: Its name, or its parameters.
        run: What raises AssertionError, or an error of a call, if the case fails.
        skipped: Why it is not run; empty if it is.

    """

    suite: str
    operator: str
    name: str
    run: Callable[[PoolClient], None]
    skipped: str = ""


def assert_equal(received: Array, expected: Array, rtol: float = 0.0, atol: float = 0.0) -> None:
    """Check the dtype, the shape and the values of an array; with 0.0, values are equal."""
    assert (received.dtype, received.shape) == (expected.dtype, expected.shape)
    np.testing.assert_allclose(received.astype(np.float64), expected.astype(np.float64), rtol, atol)
