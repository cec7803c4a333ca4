"""The blocks of a streamed tensor: each block is validated and becomes a request for its planes."""

from __future__ import annotations

from functools import lru_cache
from math import gcd, lcm
from typing import TYPE_CHECKING

from poolrpc.chains import period
from poolrpc.errors import InvalidArgumentError
from poolrpc_server.compute.planes import block_of, planes_of_image, weight_rows
from poolrpc_server.compute.with_operand import WHOLE_OPERANDS

if TYPE_CHECKING:
    from collections.abc import Callable

    from poolrpc._wire.codec import BranchResult, Request
    from poolrpc.chains import Planes
    from poolrpc.tensors import Bytes
    from poolrpc_server.calls.validate import CheckedRequest

REMEMBERED_SIZES = 4
"""Number of blocks whose validated request a stream remembers: all but its last block have the same size, and begin at
one of the three channels of an image, if there is a Normalize."""

BLOCK_BYTES = 8 * 2**20
"""Maximum size of a block of several planes, in bytes."""


class StreamBlocks:
    """The blocks of one stream, whose planes are counted as they arrive.

    Args:
        request: The request for the whole tensor, validated by `check_stream`.
        planes: The planes of its input.
        results: The results of its branches, for all planes together.
        check: Validates the request of a block.
        block_bytes: Maximum size of a block of several planes, in bytes.
        operand: The bytes of an operand that has another shape than the input, which is sent before the blocks.

    Attributes:
        request: As above.
        planes: As above.
        results: As above.
        plane_bytes: Size of one plane of the input and of the operand, in bytes.
        max_planes: Maximum number of planes in a block; at least 1.
        operand: The part of the operand that the latest block needs. None: it is in the block, or there is none.

    """

    def __init__(  # noqa: PLR0913 - the last two are optional
        self,
        request: Request,
        planes: Planes,
        results: tuple[BranchResult, ...],
        check: Callable[[Request], CheckedRequest],
        block_bytes: int = BLOCK_BYTES,
        *,
        operand: Bytes = b"",
    ) -> None:
        self.request = request
        self.planes = planes
        self.results = results
        self._whole = request.operand is not None and request.operand_name in WHOLE_OPERANDS
        self._operand = memoryview(operand)
        self.operand: memoryview | None = None
        expected = request.operand.nbytes if self._whole and request.operand is not None else 0
        if len(operand) != expected:
            msg = f"expected {expected} bytes of an operand in the first message, got {len(operand)}"
            raise InvalidArgumentError(msg, field="payload")
        one = block_of(request, planes, 1, 0)
        self.plane_bytes = one.input.nbytes if self._whole else sum(spec.nbytes for spec in one.specs)
        self.max_planes = max(1, min(planes.count, block_bytes // self.plane_bytes))
        self._check = check
        self._received = 0
        # Blocks of equal size are equal requests if they begin at the same plane of the layers' period; an image with
        # channels last counts as one plane.
        channels = request.input.shape[-1] if request.input.layout == "NHWC" else 1
        repeats = period(request.branches)
        if self._whole and request.operand_name == "weights" and channels == 1:  # a row for the planes of an image
            repeats = lcm(repeats, planes_of_image(request.input, planes.spatial_dims))
        self._period = repeats // gcd(repeats, channels)
        self._check_count = lru_cache(REMEMBERED_SIZES)(
            lambda count, first: check(block_of(request, planes, count, first))
        )

    def next_block(self, nbytes: int) -> CheckedRequest:
        """Return the validated request of the next block.

        Args:
            nbytes: The block's size, in bytes.

        Raises:
            InvalidArgumentError: The block is not a whole number of planes, or there are too many planes.
            LimitExceededError: The block exceeds a limit.

        """
        count, remainder = divmod(nbytes, self.plane_bytes)
        if remainder or not 1 <= count <= self.max_planes:
            msg = f"expected a block of 1 to {self.max_planes} planes of {self.plane_bytes} bytes, got {nbytes} bytes"
            raise InvalidArgumentError(msg, field="payload")
        first, self._received = self._received, self._received + count
        if self._received > self.planes.count:
            raise self._wrong_count()
        if self._whole:
            self.operand = self._part(first, count)
        if not self._period:
            return self._check(block_of(self.request, self.planes, count, first))
        return self._check_count(count, first % self._period)

    def _part(self, first: int, count: int) -> memoryview:
        """Return the part of the operand that some planes need: the rows of their images, or all of it."""
        if self.request.operand_name != "weights":
            return self._operand
        low, high, _ = weight_rows(self.request, self.planes, first, count)
        row = len(self._operand) // weight_rows(self.request, self.planes, 0, self.planes.count)[1]
        return self._operand[low * row : high * row]

    def finish(self) -> None:
        """Check that all planes have arrived.

        Raises:
            InvalidArgumentError: Planes are missing.

        """
        if self._received < self.planes.count:
            raise self._wrong_count()

    def _wrong_count(self) -> InvalidArgumentError:
        msg = f"expected {self.planes.count} planes, as the request says, got {self._received}"
        return InvalidArgumentError(msg, field="payload")
