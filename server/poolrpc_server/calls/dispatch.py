"""One call from its checked request to its answer: validation, admission, the queue, the engine."""

from __future__ import annotations

from functools import lru_cache, partial
from math import inf
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar

from poolrpc.errors import InvalidArgumentError, LimitExceededError, NotFoundError, PoolError, UnavailableError
from poolrpc.tensors import ALIGNMENT, size_of, tensor_ranges
from poolrpc_server.calls.admission import RETRY_DELAY, ROOM_SECONDS, CallLimit, rejection
from poolrpc_server.calls.admitted_call import ANSWER_COPIES
from poolrpc_server.calls.batcher import Batcher, StoppedError
from poolrpc_server.calls.queue import QueueFullError, QueueLimits
from poolrpc_server.calls.stream_blocks import StreamBlocks
from poolrpc_server.calls.validate import check_message, check_payload, check_request, check_shapes, check_stream
from poolrpc_server.compute.planes import block_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from poolrpc._wire.codec import ArenaRanges, Request, ServerInfo
    from poolrpc.chains import Chain, Outputs, Shape
    from poolrpc.tensors import Bytes, Layout, TensorSpec
    from poolrpc_server.calls.call import CallContext
    from poolrpc_server.calls.validate import CheckedRequest, Limits
    from poolrpc_server.compute.engine import Engine, Run
    from poolrpc_server.compute.locations import Locations
    from poolrpc_server.telemetry.metrics import Metrics
    from poolrpc_server.telemetry.stage_times import StageTimes

T = TypeVar("T")
Finish: TypeAlias = "Callable[[Sequence[memoryview]], T]"

BLOCKS_HELD = 5
"""Blocks of a stream in memory at a time: one that arrives (in gRPC's two copies), one that waits, one that is put
together from several messages, one that is computed."""

FREE_SCRATCH_BYTES = 24 * 2**20
"""Scratch memory of a request that is not counted: the blocks of planes of most requests need no more, only as many of
them are computed at a time as there are threads, and it is a part of what the process itself takes."""

LONG_SECONDS = 0.0003
"""Estimated duration of an execution during which other calls of its transport are not kept waiting. Threads that run
Python for shorter ones at the same time would wait for each other at each call of torch, which takes longer."""

REMEMBERED_REQUESTS, REMEMBERED_LAYERS = 1024, 16
"""Maximum number of requests that are remembered with what is known of them, and of the layers of each."""

MAX_RETRY_DELAY = 5.0
"""Maximum delay, in seconds, that a rejected caller is asked to wait."""


class SharedMemory(Protocol):
    """Memory shared with a client on this host."""

    @property
    def locations(self) -> Locations: ...  # noqa: D102 - the locations in it that calls use again and again

    def slice(self, part: tuple[int, int], field: str) -> memoryview:
        """Return the part at (offset, length); `field` is the path of the request's field that names it."""


def no_arena(_: bytes) -> SharedMemory:
    """Raise NotFoundError, since this server shares no memory."""
    raise NotFoundError("expected a call with its payload, got an arena: this server has none", reason="ARENA")


class Dispatcher:
    """The steps of every call, whatever its transport and protocol: validation, admission, the queue and the engine.

    Attributes:
        info: The description of the server, as GetServerInfo returns it.

    """

    def __init__(  # noqa: PLR0913, PLR0917 - what a call goes through, in order
        self,
        limits: Limits,
        max_calls: int,
        engine: Engine,
        info: ServerInfo,
        find_arena: Callable[[bytes], SharedMemory] = no_arena,
        queue_limits: QueueLimits | None = None,
        metrics: Metrics | None = None,
        *,
        max_compute_seconds: float = inf,
    ) -> None:
        """Make a dispatcher.

        Args:
            limits: Limits of a request.
            max_calls: Maximum number of calls in flight.
            engine: Computes.
            info: The description of the server, as GetServerInfo returns it.
            find_arena: Returns the arena of an id, or raises NotFoundError.
            queue_limits: Limits of the queue and of a batch. None: the defaults of QueueLimits.
            metrics: Counts executions and queued requests. None: nothing is counted.
            max_compute_seconds: Seconds that an execution may take.

        """
        self._limits = limits
        self._calls = CallLimit("CALLS", "calls at a time", max_calls)
        self._batcher = Batcher(engine.threads, self._execute, queue_limits or QueueLimits(), metrics)
        engine.slots = self._batcher
        self._engine = engine
        self._metrics = metrics
        self._find_arena = find_arena
        self._max_compute_seconds = max_compute_seconds
        # Equal requests share what is learned about their duration, whatever protocol and memory their tensors are in.
        self._remembered = lru_cache(REMEMBERED_REQUESTS)(
            partial(check_request, limits=limits, schedule=engine.schedule)
        )
        self.info = info

    def admit(self, call: CallContext, announced: int = 0) -> None:
        """Admit a call before anything of it is read.

        Args:
            call: Context of the call.
            announced: Size of its message in bytes, by its metadata; 0 if they do not say.

        Raises:
            UnavailableError: The queue of the call's priority is full, or too many calls are in flight.
            LimitExceededError: No message may be as large as announced.

        """
        check_message(announced, self._limits, "request")
        try:
            self._batcher.check_queue(call.priority)
        except QueueFullError as error:
            raise _rejected(error) from None
        call.ticket.enter(self._calls)

    def check(self, request: Request) -> CheckedRequest:
        """Check a request, apart from its payload; the result may be run any number of times.

        Raises:
            PoolError: The request is rejected; the class of the error says why.

        """
        if sum(map(len, request.branches)) > REMEMBERED_LAYERS:
            return check_request(request, self._limits, self._engine.schedule)
        return self._remembered(request)

    def check_answer(self, nbytes: int) -> None:
        """Check that an answer of so many bytes fits into one message.

        Raises:
            LimitExceededError: It does not fit.

        """
        check_message(nbytes, self._limits, "answer")

    def pool(self, checked: CheckedRequest, payload: Bytes, call: CallContext, finish: Finish[T]) -> T:
        """Run a request and return what `finish` makes of its outputs.

        Args:
            checked: The request.
            payload: The bytes of its tensors, in order.
            call: Context of the call.
            finish: Called with the bytes of `checked.outputs`, whose memory is used again afterwards.

        Raises:
            PoolError: The request failed; the class of the error says why.

        """
        call.ticket.reserve(_bytes_of(checked))
        answer: T = self._run(self._engine.run(checked.schedule, payload, finish), call)
        return answer

    def pool_from(self, checked: CheckedRequest, read: Callable[[], Bytes], call: CallContext, finish: Finish[T]) -> T:
        """Run a request whose payload `read` returns once its bytes are admitted; everything else is as in `pool`.

        Raises:
            LimitExceededError: The payload is larger than a message may be.

        """
        nbytes = sum(spec.nbytes for spec in checked.request.specs)
        check_payload(nbytes, self._limits)
        call.ticket.reserve(nbytes + _bytes_of(checked))
        answer: T = self._run(self._engine.run(checked.schedule, read(), finish), call)
        return answer

    def pool_in_arena(self, checked: CheckedRequest, ranges: ArenaRanges, call: CallContext) -> None:
        """Run a request whose tensors are in an arena, and leave its outputs there.

        Raises:
            NotFoundError: There is no such arena.
            PoolError: The request failed for another reason; the class of the error says why.

        """
        arena = self._find_arena(ranges.arena_id)
        key = checked.schedule, ranges
        location = arena.locations.find(key)
        again = location is not None
        if location is None:
            location = self._engine.location(*_slice_arena(arena, checked, ranges))
            arena.locations.add(key, location)
        if scratch := _scratch_of(checked):
            call.ticket.reserve(scratch)
        self._run(self._engine.run_in_place(checked.schedule, location, again=again), call)

    def stream(self, request: Request, call: CallContext, operand: Bytes = b"") -> StreamBlocks:
        """Admit a request whose tensors come in blocks.

        Args:
            request: The request.
            call: Context of the call.
            operand: The bytes of an operand that all blocks share.

        Raises:
            PoolError: The request is rejected; the class of the error says why.

        """
        call.raise_if_cancelled()
        planes, results = check_stream(request, self._limits, self._engine.schedule)
        stream = StreamBlocks(request, planes, results, self.check, operand=operand)
        # Reserved at once, so that a stream that has begun is not rejected in its middle.
        largest = self.check(block_of(request, planes, stream.max_planes, 0))
        nbytes = BLOCKS_HELD * stream.max_planes * stream.plane_bytes + _bytes_of(largest) + 2 * len(operand)
        call.ticket.reserve(nbytes, wait=ROOM_SECONDS)
        return stream

    def pool_block(self, stream: StreamBlocks, block: Bytes, call: CallContext, finish: Finish[T]) -> T:
        """Run the next block of a stream; everything else is as in `pool`."""
        run = self._engine.run(stream.next_block(len(block)).schedule, block, finish, stream.operand)
        # The stream was admitted as a whole.
        answer: T = self._run(run, call, admitted=True)
        return answer

    def shapes(
        self,
        shape: Shape,
        branches: Sequence[Chain],
        layout: Layout,
        outputs: Sequence[Outputs] = (),
        operand_shape: Shape | None = None,
    ) -> list[tuple[Shape, ...]]:
        """Return the shape after every layer of each branch.

        Raises:
            InvalidArgumentError: The layers cannot pool such a tensor.

        """
        return check_shapes(shape, branches, layout, outputs, operand_shape)

    @property
    def calls(self) -> int:
        """Number of calls in flight."""
        return self._calls.count

    def waiting(self) -> tuple[tuple[int, ...], float]:
        """Return the number of queued requests of each priority, and the age of the oldest in seconds."""
        return tuple(self._batcher.queue_lengths()), self._batcher.oldest_wait()

    def stop(self) -> None:
        """Fail the queued requests; those that are being computed are finished."""
        self._batcher.stop()

    def _execute(self, runs: Sequence[Run]) -> list[Any]:
        started = perf_counter()
        answers = self._engine.execute(runs)
        if self._metrics is not None:
            planes, nbytes = sum(run.schedule.planes for run in runs), sum(run.schedule.nbytes for run in runs)
            stages = runs[0].times.device if runs[0].times is not None else ()
            self._metrics.executed(len(runs), planes, nbytes, perf_counter() - started, stages)
        return answers

    def _check_running(self, call: CallContext, times: StageTimes) -> None:
        """Raise if an execution is to end before it is complete."""
        try:
            call.raise_if_cancelled()
        except PoolError as error:
            if not times.error and self._metrics is not None:  # each of the threads that compute it may come here
                self._metrics.cancelled("compute")
            times.error = type(error).__name__
            raise
        seconds = times.compute_ns / 1e9
        if seconds > self._max_compute_seconds:
            limit = self._max_compute_seconds
            msg = f"expected a request that is computed within {limit:g} seconds, got one that takes longer"
            limits = {"limit": f"{limit:g}", "actual": f"{seconds:.3g}"}
            raise LimitExceededError(msg, reason="COMPUTE_SECONDS", metadata=limits)

    def _run(self, run: Run, call: CallContext, *, admitted: bool = False) -> Any:  # noqa: ANN401 - what finish returns
        times = call.record.begin_execution(run.schedule.planes, call.priority)
        run.times, run.finish = times, times.around(run.finish)
        run.check = partial(self._check_running, call, times)
        schedule = run.schedule
        # Not by the estimate for the queue: it has the time for which other threads have disturbed the executions, and
        # calls that make way disturb each other. That of an operand depends on what is in it.
        if schedule.undisturbed_seconds > LONG_SECONDS or schedule.whole_operand or self._engine.backend.asynchronous:
            call.make_way()
        try:
            return self._batcher.run(run, call, call.priority, admitted=admitted)
        except QueueFullError as error:
            times.error = "UnavailableError"
            raise _rejected(error) from None
        except StoppedError:
            times.error = "UnavailableError"
            msg = "expected a call that began before the server stopped, got one that was still queued; try again"
            raise UnavailableError(msg, reason="STOPPING", retry_delay=RETRY_DELAY) from None
        except BaseException as error:
            times.error = type(error).__name__
            raise
        finally:
            call.record.end_execution(times)


def _bytes_of(checked: CheckedRequest) -> int:
    """Return the memory that a request takes in addition to its message: what computes it, and its answer."""
    # The engine's own outputs live until the answer is made from them, and make room for gRPC's copy of it.
    return ANSWER_COPIES * checked.output_bytes + _scratch_of(checked)


def _scratch_of(checked: CheckedRequest) -> int:
    return max(0, int(checked.schedule.scratch_bytes) - FREE_SCRATCH_BYTES)


def _rejected(error: QueueFullError) -> UnavailableError:
    # Rounded, so that a full server sends the same error to many callers and encodes it once.
    delay = round(min(max(error.wait, RETRY_DELAY / 2), MAX_RETRY_DELAY), 2)
    return rejection("QUEUE", f"{error.quantity} in the queue", error.limit, round(error.actual, 2), delay)


def _slice_arena(
    arena: SharedMemory, checked: CheckedRequest, ranges: ArenaRanges
) -> tuple[list[memoryview], list[memoryview]]:
    """Return the memory of a request's inputs, and of its outputs."""
    (start, length), (output_start, output_length) = ranges.input, ranges.output
    source, target = arena.slice(ranges.input, "arena.input"), arena.slice(ranges.output, "arena.output")
    if start < output_start + output_length and output_start < start + length:
        msg = f"expected a range apart from the input's {ranges.input}, got {ranges.output} (offset, length)"
        raise InvalidArgumentError(msg, field="arena.output")
    inputs = _slice_tensors(source, checked.request.specs, "arena.input")
    return inputs, _slice_tensors(target, checked.outputs, "arena.output")


def _slice_tensors(memory: memoryview, specs: Sequence[TensorSpec], field: str) -> list[memoryview]:
    ranges = tensor_ranges(specs, ALIGNMENT)
    if (size := size_of(ranges)) > len(memory):
        msg = f"expected a range of at least {size} bytes, each tensor at a multiple of {ALIGNMENT}, got {len(memory)}"
        raise InvalidArgumentError(msg, field=field)
    return [memory[each.start : each.end] for each in ranges]
