"""A gRPC server without a wire: what another server received is answered as gRPC's own would have it answered."""

from __future__ import annotations

import contextvars
import threading
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias, TypeVar

import grpc

from poolrpc._wire.status import DETAILS_KEY, encode_error
from poolrpc.errors import InternalError
from poolrpc_server.telemetry.logs import log

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
    from concurrent.futures import Future, ThreadPoolExecutor

T = TypeVar("T")
Pair = tuple[str, str | bytes]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Run: TypeAlias = "Callable[[Callable[[], Any]], Future[Any]]"

UNAVAILABLE, UNIMPLEMENTED = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNIMPLEMENTED


class AbortedError(Exception):
    """A servicer ended its call; the status stands in the call."""


class Call(grpc.ServicerContext):
    """One call: what its servicer sees of it, and the status that it made of it.

    Attributes:
        method: "/package.Service/Method".
        metadata: The caller's.

    """

    def __init__(self, method: str, metadata: Sequence[Pair], peer: str = "") -> None:
        """Make the call of a method, with its metadata; `peer` is who calls, in gRPC's words."""
        self.method = method
        self.metadata = tuple(metadata)
        self._peer = peer
        self._code: grpc.StatusCode | None = None
        self._details = ""
        self._trailing: tuple[Pair, ...] = ()
        self._changing = threading.Lock()
        self._callbacks: list[Callable[[], None]] | None = []

    def leave(self) -> None:
        """Say that nobody waits for an answer any more, or that it has been given."""
        with self._changing:
            callbacks, self._callbacks = self._callbacks or [], None
        for each in callbacks:
            each()

    def is_active(self) -> bool:
        """Tell whether the caller waits."""
        return self._callbacks is not None

    def add_callback(self, callback: Callable[[], None]) -> bool:
        """Have something called at the call's end; False where that was."""
        with self._changing:
            if self._callbacks is None:
                return False
            self._callbacks.append(callback)
            return True

    def cancel(self) -> bool:
        """End the call from this side."""
        self.set_code(grpc.StatusCode.CANCELLED)
        self.leave()
        return True

    def abort(self, code: grpc.StatusCode, details: str) -> NoReturn:
        """End the servicer's part with a status."""
        self._code, self._details = code, details
        raise AbortedError

    def abort_with_status(self, status: grpc.Status) -> NoReturn:
        """End the servicer's part with a status."""
        self._trailing = tuple(status.trailing_metadata or ())
        self.abort(status.code, status.details)

    def set_code(self, code: grpc.StatusCode) -> None:
        """Set the status code."""
        self._code = code

    def set_details(self, details: str) -> None:
        """Set the status's text."""
        self._details = details

    def set_trailing_metadata(self, trailing_metadata: Iterable[Pair]) -> None:
        """Set what goes with the status."""
        self._trailing = tuple(trailing_metadata)

    def code(self) -> grpc.StatusCode | None:
        """Give the status code, None where none was set."""
        return self._code

    def details(self) -> str:
        """Give the status's text."""
        return self._details

    def trailing_metadata(self) -> tuple[Pair, ...]:
        """Give what goes with the status."""
        return self._trailing

    def time_remaining(self) -> float | None:  # type: ignore[override]  # the stubs don't know calls without a deadline
        """Give None: whoever received the call watches its deadline, and cancels."""
        return None

    def invocation_metadata(self) -> tuple[Pair, ...]:
        """Give the caller's metadata."""
        return self.metadata

    def peer(self) -> str:
        """Give who calls."""
        return self._peer

    def peer_identities(self) -> None:
        """Give None: whoever received the call knows."""

    def peer_identity_key(self) -> None:
        """Give None: whoever received the call knows."""

    def auth_context(self) -> Mapping[str, bytes]:
        """Give nothing: whoever received the call knows."""
        return {}

    def send_initial_metadata(self, initial_metadata: object) -> None:
        """Send nothing: there is no wire."""


@dataclass(slots=True)  # a protocol of gRPC's, whose attributes can be set
class _Details:
    """What interceptors see of a call."""

    method: str
    invocation_metadata: tuple[Pair, ...]


class UnwiredServer(grpc.Server):
    """Stands where grpc.server's does: it has its threads, its interceptors and its services, and listens nowhere."""

    def __init__(
        self,
        threads: ThreadPoolExecutor,
        *,
        interceptors: Sequence[grpc.ServerInterceptor] = (),
        options: object = (),  # noqa: ARG002 - a wire's, of which there is none
    ) -> None:
        """Make one, as grpc.server does."""
        self._threads = threads
        self._services: list[grpc.GenericRpcHandler] = []
        self._find: Callable[[grpc.HandlerCallDetails], Handler | None] = self._look_up
        for each in reversed(interceptors):
            self._find = partial(each.intercept_service, self._find)
        self._changed = threading.Condition()
        self._stopped = False
        self._calls: set[Call] = set()

    def unary(self, call: Call, request: bytes) -> Future[bytes]:
        """Have a call of one message each way answered; it then has its status."""
        handler, run = self._begin(call)
        read, write = handler.request_deserializer or _as_it_is, handler.response_serializer or _as_it_is
        behaviour: Any = handler.unary_unary or handler.stream_stream  # the latter of one that refuses, whatever it is

        def answer() -> bytes:
            try:
                return _guarded(call, lambda: write(behaviour(read(request), call)), b"")
            finally:
                self._end(call)

        future: Future[bytes] = run(answer)
        future.add_done_callback(lambda _: self._end(call))  # it may be cancelled before a thread has it
        return future

    def stream(self, call: Call, requests: Iterator[bytes]) -> Answers:
        """Give the answers of a call of many messages each way.

        Args:
            call: The call; it has its status once there are no more answers.
            requests: What comes; read by threads. It is to end once the call has.

        """
        handler, run = self._begin(call)
        read, write = handler.request_deserializer or _as_it_is, handler.response_serializer or _as_it_is
        behaviour: Any = handler.stream_stream

        def answers() -> Generator[bytes]:
            yield from map(write, behaviour(map(read, requests), call))

        return Answers(call, answers(), run, self._end)

    def _begin(self, call: Call) -> tuple[Handler, Run]:
        context = contextvars.copy_context()
        with self._changed:
            stopped = self._stopped
            self._calls.add(call)
        handler = None if stopped else context.run(self._find, _Details(call.method, call.metadata))
        if handler is None:
            told = (UNAVAILABLE, "the server stops") if stopped else (UNIMPLEMENTED, "no such method")
            handler = grpc.stream_stream_rpc_method_handler(lambda _, call: call.abort(*told))
        behaviour = handler.unary_unary or handler.stream_stream
        # What grpc.server asks of a behaviour too.
        threads = getattr(behaviour, "experimental_thread_pool", None) or self._threads
        return handler, lambda work: threads.submit(context.run, work)

    def _end(self, call: Call) -> None:
        call.leave()
        with self._changed:
            self._calls.discard(call)
            self._changed.notify_all()

    def _look_up(self, details: grpc.HandlerCallDetails) -> Handler | None:
        return next(filter(None, (each.service(details) for each in self._services)), None)

    def add_generic_rpc_handlers(self, generic_rpc_handlers: Iterable[grpc.GenericRpcHandler]) -> None:
        """Add services."""
        self._services.extend(generic_rpc_handlers)

    def add_registered_method_handlers(self, service_name: str, method_handlers: Mapping[str, Handler]) -> None:
        """Add nothing: the same services are added as generic handlers."""

    def add_insecure_port(self, address: str) -> int:  # noqa: ARG002 - of a wire
        """Give no port."""
        return 0

    def add_secure_port(self, address: str, server_credentials: grpc.ServerCredentials) -> int:  # noqa: ARG002 - of a wire
        """Give no port."""
        return 0

    def start(self) -> None:
        """Do nothing: calls are answered as they are handed in."""

    def stop(self, grace: float | None) -> threading.Event:
        """Refuse calls from now on, and cancel those that take longer than `grace` seconds; the event tells the end."""
        ended = threading.Event()

        def wait() -> None:
            with self._changed:
                self._changed.wait_for(lambda: not self._calls, grace or 0)
                left = tuple(self._calls)
            for each in left:
                each.cancel()
            ended.set()

        with self._changed:
            self._stopped = True
        threading.Thread(target=wait, name="poolrpc-stop", daemon=True).start()
        return ended


class Answers:
    """The answers of a stream, one at a time."""

    def __init__(self, call: Call, answers: Generator[bytes], run: Run, end: Callable[[Call], None]) -> None:
        """Make them; `run` has each step done by a thread, and `end` is called at the end."""
        self._call, self._answers, self._run, self._end = call, answers, run, end
        self._stepping = threading.Lock()

    def next(self) -> Future[bytes | None]:
        """Have the next one made: None where there is none."""
        return self._run(self._next)

    def close(self) -> None:
        """Want no more."""
        self._call.leave()
        # Not at once: a thread may be at the next one, and finds that nobody waits for it.
        self._run(self._close)

    def _next(self) -> bytes | None:
        with self._stepping:
            answer = _guarded(self._call, lambda: next(self._answers, None), None)
            if answer is None:
                self._end(self._call)
            return answer

    def _close(self) -> None:
        with self._stepping:
            _guarded(self._call, self._answers.close, None)
            self._end(self._call)


def _as_it_is(message: Any) -> Any:  # noqa: ANN401 - as gRPC has it where nobody says how messages are written
    return message


def _guarded(call: Call, work: Callable[[], T], otherwise: T) -> T:
    try:
        return work()
    except AbortedError:
        return otherwise
    except Exception:  # noqa: BLE001 - as gRPC has it
        # The interceptors answer for servicers, so it is a message that can't be read or written.
        log.exception("unexpected error", method=call.method)
        text, details = encode_error(InternalError("expected a message of the method's, got bytes that are none"))
        call.set_trailing_metadata([(DETAILS_KEY, details)])
        call.set_code(grpc.StatusCode.INTERNAL)
        call.set_details(text)
        return otherwise
