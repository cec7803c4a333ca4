"""Blocks of planes on several streams of a device: one is uploaded while another is computed or downloaded."""

from __future__ import annotations

from collections import deque
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from math import inf
from time import monotonic_ns
from typing import TYPE_CHECKING, Any, TypeAlias

from poolrpc_server.telemetry.stage_times import DEVICE_STAGES, DeviceStage

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from poolrpc_server.compute.device import DeviceStreams, Event, Stream

Stage: TypeAlias = "Callable[[int, int, Any], Any]"
"""Queues one stage of a range (start, stop) of planes on the current stream, with the result of the stage before, and
returns its own result."""

BLOCK_BYTES = 8 * 2**20
"""The size of a block. On an H200, 270 MB take 1.06 times as long as their upload alone in blocks of 8 and 16 MiB, 1.2
times in blocks of 4, and 2.3 times in blocks of 2, whose torch calls take the host longer than the link."""

PAGEABLE_BLOCK_BYTES = 64 * 2**20
"""The size of a block of an input that is not page-locked. The driver itself copies it to page-locked memory, block by
block: on an H200, that was faster for a whole tensor than for small parts, and than staging parts of it here."""

AHEAD = 2
"""The blocks that are queued on a stream: with fewer it may become idle. A cancelled call still computes these."""

MEMORY_SHARE = 4
"""The blocks that all executions queue take no more than this part of the device's memory, such as it reports it; the
rest is for what the layers need between input and output."""


def block_limit(memory_bytes: int, executions: int, streams: int) -> float:
    """Return the largest size of a block, in bytes, with which those of all executions fit into the device's memory.

    Args:
        memory_bytes: The size of the device's memory, in bytes; 0 if it has none of its own.
        executions: The number of executions at a time.
        streams: The number of streams of an execution.

    """
    return memory_bytes / (MEMORY_SHARE * AHEAD * streams * executions) if memory_bytes else inf


def planes_of_block(planes: int, plane_bytes: int, *, page_locked: bool, limit: float = inf) -> int:
    """Return the planes of a block, such that all blocks have about the same size.

    Args:
        planes: The number of planes.
        plane_bytes: The size of a plane with its output, in bytes.
        page_locked: Whether the input is page-locked.
        limit: The largest size of a block of several planes, in bytes.

    """
    size = min(BLOCK_BYTES if page_locked else PAGEABLE_BLOCK_BYTES, limit)
    most = max(1, int(size // max(1, plane_bytes)))
    return -(-planes // max(1, -(-planes // most)))


class StageTimer:
    """The times of the stages of all blocks of an execution, as the device's events have them."""

    def __init__(self, stream: Stream) -> None:
        """Start at this moment.

        Args:
            stream: A stream of the execution, which is idle.

        """
        self._started = monotonic_ns()
        self._start = stream.record()
        self._first = [inf] * len(DEVICE_STAGES)
        self._last = [0.0] * len(DEVICE_STAGES)
        self._busy = [0.0] * len(DEVICE_STAGES)

    def add(self, events: Sequence[Event]) -> None:
        """Add a block, given the events before its first stage and after each; all have been reached."""
        # Another stream may reach its first event a little earlier than this one's.
        at = [max(0.0, event.seconds_since(self._start)) for event in events]
        for number, (begin, end) in enumerate(pairwise(at)):
            self._first[number] = min(self._first[number], begin)
            self._last[number] = max(self._last[number], end)
            self._busy[number] += end - begin

    def stages(self) -> tuple[DeviceStage, ...]:
        """Return the stages; there are none before the first block."""
        if self._first[0] == inf:
            return ()
        return tuple(
            DeviceStage(name, self._started + round(first * 1e9), self._started + round(last * 1e9), round(busy * 1e9))
            for name, first, last, busy in zip(DEVICE_STAGES, self._first, self._last, self._busy, strict=True)
        )


def run_in_blocks(  # noqa: PLR0913 - the last two are optional
    streams: Sequence[Stream],
    planes: int,
    block: int,
    stages: Sequence[Stage],
    check: Callable[[], None] | None = None,
    *,
    timer: StageTimer | None = None,
    counter: DeviceStreams | None = None,
) -> None:
    """Submit the stages of each block to the streams in turn, and return when all of them are done.

    Args:
        streams: The streams.
        planes: The number of planes.
        block: The planes of a block.
        stages: The stages of a block, in order; those that are timed are the upload, the kernel and the download.
        check: Called before each block; what it raises ends the work, once what is queued is done.
        timer: Records the times of the stages.
        counter: Counts the blocks that are queued.

    """
    queue = _QueuedBlocks(stages, timer, counter)
    try:
        for number, start in enumerate(range(0, planes, block)):
            if check is not None:
                check()
            if len(queue) == AHEAD * len(streams):
                queue.wait()
            queue.submit(streams[number % len(streams)], _Block(start, min(planes, start + block)))
    finally:
        # The caller reuses the memory: queued copies must not read or write it any more, whatever was raised.
        with ExitStack() as every:
            for _ in range(len(queue)):
                every.callback(queue.wait)


class _QueuedBlocks:
    """The blocks of an execution that are queued on its streams, in order."""

    def __init__(self, stages: Sequence[Stage], timer: StageTimer | None, counter: DeviceStreams | None) -> None:
        self._stages, self._timer, self._counter = stages, timer, counter
        self._events: deque[list[Event]] = deque()  # of each block: before its first stage and after each, or the last

    def __len__(self) -> int:
        return len(self._events)

    def submit(self, stream: Stream, block: _Block) -> None:
        """Queue a block; if that fails, a part of it may be queued."""
        events: list[Event] = []
        self._events.append(events)
        self._count(1)
        try:
            for stage in self._stages:
                if self._timer is not None:
                    events.append(stream.record())
                stream.submit(partial(block.run, stage))
        finally:
            events.append(stream.record())

    def wait(self) -> None:
        """Wait until the oldest block is done, and take it from the queue."""
        events = self._events.popleft()
        try:
            for event in events[-1:]:  # there is none if not even an event could be queued
                event.wait()
        finally:
            self._count(-1)
        if self._timer is not None and len(events) == len(self._stages) + 1:
            self._timer.add(events)

    def _count(self, change: int) -> None:
        if self._counter is not None:
            self._counter.count_blocks(change)


class _Block:
    """A range of planes on its way through the stages."""

    def __init__(self, start: int, stop: int) -> None:
        self._start, self._stop = start, stop
        self._result: Any = None
        self._failed = False

    def run(self, stage: Stage) -> None:
        """Queue a stage, unless one before it failed: a stream may do the work, and fail, after it was submitted."""
        if not self._failed:
            self._failed = True
            self._result = stage(self._start, self._stop, self._result)
            self._failed = False
