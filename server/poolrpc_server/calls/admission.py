"""Admission control: the calls and the bytes in flight, counted before anything is allocated, and their limits.

Every call has a ticket, and everything that the call holds is on it: its part of the limits on the number of calls, and
its bytes. The ticket is released once, when the call has ended, so that nothing can stay reserved.
"""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Condition, Lock
from time import monotonic
from typing import TYPE_CHECKING, Protocol, Self

from poolrpc.errors import CancelledError, LimitExceededError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

RETRY_DELAY = 0.1
"""Seconds that a rejected caller is asked to wait, without a better estimate: about what a large request takes."""

SMALL_BYTES = 2**20
"""A quarter of the bytes is left for reservations up to this size: large uploads never exclude small calls."""

STALLED_SECONDS = 0.5
"""Seconds after which a call that waits for its caller may be ended because another one needs what it holds."""

CONTROL_STALLED_SECONDS = 0.02
"""The same for calls that do not compute: their small messages come with the calls."""

STALLED_BYTES_PER_SECOND = 25 * 2**20
"""Further time for the bytes that the caller has to send or read: what a network of 200 Mbit/s takes."""

ROOM_SECONDS = 2 * STALLED_SECONDS
"""Seconds that a call waits for room for its message, in which calls that stall give way to it."""

UNKNOWN_ROOM_SECONDS = 5.0
"""The same for a message whose size is not announced: it asks for more room than most messages take."""

MAX_WAITING = 32
"""Calls that wait for room at a time: they are among the calls in flight, and more of them would keep others out."""

ENDED = "the call was cancelled before it was computed"
"""Message of the error of a call that has ended."""


def rejection(reason: str, what: str, limit: float, actual: float, delay: float = RETRY_DELAY) -> UnavailableError:
    """Return the error of a call that is rejected temporarily because a limit of the server is reached.

    Args:
        reason: Reason of the error, for programs.
        what: What the limit counts, for the message.
        limit: The limit.
        actual: The count with this call included.
        delay: Seconds that the caller is asked to wait before it tries again.

    """
    message = f"expected at most {limit:g} {what}, got {actual:g}; try again"
    limits = {"limit": f"{limit:g}", "actual": f"{actual:g}"}
    return UnavailableError(message, reason=reason, metadata=limits, retry_delay=delay)


def share_of(limit: int) -> int:
    """Return the part of a limit that one caller may hold: the rest is left for the others."""
    return limit - limit // 4


class CallLimit:
    """A limit on the number of calls of some kind at a time, and on the part of it that one caller may hold.

    Args:
        reason: Reason of the error of a call that is rejected.
        what: What is counted, for the error's message.
        maximum: The limit.

    """

    def __init__(self, reason: str, what: str, maximum: int) -> None:
        self.reason, self.what, self.maximum = reason, what, maximum
        self.tickets: dict[Ticket, None] = {}
        self.callers: Counter[str] = Counter()

    @property
    def count(self) -> int:
        """Number of calls that are counted now."""
        return len(self.tickets)


def _nothing(*_: object) -> None:
    """Do nothing."""


class Ticket:
    """What one call holds until it ends; every method is for any thread.

    Attributes:
        caller: The caller, among whose calls the limits are divided: a token or a connection. Empty if unknown.
        nbytes: Bytes that are reserved.
        before_wait: Called before the call's thread waits for room.

    """

    __slots__ = (
        "_admission",
        "_end",
        "before_wait",
        "caller",
        "expires",
        "limits",
        "nbytes",
        "released",
        "stalls_at",
        "waits_since",
    )

    def __init__(
        self,
        admission: AdmissionControl,
        end: Callable[[str], object] = _nothing,
        before_wait: Callable[[], object] = _nothing,
    ) -> None:
        """Make the ticket of a call that holds nothing yet.

        Args:
            admission: Counts what is held.
            end: Ends the call; its argument is the reason.
            before_wait: Called before the call's thread waits for room.

        """
        self._admission = admission
        self._end = end
        self.before_wait = before_wait
        self.caller = ""
        self.nbytes = 0
        self.limits: tuple[CallLimit, ...] = ()
        self.released = False
        self.expires: float | None = None  # when the call is ended, by the monotonic clock
        self.stalls_at: float | None = None  # when it may be ended in favor of another call, if it waits for its caller
        self.waits_since = 0.0  # when it began to wait for its caller, if it does

    def enter(self, limit: CallLimit) -> None:
        """Count the call among those of a limit.

        Raises:
            UnavailableError: The limit, or the caller's share of it, is reached.
            CancelledError: The call has ended.

        """
        self._admission.enter(self, limit)

    def leave(self, limit: CallLimit) -> None:
        """Stop counting the call among those of a limit."""
        self._admission.leave(self, limit)

    def identify(self, caller: str) -> None:
        """Set the caller; raises as `enter` does if its share of a limit is reached."""
        if caller != self.caller:
            self._admission.identify(self, caller)

    def reserve(self, nbytes: int, wait: float = 0.0) -> None:
        """Reserve further bytes.

        Args:
            nbytes: The bytes.
            wait: Seconds to wait for room, if there is none; calls that stall make room meanwhile. Of the calls that
                wait, the one whose caller holds the fewest bytes is the first.

        Raises:
            UnavailableError: They do not fit together with those of other calls.
            LimitExceededError: They would not fit if there were no other call.
            CancelledError: The call has ended.

        """
        self._admission.reserve(self, nbytes, wait=wait)

    def reserve_unknown(self, nbytes: int) -> None:
        """Reserve bytes for a message that may be of any size up to this, but as soon as there is room.

        Raises as `reserve` does, but a message that is larger than all bytes gets as many as one caller may have.
        """
        self._admission.reserve_unknown(self, nbytes)

    def shrink(self, nbytes: int) -> None:
        """Return all but `nbytes` of the reserved bytes."""
        if nbytes < self.nbytes:
            self._admission.shrink(self, nbytes)

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Return the bytes that are reserved within the context at its end."""
        nbytes = self.nbytes
        try:
            yield
        finally:
            self.shrink(nbytes)

    def wait(self, seconds: float, nbytes: int = 0, patience: float = STALLED_SECONDS) -> None:
        """Note that the call waits for its caller from now on.

        Args:
            seconds: Seconds after which the call is ended.
            nbytes: Bytes that the caller has to send or to read.
            patience: Seconds after which it may be ended because another call needs what it holds, without the time
                that the bytes take.

        """
        self.waits_since = now = monotonic()
        self.expires = now + seconds
        self.stalls_at = now + patience + nbytes / STALLED_BYTES_PER_SECOND

    def proceed(self) -> None:
        """Note that the call does not wait for its caller any more."""
        self.expires = self.stalls_at = None

    def end(self, reason: str) -> None:
        """Return everything at once, and end the call."""
        end = self._end
        self.release()
        end(reason)

    def release(self) -> None:
        """Return everything, because the call has ended; a second time does nothing."""
        if not self.released:
            self._admission.release(self)
        # It refers to the call, which has this ticket: gRPC would keep both, and the stream, until Python's garbage
        # collection finds the cycle.
        self._end = self.before_wait = _nothing


class IdleMemory(Protocol):
    """Memory that is kept between calls to be used again."""

    @property
    def idle_limit(self) -> int: ...  # noqa: D102 - its largest size in bytes
    @property
    def idle_bytes(self) -> int: ...  # noqa: D102 - its size in bytes

    def drop_idle(self) -> None:
        """Return all of it to the system."""


@dataclass(slots=True)
class _Waiting:
    """A call that waits for room.

    Attributes:
        nbytes: Its bytes.
        room: Notified when there may be room.
        known: Whether its message is known to have so many bytes.
        until: When its wait ends, by the monotonic clock.

    """

    nbytes: int
    room: Condition
    known: bool
    until: float


class _Ended(list[Ticket]):
    """The calls that give way in a context: they are released in it, under the lock, and ended after it."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for ticket in self:
            ticket.end("STALLED")


class AdmissionControl:
    """The tickets of all calls, and the limit of their bytes.

    Args:
        max_bytes: Bytes in flight.
        idle: Memory that is kept between calls. It counts too, and gives way to calls: it is dropped when the two
            together exceed `max_bytes`.

    Attributes:
        max_bytes: The limit.
        on_enter: Called for each call that enters.

    """

    def __init__(self, max_bytes: int, idle: IdleMemory | None = None) -> None:
        self.max_bytes = max_bytes
        self._idle = idle
        self._bytes = self._excess = 0
        self._caller_bytes: Counter[str] = Counter()
        self._tickets: dict[Ticket, None] = {}
        self._lock = Lock()
        self._waiting: dict[Ticket, _Waiting] = {}
        self.on_enter: Callable[[], object] = lambda: None

    @property
    def bytes_in_flight(self) -> int:
        """Bytes that all calls have reserved."""
        return self._bytes

    @property
    def waiting(self) -> int:
        """Number of calls that wait for room."""
        return len(self._waiting)

    def set_excess(self, nbytes: int) -> None:
        """Set the bytes that the process has in excess of what is counted; new messages wait until they have room too.

        What a message needs when it has come does not: it is needed to finish the call, and to return everything.
        """
        with self._lock:
            self._excess = nbytes
            self._notify_first()

    def tickets(self) -> list[Ticket]:
        """Return the tickets that hold something."""
        return list(self._tickets)

    def enter(self, ticket: Ticket, limit: CallLimit) -> None:
        """See Ticket."""
        with _Ended() as ended, self._lock:
            if ticket.released:  # nothing would release it again
                raise CancelledError(ENDED)
            if limit.count >= limit.maximum:
                error = rejection(limit.reason, limit.what, limit.maximum, limit.maximum + 1)
                self._give_way(_stalled(limit.tickets), ended, error)
            limit.tickets[ticket] = None
            ticket.limits += (limit,)
            self._tickets[ticket] = None
            if ticket.caller:
                self._count_caller(ticket, limit, ended)
        self.on_enter()

    def leave(self, ticket: Ticket, limit: CallLimit) -> None:
        """See Ticket."""
        with self._lock:
            if not ticket.released:
                self._leave(ticket, limit)
                ticket.limits = tuple(each for each in ticket.limits if each is not limit)

    @staticmethod
    def _leave(ticket: Ticket, limit: CallLimit) -> None:
        limit.tickets.pop(ticket, None)
        limit.callers[ticket.caller] -= 1
        if limit.callers[ticket.caller] <= 0:
            del limit.callers[ticket.caller]

    def identify(self, ticket: Ticket, caller: str) -> None:
        """See Ticket."""
        with _Ended() as ended, self._lock:
            if ticket.released or ticket.caller == caller:
                return
            ticket.caller = caller
            for limit in ticket.limits:
                self._count_caller(ticket, limit, ended)

    def _count_caller(self, ticket: Ticket, limit: CallLimit, ended: list[Ticket]) -> None:
        # Under the lock.
        limit.callers[ticket.caller] += 1
        count, share = limit.callers[ticket.caller], share_of(limit.maximum)
        if count > share:
            error = rejection(limit.reason, f"{limit.what} of one caller", share, count)
            own = _stalled(each for each in limit.tickets if each.caller == ticket.caller)
            self._give_way(own, ended, error)

    def _give_way(self, stalled: dict[Ticket, float], ended: list[Ticket], error: UnavailableError) -> None:
        """Release the call that has waited longest, of the caller with the most calls that wait too long, or raise."""
        # Under the lock.
        if not stalled:
            raise error
        counts = Counter(each.caller for each in stalled)
        first = min(stalled, key=lambda each: (-counts[each.caller], stalled[each]))
        self._release(first)
        ended.append(first)

    def reserve_unknown(self, ticket: Ticket, nbytes: int) -> None:
        """See Ticket."""
        self.reserve(ticket, min(nbytes, share_of(self.max_bytes)), wait=UNKNOWN_ROOM_SECONDS, known=False)

    def reserve(self, ticket: Ticket, nbytes: int, *, wait: float = 0.0, known: bool = True) -> None:
        """See Ticket; `wait` is the maximum time to wait for room, in seconds, and `known` whether the size is."""
        with _Ended() as ended, self._lock:
            self._check_fits(ticket, nbytes)
            try:
                if wait and self._waiting and nbytes > SMALL_BYTES:
                    raise self._out_of_bytes("", self.max_bytes, self._bytes, nbytes)  # others are before it
                self._reserve(ticket, nbytes, ended, arrives=wait > 0)
            except UnavailableError:
                if not wait:
                    raise
                waiter = _Waiting(nbytes, Condition(self._lock), known, monotonic() + wait)
                self._wait_for_room(ticket, waiter, ended)
        self._make_room()

    def _check_fits(self, ticket: Ticket, nbytes: int) -> None:
        if nbytes + ticket.nbytes > self.max_bytes:
            msg = f"expected a call of at most {self.max_bytes} bytes, got {nbytes + ticket.nbytes} (inputs, outputs "
            msg += "and the memory to compute them)"
            limits = {"limit": str(self.max_bytes), "actual": str(nbytes + ticket.nbytes)}
            raise LimitExceededError(msg, reason="IN_FLIGHT_BYTES", metadata=limits)

    def _reserve(self, ticket: Ticket, nbytes: int, ended: list[Ticket], *, arrives: bool) -> None:
        # Under the lock.
        while not ticket.released:
            excess = self._excess if arrives and nbytes > SMALL_BYTES else 0
            missing, error, among = self._shortage(ticket, nbytes, excess)
            if error is None:
                ticket.nbytes += nbytes
                self._bytes += nbytes
                self._caller_bytes[ticket.caller] += nbytes
                self._tickets[ticket] = None
                return
            others = [each for each in self._tickets if each.nbytes and each is not ticket]
            stalled = _stalled(each for each in others if among in {None, each.caller})
            # Otherwise ending them would not help; without any other call, this one may have everything.
            if sum(each.nbytes for each in stalled) < missing and len(stalled) < len(others):
                raise error
            self._give_way(stalled, ended, error)
        raise CancelledError(ENDED)

    def _wait_for_room(self, ticket: Ticket, waiter: _Waiting, ended: list[Ticket]) -> None:
        # Under the lock, which is released while it waits.
        ticket.before_wait()
        self._waiting[ticket] = waiter
        if len(self._waiting) > MAX_WAITING:
            last = self._waiting[max(reversed(self._waiting), key=self._rank)]
            last.until = 0.0
            last.room.notify()
        try:
            while True:
                left = waiter.until - monotonic()
                first = self._first_waiting() is ticket
                # A small message takes the room that is left for it; the last chance does not depend on the others. A
                # call that has ended meanwhile gets an error.
                if first or waiter.nbytes <= SMALL_BYTES or left <= 0 or ticket.released:
                    try:
                        return self._reserve(ticket, waiter.nbytes, ended, arrives=True)
                    except UnavailableError:
                        if left <= 0:
                            raise
                # The first one looks for calls that stall; the others are notified, but for one that comes to be first
                # because other callers have got more bytes.
                waiter.room.wait(min(left, STALLED_SECONDS / 4 if first else STALLED_SECONDS))
        finally:
            del self._waiting[ticket]
            self._notify_first()

    def _first_waiting(self) -> Ticket | None:
        """Return the call that waits for room and is to have it first; of equals, the one that came first."""
        # Under the lock.
        return min(self._waiting, key=self._rank, default=None)

    def _rank(self, ticket: Ticket) -> tuple[bool, int, bool]:
        waiter = self._waiting[ticket]
        return waiter.nbytes > SMALL_BYTES, self._caller_bytes[ticket.caller], not waiter.known

    def _notify_first(self) -> None:
        # Under the lock.
        if self._waiting and (first := self._first_waiting()) is not None:
            self._waiting[first].room.notify()

    def _shortage(self, ticket: Ticket, nbytes: int, excess: int) -> tuple[int, UnavailableError | None, str | None]:
        """Return how many bytes are missing, the error that says so, and the only caller whose calls could return them.

        The error is None if they fit, and the caller if those of any caller could.
        """
        # A call alone may have everything, and a caller's only call may exceed the caller's share.
        alone = self._bytes == ticket.nbytes
        held, own = self._bytes + (0 if alone else excess), self._caller_bytes[ticket.caller]
        limit = self.max_bytes if nbytes <= SMALL_BYTES or alone else share_of(self.max_bytes)
        if held + nbytes > limit:
            return held + nbytes - limit, self._out_of_bytes("", limit, held, nbytes), None
        share = share_of(self.max_bytes)
        if ticket.caller and own > ticket.nbytes and own + nbytes > share:
            return own + nbytes - share, self._out_of_bytes(" of one caller", share, own, nbytes), ticket.caller
        return 0, None, None

    def shrink(self, ticket: Ticket, nbytes: int) -> None:
        """See Ticket."""
        with self._lock:
            if not ticket.released:
                self._return_bytes(ticket, nbytes)

    def release(self, ticket: Ticket) -> None:
        """See Ticket."""
        with self._lock:
            self._release(ticket)

    def _release(self, ticket: Ticket) -> None:
        # Under the lock.
        if ticket.released:
            return
        ticket.released = True
        if ticket in self._waiting:
            self._waiting[ticket].room.notify()
        self._return_bytes(ticket, 0)
        self._tickets.pop(ticket, None)
        for limit in ticket.limits:
            self._leave(ticket, limit)

    def _return_bytes(self, ticket: Ticket, keep: int) -> None:
        # Under the lock.
        nbytes = ticket.nbytes - keep
        if nbytes <= 0:
            return
        ticket.nbytes = keep
        self._bytes -= nbytes
        self._caller_bytes[ticket.caller] -= nbytes
        if self._caller_bytes[ticket.caller] <= 0:
            del self._caller_bytes[ticket.caller]
        self._notify_first()

    def _make_room(self) -> None:
        # The size of idle memory takes a lock to read, and seldom matters.
        idle = self._idle
        if idle is None or self._bytes + idle.idle_limit <= self.max_bytes:
            return
        if self._bytes + idle.idle_bytes > self.max_bytes:
            idle.drop_idle()

    @staticmethod
    def _out_of_bytes(whose: str, limit: int, held: int, nbytes: int) -> UnavailableError:
        message = f"expected at most {limit} bytes in flight{whose}, got {held} and {nbytes} more; try again"
        limits = {"limit": str(limit), "actual": str(held + nbytes)}
        return UnavailableError(message, reason="IN_FLIGHT_BYTES", metadata=limits, retry_delay=RETRY_DELAY)


def _stalled(tickets: Iterable[Ticket]) -> dict[Ticket, float]:
    """Return the calls that wait for their callers too long, and since when."""
    now = monotonic()
    # Read once: the call's own thread may set it to None at any moment.
    return {each: since for each in tickets if (since := each.stalls_at) is not None and since <= now}
