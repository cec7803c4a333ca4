"""What a stream has of its own: a thread that reads ahead, one that watches it, and what is told of its end."""

from __future__ import annotations

import time
from contextlib import contextmanager
from queue import Empty, Queue
from threading import Event, Lock, Thread
from typing import TYPE_CHECKING, Generic, Self, TypeVar

from poolrpc.errors import DeadlineExceededError
from poolrpc_server.calls.admission import refused

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

T = TypeVar("T")


class ReadAhead(Generic[T]):
    """An iterator over another one, which a thread reads; the thread ends with the context, or with what it reads."""

    def __init__(self, source: Iterator[T], ahead: int, idle: float) -> None:
        """Make one; reading begins with the context.

        Args:
            source: What is read. It must end, or raise, once nobody wants it any more, as gRPC's iterators do.
            ahead: Items to hold at most, beside the one that is being read.
            idle: Seconds to wait for an item.

        """
        self._source = source
        self._idle = idle
        self._items: Queue[T | _End] = Queue(ahead)
        self._closed = Event()

    def __enter__(self) -> Self:
        """Begin to read."""
        Thread(target=self._read, name="poolrpc-reader", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        """Want no more items."""
        self._closed.set()
        # A reader that waits for room finds it, and then that it is closed.
        try:
            while True:
                self._items.get_nowait()
        except Empty:
            pass

    def __iter__(self) -> Self:
        """Give this."""
        return self

    def __next__(self) -> T:
        """Give the next item.

        Raises:
            StopIteration: There is none.
            DeadlineExceededError: It didn't come in time.
            Exception: What reading raised.

        """
        try:
            item = self._items.get(timeout=self._idle)
        except Empty:
            msg = f"expected the next message of the stream within {self._idle:g} seconds, got none"
            raise DeadlineExceededError(msg, reason="STREAM_IDLE") from None
        if isinstance(item, _End):
            self._items.put(item)  # for whoever asks again
            raise StopIteration if item.error is None else item.error
        return item

    def _read(self) -> None:
        end = _End(None)
        try:
            for item in self._source:
                self._items.put(item)
                if self._closed.is_set():
                    return
        except Exception as error:  # noqa: BLE001 - raised where it is waited for
            end = _End(error)
        self._items.put(end)


class IdleTimer:
    """Calls something once nothing has moved for some time, from a thread that ends with the context."""

    def __init__(self, idle: float, stalled: Callable[[], object]) -> None:
        """Make one that calls `stalled` where `moved` isn't called for `idle` seconds."""
        self._idle = idle
        self._stalled = stalled
        self._last = time.monotonic()
        self._ended = Event()

    def __enter__(self) -> Self:
        """Begin to watch."""
        Thread(target=self._watch, name="poolrpc-watch", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        """IdleTimer no more."""
        self._ended.set()

    def moved(self) -> None:
        """Tell that something moved."""
        self._last = time.monotonic()

    def _watch(self) -> None:
        while not self._ended.wait(max(0.0, self._last + self._idle - time.monotonic())):
            if time.monotonic() - self._last >= self._idle:
                self._stalled()
                return


class Streams:
    """Lets streams in, whichever door they come by: so many at a time, each of which must move.

    Attributes:
        count: How many there are.

    """

    def __init__(self, most: int, idle: float) -> None:
        """Let in `most` at a time; one that sends nothing for `idle` seconds has an error."""
        self._most = most
        self._idle = idle
        self._counting = Lock()
        self.count = 0

    @contextmanager
    def opened(
        self, messages: Iterator[T], ahead: int, cancel: Callable[[], object]
    ) -> Iterator[tuple[ReadAhead[T], IdleTimer]]:
        """Let one in for as long as the context lasts, and give its messages and what watches it.

        Args:
            messages: What it sends.
            ahead: Messages that are read before they are asked for.
            cancel: Ends it, where nothing moves.

        Raises:
            UnavailableError: There are too many.

        """
        with self._counting:
            if self.count >= self._most:
                raise refused("STREAMS", "streams at a time", self._most, self._most + 1)
            self.count += 1
        try:
            # A caller that doesn't read holds its answer where only the end of the call reaches it. Twice the time, so
            # that one that doesn't send has an error instead.
            with IdleTimer(2 * self._idle, cancel) as watch, ReadAhead(messages, ahead, self._idle) as reading:
                yield reading, watch
        finally:
            with self._counting:
                self.count -= 1


class Leaving:
    """Tells one at a time that a caller has left: gRPC would keep whatever it is given for as long as the call lasts.

    A stream's blocks are many, and what waits for one holds the block and its answer.
    """

    def __init__(self, add_callback: Callable[[Callable[[], None]], bool]) -> None:
        """Make one that is told by what `add_callback` is given; it gives False where the caller has left already."""
        self._add_callback = add_callback
        self._callback: Callable[[], None] | None = None
        self._asked, self._here = False, True

    def tell(self, callback: Callable[[], None]) -> bool:
        """Have this called, and no longer what was given before it; False where the caller has left."""
        # In this order: who leaves meanwhile is either seen here or calls it.
        self._callback = callback
        if not self._asked:
            self._asked = True
            if not self._add_callback(self._left):
                self._here = False
        return self._here

    def _left(self) -> None:
        self._here = False
        if self._callback is not None:
            self._callback()


class _End:
    """The end of the items, and what it came by."""

    def __init__(self, error: Exception | None) -> None:
        self.error = error
