"""A tensor that comes in blocks of whole planes: what may come next, and what each block is a request for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from poolrpc.errors import InvalidArgumentError
from poolrpc_server.compute.planes import block_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from poolrpc._wire.codec import BranchResult, Request
    from poolrpc.chains import Planes
    from poolrpc_server.calls.validate import Checked

BLOCK_BYTES = 8 * 2**20
"""A block is at most this, or one plane."""


class Stream:
    """One stream: its planes are counted as they come.

    Attributes:
        request: What was asked.
        planes: The input's.
        results: What comes of each branch, from all planes together.
        plane_bytes: Of one plane of the input, with that of the indices where there are any.
        most: Planes in a block, at most.

    """

    def __init__(
        self,
        request: Request,
        planes: Planes,
        results: tuple[BranchResult, ...],
        check: Callable[[Request], Checked],
    ) -> None:
        """Begin a stream that was checked; `check` checks a block's request."""
        self.request = request
        self.planes = planes
        self.results = results
        self.plane_bytes = sum(spec.nbytes for spec in block_of(request, planes, 1, 0).specs)
        self.most = max(1, min(planes.count, BLOCK_BYTES // self.plane_bytes))
        self._check = check
        self._seen = 0
        # Blocks of a size are the same request, unless a layer tells planes apart by their number.
        self._alike = all(layer.at_plane(1) is layer for chain in request.branches for layer in chain)
        self._known: dict[int, Checked] = {}

    def take(self, nbytes: int) -> Checked:
        """Give the checked request that the next block, of so many bytes, is.

        Raises:
            InvalidArgumentError: It is no number of whole planes, or more than should come.
            LimitExceededError: It exceeds a limit.

        """
        count, rest = divmod(nbytes, self.plane_bytes)
        if rest or not 1 <= count <= self.most:
            msg = f"expected a block of 1 to {self.most} planes of {self.plane_bytes} bytes, got {nbytes} bytes"
            raise InvalidArgumentError(msg, field="payload")
        first, self._seen = self._seen, self._seen + count
        if self._seen > self.planes.count:
            msg = f"expected {self.planes.count} planes, as the request says, got {self._seen}"
            raise InvalidArgumentError(msg, field="payload")
        if not self._alike:
            return self._check(block_of(self.request, self.planes, count, first))
        if count not in self._known:
            self._known[count] = self._check(block_of(self.request, self.planes, count, 0))
        return self._known[count]

    def finish(self) -> None:
        """See that every plane has come.

        Raises:
            InvalidArgumentError: Some have not.

        """
        if self._seen < self.planes.count:
            msg = f"expected {self.planes.count} planes, as the request says, got {self._seen}"
            raise InvalidArgumentError(msg, field="payload")
