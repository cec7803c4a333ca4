"""What an operator may set: one frozen Config, filled from flags and POOLRPC_* environment variables."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import configargparse

from poolrpc._shapes.limits import MAX_MESSAGE_BYTES, MAX_PAYLOAD_BYTES
from poolrpc.access import is_loopback
from poolrpc_server.presets import read_presets
from poolrpc_server.resources import cpu_count, memory_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

LOG_FORMATS = ("text", "json")
LEAST = {
    "threads": 0,
    "max_message_bytes": 0,
    "max_inflight_bytes": 0,
    "max_arena_bytes": -1,  # 0: none
    "max_queue_seconds": 0,
    "max_queue_delay": 0,
    "max_connection_age_seconds": 0,
    "max_connection_idle_seconds": 0,
    "drain_seconds": 0,
    "shutdown_grace": 0,
}
MOST = {
    "workers": 1024,
    "threads": 1024,
    "call_threads": 65536,
    "max_message_bytes": 2**31 - 1,  # gRPC's is a C int
    "max_connection_calls": 2**31 - 1,  # these two too
    "max_metadata_bytes": 2**31 - 1,
    "stream_idle_seconds": 86400,
    "keepalive_seconds": 86400,
    "keepalive_timeout_seconds": 86400,
    "min_ping_seconds": 86400,
    "max_connection_age_seconds": 7 * 86400,
    "max_connection_idle_seconds": 7 * 86400,
    "drain_seconds": 86400,
    "shutdown_grace": 86400,
    "max_queue_seconds": 86400,
    "max_queue_delay": 10_000,
}
NEEDS = {
    "tls_cert": "tls_key",
    "tls_key": "tls_cert",
    "tls_client_ca": "tls_cert",
    "health_requires_token": "token_file",
}
LOG_LEVELS = ("debug", "info", "warning", "error")


class ConfigError(ValueError):
    """A setting is wrong: what was expected and what was received."""


def _setting(default: Any, help: str, unit: str = "") -> Any:  # noqa: A002, ANN401 - argparse's word; a dataclass field
    return field(default=default, metadata={"help": help, "unit": unit})


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Everything that an operator may set; checked when it is made.

    Raises:
        ConfigError: A setting is out of its range, or an address is public without TLS and tokens, or `insecure`.

    """

    listen: tuple[str, ...] = _setting(
        ("127.0.0.1:50051",), "address to listen on, host:port (port 0: a free one) or unix:PATH; repeatable"
    )
    tls_cert: str = _setting(
        "", "certificate, PEM, with those between it and its authority: TLS on all addresses but unix sockets"
    )
    tls_key: str = _setting(
        "", "its key, PEM, without a passphrase; certificates and key are read again as they change"
    )
    tls_client_ca: str = _setting(
        "", "authorities, PEM, of the certificates that clients are to have; empty: need none"
    )
    token_file: str = _setting(
        "",
        "tokens, one of which each call is to carry (authorization: Bearer TOKEN); a line each: NAME, the token's "
        "SHA-256 (echo -n TOKEN | sha256sum), and the services or methods it is for (package.Service/Method), "
        "none: all; a line that starts with # is a comment; read again as it changes",
    )
    health_requires_token: bool = _setting(False, "health checks need a token too")
    model: tuple[str, ...] = _setting(
        (), "layers to serve under a name of their own to Triton's clients, NAME=LAYER; repeatable"
    )
    models: str = _setting("", "TOML file with more of them: lines of NAME = 'LAYER'")
    allow_client_shm: bool = _setting(
        False, "read and write shared memory of this user's processes that Triton's clients name; of one worker"
    )
    insecure: bool = _setting(
        False, "allow a public address without TLS and tokens, although anyone who reaches it may call or listen"
    )
    device: str = _setting(
        "auto", "device to compute on: auto (cuda, mps or cpu, the first there is) or torch's name for it"
    )
    workers: int = _setting(
        1,
        "server processes on the same addresses; what dies is started again; threads and limits are of all together",
        "processes",
    )
    threads: int = _setting(
        0, "requests computed at a time, each by one thread; 0: one for each CPU that it may use", "threads"
    )
    call_threads: int = _setting(256, "calls that are read, checked and waited for at a time", "threads")
    max_message_bytes: int = _setting(
        0, "largest gRPC message, each way; 0: a 32nd of the memory, 4 to 513 MiB", "bytes"
    )
    max_output_bytes: int = _setting(MAX_PAYLOAD_BYTES, "outputs of a request, and each step of a chain", "bytes")
    max_output_growth: int = _setting(64, "outputs of a request over its input, for outputs above 4 MiB", "times")
    max_work: int = _setting(
        4_000_000_000, "work of a request: cells that its layers visit, by the kernels that compute them", "cells"
    )
    max_inflight_bytes: int = _setting(
        0, "inputs and outputs of all requests under way; 0: two fifths of the memory, at most 4 GiB", "bytes"
    )
    max_queue: int = _setting(64, "calls of a priority that wait for their turn", "calls")
    max_queue_seconds: float = _setting(1.0, "work of a priority's calls that wait, by estimate", "seconds")
    max_queue_delay: float = _setting(
        0.0, "time that a small call waits for others like it although nothing else is computed", "milliseconds"
    )
    max_batch_bytes: int = _setting(2 * 2**20, "inputs and outputs of small calls that are computed at once", "bytes")
    max_arena_bytes: int = _setting(
        -1,
        "shared memory of all clients on unix sockets; 0: none; -1: a fifth of the memory, at most 2 GiB",
        "bytes",
    )
    max_arenas: int = _setting(256, "pieces of it", "arenas")
    max_streams: int = _setting(16, "streams at a time: each has a thread for as long as it lasts", "streams")
    stream_idle_seconds: float = _setting(60.0, "time that a stream may send nothing", "seconds")
    keepalive_seconds: float = _setting(60.0, "time after which a silent connection is asked for a sign", "seconds")
    keepalive_timeout_seconds: float = _setting(20.0, "time to give one, or the connection is closed", "seconds")
    min_ping_seconds: float = _setting(
        10.0, "least time between a client's own keepalive pings; one that sends more is disconnected", "seconds"
    )
    max_connection_age_seconds: float = _setting(
        0.0,
        "time after which a client is to connect anew, to another server perhaps; calls have shutdown-grace to end; "
        "0: no limit",
        "seconds",
    )
    max_connection_idle_seconds: float = _setting(
        3600.0, "time after which a connection without calls is closed; 0: no limit", "seconds"
    )
    max_connection_calls: int = _setting(
        1024, "calls at a time on a connection; further ones wait at the client", "calls"
    )
    max_metadata_bytes: int = _setting(8192, "metadata of a call", "bytes")
    metrics: str = _setting("", "HTTP address of /metrics, /healthz and /readyz, host:port; empty: none")
    drain_seconds: float = _setting(2.0, "time to go on serving as NOT_SERVING after SIGTERM", "seconds")
    shutdown_grace: float = _setting(30.0, "time to finish accepted calls after that", "seconds")
    log_format: str = _setting("text", f"format of the log: {' or '.join(LOG_FORMATS)}")
    log_level: str = _setting("info", f"least level of the log: {', '.join(LOG_LEVELS)}")

    def __post_init__(self) -> None:
        object.__setattr__(self, "listen", tuple(self.listen))
        self._check_addresses()
        object.__setattr__(self, "model", tuple(self.model))
        try:
            read_presets(self.model, self.models)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        if self.allow_client_shm and self.workers > 1:
            # A region is registered with one process, and a client's connections may be to several.
            raise ConfigError(f"allow_client_shm: expected 1 worker, got {self.workers}")
        for each in fields(self):
            value, unit = getattr(self, each.name), each.metadata["unit"]
            least = LEAST.get(each.name, 1)
            if unit and not value >= least:
                raise ConfigError(f"{each.name}: expected at least {least} {unit}, got {value}")
            most = MOST.get(each.name, 2**63 - 1)
            if unit and value > most:
                raise ConfigError(f"{each.name}: expected at most {most} {unit}, got {value}")
        for name, choices in (("log_format", LOG_FORMATS), ("log_level", LOG_LEVELS)):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name}: expected one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name, value in _by_the_machine().items():
            if getattr(self, name) == LEAST[name]:
                object.__setattr__(self, name, value)

    def _check_addresses(self) -> None:
        if not self.listen:
            raise ConfigError("listen: expected at least one address, got none")
        missing = [(name, other) for name, other in NEEDS.items() if getattr(self, name) and not getattr(self, other)]
        if missing:
            raise ConfigError("{1}: expected a file, for {0} is given, got none".format(*missing[0]))
        guards = [name for name, on in (("TLS", self.tls_cert), ("tokens", self.token_file)) if on]
        for address in self.listen:
            _check_address("listen", address, guards, insecure=self.insecure)
        if self.metrics:
            _check_address("metrics", self.metrics, (), insecure=self.insecure)

    @staticmethod
    def unit(name: str) -> str:
        """Give what a setting counts; empty where it is no count."""
        return next(str(each.metadata["unit"]) for each in fields(Config) if each.name == name)


def _by_the_machine() -> dict[str, int]:
    """Give the settings that follow the machine, where they are at their least."""
    memory = memory_bytes()
    return {
        "threads": min(cpu_count(), MOST["threads"]),
        "max_message_bytes": min(MAX_MESSAGE_BYTES, max(memory // 32, 4 * 2**20)),
        "max_inflight_bytes": min(4 * 2**30, memory * 2 // 5),
        "max_arena_bytes": min(2 * 2**30, memory // 5),
    }


def _check_address(name: str, address: str, guards: Sequence[str], *, insecure: bool) -> None:
    if name == "listen" and address.startswith("unix:"):
        if not address.removeprefix("unix:").strip("/"):
            raise ConfigError(f"listen: expected unix:PATH, got {address!r}")
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:  # noqa: PLR2004 - the largest port there is
        expected = "host:port or unix:PATH" if name == "listen" else "host:port"
        raise ConfigError(f"{name}: expected {expected}, got {address!r}")
    if is_loopback(host) or insecure or len(guards) == 2:  # noqa: PLR2004 - both that there are
        return
    if name == "metrics":
        raise ConfigError(
            f"metrics: {address!r} is public, and metrics have neither TLS nor tokens: whoever reaches them may read. "
            "Take 127.0.0.1, or give --insecure where a network or a proxy guards it"
        )
    raise ConfigError(
        f"listen: {address!r} is public, for which TLS and tokens are expected (--tls-cert, --tls-key and "
        f"--token-file), got {' '.join(guards) or 'neither'}: whoever reaches it may call or listen. "
        "Listen on 127.0.0.1 or a unix socket, or give --insecure where a network or a proxy guards it"
    )


def parse(arguments: Sequence[str] | None = None) -> Config:
    """Give the Config that flags say, and the environment where no flag does.

    Args:
        arguments: The command line. None: that of the process.

    Raises:
        ConfigError: A setting is wrong.

    """
    parser = configargparse.ArgumentParser(
        prog="poolrpc-server",
        description="Serve PyTorch's pooling layers over gRPC.",
        epilog="Each flag may also be set by its environment variable; a repeatable one as [a, b]. CPUs and memory are "
        "the machine's, or what its container leaves this process of them.",
        add_config_file_help=False,
        add_env_var_help=False,
    )
    for each in fields(Config):
        unit, default = each.metadata["unit"], each.default
        shown = (
            ", ".join(default) or "none"
            if isinstance(default, tuple)
            else str(default).lower()
            if isinstance(default, bool)
            else default
            if default != ""
            else "none"
        )
        variable = f"POOLRPC_{each.name.upper()}"
        options: dict[str, Any] = {
            "dest": each.name,
            "env_var": variable,
            "default": None,
            "help": f"{each.metadata['help']} [default: {shown}{f' {unit}' if unit else ''}; {variable}]",
        }
        if isinstance(default, bool):
            options["action"] = "store_true"
        else:
            options["type"] = str if isinstance(default, tuple) else type(default)
            options["metavar"] = (unit or each.name.rpartition("_")[2]).upper()
            if isinstance(default, tuple):
                options["action"] = "append"
        parser.add_argument(f"--{each.name.replace('_', '-')}", **options)
    given = vars(parser.parse_args(arguments))
    return Config(**{name: value for name, value in given.items() if value is not None})
