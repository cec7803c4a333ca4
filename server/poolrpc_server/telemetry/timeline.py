"""When each stage of a call began and ended, for whoever makes spans of it; knows nothing of tracing."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from time import time_ns
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

MOST_TURNS = 32
"""Turns of a call that are kept: a stream has one for each block."""


@dataclass(slots=True, eq=False)
class Turn:
    """One request on its way through queue, compute and encode; times in ns since 1970, 0 where it didn't come.

    Attributes:
        planes: Its own.
        priority: The level that it waits in.
        queued: When it was ready to be computed.
        begun: When it was.
        computed: When its outputs were there.
        encoded: When its answer was.
        ended: When it came back, with an answer or without.
        batch_requests: Requests that were computed at once, itself among them.
        batch_planes: Theirs.
        error: The name of what it failed with; empty where it didn't.

    """

    planes: int
    priority: int
    queued: int
    begun: int = 0
    computed: int = 0
    encoded: int = 0
    ended: int = 0
    batch_requests: int = 0
    batch_planes: int = 0
    error: str = ""

    def begin(self, requests: int, planes: int) -> None:
        """Tell that so many requests begin to be computed at once."""
        self.batch_requests, self.batch_planes = requests, planes
        self.begun, self.computed = time_ns(), 0

    def compute_ended(self) -> None:
        """Tell that all of the batch is computed."""
        self.computed = time_ns()

    def timed(self, finish: Callable[[Sequence[memoryview]], Any]) -> Callable[[Sequence[memoryview]], Any]:
        """Give what makes an answer of the outputs, and tells when."""

        def answer(outputs: Sequence[memoryview]) -> Any:  # noqa: ANN401 - what finish gives
            if not self.computed:
                self.compute_ended()
            made = finish(outputs)
            self.encoded = time_ns()
            return made

        return answer


class Timeline:
    """The turns of one call.

    Attributes:
        started: When the call came.
        turns: The first of them.
        count: How many there were.

    """

    def __init__(self) -> None:
        self.started = time_ns()
        self.turns: list[Turn] = []
        self.count = 0

    @contextmanager
    def turn(self, planes: int, priority: int) -> Iterator[Turn]:
        """Give a turn of so many planes at a priority, which lasts as long as the context."""
        turn = Turn(planes, priority, time_ns())
        self.count += 1
        if len(self.turns) < MOST_TURNS:
            self.turns.append(turn)
        try:
            yield turn
        except BaseException as error:
            turn.error = type(error).__name__
            raise
        finally:
            turn.ended = time_ns()
