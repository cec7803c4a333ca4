"""One call, from what was asked to what is answered: admission, validation, the engine. It knows no protocol."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from poolrpc.codec import BranchResult
from poolrpc.errors import CancelledError, DeadlineExceededError
from poolrpc.tensors import TensorSpec
from poolrpc_server.validate import Limits, check_request, check_shapes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from poolrpc.chains import Chain, Shape
    from poolrpc.codec import Request, ServerInfo
    from poolrpc_server.admission import Admission
    from poolrpc_server.engine import Engine


@dataclass(frozen=True, slots=True)
class Call:
    """A request to pool, as a door hands it over.

    Attributes:
        request: What was asked.
        payload: The bytes of the request's tensors, in order.
        remaining: Gives the seconds left to answer, None for no limit.
        active: Tells whether the caller still waits.

    """

    request: Request
    payload: bytes
    remaining: Callable[[], float | None]
    active: Callable[[], bool]

    def check_wanted(self) -> None:
        """Stop here if nobody waits for the answer any more.

        Raises:
            DeadlineExceededError: The deadline has passed.
            CancelledError: The caller has gone.

        """
        left = self.remaining()
        if left is not None and left <= 0:
            raise DeadlineExceededError("the deadline passed before the call was computed")
        if not self.active():
            raise CancelledError("the caller left before the call was computed")


class Dispatcher:
    """The way of every call, whichever door it came by."""

    def __init__(self, limits: Limits, admission: Admission, engine: Engine, info: ServerInfo) -> None:
        self._limits = limits
        self._admission = admission
        self._engine = engine
        self.info = info

    def pool(self, call: Call) -> tuple[list[BranchResult], bytes]:
        """Run a request and give the results and the bytes of their tensors.

        Raises:
            PoolError: Of the class that says what went wrong.

        """
        call.check_wanted()
        with self._admission.hold(len(call.payload)) as hold_more:
            checked = check_request(call.request, call.payload, self._limits, self._engine.work)
            hold_more(checked.output_bytes)
            outputs = self._engine.run(checked, call.check_wanted)
        spec = call.request.input
        results = [
            BranchResult(
                shapes,
                TensorSpec(spec.dtype, shapes[-1], spec.layout),
                TensorSpec("int64", shapes[-1], spec.layout) if chain[-1].gives_indices else None,
            )
            for chain, shapes in zip(call.request.branches, checked.shapes, strict=True)
        ]
        return results, b"".join(outputs)

    def shapes(self, shape: Shape, branches: Sequence[Chain], layout: str) -> list[tuple[Shape, ...]]:
        """Give the shape after every layer of each branch.

        Raises:
            InvalidArgumentError: The layers can't pool such a tensor.

        """
        return check_shapes(shape, branches, layout)
