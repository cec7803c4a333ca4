"""How a client shows who it is and knows who the server is: TLS and a token, as told or as the environment says."""

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
    """Tell whether a host, by name or number, is this machine alone."""
    import ipaddress  # noqa: PLC0415 - import poolrpc is to be quick

    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def is_unix(address: str) -> bool:
    """Tell whether a gRPC address is a unix socket's."""
    return address.startswith(("unix:", "unix-abstract:"))


def unix_path(address: str) -> str:
    """Return the path in a gRPC address of the form "unix:PATH", or an empty string for any other address."""
    scheme, _, path = address.partition(":")
    return path.removeprefix("//") if scheme == "unix" else ""


def _stays_here(address: str) -> bool:
    # Of what isn't understood (several addresses, another name server) it is not known.
    for prefix in ("dns:///", "dns:", "ipv4:", "ipv6:"):
        address = address.removeprefix(prefix)
    host, colon, port = address.rpartition(":")
    return is_loopback(host if colon and port.isdecimal() else address)


def credentials_for(address: str, given: grpc.ChannelCredentials | None) -> grpc.ChannelCredentials | None:
    """Give the credentials for a server: those given, or for TLS as the environment says; None: plaintext.

    Raises:
        InvalidArgumentError: What the environment names can't be read, or something is missing beside it.

    """
    if given is not None or is_unix(address):
        return given
    authorities, chain, key = map(_pem, (CA, CLIENT_CERT, CLIENT_KEY))
    for name, has, other, needs in (
        (CLIENT_CERT, chain, CLIENT_KEY, key),
        (CLIENT_KEY, key, CLIENT_CERT, chain),
        (CLIENT_CERT, chain, CA, authorities),
    ):
        if has and not needs:
            raise InvalidArgumentError(f"expected a file, for {name} names one, got none", field=other)
    return grpc.ssl_channel_credentials(authorities, key, chain) if authorities else None


def _pem(name: str) -> bytes | None:
    path = os.environ.get(name)
    if not path:
        return None
    from pathlib import Path  # noqa: PLC0415 - import poolrpc is to be quick

    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InvalidArgumentError(f"expected a PEM file, got {path}: {error.strerror}", field=name) from None


def metadata_for(address: str, metadata: Iterable[tuple[str, str]], token: str | None, *, encrypted: bool) -> Metadata:
    """Give the metadata of a client's calls: what it was told, and the token that it was told or the environment has.

    Metadata with an authorization of its own goes as it is: who passes that knows where it goes.

    Raises:
        InvalidArgumentError: The token is none, would go in clear through a network, or there are two.

    """
    pairs = tuple(metadata)
    own = any(key.lower() == AUTHORIZATION for key, _ in pairs)
    if own and token is not None:
        raise InvalidArgumentError(f"expected a token or {AUTHORIZATION} in the metadata, got both", field="token")
    field = TOKEN if token is None else "token"
    if token is None:
        token = os.environ.get(TOKEN) or None
    if own or token is None:
        return pairs
    # No error may have the token in it, as gRPC's own would.
    if not (token.isascii() and token.isprintable() and token and " " not in token):
        raise InvalidArgumentError("expected printable ASCII without spaces, got something else", field=field)
    if not (encrypted or is_unix(address) or _stays_here(address)):
        raise InvalidArgumentError(
            f"expected TLS (credentials=, or {CA} in the environment) to send a token to {address}, got plaintext: "
            "whoever is on the way could take it",
            field=field,
        )
    return *pairs, (AUTHORIZATION, f"Bearer {token}")
