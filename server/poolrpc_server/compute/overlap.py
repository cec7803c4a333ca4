"""Blocks of planes on several streams of a device: one is uploaded while another is computed or downloaded."""

from __future__ import annotations

from collections import deque
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from poolrpc_server.compute.device import Event, Stream

BLOCK_BYTES = 8 * 2**20
"""The size of a block. On an H200, 270 MB take 1.06 times as long as their upload alone in blocks of 8 and 16 MiB, 1.2
times in blocks of 4, and 2.3 times in blocks of 2, whose torch calls take the host longer than the link."""

PAGEABLE_BLOCK_BYTES = 64 * 2**20
"""The size of a block of an input that is not page-locked. The driver itself copies it to page-locked memory, block by
block: on an H200, that was faster for a whole tensor than for small parts, and than staging parts of it here."""

AHEAD = 2
"""The blocks that are queued on a stream: with fewer it may become idle. A cancelled call still computes these."""


def planes_of_block(planes: int, plane_bytes: int, *, page_locked: bool) -> int:
    """Return the planes of a block, such that all blocks have about the same size.

    Args:
        planes: The number of planes.
        plane_bytes: The size of a plane with its output, in bytes.
        page_locked: Whether the input is page-locked.

    """
    most = max(1, (BLOCK_BYTES if page_locked else PAGEABLE_BLOCK_BYTES) // max(1, plane_bytes))
    return -(-planes // max(1, -(-planes // most)))


def run_in_blocks(
    streams: Sequence[Stream],
    planes: int,
    block: int,
    work: Callable[[int, int], object],
    check: Callable[[], None] | None = None,
) -> None:
    """Submit the work of each block to the streams in turn, and return when all of it is done.

    Args:
        streams: The streams.
        planes: The number of planes.
        block: The planes of a block.
        work: Queues the work of a range (start, stop) of planes on the current stream.
        check: Called before each block; what it raises ends the work, once what is queued is done.

    """
    events: deque[Event] = deque()
    try:
        for number, start in enumerate(range(0, planes, block)):
            if check is not None:
                check()
            if len(events) == AHEAD * len(streams):
                events.popleft().wait()
            stream = streams[number % len(streams)]
            try:
                stream.submit(partial(work, start, min(planes, start + block)))
            finally:
                events.append(stream.record())  # after a failure too: a part of the work may be queued
    finally:
        # The caller reuses the memory: queued copies must not read or write it any more, whatever was raised.
        with ExitStack() as every:
            for event in events:
                every.callback(event.wait)
