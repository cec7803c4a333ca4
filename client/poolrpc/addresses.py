"""Addresses of servers: their check, and their form for gRPC."""

from __future__ import annotations

import os
import re

from poolrpc._shapes.rules import clip
from poolrpc.errors import InvalidArgumentError

FORMS = '"host:port", "dns:///name:port", "unix:PATH" or a path object'
"""The forms of an address, for errors."""

EXAMPLE_PORT = 50051
"""The port in suggestions: the server's default."""

MAX_PORT = 65535

MAX_SOCKET_PATH = 107
"""Maximum length of the path of a unix socket, in bytes: Linux has room for one more, a zero."""

_URL = re.compile(r"(?i)(https?|grpcs?|tcp)://([^/]*)")
_PATH = ("/", "./", "../", "~")
_OTHER_RESOLVERS = ("xds:", "vsock:")  # left to gRPC


def is_unix(address: str) -> bool:
    """Return whether a gRPC address is that of a unix socket."""
    return address.startswith(("unix:", "unix-abstract:"))


def unix_path(address: str) -> str:
    """Return the path in a gRPC address of the form "unix:PATH", or an empty string for any other address."""
    scheme, _, path = address.partition(":")
    return path.removeprefix("//") if scheme == "unix" else ""


def grpc_target(address: str) -> str:
    """Return an address as gRPC takes it, which decodes the path of a unix socket like that of a URL."""
    path = unix_path(address)
    if not path:
        return address
    from urllib.parse import quote  # noqa: PLC0415 - keeps `import poolrpc` fast

    return f"unix:{quote(os.fsencode(path))}"


def check_address(address: object) -> str:
    """Return the address of a server as text.

    Args:
        address: "host:port", "dns:///name:port", "ipv4:HOST:PORT,HOST:PORT", "unix:PATH" or "unix-abstract:NAME"; or a
            path object, for the unix socket at that path.

    Raises:
        InvalidArgumentError: It is none of these; the message has the valid form.

    """
    if isinstance(address, os.PathLike):
        address = f"unix:{os.fsdecode(address)}"
    if not isinstance(address, str):
        hint = ""
        if isinstance(address, int) and 1 <= address <= MAX_PORT and not isinstance(address, bool):
            hint = f'for a port of this machine "127.0.0.1:{address}"'
        raise _invalid(address, hint, kind=type(address).__name__)
    if is_unix(address):
        _check_socket(address)
    elif match := _URL.match(address):
        host = match[2] if ":" in match[2] else f"{match[2] or 'host'}:{EXAMPLE_PORT}"
        tls = ", with credentials= or POOLRPC_CA for TLS" if match[1].lower() in ("https", "grpcs") else ""
        raise _invalid(address, f'"{host}"{tls}')
    elif address.startswith(_PATH):
        raise _invalid(address, f'for a unix socket "unix:{address}"')
    elif not address.startswith(_OTHER_RESOLVERS):
        _check_hosts(address)
    return address


def host_ports(address: str) -> list[str]:
    """Return the parts of an address that name a host, each "host:port" or as it was given."""
    for prefix in ("ipv4:", "ipv6:"):
        if address.startswith(prefix):
            return address.removeprefix(prefix).split(",")
    return [address.removeprefix("dns:///").removeprefix("dns:")]


def _check_hosts(address: str) -> None:
    authority = re.match(r"dns://[^/]*/", address)  # with or without a name server
    parts = [address[authority.end() :]] if authority else host_ports(address)
    for part in parts:
        host, colon, port = part.rpartition(":")
        if part.count(":") > 1 and not re.fullmatch(r"\[[^\]]*\](:\d*)?", part):
            raise _invalid(address, f'an IPv6 address in brackets, such as "[::1]:{EXAMPLE_PORT}"')
        if not re.fullmatch(r"[^\s/,]*", part):
            raise _invalid(address)
        if not colon or part.endswith("]"):
            raise _invalid(address, f'with a port "{address}:{EXAMPLE_PORT}"' if part else "")
        if not host:
            raise _invalid(address, f'for a port of this machine "127.0.0.1{part}"')
        if not (port.isascii() and port.isdecimal() and 1 <= int(port[:6]) <= MAX_PORT):
            raise _invalid(address, f"a port of 1 to {MAX_PORT}")


def _check_socket(address: str) -> None:
    path = address.partition(":")[2]
    if address.startswith("unix://"):
        path = path.removeprefix("//")
        if not path.startswith("/"):
            raise _invalid(address, f'"unix:{path}"' if path else "")
    size = len(os.fsencode(path))
    if not path.strip("/") or "\0" in path:
        raise _invalid(address)
    if size > MAX_SOCKET_PATH:
        msg = f"expected the path of a unix socket in at most {MAX_SOCKET_PATH} bytes, got {size}: {clip(path)}"
        raise InvalidArgumentError(msg, field="address")


def _invalid(address: object, hint: str = "", *, kind: str = "") -> InvalidArgumentError:
    received = f"{clip(address)} ({kind})" if kind else clip(address)
    return InvalidArgumentError(f"expected {FORMS}, got {received}{hint and f'; use {hint}'}", field="address")
