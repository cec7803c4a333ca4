"""The server's settings: one frozen Config, which checks them."""

from __future__ import annotations

import operator
import os
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from poolrpc._shapes.limits import MAX_MESSAGE_BYTES, MAX_PAYLOAD_BYTES
from poolrpc.addresses import MAX_SOCKET_PATH, unix_path
from poolrpc.credentials import is_loopback
from poolrpc_server.presets import read_presets
from poolrpc_server.resources import cpu_count, max_descriptors, memory_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

CHOICES = {"log_format": ("text", "json"), "log_level": ("debug", "info", "warning", "error")}
REQUIRES = {
    "tls_cert": "tls_key",
    "tls_key": "tls_cert",
    "tls_client_ca": "tls_cert",
    "health_requires_token": "token_file",
}
"""Settings that need another one: the file that must be set too."""

C_INT = 2**31 - 1
"""The largest value of gRPC's own options, which are C ints."""

PROCESS_BYTES = 320 * 2**20
"""Memory of one process without calls, with a margin: torch and the libraries, threads, gRPC's own buffers."""

MIN_FREE_BYTES = 64 * 2**20
"""Least memory for calls and arenas with which a server starts."""

MIN_MESSAGE_BYTES = 4 * 2**20
"""gRPC's own default limit of a message, which is the least that is derived."""

DAY = 86400
MAX_PORT = 65535


class ConfigError(ValueError):
    """A setting is wrong; the message has what was expected and what was received."""


def _setting(
    default: Any,  # noqa: ANN401 - any field's default
    help: str,  # noqa: A002 - argparse's word
    unit: str = "",
    *,
    minimum: float = 1,
    maximum: float | None = None,
) -> Any:  # noqa: ANN401 - a dataclass field
    """Return a field of Config; a setting with a unit is a number within a range, of seconds at most a day."""
    if maximum is None:
        maximum = DAY if unit == "seconds" else 2**63 - 1
    return field(default=default, metadata={"help": help, "unit": unit, "minimum": minimum, "maximum": maximum})


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Every setting of the server, validated when it is made.

    Raises:
        ConfigError: A setting is out of its range, or an address is public without TLS and tokens, `insecure` or
            `insecure_metrics`.

    """

    listen: tuple[str, ...] = _setting(
        ("127.0.0.1:50051",), "Address to listen on: host:port (port 0 chooses a free port) or unix:PATH. Repeatable."
    )
    tls_cert: str = _setting(
        "",
        "PEM file of the server's certificate and its intermediate certificates. Enables TLS on every address that is "
        "not a unix socket. Reloaded when it changes.",
    )
    tls_key: str = _setting(
        "", "PEM file of the certificate's private key, without a passphrase. Reloaded when it changes."
    )
    tls_client_ca: str = _setting(
        "",
        "PEM file of the authorities that sign the clients' certificates. If set, every client must present a "
        "certificate (mutual TLS). Reloaded when it changes.",
    )
    token_file: str = _setting(
        "",
        "File of the tokens, one of which every call must carry as metadata (authorization: Bearer TOKEN). Each line "
        "has a name, the SHA-256 of the token (echo -n TOKEN | sha256sum), and the services or methods that it allows "
        "(package.Service/Method; default: all). Lines that start with # are comments. Reloaded when it changes.",
    )
    health_requires_token: bool = _setting(False, "Require a token for health checks too.")
    model: tuple[str, ...] = _setting((), "Preset that Triton's clients can call by name: NAME=LAYER. Repeatable.")
    models: str = _setting("", "TOML file of further presets: lines of NAME = 'LAYER'.")
    allow_client_shm: bool = _setting(
        False,
        "Let Triton's clients register shared memory of the server's user, which the server then reads and writes. "
        "Requires a single worker.",
    )
    insecure: bool = _setting(
        False,
        "Allow a public address of --listen without TLS and tokens. Everyone who can reach the address may then call "
        "the server and read its traffic.",
    )
    device: str = _setting(
        "auto", "Device to compute on: auto (the first available of cuda, mps and cpu) or torch's name of a device."
    )
    workers: int = _setting(
        1,
        "Number of server processes that share the addresses. A process that ends is restarted. --threads and the "
        "limits on bytes in flight and arenas apply to all processes together.",
        "processes",
        maximum=1024,
    )
    threads: int = _setting(
        0,
        "Number of requests computed at the same time, each by one thread. 0: one for each CPU that the server may "
        "use.",
        "threads",
        minimum=0,
        maximum=1024,
    )
    call_threads: int = _setting(
        0,
        "Number of calls handled at the same time, each by a thread. 0: one for each MiB in flight, at least 16 and at "
        "most 256.",
        "threads",
        minimum=0,
        maximum=65536,
    )
    max_message_bytes: int = _setting(
        0,
        "Limit on the size of a gRPC message in either direction, in bytes. 0: 1/8 of the bytes in flight and 1 MiB, "
        "at least 16 MiB if a quarter of them is as much, and at most 513 MiB.",
        "bytes",
        minimum=0,
        maximum=C_INT,
    )
    max_output_bytes: int = _setting(
        0,
        "Limit on the outputs of a request, and on the output of each step of a chain, in bytes. 0: 1/4 of the bytes "
        "in flight, at most 512 MiB.",
        "bytes",
        minimum=0,
    )
    max_output_growth: int = _setting(
        64, "Limit on the ratio of a request's output bytes to its input bytes, for outputs above 4 MiB.", "times"
    )
    max_work: int = _setting(
        4_000_000_000,
        "Limit on the work of a request, over all planes and layers: the number of cells that its kernels read, each "
        "weighted by its cost. A cell of max pooling counts 1, about a nanosecond of one CPU.",
        "cells",
    )
    max_compute_seconds: float = _setting(
        30.0,
        "Limit on the time that a request is computed, in seconds; a request that takes longer is ended.",
        "seconds",
        minimum=0.001,
    )
    max_inflight_bytes: int = _setting(
        0,
        "Limit on the memory of all calls in flight, in bytes: messages, answers and what computes them. Further calls "
        "are rejected with UNAVAILABLE. 0: half of the memory that the processes themselves leave (320 MiB each), at "
        "most 4 GiB.",
        "bytes",
        minimum=0,
    )
    max_queue: int = _setting(
        64,
        "Limit on the number of queued requests of each priority; further requests are rejected with UNAVAILABLE.",
        "calls",
    )
    max_queue_seconds: float = _setting(
        1.0,
        "Limit on the estimated compute time of the queued requests of each priority, in seconds; further requests "
        "are rejected with UNAVAILABLE.",
        "seconds",
        minimum=0,
    )
    max_queue_delay: float = _setting(
        0.0,
        "Time that a small request waits for similar requests to form a batch although the device is idle, in "
        "milliseconds.",
        "milliseconds",
        minimum=0,
        maximum=10_000,
    )
    max_batch_bytes: int = _setting(
        2 * 2**20, "Limit on the inputs and outputs of the small requests that form a batch, in bytes.", "bytes"
    )
    max_arena_bytes: int = _setting(
        -1,
        "Limit on the shared memory (arenas) of all clients on unix sockets, in bytes. 0: no shared memory. -1: 1/4 of "
        "the memory that the processes themselves leave, at most 2 GiB.",
        "bytes",
        minimum=-1,
    )
    disable_local_calls: bool = _setting(
        False,
        "Serve no calls as packets on the socket of the arenas; clients on unix sockets send all their calls by gRPC.",
    )
    max_page_locked_bytes: int = _setting(
        -1,
        "Limit on the memory of arenas that is page-locked for a CUDA device, which then copies from and to them "
        "directly, in bytes. 0: none. -1: all arenas.",
        "bytes",
        minimum=-1,
    )
    max_arenas: int = _setting(256, "Limit on the number of arenas of all clients.", "arenas")
    max_streams: int = _setting(
        0,
        "Limit on the number of open streams; each occupies a call thread until it ends. 0: one for each 64 MiB in "
        "flight, at least 2 and at most 16.",
        "streams",
        minimum=0,
    )
    receive_timeout: float = _setting(
        10.0,
        "Time that a caller may take to send its message or to read its answer, in seconds, in addition to a second "
        "for each MiB that it announced or has to read; the call is ended then.",
        "seconds",
        minimum=0.001,
    )
    stream_idle_seconds: float = _setting(
        60.0, "Time after which a stream is ended if its client sends nothing, in seconds.", "seconds"
    )
    keepalive_seconds: float = _setting(
        60.0, "Idle time before the server sends an HTTP/2 keepalive ping, in seconds.", "seconds"
    )
    keepalive_timeout_seconds: float = _setting(
        20.0,
        "Time to wait for the acknowledgement of a keepalive ping before the connection is closed, in seconds.",
        "seconds",
    )
    min_ping_seconds: float = _setting(
        10.0,
        "Minimum interval between the keepalive pings of a client, in seconds; a client that sends them more often is "
        "disconnected.",
        "seconds",
    )
    max_connection_age_seconds: float = _setting(
        0.0,
        "Age of a connection at which its client is asked to connect again, and so to look up the server's name again, "
        "in seconds, varied by a tenth. The connection is closed when its calls have ended. 0: no limit.",
        "seconds",
        minimum=0,
        maximum=7 * DAY,
    )
    max_connection_idle_seconds: float = _setting(
        3600.0,
        "Time without calls after which a connection is closed, in seconds. 0: no limit.",
        "seconds",
        minimum=0,
        maximum=7 * DAY,
    )
    max_connections: int = _setting(
        0,
        "Limit on the number of connections of each process; further connections are closed. 0: half of the open files "
        "that it may have, one for each 256 KiB of its memory, or 4096, whichever is least.",
        "connections",
        minimum=0,
        maximum=C_INT,
    )
    max_connection_calls: int = _setting(
        100,
        "Limit on the number of concurrent calls (HTTP/2 streams) on a connection; further calls wait in the client.",
        "calls",
        maximum=C_INT,
    )
    max_metadata_bytes: int = _setting(
        8192, "Limit on the metadata (HTTP/2 headers) of a call, in bytes.", "bytes", maximum=C_INT
    )
    metrics: str = _setting(
        "", "Address of the HTTP endpoints /metrics, /livez and /readyz: host:port. Not served if empty."
    )
    insecure_metrics: bool = _setting(
        False,
        "Allow a public address of --metrics, which has neither TLS nor tokens. Everyone who can reach the address may "
        "then read the metrics.",
    )
    probes: str = _setting(
        "",
        "Address of the HTTP endpoints /livez (the process answers) and /readyz (it takes calls) alone: host:port. It "
        "may be public, for it has no TLS, needs no token and says nothing else. Not served if empty.",
    )
    explorer: str = _setting(
        "",
        "Address of the explorer, a web page that shows what the layers do, and of the JSON protocol: host:port. With "
        "TLS if --tls-cert is set. A public address requires tokens, and TLS or --insecure. Not served if empty.",
    )
    drain_seconds: float = _setting(
        2.0,
        "Time after SIGTERM during which health is NOT_SERVING while calls are still accepted, in seconds.",
        "seconds",
        minimum=0,
    )
    shutdown_grace: float = _setting(
        30.0, "Time after the drain in which accepted calls may finish, in seconds.", "seconds", minimum=0
    )
    watchdog_seconds: float = _setting(
        30.0,
        "Time without an answer to the server's own calls after which the process is ended with status 70, or a worker "
        "is killed and replaced, in seconds. 0: never.",
        "seconds",
        minimum=0,
    )
    log_format: str = _setting("text", f"Format of the log: {' or '.join(CHOICES['log_format'])}.")
    log_level: str = _setting("info", f"Lowest level of the log lines: {', '.join(CHOICES['log_level'])}.")

    def __post_init__(self) -> None:  # noqa: C901 - one check after the other
        object.__setattr__(self, "listen", tuple(self.listen))
        self._check_addresses()
        object.__setattr__(self, "model", tuple(self.model))
        try:
            read_presets(self.model, self.models)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        if self.allow_client_shm and self.workers > 1:
            # A region is registered with one process, while a client's connections may lead to several.
            raise ConfigError(f"allow_client_shm: expected 1 worker, got {self.workers}")
        for setting in fields(self):
            name, value, unit = setting.name, getattr(self, setting.name), setting.metadata["unit"]
            minimum, maximum = setting.metadata["minimum"], setting.metadata["maximum"]
            if unit:  # from Python, such as embedded(threads=...), it may be of any type
                value = _number(name, value, whole=setting.type == "int")
                object.__setattr__(self, name, value)
            if unit and not value >= minimum:  # so that NaN is rejected too
                raise ConfigError(f"{name}: expected at least {minimum} {self.unit(name, minimum)}, got {value}")
            if unit and value > maximum:
                raise ConfigError(f"{name}: expected at most {maximum} {unit}, got {value}")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name}: expected one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name, (automatic, value) in AUTOMATIC.items():
            if getattr(self, name) == automatic:
                object.__setattr__(self, name, value(self))

    def _check_addresses(self) -> None:
        if not self.listen:
            raise ConfigError("listen: expected at least one address, got none")
        for name, required in REQUIRES.items():
            if getattr(self, name) and not getattr(self, required):
                raise ConfigError(f"{required}: expected a file, because {name} is set, got none")
        protections = [name for name, on in (("TLS", self.tls_cert), ("tokens", self.token_file)) if on]
        for address in self.listen:
            _check_address("listen", address, protections, insecure=self.insecure)
        if self.metrics:
            _check_address("metrics", self.metrics, (), insecure=self.insecure_metrics)
        if self.probes:
            _check_address("probes", self.probes, (), insecure=True)
        if self.explorer:
            # Even if a network or a proxy protects the address, each user of the page needs a token.
            insecure = self.insecure and bool(self.token_file)
            _check_address("explorer", self.explorer, protections, insecure=insecure)

    @staticmethod
    def unit(name: str, count: object = None) -> str:
        """Return the unit of a setting, in the singular for a count of 1; empty if the setting is not a number."""
        unit = next(str(each.metadata["unit"]) for each in fields(Config) if each.name == name)
        return unit.removesuffix("es" if unit == "processes" else "s") if str(count) == "1" else unit


def _number(name: str, value: object, *, whole: bool) -> float:
    """Return a number of any type as an int or a float."""
    try:
        if isinstance(value, bool | str | bytes):
            raise TypeError  # noqa: TRY301 - the same as for any other object
        if whole:
            return operator.index(value)  # type: ignore[arg-type]  # TypeError is caught
        return value if type(value) in (int, float) else float(value)  # type: ignore[return-value, arg-type]  # the same
    except (TypeError, ValueError, OverflowError):
        kind = "an integer" if whole else "a number"
        raise ConfigError(f"{name}: expected {kind}, got {value!r} ({type(value).__name__})") from None


def _free_memory(config: Config) -> int:
    """Return the memory that the processes themselves leave, in bytes.

    Raises:
        ConfigError: It is too little to serve anything.

    """
    memory, own = memory_bytes(), config.workers * PROCESS_BYTES
    if memory < own + MIN_FREE_BYTES:
        raise ConfigError(
            f"expected at least {(own + MIN_FREE_BYTES) >> 20} MiB of memory for {config.workers} "
            f"{Config.unit('workers', config.workers)}, got {memory >> 20} MiB; --max-inflight-bytes and "
            "--max-arena-bytes set the limits regardless"
        )
    return memory - own


def _inflight_bytes(config: Config) -> int:
    """Return the bytes in flight of one process."""
    return config.max_inflight_bytes // config.workers


def _between(low: int, value: int, high: int) -> int:
    return max(low, min(value, high))


AUTOMATIC: dict[str, tuple[int, Callable[[Config], int]]] = {
    "threads": (0, lambda _: min(cpu_count(), 1024)),
    "max_inflight_bytes": (0, lambda config: min(4 * 2**30, _free_memory(config) // 2)),
    "max_arena_bytes": (-1, lambda config: min(2 * 2**30, _free_memory(config) // 4)),
    "max_message_bytes": (
        0,
        lambda config: _between(
            max(MIN_MESSAGE_BYTES, min(16 * 2**20, _inflight_bytes(config) // 4)),
            _inflight_bytes(config) // 8 + 2**20,
            MAX_MESSAGE_BYTES,
        ),
    ),
    "max_output_bytes": (
        0,
        lambda config: _between(MIN_MESSAGE_BYTES, _inflight_bytes(config) // 4, MAX_PAYLOAD_BYTES),
    ),
    "call_threads": (0, lambda config: _between(16, _inflight_bytes(config) >> 20, 256)),
    "max_streams": (0, lambda config: _between(2, _inflight_bytes(config) >> 26, 16)),
    "max_connections": (
        0,
        lambda config: _between(16, min(max_descriptors() // 2, memory_bytes() // config.workers >> 18), 4096),
    ),
}
"""For each setting that follows the machine, in order: the value that means "automatic", and the actual value."""


def _check_address(name: str, address: str, protections: Sequence[str], *, insecure: bool) -> None:
    if name == "listen" and address.startswith("unix:"):
        if not address.removeprefix("unix:").strip("/"):
            raise ConfigError(f"listen: expected unix:PATH, got {address!r}")
        if (size := len(os.fsencode(unix_path(address)))) > MAX_SOCKET_PATH:
            raise ConfigError(f"listen: expected a path of at most {MAX_SOCKET_PATH} bytes, got {size}: {address!r}")
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > MAX_PORT:
        expected = "host:port or unix:PATH" if name == "listen" else "host:port"
        raise ConfigError(f"{name}: expected {expected}, got {address!r}")
    if is_loopback(host) or insecure or len(protections) == 2:  # noqa: PLR2004 - both TLS and tokens
        return
    if name == "metrics":
        raise ConfigError(
            f"metrics: expected a loopback address, because metrics have neither TLS nor tokens, got {address!r}. Use "
            "127.0.0.1, or --insecure-metrics if a network or a proxy protects the address"
        )
    others, way = (" or a unix socket", "--insecure") if name == "listen" else ("", "--insecure with tokens")
    raise ConfigError(
        f"{name}: expected TLS and tokens (--tls-cert, --tls-key and --token-file) for a public address, got "
        f"{' '.join(protections) or 'neither'} for {address!r}. Use 127.0.0.1{others}, or {way} if a network or a "
        "proxy protects the address"
    )
