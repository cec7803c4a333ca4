"""The threads that calls have, and the calls that need none: who is alone is answered where its message arrived."""

from __future__ import annotations

import inspect
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

from poolrpc_server.calls.admission import refused

if TYPE_CHECKING:
    from collections.abc import Callable

    from poolrpc_server.calls.dispatch import Dispatcher

T = TypeVar("T")


def _find_inside() -> Any:  # noqa: ANN401 - a module that nobody has typed
    """Give the module of gRPC's server if it is inside as it was from 1.75 to 1.85, as far as _read_ahead goes."""
    try:
        inside: Any = import_module("grpc._server")
        asked = {
            inside._unary_response_in_pool: "rpc_event state behavior argument_thunk",  # noqa: SLF001
            inside._receive_message: "state call request_deserializer",  # noqa: SLF001
        }
        for function, names in asked.items():
            if not " ".join(inspect.signature(function).parameters).startswith(names):
                return None
        state = inside._RPCState()  # noqa: SLF001
        known = all(hasattr(state, name) for name in ("condition", "due", "request"))
        known &= hasattr(inside, "_RECEIVE_MESSAGE_TOKEN")
        inside.cygrpc.ReceiveMessageOperation(0)
    except (ImportError, AttributeError, TypeError, ValueError):
        return None
    return inside if known else None


INSIDE = _find_inside()
"""gRPC's server, where a call's message can be read before the call has a thread. None: every call has one at once."""


class CallThreads(ThreadPoolExecutor):
    """The threads of calls, which know how many there are: gRPC would let any number wait for one, unseen.

    A call's thread waits for its message before it comes to the servicer. What was announced is counted until then.

    To wake a thread, twice, is most of what a small call costs in gRPC. So where a call is alone its message is read
    first, and if it is `quick` it is answered by the thread that read it: gRPC's own, which has nothing else to do, as
    no other call is under way. All others have a thread.

    Attributes:
        quick: By method, what tells of a message whether its call takes so little that others can wait for it.

    """

    def __init__(self, most: int, dispatcher: Dispatcher) -> None:
        """Make so many threads, for calls for which the dispatcher has room."""
        super().__init__(most, "poolrpc-call")
        self.quick: dict[bytes, Callable[[bytes], bool]] = {}
        self._most = most
        self._dispatcher = dispatcher
        self._taken = 0
        self._counting = threading.Lock()
        self._announced = threading.local()

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:  # noqa: ANN401 - fn's
        """Have something called."""
        with self._counting:
            self._taken += 1
            alone = self._taken == 1
        # gRPC does so in the thread in which it asked for the call's handler, right after that.
        announced = self._take()
        if alone and not announced and INSIDE is not None and args[:1] == (INSIDE._unary_response_in_pool,):  # noqa: SLF001
            quick = self.quick.get(args[1].call_details.method)
            if quick is not None:
                return self._read_ahead(quick, fn, *args)
        if announced:
            fn = partial(self._awaiting, announced, fn)
        future = super().submit(fn, *args, **kwargs)
        future.add_done_callback(self._done)
        return future

    def check_room(self, priority: int, announced: int) -> None:
        """See that there is a thread for a call, and room for one of that priority, which this thread hands on next.

        Raises:
            UnavailableError: There is none.
            LimitExceededError: No message may be as large as is announced.

        """
        if self._taken >= self._most:
            raise refused("CALLS", "calls at a time", self._most, self._taken + 1)
        self._dispatcher.check_room(priority, announced)
        self._announced.nbytes = announced

    def arrived(self) -> None:
        """Say that this thread's call has its message."""
        if announced := self._take():
            self._dispatcher.arrived(announced)

    def _read_ahead(  # noqa: PLR0913, PLR0917 - what gRPC submits
        self,
        quick: Callable[[bytes], bool],
        run: Callable[..., Any],
        respond: Callable[..., Any],
        event: Any,  # noqa: ANN401 - gRPC's, as the others
        state: Any,  # noqa: ANN401
        behavior: Any,  # noqa: ANN401
        read: Callable[[], object],
        *rest: object,
    ) -> Future[Any]:
        """Do what gRPC's `read` does in a call's thread, so that the message is there when it is seen who answers.

        gRPC has no public way to it. What is used of it is looked for before, in _find_inside.
        """
        future: Future[Any] = Future()
        future.add_done_callback(self._done)
        receive = INSIDE._receive_message(state, event.call, None)  # noqa: SLF001

        def answer(read: Callable[[], object]) -> None:
            try:
                run(respond, event, state, behavior, read, *rest)
            finally:
                future.set_result(None)

        def received(received_event: object) -> object:
            given = receive(received_event)
            message, state.request = state.request, None
            # Without a message gRPC's own reader says what is wrong: it finds the same as this one.
            reader = read if message is None else lambda: message
            if message is not None and self._taken == 1 and quick(message):
                answer(reader)
            else:
                super(CallThreads, self).submit(answer, reader)
            return given

        with state.condition:
            event.call.start_server_batch((INSIDE.cygrpc.ReceiveMessageOperation(0),), received)
            state.due.add(INSIDE._RECEIVE_MESSAGE_TOKEN)  # noqa: SLF001
        return future

    def _awaiting(self, announced: int, fn: Callable[..., T], *args: object, **kwargs: object) -> T:
        self._announced.nbytes = announced
        try:
            return fn(*args, **kwargs)
        finally:
            self.arrived()  # where the caller left before it

    def _take(self) -> int:
        nbytes: int = getattr(self._announced, "nbytes", 0)
        self._announced.nbytes = 0
        return nbytes

    def _done(self, _: object) -> None:
        with self._counting:
            self._taken -= 1
