"""Open streams: a limited number of them, each read ahead of the computation, and ended if it makes no progress."""

from __future__ import annotations

import time
from contextlib import contextmanager, suppress
from queue import Empty, Queue
from threading import Event, Thread
from typing import TYPE_CHECKING, Generic, Self, TypeVar

from poolrpc.errors import DeadlineExceededError
from poolrpc_server.calls.admission import STALLED_SECONDS, CallLimit
from poolrpc_server.calls.call import DerivedContext

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from poolrpc_server.calls.call import CallContext

T = TypeVar("T")


class ReadAhead(Generic[T]):
    """An iterator that reads another one ahead, in a thread, which ends with the context or with the source."""

    def __init__(self, source: Iterator[T], ahead: int, idle: float) -> None:
        """Make a reader; it begins to read when its context is entered.

        Args:
            source: What is read. It must end or raise once the call has ended, as gRPC's iterators do.
            ahead: Maximum number of items to hold, in addition to the one that is being read.
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
        """Stop reading."""
        self._closed.set()
        # A reader that waits for room gets it, and then finds that the context has ended.
        self._drop_items()

    def __iter__(self) -> Self:
        """Return the reader itself."""
        return self

    def __next__(self) -> T:
        """Return the next item.

        Raises:
            StopIteration: The source has ended.
            DeadlineExceededError: The item did not come in time.
            Exception: What reading raised.

        """
        try:
            item = self._items.get(timeout=self._idle)
        except Empty:
            msg = f"expected the next message of the stream within {self._idle:g} seconds, got none"
            raise DeadlineExceededError(msg, reason="STREAM_IDLE") from None
        if isinstance(item, _End):
            self._items.put(item)  # for the next call of this method
            try:
                raise StopIteration if item.error is None else item.error
            finally:
                del item  # breaks the cycle of the error, its traceback and this frame, which keeps the stream's memory
        return item

    def _read(self) -> None:
        end = _End(None)
        try:
            for item in self._source:
                self._items.put(item)
                if self._closed.is_set():
                    return
        except Exception as error:  # noqa: BLE001 - raised by __next__
            end = _End(error)
        self._items.put(end)
        del end  # breaks the same cycle as above
        if self._closed.is_set():
            self._drop_items()

    def _drop_items(self) -> None:
        with suppress(Empty):
            while True:
                self._items.get_nowait()


class StreamContext(DerivedContext):
    """The context of a stream, which is ended unless it makes progress, and keeps only the latest done callback.

    gRPC keeps every callback for as long as the call lasts. A stream has many blocks, and the callback of each would
    keep the block and its answer.
    """

    def __init__(self, call: CallContext, stalled_seconds: float) -> None:
        """Create the context of a stream that is ended if `progressed` is not called for some seconds."""
        super().__init__(call)
        self._stalled_seconds = stalled_seconds
        self.progressed()
        self._callback: Callable[[], None] | None = None
        self._registered, self._active = False, True

    def progressed(self) -> None:
        """Note that the stream has made progress, and does not wait for its caller now."""
        self.ticket.expires = time.monotonic() + self._stalled_seconds
        self.ticket.stalls_at = None

    def sends(self) -> None:
        """Note that the stream has made progress, and waits for its caller to read an answer."""
        self.ticket.wait(self._stalled_seconds)

    def received(self, messages: Iterator[T]) -> Iterator[T]:
        """Yield messages, and note while the stream waits for one."""
        while True:
            self.ticket.waits_since = now = time.monotonic()
            self.ticket.stalls_at = now + STALLED_SECONDS
            try:
                message = next(messages)
            except StopIteration:
                return
            self.progressed()
            yield message

    def add_done_callback(self, callback: Callable[[], None]) -> bool:
        """Have `callback` called when the stream ends, in place of the one before; return False if it has ended."""
        # In this order: a stream that ends meanwhile is either seen here or calls the callback.
        self._callback = callback
        if not self._registered:
            self._registered = True
            if not self._call.add_done_callback(self._done):
                self._active = False
        if not self._active:
            self._callback = None  # it refers to this context
        return self._active

    def _done(self) -> None:
        self._active = False
        callback, self._callback = self._callback, None
        if callback is not None:
            callback()


class OpenStreams:
    """The streams of all protocols: a bounded number at a time, each of which must make progress."""

    def __init__(self, limit: int, idle: float) -> None:
        """Allow `limit` streams at a time; one that sends nothing for `idle` seconds fails."""
        self._limit = CallLimit("STREAMS", "streams at a time", limit)
        self._idle = idle

    @property
    def count(self) -> int:
        """Number of open streams."""
        return self._limit.count

    @contextmanager
    def open(self, messages: Iterator[T], ahead: int, call: CallContext) -> Iterator[tuple[Iterator[T], StreamContext]]:
        """Admit a stream until its call ends.

        Args:
            messages: The client's messages.
            ahead: Number of messages to read ahead.
            call: Context of the call, which is cancelled if the stream makes no progress.

        Returns:
            A context with the client's messages, read ahead, and with the stream's context.

        Raises:
            UnavailableError: Too many streams are open.

        """
        call.ticket.enter(self._limit)
        # A client that does not read blocks the sending thread, which only the end of the call frees. Twice the
        # time, so that a client that does not send gets an error instead.
        context = StreamContext(call, 2 * self._idle)
        with ReadAhead(messages, ahead, self._idle) as reader:
            yield context.received(reader), context


class _End:
    """The end of the items, and the error that caused it."""

    def __init__(self, error: Exception | None) -> None:
        self.error = error
