"""The gRPC transport: a grpcio server on its addresses, with health, reflection and the threads of calls."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
from grpc_health.v1 import health_pb2  # noqa: F401 - its descriptor, for reflection
from grpc_reflection.v1alpha import reflection, reflection_pb2

from poolrpc.addresses import grpc_target, unix_path
from poolrpc_server.calls.method import Method
from poolrpc_server.calls.pipeline import CONTROL_CALLS
from poolrpc_server.protocols.messages import parse
from poolrpc_server.sockets import prepare_path
from poolrpc_server.transports.grpc.health_watch import HealthWatch
from poolrpc_server.transports.grpc.interceptor import PipelineInterceptor

if TYPE_CHECKING:
    from collections.abc import Iterator
    from threading import Event

    from poolrpc_server.calls.call import CallContext
    from poolrpc_server.calls.pipeline import CallPipeline
    from poolrpc_server.protocols.health import Health
    from poolrpc_server.transports.grpc.tls import Certificates

MAX_PENDING_CALLS = 3000
"""Calls that may wait for the thread that admits them: gRPC's own hard limit. By default it cancels any of them from
1000 on, at random, and a client does not try such a call again."""

MAX_FRAME_BYTES = 4 * 2**20
"""Size of HTTP/2's frames that clients may send. With HTTP/2's own 16 KiB, they take three times the CPU time to send a
message of 16 MiB."""

HANDSHAKE_MILLISECONDS = 5000
"""Milliseconds in which a new connection has to send what HTTP/2 and TLS require first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GrpcSettings:
    """Settings of a gRPC server and of its connections; seconds of 0 leave gRPC's own default.

    Attributes:
        call_threads: Threads of calls that compute.
        max_message_bytes: Maximum size of a message, in each direction.
        max_metadata_bytes: Maximum size of a call's metadata.
        max_connections: Maximum number of connections on an address.
        max_connection_calls: Maximum number of concurrent calls on a connection.
        keepalive_seconds: Idle time before the server sends a keepalive ping.
        keepalive_timeout_seconds: Seconds to wait for the ping's acknowledgement.
        min_ping_seconds: Minimum time between a client's pings; a client that sends them more often is disconnected.
        max_connection_age_seconds: Age at which clients are asked to reconnect; calls in flight may finish.
        max_connection_idle_seconds: Time without calls after which a connection is closed.
        lookahead_bytes: Bytes of a message that gRPC takes before a handler asks for the message.
        share_ports: Whether other processes may listen on the same ports.

    """

    call_threads: int
    max_message_bytes: int
    max_metadata_bytes: int
    max_connections: int
    max_connection_calls: int
    keepalive_seconds: float
    keepalive_timeout_seconds: float
    min_ping_seconds: float
    max_connection_age_seconds: float
    max_connection_idle_seconds: float
    lookahead_bytes: int
    share_ports: bool = False

    def options(self) -> list[tuple[str, int]]:
        """Return the settings as gRPC channel arguments."""
        seconds = {
            "grpc.keepalive_time_ms": self.keepalive_seconds,
            "grpc.keepalive_timeout_ms": self.keepalive_timeout_seconds,
            "grpc.http2.min_ping_interval_without_data_ms": self.min_ping_seconds,
            "grpc.max_connection_age_ms": self.max_connection_age_seconds,
            "grpc.max_connection_idle_ms": self.max_connection_idle_seconds,
        }
        return [
            *((name, round(value * 1000)) for name, value in seconds.items() if value),
            # The peer of a connection without calls may be gone too.
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.max_concurrent_streams", self.max_connection_calls),
            # It counts streams that have ended too, until Python drops them: clients within the limit were rejected.
            ("grpc.http.overload_protection", 0),
            # If the two differed, gRPC would reject calls between them at random.
            ("grpc.max_metadata_size", self.max_metadata_bytes),
            ("grpc.absolute_max_metadata_size", self.max_metadata_bytes),
            ("grpc.max_receive_message_length", self.max_message_bytes),
            ("grpc.max_send_message_length", self.max_message_bytes),
            # Otherwise two servers could listen on one port, and each would get some of the calls.
            ("grpc.so_reuseport", int(self.share_ports)),
            ("grpc.max_allowed_incoming_connections", self.max_connections),
            ("grpc.server_handshake_timeout_ms", HANDSHAKE_MILLISECONDS),
            ("grpc.server.max_pending_requests", MAX_PENDING_CALLS),
            ("grpc.server.max_pending_requests_hard_limit", MAX_PENDING_CALLS),
            # By default gRPC adapts this window to the connection: it was seen to hold 10 MB of a call that waits for
            # room, and 8 MB of an idle connection, which nothing counts.
            ("grpc.http2.bdp_probe", 0),
            ("grpc.http2.lookahead_bytes", self.lookahead_bytes),
            ("grpc.http2.max_frame_size", MAX_FRAME_BYTES),
            # A compressed message may inflate to any size.
            ("grpc.compression_enabled_algorithms_bitset", 1),
        ]


class GrpcServer:
    """A grpcio server whose calls the pipeline answers.

    Attributes:
        addresses: The addresses on which it listens, with the actual number in place of port 0.

    """

    def __init__(
        self,
        pipeline: CallPipeline,
        probes: Health,
        listen: tuple[str, ...],
        settings: GrpcSettings,
        certificates: Certificates | None = None,
    ) -> None:
        """Make a server and take its addresses.

        Args:
            pipeline: Answers its calls.
            probes: Health of the server; its services are those that reflection names.
            listen: Addresses, "host:port" (port 0: a free one) or "unix:PATH".
            settings: Settings of the server.
            certificates: TLS on every address but unix sockets. None: plaintext.

        Raises:
            ValueError: An address is in use, or not one of this machine; the message says which.

        """
        self._certificates = certificates
        self._executor = ThreadPoolExecutor(settings.call_threads, "poolrpc-call")
        self._control = ThreadPoolExecutor(CONTROL_CALLS, "poolrpc-control")
        self._watch = HealthWatch(probes, pipeline.reject)
        names = (*filter(None, probes.services), reflection.SERVICE_NAME)
        pipeline.add([_reflection_method(names)])
        interceptor = PipelineInterceptor(pipeline, self._executor_of, self._watch)
        self._server = grpc.server(self._executor, interceptors=[interceptor], options=settings.options())
        try:
            self.addresses = tuple(map(self._listen, listen))
        except BaseException:
            self.stop(0).wait()
            self.close()
            raise

    def start(self) -> None:
        """Accept calls."""
        self._server.start()

    def stop(self, grace: float) -> Event:
        """Reject new calls, and cancel those that take longer than `grace` seconds; the event is set at the end.

        Without grace, it returns at the end.
        """
        # For any number gRPC starts a thread, which Python 3.12 and newer don't allow at the end of the process.
        stopped = self._server.stop(grace or None)
        self._watch.close()
        return stopped

    def close(self) -> None:
        """End the threads, once the server has stopped."""
        for executor in (self._executor, self._control):
            executor.shutdown()

    def _executor_of(self, method: Method) -> ThreadPoolExecutor:
        return self._executor if method.computes else self._control

    def _listen(self, address: str) -> str:
        try:
            if path := unix_path(address):
                prepare_path(Path(path))
            # Only this machine can reach a unix socket, and its clients share memory with the server.
            if path or self._certificates is None:
                port = self._server.add_insecure_port(grpc_target(address))
            else:
                port = self._server.add_secure_port(address, self._certificates.credentials())
        except (RuntimeError, BlockingIOError):
            raise ValueError(
                f"expected a free address, got {address!r}: it is in use, or does not belong to this machine"
            ) from None
        return address if path else f"{address.rpartition(':')[0]}:{port}"


def _reflection_method(names: tuple[str, ...]) -> Method:
    servicer = reflection.ReflectionServicer(names)

    def reflect(messages: Iterator[bytes], call: CallContext) -> Iterator[bytes]:
        requests = (parse(reflection_pb2.ServerReflectionRequest, message) for message in messages)
        for response in servicer.ServerReflectionInfo(requests, call):
            yield response.SerializeToString()

    return Method(f"/{reflection.SERVICE_NAME}/ServerReflectionInfo", stream=reflect, probe=True)
