"""What an operator may set: one frozen Config, filled from flags and POOLRPC_* environment variables."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import configargparse

from poolrpc.limits import MAX_MESSAGE_BYTES, MAX_PAYLOAD_BYTES
from poolrpc_server.models import read_models

if TYPE_CHECKING:
    from collections.abc import Sequence

LOG_FORMATS = ("text", "json")
MOST = {
    "threads": 1024,
    "call_threads": 65536,
    "max_message_bytes": 2**31 - 1,  # gRPC's is a C int
    "stream_idle_seconds": 86400,
    "drain_seconds": 86400,
    "shutdown_grace": 86400,
    "max_queue_seconds": 86400,
    "max_queue_delay": 10_000,
}
FROM_ZERO = ("threads", "max_arena_bytes", "max_queue_seconds", "max_queue_delay", "drain_seconds", "shutdown_grace")
LOG_LEVELS = ("debug", "info", "warning", "error")


class ConfigError(ValueError):
    """A setting is wrong: what was expected and what was received."""


def _setting(default: Any, help: str, unit: str = "") -> Any:  # noqa: A002, ANN401 - argparse's word; a dataclass field
    return field(default=default, metadata={"help": help, "unit": unit})


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Everything that an operator may set; checked when it is made.

    Raises:
        ConfigError: A setting is out of its range, or an address is public without `insecure`.

    """

    listen: tuple[str, ...] = _setting(
        ("127.0.0.1:50051",), "address to listen on, host:port (port 0: a free one) or unix:PATH; repeatable"
    )
    insecure: bool = _setting(False, "allow a public address although anyone who reaches it may call, unencrypted")
    model: tuple[str, ...] = _setting(
        (), "layers to serve under a name of their own to Triton's clients, NAME=LAYER; repeatable"
    )
    models: str = _setting("", "TOML file with more of them: lines of NAME = 'LAYER'")
    allow_client_shm: bool = _setting(
        False, "read and write shared memory of this user's processes that Triton's clients name"
    )
    device: str = _setting(
        "auto", "device to compute on: auto (cuda, mps or cpu, the first there is) or torch's name for it"
    )
    threads: int = _setting(0, "requests computed at a time, each by one thread; 0: one for each CPU", "threads")
    call_threads: int = _setting(256, "calls that are read, checked and waited for at a time", "threads")
    max_message_bytes: int = _setting(MAX_MESSAGE_BYTES, "largest gRPC message, each way", "bytes")
    max_output_bytes: int = _setting(MAX_PAYLOAD_BYTES, "outputs of a request, and each step of a chain", "bytes")
    max_output_growth: int = _setting(64, "outputs of a request over its input, for outputs above 4 MiB", "times")
    max_work: int = _setting(
        4_000_000_000, "work of a request: cells that its layers visit, by the kernels that compute them", "cells"
    )
    max_inflight_bytes: int = _setting(4 * 2**30, "inputs and outputs of all requests under way", "bytes")
    max_queue: int = _setting(64, "calls of a priority that wait for their turn", "calls")
    max_queue_seconds: float = _setting(1.0, "work of a priority's calls that wait, by estimate", "seconds")
    max_queue_delay: float = _setting(
        0.0, "time that a small call waits for others like it although nothing else is computed", "milliseconds"
    )
    max_batch_bytes: int = _setting(2 * 2**20, "inputs and outputs of small calls that are computed at once", "bytes")
    max_arena_bytes: int = _setting(2 * 2**30, "shared memory of all clients on unix sockets; 0: none", "bytes")
    max_arenas: int = _setting(256, "pieces of it", "arenas")
    max_streams: int = _setting(16, "streams at a time: each has a thread for as long as it lasts", "streams")
    stream_idle_seconds: float = _setting(60.0, "time that a stream may send nothing", "seconds")
    drain_seconds: float = _setting(2.0, "time to go on serving as NOT_SERVING after SIGTERM", "seconds")
    shutdown_grace: float = _setting(30.0, "time to finish accepted calls after that", "seconds")
    log_format: str = _setting("text", f"format of the log: {' or '.join(LOG_FORMATS)}")
    log_level: str = _setting("info", f"least level of the log: {', '.join(LOG_LEVELS)}")

    def __post_init__(self) -> None:
        object.__setattr__(self, "listen", tuple(self.listen))
        if not self.listen:
            raise ConfigError("listen: expected at least one address, got none")
        for address in self.listen:
            _check_address(address, insecure=self.insecure)
        object.__setattr__(self, "model", tuple(self.model))
        try:
            read_models(self.model, self.models)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        for each in fields(self):
            value, unit = getattr(self, each.name), each.metadata["unit"]
            least = 0 if each.name in FROM_ZERO else 1
            if unit and not value >= least:
                raise ConfigError(f"{each.name}: expected at least {least} {unit}, got {value}")
            most = MOST.get(each.name, 2**63 - 1)
            if unit and value > most:
                raise ConfigError(f"{each.name}: expected at most {most} {unit}, got {value}")
        for name, choices in (("log_format", LOG_FORMATS), ("log_level", LOG_LEVELS)):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name}: expected one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if not self.threads:
            object.__setattr__(self, "threads", _cpus())

    @staticmethod
    def unit(name: str) -> str:
        """Give what a setting counts; empty where it is no count."""
        return next(str(each.metadata["unit"]) for each in fields(Config) if each.name == name)


def _cpus() -> int:
    # The CPUs that this process may use, where the system tells.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_address(address: str, *, insecure: bool) -> None:
    if address.startswith("unix:"):
        if not address.removeprefix("unix:").strip("/"):
            raise ConfigError(f"listen: expected unix:PATH, got {address!r}")
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:  # noqa: PLR2004 - the largest port there is
        raise ConfigError(f"listen: expected host:port or unix:PATH, got {address!r}")
    try:
        loopback = ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if not (loopback or insecure):
        raise ConfigError(
            f"listen: {address!r} is public, and this server has neither TLS nor tokens: whoever reaches it may call. "
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
        epilog="Each flag may also be set by its environment variable; a repeatable one as [a, b].",
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
