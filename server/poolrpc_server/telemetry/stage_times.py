"""When the stages of one execution of a call began and ended."""

from __future__ import annotations

from dataclasses import dataclass, field
from time import monotonic_ns
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


DEVICE_STAGES = ("upload", "kernel", "download")
"""The stages of an execution on a device with memory of its own."""


@dataclass(frozen=True, slots=True)
class DeviceStage:
    """One of the DEVICE_STAGES of an execution, over all blocks of its planes.

    Attributes:
        name: Name of the stage.
        started: When the first block entered it, in nanoseconds of the monotonic clock.
        ended: When the last block left it.
        busy_ns: Nanoseconds that blocks spent in it, summed. Stages of several blocks overlap, so that the sum over the
            stages may be longer than the computation.

    """

    name: str
    started: int
    ended: int
    busy_ns: int


@dataclass(slots=True, eq=False)
class StageTimes:
    """The stages of one request on its way through the queue and the engine.

    A unary call has one execution, a stream one for each of its blocks. Times are nanoseconds of the monotonic clock;
    0 stands for a stage that was not reached.

    Attributes:
        planes: Number of planes of the request.
        priority: Priority that it is queued with.
        queued: When it was ready to be computed.
        started: When its computation began.
        computed: When its outputs were complete.
        encoded: When its answer was encoded.
        ended: When the caller got the answer or the error.
        batch_requests: Number of requests computed in the same batch, this one included.
        batch_planes: Number of their planes.
        error: Name of the exception class that it failed with; empty if it did not fail.
        device: Stages on a device with memory of its own; empty if it was computed on the CPU.

    """

    planes: int
    priority: int
    queued: int = field(default_factory=monotonic_ns)
    started: int = 0
    computed: int = 0
    encoded: int = 0
    ended: int = 0
    batch_requests: int = 0
    batch_planes: int = 0
    error: str = ""
    device: tuple[DeviceStage, ...] = ()

    def compute_started(self, requests: int, planes: int) -> None:
        """Record that a batch of so many requests and planes begins to be computed.

        A batch that failed as a whole is computed again, request by request: the last start counts.
        """
        self.batch_requests, self.batch_planes = requests, planes
        self.started, self.computed, self.device = monotonic_ns(), 0, ()

    def compute_ended(self) -> None:
        """Record that the outputs are complete; the first call after a start counts."""
        if not self.computed:
            self.computed = monotonic_ns()

    def around(self, finish: Callable[[Sequence[memoryview]], Any]) -> Callable[[Sequence[memoryview]], Any]:
        """Return `finish`, which makes an answer of the outputs, with its begin and end recorded."""

        def finish_and_record(outputs: Sequence[memoryview]) -> Any:  # noqa: ANN401 - what finish returns
            self.compute_ended()
            answer = finish(outputs)
            self.encoded = monotonic_ns()
            return answer

        return finish_and_record

    @property
    def queue_ns(self) -> int:
        """Nanoseconds in the queue: until the computation began, or until the end if it never did."""
        return max(0, (self.started or self.ended or monotonic_ns()) - self.queued)

    @property
    def compute_ns(self) -> int:
        """Nanoseconds of the computation; 0 if it never began."""
        return max(0, (self.computed or self.ended or monotonic_ns()) - self.started) if self.started else 0
