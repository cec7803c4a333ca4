"""A peer that speaks HTTP/2 without gRPC: it writes what no gRPC client would, and reads only when it wants to."""

from __future__ import annotations

import socket
import struct
from typing import Self

import h2.config
import h2.connection
import h2.events
import h2.settings

from poolrpc.addresses import unix_path

MIB = 2**20
MAX_STREAMS = 2**31 - 1


def framed(data: bytes, *, compressed: bool = False) -> bytes:
    """Return a message with gRPC's prefix."""
    return struct.pack(">BI", compressed, len(data)) + data


def connect(address: str, timeout: float = 30) -> socket.socket:
    """Connect to "host:port" or "unix:PATH"."""
    path = unix_path(address)
    if not path:
        host, _, port = address.rpartition(":")
        return socket.create_connection((host, int(port)), timeout)
    made = socket.socket(socket.AF_UNIX)
    made.settimeout(timeout)
    try:
        made.connect(path)
    except OSError:
        made.close()
        raise
    return made


class RawPeer:
    """A connection to a server, whose frames are written by the caller.

    Args:
        address: "host:port" or "unix:PATH".
        window: Bytes that the server may send on a stream before it is allowed more. None: HTTP/2's 64 KiB.
        timeout: Seconds to wait for the server.

    Attributes:
        socket: The connection.
        ended: Streams that are over, with their headers and trailers.
        answering: Streams on which data was received.

    """

    def __init__(self, address: str, *, window: int | None = None, timeout: float = 30) -> None:
        self.socket = connect(address, timeout)
        self.ended: dict[int, dict[str, str]] = {}
        self.answering: set[int] = set()
        self._seen: dict[int, dict[str, str]] = {}
        self._http = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        if window is not None:
            size = {h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window}
            self._http.local_settings = h2.settings.Settings(client=True, initial_values=size)
        self._http.initiate_connection()
        self._http.increment_flow_control_window(MIB)  # of the connection; each stream keeps its own
        self.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def open(self, method: str, *headers: tuple[str, str]) -> int:
        """Open a stream, and return its number; the server's limit on concurrent streams is ignored."""
        self._http.remote_settings[h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS] = MAX_STREAMS
        self._http.remote_settings.acknowledge()
        stream = self._http.get_next_available_stream_id()
        fixed = [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", method),
            (":authority", "localhost"),
            ("content-type", "application/grpc"),
            ("te", "trailers"),
        ]
        self._http.send_headers(stream, [*fixed, *headers])
        return stream

    def send(self, stream: int, data: bytes, *, end: bool = True) -> None:
        """Send data as flow control allows; stop when the stream is over."""
        rest = memoryview(data)
        while stream not in self.ended:
            room = min(self._http.local_flow_control_window(stream), self._http.max_outbound_frame_size, len(rest))
            if not room and rest:
                self.receive()
                continue
            self._http.send_data(stream, rest[:room].tobytes(), end_stream=end and room == len(rest))
            self.flush()
            rest = rest[room:]
            if not rest:
                return

    def reset(self, stream: int) -> None:
        """Reset a stream; the frame is sent with the next flush."""
        self._http.reset_stream(stream, 8)

    def ping(self) -> None:
        """Send a ping with the next flush."""
        self._http.ping(bytes(8))

    def flush(self) -> None:
        """Send what is buffered."""
        self.socket.sendall(self._http.data_to_send())

    def receive(self) -> None:
        """Wait for data of the server."""
        data = self.socket.recv(65536)
        if not data:
            raise ConnectionError("the server closed the connection")
        for event in self._http.receive_data(data):
            if isinstance(event, h2.events.ResponseReceived | h2.events.TrailersReceived):
                self._seen.setdefault(event.stream_id, {}).update(event.headers)
            if isinstance(event, h2.events.DataReceived):
                self.answering.add(event.stream_id)
            if isinstance(event, h2.events.StreamEnded | h2.events.StreamReset):
                self.ended[event.stream_id] = self._seen.get(event.stream_id, {})
        self.flush()

    def status(self, stream: int) -> str:
        """Return the gRPC status of a stream, once it is over."""
        while stream not in self.ended:
            self.receive()
        return self.ended[stream]["grpc-status"]
