"""The reaper: a thread that ends calls whose caller keeps them waiting for too long, or that fill the memory.

What a call has announced, or its plan needs, is counted before it is allocated. The size of a message is not: gRPC
holds all of it before it shows any of it, and the size that a caller announces may be a lie. So the process's memory is
measured, as Envoy's overload manager does: what it has in excess of what is counted keeps new messages waiting, and
above the limit calls that wait for messages are ended.
"""

from __future__ import annotations

import ctypes
from threading import Event, Thread
from time import monotonic
from typing import TYPE_CHECKING

from poolrpc_server.telemetry.logs import log

if TYPE_CHECKING:
    from collections.abc import Callable

    from poolrpc_server.calls.admission import AdmissionControl, Ticket

MIN_SECONDS, MAX_SECONDS = 0.02, 0.5
"""Shortest and longest interval of the reaper."""

FILL_BYTES_PER_SECOND = 2 * 2**30
"""Speed at which messages may fill the memory: about twice what gRPC receives from loopback."""

TRIM_SHARE = 0.05
"""Part of the time that may be spent on returning freed memory to the system: threads that need memory wait for it."""

LINGER_SECONDS = 1.0
"""Time that the reaper goes on without a call, so that a sequence of calls does not wake it for each one."""


class Reaper:
    """A thread that looks at all calls in flight from time to time, and sleeps while there are none.

    The less memory is free, the shorter is the interval: waking at 20 Hz was measured to cost a tenth of the CPU time
    of small calls.

    Args:
        admission: The calls.
        resident: Returns the memory of the process in bytes; 0 if it is unknown.
        max_resident: Memory above which calls that wait for messages are ended, in bytes: all that may be counted, and
            what the process takes besides.
        drop_idle: Drops memory that is kept for later calls.

    Attributes:
        on_look: Called at each look.

    """

    def __init__(
        self,
        admission: AdmissionControl,
        resident: Callable[[], int],
        max_resident: int,
        drop_idle: Callable[[], object] = lambda: None,
    ) -> None:
        self._admission = admission
        self._resident = resident
        self._max_resident = max_resident
        self._max_uncounted = max_resident - admission.max_bytes
        self._drop_idle = drop_idle
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)
        self._trims_at = 0.0
        self.on_look: Callable[[], object] = lambda: None
        self._busy = Event()
        self._closed = False
        self._thread = Thread(target=self._run, name="poolrpc-reaper", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Begin to look at the calls, since there is one."""
        if not self._busy.is_set():
            self._busy.set()

    def close(self) -> None:
        """End the thread."""
        self._closed = True
        self._busy.set()
        self._thread.join()

    def _run(self) -> None:
        pause, last, interval = Event(), 0.0, MIN_SECONDS
        while self._busy.wait() and not self._closed:
            tickets = self._admission.tickets()
            now = monotonic()
            if tickets:
                last = now
                try:
                    self.on_look()
                    self._end_late(tickets, now)
                    free = self._max_resident - self._bound_memory(tickets)
                    interval = max(MIN_SECONDS, min(free / FILL_BYTES_PER_SECOND, MAX_SECONDS))
                except Exception:  # noqa: BLE001 - the thread must go on for the other calls
                    log.exception("reaper failed")
            elif now - last > LINGER_SECONDS:
                self._busy.clear()
                if not self._admission.tickets():  # else one came meanwhile, and found the event set
                    if self._trims_at:  # memory ran out: what the C library still keeps is returned now
                        self._trims_at = 0.0
                        self._return_memory()
                        self._admission.set_excess(self._excess(self._resident()))
                    # A call is often over before this thread runs: what woke it counts, not whether it finds the call.
                    self._busy.wait()
                    last = monotonic()
                    continue
                self._busy.set()
            pause.wait(interval)

    @staticmethod
    def _end_late(tickets: list[Ticket], now: float) -> None:
        for ticket in tickets:
            expires = ticket.expires
            if expires is not None and expires <= now:
                ticket.end("TIMEOUT")

    def _bound_memory(self, tickets: list[Ticket]) -> int:
        """Return memory and end calls as far as is needed, and return the bytes of memory that were measured last."""
        resident = self._resident()
        now = monotonic()
        needed = resident > self._max_resident or (self._admission.waiting and self._excess(resident) > 0)
        returned = needed and now >= self._trims_at
        if returned:
            # Memory that was freed counts until the C library returns it. What calls that were ended held is freed soon
            # after it, and seen the next time: no other call is ended before.
            self._return_memory()
            resident = self._resident()
            self._trims_at = monotonic() + (monotonic() - now) / TRIM_SHARE
        self._admission.set_excess(self._excess(resident))
        if returned and resident > self._max_resident:
            self._end_longest(tickets, now, resident)
        return resident

    @staticmethod
    def _end_longest(tickets: list[Ticket], now: float, resident: int) -> None:
        """End the calls that wait for messages of the caller that keeps the server waiting the longest."""
        # A stream expires while it computes as well, but stalls only while it waits for its caller. A message that has
        # been waited for so briefly cannot be large.
        waiting = [
            (ticket, waited)
            for ticket in tickets
            if ticket.stalls_at is not None and (waited := now - ticket.waits_since) > MIN_SECONDS
        ]
        if not waiting:
            return
        # The longer a message is waited for, the more of it may have arrived.
        seconds: dict[str, float] = {}
        for ticket, waited in waiting:
            seconds[ticket.caller] = seconds.get(ticket.caller, 0.0) + waited
        caller = max(seconds, key=seconds.__getitem__)
        ended = [ticket for ticket, _ in waiting if ticket.caller == caller]
        log.warning("calls ended: too much memory", calls=len(ended), caller=caller, resident_bytes=resident)
        for ticket in ended:
            ticket.end("MEMORY")

    def _excess(self, resident: int) -> int:
        """Return by how many bytes the memory that is not counted exceeds what it may be."""
        return max(0, resident - self._max_uncounted - self._admission.bytes_in_flight)

    def _return_memory(self) -> None:
        self._drop_idle()
        self._trim(0)
