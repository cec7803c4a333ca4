"""The pipeline of a call: token, admission, record, protocol, status. Every transport hands its calls to it.

A transport makes a `CallContext` and calls `admit` before it reads anything of the call's messages. If the call was
rejected, it calls `reject` and reads nothing; otherwise `unary` or `stream`. When the call has ended, on whatever path,
it releases the context's ticket. Every failure is raised as a `StatusError`.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NoReturn

from poolrpc._shapes.rules import clip
from poolrpc._wire.framing import MESSAGE_BYTES_KEY
from poolrpc.errors import InvalidArgumentError, PoolError, UnavailableError
from poolrpc_server.calls.admission import CallLimit, Ticket
from poolrpc_server.calls.admitted_call import AdmittedCall, Patience
from poolrpc_server.calls.call import DEFAULT_PRIORITY
from poolrpc_server.calls.method import UNKNOWN_METHOD, Method
from poolrpc_server.calls.queue import PRIORITIES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from poolrpc_server.calls.admission import AdmissionControl
    from poolrpc_server.calls.call import CallContext
    from poolrpc_server.calls.method import Observers
    from poolrpc_server.calls.tokens import TokenFile

PRIORITY_KEY = "priority"
"""Metadata key of a call's priority: 0 goes first, 1 is the default, 2 goes last."""

PRIORITY_NAMES = tuple(map(str, range(PRIORITIES)))

MAX_SIZE_DIGITS = 19
"""Digits of the largest message size that is read."""

CONTROL_CALLS = 64
"""Calls at a time of methods that do not compute. Each has a thread of its own, so that monitoring is answered while
every other thread is taken; one that waits for its message soon gives way to any other. Half of them are for probes,
so that no method that takes longer keeps those out."""


class CallPipeline:
    """The methods of all protocols, and the steps that are the same for each of their calls."""

    def __init__(  # noqa: PLR0913 - made in one place
        self,
        admission: AdmissionControl,
        admit: Callable[[CallContext, int], object],
        observers: Observers,
        tokens: TokenFile | None = None,
        *,
        max_message_bytes: int,
        receive_seconds: float,
    ) -> None:
        """Make a pipeline without methods.

        Args:
            admission: Counts what calls hold.
            admit: Admits a call that computes and whose message has an announced size (0: unknown), or raises.
            observers: Receivers of every call's record.
            tokens: Tokens, one of which each call has to carry. None: calls need none.
            max_message_bytes: Maximum size of a message that the transports receive.
            receive_seconds: Seconds that a caller may take to send a message, or to read an answer, in addition to
                those that its bytes take at MIN_BYTES_PER_SECOND.

        """
        self._admission = admission
        self._admit = admit
        self._probes = CallLimit("CALLS", "probes at a time", CONTROL_CALLS // 2)
        self._control = CallLimit("CALLS", "calls that do not compute at a time", CONTROL_CALLS // 2)
        self._observers = observers
        self._tokens = tokens
        self._patience = Patience(max_message_bytes, receive_seconds)
        self._methods: dict[str, Method] = {}
        self._stopped = False

    def add(self, methods: Iterable[Method]) -> None:
        """Add the methods of a protocol."""
        for method in methods:
            self._methods[method.name] = method
            self._observers.metrics.expect(*method.labels)

    def stop(self) -> None:
        """Reject calls from now on."""
        self._stopped = True

    def admit(self, call: CallContext, other: Method = UNKNOWN_METHOD) -> AdmittedCall | None:
        """Admit a call before anything of its messages is read.

        Args:
            call: Context of the call, whose ticket is to be released when the call has ended.
            other: The method, if the transport answers it itself: the pipeline only checks the token.

        Returns:
            The call, admitted or rejected; None if the pipeline has no such method, and does not reject the call.

        """
        method = self._methods.get(call.method, other)
        call.record.method = method.name
        call.ticket = Ticket(self._admission, partial(self._end, call), call.make_way)
        announced = 0
        try:
            if self._tokens is not None and not method.public:
                self._authenticate(call, self._tokens)
            if method is other:
                return None
            call.record.streaming = method.stream is not None
            if call.arrived is not None:
                call.ticket.caller = call.caller  # at once; another transport may take long to say who it is
            if self._stopped:
                raise UnavailableError("the server is stopping; try again", reason="STOPPING")
            if method.computes:
                priority, announced = _call_options(call.metadata)
                if call.arrived is not None:
                    announced = call.arrived
                call.set_priority(priority)
                self._admit(call, announced)
            else:
                call.ticket.enter(self._probes if method.probe else self._control)
        except PoolError as error:
            call.ticket.release()
            # Its traceback would keep the call until Python's garbage collection finds the cycle.
            error.with_traceback(None)
            return AdmittedCall(method, call, self._observers, self._patience, error=error)
        return AdmittedCall(method, call, self._observers, self._patience, announced)

    def reject(self, call: CallContext, method: Method, error: PoolError) -> NoReturn:
        """End a call of a method that the transport answers itself, and that it rejects.

        Raises:
            StatusError: The error as a status.

        """
        AdmittedCall(method, call, self._observers, self._patience, error=error).reject()

    @staticmethod
    def _authenticate(call: CallContext, tokens: TokenFile) -> None:
        token = tokens.authenticate([str(value) for key, value in call.metadata if key == "authorization"])
        call.token, call.urgent = token.name, token.urgent
        call.record.note({"caller": token.name})
        token.authorize(call.method)

    def _end(self, call: CallContext, reason: str) -> None:
        call.record.note({"ended": reason})
        self._observers.metrics.ended(reason)
        call.cancel()


def _call_options(metadata: Sequence[tuple[str, str | bytes]]) -> tuple[int, int]:
    """Return the priority and the announced message size that a call's metadata names; 0 stands for no size."""
    priority, announced = DEFAULT_PRIORITY, 0
    for key, value in metadata:
        if key == PRIORITY_KEY:
            if value not in PRIORITY_NAMES:
                msg = f"expected one of {', '.join(PRIORITY_NAMES)}, got {clip(value)}"
                raise InvalidArgumentError(msg, field=f"metadata.{PRIORITY_KEY}")
            priority = int(value)
        elif key == MESSAGE_BYTES_KEY:
            if not (isinstance(value, str) and value.isdecimal() and len(value) <= MAX_SIZE_DIGITS):
                msg = f"expected a number of bytes, got {clip(value)}"
                raise InvalidArgumentError(msg, field=f"metadata.{MESSAGE_BYTES_KEY}")
            announced = int(value)
    return priority, announced
