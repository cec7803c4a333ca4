"""What a client says of a server that it cannot talk to: its address, the timeout, and what to try.

gRPC's own message is that of the last address that it tried, so that of a host with two addresses may hide the cause.
After a call has failed without a connection, the client therefore looks at the address itself, by a connection of its
own.
"""

from __future__ import annotations

import os
import re
import socket
from contextlib import suppress
from typing import TYPE_CHECKING
from urllib.parse import unquote

import grpc

from poolrpc.addresses import host_ports, is_unix, unix_path
from poolrpc.credentials import is_local
from poolrpc.errors import DeadlineExceededError, FailedPreconditionError, PoolError, UnavailableError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Iterator

NOT_CONNECTED = (
    "connections to all backends failing",
    "failed to connect to all addresses",
    "errors resolving",
    "DNS resolution failed",
)
"""The possible beginnings of gRPC's message if it could not connect."""

NO_SERVER = re.compile(r"last error: \w+: ipv[46]:(.+):(\d+): .*Connection refused")
"""The end of gRPC's message if the last address that it tried has no server: its host and its port."""

PROBE_SECONDS = 1.0
"""Seconds that each step of a look at an address may take."""

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
"""What a client of HTTP/2 sends first: the preface, and settings without any."""

KINDS = ("other", "tls", "plaintext", "silent")
"""What may be at an address that can be connected to."""

SETTINGS_FRAME = 4
TLS_ALERT = 0x15

NOT_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST")
"""The possible reasons of OpenSSL for an answer that is not TLS."""

TRUST = (
    "check that POOLRPC_CA or credentials= has the authority of its certificate, that the certificate has this name, "
    "and that it gets a client certificate (POOLRPC_CLIENT_CERT, POOLRPC_CLIENT_KEY) if it asks for one"
)
START = "start one with poolrpc-server"
CORRECT = "correct the address (--address, POOLRPC_ADDRESS)"
REQUIRES_TLS = "one that requires TLS: set POOLRPC_CA to the file of its authority, or pass credentials="


def is_transport_error(error: PoolError) -> bool:
    """Return whether an error is gRPC's or the client's own rather than one that the server has described."""
    own = error.__cause__ is None or isinstance(error.__cause__, grpc.RpcError)
    return own and error.reason == error.default_reason and getattr(error, "retry_delay", None) is None


def explain(  # noqa: PLR0911 - one error after the other
    error: PoolError, method: str, address: str, timeout: float | None, *, encrypted: bool
) -> PoolError:
    """Return the error of a call with the address, the timeout and what to try; it may take some seconds.

    Args:
        error: An error for which `is_transport_error` is true.
        method: The method, "package.Service/Method".
        address: The address of the client.
        timeout: The timeout of the call, in seconds; None: no limit.
        encrypted: Whether the client uses TLS.

    """
    within = "" if timeout is None else f" within {timeout:g} s"
    expected = f"expected a poolrpc server at {address}, got "
    if isinstance(error, DeadlineExceededError):
        # With a short timeout gRPC's attempts to connect take all of it. This look at the address takes no time.
        found = _look_at(address, encrypted=encrypted) if is_local(address) else ""
        if found not in ("", *KINDS):
            return UnavailableError(f"{expected}no connection ({found}): {START}, or {CORRECT}")
        return DeadlineExceededError(
            f"expected an answer from {address} to {method}{within}, got none: set a longer timeout=, or look at the "
            f"server with: poolrpc health --address {address}"
        )
    if isinstance(error, UnsupportedError):
        msg = f"expected a poolrpc server at {address}, got a gRPC server that lacks {method} ({error.message})"
        return UnsupportedError(f"{msg}: {CORRECT}", reason="METHOD")
    if not error.message.startswith(NOT_CONNECTED):
        return error
    found = _look_at(address, encrypted=encrypted)
    if found == "other":
        msg = f"{expected}one that does not speak gRPC, such as a web server: {CORRECT}"
        return FailedPreconditionError(msg, reason="PROTOCOL")
    if found == "plaintext" and encrypted:
        msg = f"{expected}one without TLS: unset POOLRPC_CA, and pass no credentials="
        return FailedPreconditionError(msg, reason="TLS")
    if found == "tls" and encrypted and _started_since(error):
        return UnavailableError(f"{expected}no connection, but there is one now: try again")
    if found == "tls":
        return FailedPreconditionError(expected + (_untrusted(error) if encrypted else REQUIRES_TLS), reason="TLS")
    if found == "silent":
        return UnavailableError(f"{expected}a connection on which nothing answers{within}: {START}, or {CORRECT}")
    reason = found if found not in ("", "plaintext") else _last(error)
    return UnavailableError(f"{expected}no connection ({reason}): {START}, or {CORRECT}")


def _untrusted(error: PoolError) -> str:
    last = _last(error)  # which is perhaps that of another address of the host
    cause = f" ({last})" if "handshake failed" in last or "erification" in last else ""
    return f"one whose TLS handshake fails{cause}: {TRUST}"


def _started_since(error: PoolError) -> bool:
    """Return whether the address that rejected gRPC's connection takes one now: its server has started meanwhile."""
    found = NO_SERVER.search(error.message)
    if not found:
        return False
    try:
        with socket.create_connection((unquote(found[1]).strip("[]"), int(found[2])), PROBE_SECONDS):
            return True
    except OSError:
        return False


def _last(error: PoolError) -> str:
    """Return the end of gRPC's message, which is the system's or BoringSSL's."""
    return error.message.partition("last error: ")[2].partition(": ")[2] or error.message


def _look_at(address: str, *, encrypted: bool) -> str:
    """Return what is at an address: "other", "tls", "plaintext", "silent", a reason for no connection, or ""."""
    if not is_local(address) and any(map(os.environ.get, ("grpc_proxy", "https_proxy", "http_proxy"))):
        return ""  # gRPC's connection may have gone through a proxy, and this one would not
    found = ""
    for target in _targets(address):
        kind = _look_at_one(*target, encrypted=encrypted)
        if kind in ("other", "tls", "plaintext"):
            return kind
        found = kind if kind == "silent" else found or kind
    return found


def _targets(address: str) -> Iterator[tuple[socket.AddressFamily, object]]:
    if is_unix(address):
        path = unix_path(address)
        yield socket.AF_UNIX, path or "\0" + address.partition(":")[2]
        return
    for each in host_ports(address):
        host, _, port = each.rpartition(":")
        with suppress(OSError, ValueError):  # gRPC's own message says that a name has no address
            for family, _, _, _, sockaddr in socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM):
                yield family, sockaddr


def _look_at_one(family: socket.AddressFamily, sockaddr: object, *, encrypted: bool) -> str:
    if not encrypted:
        try:
            data = _answer(family, sockaddr)
        except TimeoutError:
            return "silent"
        except (ConnectionResetError, BrokenPipeError):
            data = b""
        except OSError as error:
            return error.strerror or str(error)
        if data and data[0] != TLS_ALERT:
            return "plaintext" if data[3:4] == bytes((SETTINGS_FRAME,)) else "other"
    return _shake_hands(family, sockaddr)


def _answer(family: socket.AddressFamily, sockaddr: object) -> bytes:
    """Return the beginning of what a server answers to a client of HTTP/2."""
    with socket.socket(family, socket.SOCK_STREAM) as connection:
        connection.settimeout(PROBE_SECONDS)
        connection.connect(sockaddr)  # type: ignore[arg-type]  # as getaddrinfo returns it, or a path
        connection.sendall(PREFACE)
        return connection.recv(16)


def _shake_hands(family: socket.AddressFamily, sockaddr: object) -> str:
    """Return "tls" if a server shakes hands with a client that trusts everybody and sends nothing."""
    import ssl  # noqa: PLC0415 - only needed here

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        with socket.socket(family, socket.SOCK_STREAM) as connection:
            connection.settimeout(PROBE_SECONDS)
            connection.connect(sockaddr)  # type: ignore[arg-type]  # the same
            with context.wrap_socket(connection):
                return "tls"
    except TimeoutError:
        return "silent"
    except ssl.SSLEOFError:  # as a proxy does whose server is starting
        return "the connection was closed"
    except ssl.SSLError as error:
        return "plaintext" if error.reason in NOT_TLS else "tls"
    except OSError as error:
        return error.strerror or str(error)
