"""One call, from what was asked to what is answered: validation, admission, its turn, the engine. No protocol."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from poolrpc.errors import CancelledError, DeadlineExceededError, InvalidArgumentError, NotFoundError, UnavailableError
from poolrpc.tensors import ALIGNMENT, aligned_ranges
from poolrpc_server.calls.admission import RETRY_DELAY, refused
from poolrpc_server.calls.batcher import Batcher, StoppedError
from poolrpc_server.calls.queue import QueueFullError, QueueLimits
from poolrpc_server.calls.stream_blocks import StreamBlocks
from poolrpc_server.calls.validate import check_message, check_payload, check_request, check_shapes, check_stream
from poolrpc_server.compute.planes import block_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from poolrpc._wire.codec import ArenaRanges, Request, ServerInfo
    from poolrpc.chains import Chain, Shape
    from poolrpc.tensors import Bytes, Layout, TensorSpec
    from poolrpc_server.calls.admission import AdmissionControl
    from poolrpc_server.calls.validate import CheckedRequest, Limits
    from poolrpc_server.compute.engine import Engine, Run
    from poolrpc_server.telemetry.metrics import Metrics
    from poolrpc_server.telemetry.timeline import Timeline
    from poolrpc_server.transports.local.arenas import Arena

T = TypeVar("T")

BLOCKS_HELD = 3
"""A stream's blocks in memory at a time: one that arrives, one that waits, one that is computed."""

COPIES = 2
"""How often gRPC has a message in memory as it hands it over: as it came, and in one piece."""

QUICK_SECONDS = 250e-6
"""Calls that take up to this are over before a thread that is handed one has woken, give or take."""

MOST_DELAY = 5.0
"""Seconds that a refused caller is asked to wait, at most."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who waits for an answer, as a door knows it.

    Attributes:
        time_remaining: Gives the seconds left to answer, None for no limit.
        active: Tells whether the caller still waits.
        add_done_callback: Has something called when the caller waits no more; False where that is so already.
        priority: 0, 1 or 2; 0 goes first.
        timeline: Is told when each stage begins, where there is one.

    """

    time_remaining: Callable[[], float | None]
    active: Callable[[], bool]
    add_done_callback: Callable[[Callable[[], None]], bool] = lambda _: True
    priority: int = 1
    timeline: Timeline | None = None

    def raise_if_cancelled(self) -> None:
        """Stop here if nobody waits for the answer any more.

        Raises:
            DeadlineExceededError: The deadline has passed.
            CancelledError: The caller has gone.

        """
        left = self.time_remaining()
        if left is not None and left <= 0:
            raise DeadlineExceededError("the deadline passed before the call was computed")
        if not self.active():
            raise CancelledError("the caller left before the call was computed")


class Dispatcher:
    """The way of every call, whichever door it came by."""

    def __init__(  # noqa: PLR0913, PLR0917 - what a call goes through, in order
        self,
        limits: Limits,
        admission: AdmissionControl,
        engine: Engine,
        info: ServerInfo,
        find_arena: Callable[[bytes], Arena] | None = None,
        bounds: QueueLimits | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        """Make a dispatcher.

        Args:
            limits: What requests are held to.
            admission: Counts the bytes under way.
            engine: Computes.
            info: What the server says of itself.
            find_arena: Gives an arena of that id. None: there are none.
            bounds: What may wait for the engine, and what is computed at once. None: as QueueLimits has it.
            metrics: Count what happens, where there are any.

        """
        self._limits = limits
        self._admission = admission
        self._bounds = bounds or QueueLimits()
        self._batcher = Batcher(engine.threads, engine.execute, self._bounds, metrics)
        engine.slots, engine.observer = self._batcher, metrics
        self._engine = engine
        self._find_arena = find_arena
        self.info = info

    def check_room(self, priority: int, announced: int = 0) -> None:
        """See that there is room for a call of that priority, before anything of it is read.

        Args:
            priority: Its priority.
            announced: How large it says that its message is, which is counted from now on, until `arrived`; 0: it
                says nothing.

        Raises:
            UnavailableError: There is none.
            LimitExceededError: No message may be as large.

        """
        check_message(announced, self._limits, "request")
        self._admission.check_room()
        try:
            self._batcher.check_queue(priority)
        except QueueFullError as error:
            raise _refused(error) from None
        if announced:
            self._admission.take(COPIES * announced)

    def arrived(self, announced: int) -> None:
        """Count a message no more that was announced: it is here, and counted as what it is; or it won't come."""
        self._admission.give_back(COPIES * announced)

    def check(self, request: Request) -> CheckedRequest:
        """Check a request, apart from its payload; the same request may then be run any number of times.

        Raises:
            PoolError: Of the class that says what is wrong.

        """
        return check_request(request, self._limits, self._engine.schedule)

    def check_answer(self, nbytes: int) -> None:
        """See that an answer of so many bytes may be one message.

        Raises:
            LimitExceededError: It may not.

        """
        check_message(nbytes, self._limits, "answer")

    def is_quick(self, checked: CheckedRequest) -> bool:
        """Tell whether a request that finds a slot free is computed in next to no time."""
        return checked.schedule.seconds <= QUICK_SECONDS and not self._bounds.max_queue_delay

    def pool(
        self, checked: CheckedRequest, payload: Bytes, caller: Caller, finish: Callable[[Sequence[memoryview]], T]
    ) -> T:
        """Run a request and give what `finish` makes of its outputs.

        Args:
            checked: The request.
            payload: The bytes of its tensors, in order.
            caller: Who waits.
            finish: Called with the bytes of `checked.outputs`, whose memory is used again afterwards.

        Raises:
            PoolError: Of the class that says what went wrong.

        """
        nbytes = len(payload) + checked.output_bytes
        self._admission.take(nbytes)
        try:
            answer: T = self._run(self._engine.run(checked.schedule, payload, finish), caller)
        finally:
            self._admission.give_back(nbytes)
        return answer

    def pool_from(
        self,
        checked: CheckedRequest,
        read: Callable[[], Bytes],
        caller: Caller,
        finish: Callable[[Sequence[memoryview]], T],
    ) -> T:
        """Run a request whose payload `read` gives, once there is room for it; the rest is as in pool.

        Raises:
            LimitExceededError: The payload is larger than a message may be.

        """
        nbytes = sum(spec.nbytes for spec in checked.request.specs)
        check_payload(nbytes, self._limits)
        with self._admission.hold(nbytes + checked.output_bytes):
            answer: T = self._run(self._engine.run(checked.schedule, read(), finish), caller)
        return answer

    def pool_in_arena(self, checked: CheckedRequest, ranges: ArenaRanges, caller: Caller) -> None:
        """Run a request whose tensors lie in an arena, and leave its outputs there.

        Raises:
            NotFoundError: There is no such arena.
            PoolError: Of the class that says what else went wrong.

        """
        if self._find_arena is None:
            raise NotFoundError("expected a call with its payload: this server has no arenas", reason="ARENA")
        arena = self._find_arena(ranges.arena_id)
        (start, length), (to, room) = ranges.input, ranges.output
        memory, into = arena.slice(ranges.input, "arena.input"), arena.slice(ranges.output, "arena.output")
        if start < to + room and to < start + length:
            msg = f"expected a range apart from the input's {ranges.input}, got {ranges.output} (offset, length)"
            raise InvalidArgumentError(msg, field="arena.output")
        inputs = _cut(memory, checked.request.specs, "arena.input")
        outputs = _cut(into, checked.outputs, "arena.output")
        self._run(self._engine.run_in_place(checked.schedule, inputs, outputs), caller)

    @contextmanager
    def stream(self, request: Request, caller: Caller) -> Iterator[StreamBlocks]:
        """Take a request whose tensors come in blocks, for as long as the context lasts.

        Raises:
            PoolError: Of the class that says what is wrong.

        """
        caller.raise_if_cancelled()
        planes, results = check_stream(request, self._limits, self._engine.schedule)
        stream = StreamBlocks(request, planes, results, self.check)
        # Counted at once, so that a stream which has begun isn't refused in its middle.
        largest = self.check(block_of(request, planes, stream.max_planes, 0))
        with self._admission.hold(BLOCKS_HELD * stream.max_planes * stream.plane_bytes + largest.output_bytes):
            yield stream

    def pool_block(
        self, stream: StreamBlocks, block: Bytes, caller: Caller, finish: Callable[[Sequence[memoryview]], T]
    ) -> T:
        """Run the next block of a stream; the rest is as in pool."""
        run = self._engine.run(stream.next_block(len(block)).schedule, block, finish)
        # The stream was let in as a whole.
        answer: T = self._run(run, caller, admitted=True)
        return answer

    def waiting(self) -> tuple[tuple[int, ...], float]:
        """Count the calls that wait, of each priority, and give the seconds that the first of them has waited."""
        return tuple(self._batcher.queue_lengths()), self._batcher.oldest_wait()

    def stop(self) -> None:
        """Fail what waits; what is being computed is finished."""
        self._batcher.stop()

    def _run(self, run: Run, caller: Caller, *, admitted: bool = False) -> Any:  # noqa: ANN401 - what the run's finish gives
        if caller.timeline is None:
            return self._take_turn(run, caller, admitted=admitted)
        with caller.timeline.turn(run.schedule.planes, caller.priority) as turn:
            timed = replace(run, finish=turn.timed(run.finish), turn=turn)
            return self._take_turn(timed, caller, admitted=admitted)

    def _take_turn(self, run: Run, caller: Caller, *, admitted: bool) -> Any:  # noqa: ANN401 - as above
        try:
            return self._batcher.run(run, caller, caller.priority, admitted=admitted)
        except QueueFullError as error:
            raise _refused(error) from None
        except StoppedError:
            msg = "expected a call that was begun before the server stopped, got one that waited; try again"
            raise UnavailableError(msg, reason="STOPPING", retry_delay=RETRY_DELAY) from None

    def shapes(self, shape: Shape, branches: Sequence[Chain], layout: Layout) -> list[tuple[Shape, ...]]:
        """Give the shape after every layer of each branch.

        Raises:
            InvalidArgumentError: The layers can't pool such a tensor.

        """
        return check_shapes(shape, branches, layout)


def _refused(error: QueueFullError) -> UnavailableError:
    # Rounded, so that a full server says the same to many: what is said is encoded once.
    delay = round(min(max(error.wait, RETRY_DELAY / 2), MOST_DELAY), 2)
    return refused("QUEUE", f"{error.quantity} that wait", error.limit, round(error.actual, 2), delay)


def _cut(memory: memoryview, specs: Sequence[TensorSpec], field: str) -> list[memoryview]:
    places, size = aligned_ranges(specs)
    if size > len(memory):
        msg = f"expected a range of at least {size} bytes, each tensor at a multiple of {ALIGNMENT}, got {len(memory)}"
        raise InvalidArgumentError(msg, field=field)
    return [memory[start:end] for start, end in places]
