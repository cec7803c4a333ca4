"""Credentials of a client: TLS and a token, from arguments or from the environment."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import grpc

from poolrpc.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Iterable

TOKEN, CA, CLIENT_CERT, CLIENT_KEY = "POOLRPC_TOKEN", "POOLRPC_CA", "POOLRPC_CLIENT_CERT", "POOLRPC_CLIENT_KEY"
AUTHORIZATION = "authorization"

Metadata = tuple[tuple[str, str], ...]


def is_loopback(host: str) -> bool:
    """Return whether a host, by name or address, is only reachable from this machine."""
    import ipaddress  # noqa: PLC0415 - keeps `import poolrpc` fast

    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def is_unix(address: str) -> bool:
    """Return whether a gRPC address is that of a unix socket."""
    return address.startswith(("unix:", "unix-abstract:"))


def unix_path(address: str) -> str:
    """Return the path in a gRPC address of the form "unix:PATH", or an empty string for any other address."""
    scheme, _, path = address.partition(":")
    return path.removeprefix("//") if scheme == "unix" else ""


def _is_local(address: str) -> bool:
    # An address of another form (several addresses, another name server) counts as remote.
    for prefix in ("dns:///", "dns:", "ipv4:", "ipv6:"):
        address = address.removeprefix(prefix)
    host, colon, port = address.rpartition(":")
    return is_loopback(host if colon and port.isdecimal() else address)


def credentials_for(address: str, credentials: grpc.ChannelCredentials | None) -> grpc.ChannelCredentials | None:
    """Return the credentials for a server: the argument, or those for TLS from the environment; None for plaintext.

    Args:
        address: The address of the server.
        credentials: The credentials that the user passed; None: those of the environment.

    Raises:
        InvalidArgumentError: A file that the environment names cannot be read, or a second one that it requires
                is not named.

    """
    if credentials is not None or is_unix(address):
        return credentials
    authorities, chain, key = map(_read_pem, (CA, CLIENT_CERT, CLIENT_KEY))
    for name, value, required_name, required in (
        (CLIENT_CERT, chain, CLIENT_KEY, key),
        (CLIENT_KEY, key, CLIENT_CERT, chain),
        (CLIENT_CERT, chain, CA, authorities),
    ):
        if value and not required:
            raise InvalidArgumentError(f"expected a file, because {name} is set, got none", field=required_name)
    return grpc.ssl_channel_credentials(authorities, key, chain) if authorities else None


def _read_pem(name: str) -> bytes | None:
    path = os.environ.get(name)
    if not path:
        return None
    from pathlib import Path  # noqa: PLC0415 - keeps `import poolrpc` fast

    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InvalidArgumentError(f"expected a PEM file, got {path}: {error.strerror}", field=name) from None


def metadata_for(address: str, metadata: Iterable[tuple[str, str]], token: str | None, *, encrypted: bool) -> Metadata:
    """Return the metadata of a client's calls, with the token in it.

    Metadata that already has an authorization is returned as it is, for any address: the user is responsible for it.

    Args:
        address: The address of the server.
        metadata: The metadata that the user passed.
        token: The token that the user passed; None: that of the environment, if there is one.
        encrypted: Whether the connection uses TLS.

    Raises:
        InvalidArgumentError: The token is not valid, would be sent over a network in plaintext, or is given twice.

    """
    pairs = tuple(metadata)
    has_authorization = any(key.lower() == AUTHORIZATION for key, _ in pairs)
    if has_authorization and token is not None:
        raise InvalidArgumentError(f"expected a token or {AUTHORIZATION} in the metadata, got both", field="token")
    field = TOKEN if token is None else "token"
    if token is None:
        token = os.environ.get(TOKEN) or None
    if has_authorization or token is None:
        return pairs
    # No error message may contain the token, as gRPC's own would.
    if not (token.isascii() and token.isprintable() and token and " " not in token):
        raise InvalidArgumentError("expected printable ASCII without spaces, got something else", field=field)
    if not (encrypted or is_unix(address) or _is_local(address)):
        raise InvalidArgumentError(
            f"expected TLS (credentials=, or {CA} in the environment) to send a token to {address}, got plaintext, "
            "which others on the network can read",
            field=field,
        )
    return *pairs, (AUTHORIZATION, f"Bearer {token}")
