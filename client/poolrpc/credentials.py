"""Credentials of a client: TLS and a token, from arguments or from the environment."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping

import grpc

from poolrpc._shapes.rules import clip
from poolrpc.addresses import host_ports, is_unix
from poolrpc.errors import InvalidArgumentError

TOKEN, CA, CLIENT_CERT, CLIENT_KEY = "POOLRPC_TOKEN", "POOLRPC_CA", "POOLRPC_CLIENT_CERT", "POOLRPC_CLIENT_KEY"
AUTHORIZATION = "authorization"
METADATA_KEY = re.compile(r"[0-9a-z_.-]+")

Metadata = tuple[tuple[str, str], ...]


def is_loopback(host: str) -> bool:
    """Return whether a host, by name or address, is only reachable from this machine."""
    import ipaddress  # noqa: PLC0415 - keeps `import poolrpc` fast

    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def is_local(address: str) -> bool:
    """Return whether an address only leads to this machine: a unix socket, or loopback addresses alone."""
    # A name that another name server resolves counts as remote.
    return is_unix(address) or all(is_loopback(each.rpartition(":")[0]) for each in host_ports(address))


def credentials_for(address: str, credentials: object) -> grpc.ChannelCredentials | None:
    """Return the credentials for a server: the argument, or those for TLS from the environment; None for plaintext.

    Args:
        address: The address of the server.
        credentials: The credentials that the user passed; None: those of the environment.

    Raises:
        InvalidArgumentError: The argument is something else, a file that the environment names cannot be read, or a
            second one that it requires is not named.

    """
    if credentials is not None and not isinstance(credentials, grpc.ChannelCredentials):
        kind = type(credentials).__name__
        msg = f"expected what grpc.ssl_channel_credentials returns, or None, got an object of type {kind}"
        raise InvalidArgumentError(msg, field="credentials")
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
    return None if authorities is None else grpc.ssl_channel_credentials(authorities, key, chain)


def _read_pem(name: str) -> bytes | None:
    path = os.environ.get(name)
    if not path:
        return None
    from pathlib import Path  # noqa: PLC0415 - keeps `import poolrpc` fast

    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise InvalidArgumentError(f"expected a PEM file, got {path}: {error.strerror}", field=name) from None
    if not data.strip():
        raise InvalidArgumentError(f"expected a PEM file, got {path}, which is empty", field=name)
    return data


def has_token(metadata: Metadata) -> bool:
    """Return whether calls with this metadata carry a token."""
    return any(key == AUTHORIZATION for key, _ in metadata)


def check_metadata(metadata: object) -> Metadata:
    """Return metadata as pairs that gRPC can send.

    Raises:
        InvalidArgumentError: They are something else; no message has a value, which may be secret.

    """
    items = metadata.items() if isinstance(metadata, Mapping) else metadata
    if isinstance(items, str | bytes) or not isinstance(items, Iterable):
        kind = type(metadata).__name__
        raise InvalidArgumentError(f"expected a dict or pairs, got an object of type {kind}", field="metadata")
    return tuple(map(_check_pair, items))


def _check_pair(pair: object) -> tuple[str, str]:
    parts = () if isinstance(pair, str | bytes) or not isinstance(pair, Iterable) else tuple(pair)
    if len(parts) != 2:  # noqa: PLR2004 - a key and a value
        kind = type(pair).__name__
        raise InvalidArgumentError(f"expected a key and a value, got an object of type {kind}", field="metadata")
    key, value = parts
    lower = key.lower() if isinstance(key, str) else ""
    if not METADATA_KEY.fullmatch(lower) or lower.startswith("grpc-"):
        msg = f"expected a key of letters, digits, '_', '.' and '-' that does not begin with grpc-, got {clip(key)}"
        raise InvalidArgumentError(msg, field="metadata")
    if lower.endswith("-bin"):
        fits, expected = isinstance(value, bytes), "bytes"
    else:
        fits, expected = isinstance(value, str) and value.isascii() and value.isprintable(), "printable ASCII text"
    if not fits:
        msg = f"expected {expected} for {clip(key)}, got something else of type {type(value).__name__}"
        raise InvalidArgumentError(msg, field="metadata")
    return lower, value


def metadata_for(
    address: str,
    metadata: Mapping[str, str] | Iterable[tuple[str, str]],
    token: str | None,
    *,
    encrypted: bool,
) -> Metadata:
    """Return the metadata of a client's calls, with its keys in lower case and with the token in it.

    Metadata that already has an authorization is returned as it is, for any address: the user is responsible for it.

    Args:
        address: The address of the server.
        metadata: The metadata that the user passed: a mapping, or pairs.
        token: The token that the user passed; None: that of the environment, if there is one.
        encrypted: Whether the connection uses TLS.

    Raises:
        InvalidArgumentError: The token is not valid, would be sent over a network in plaintext, or is given twice; or
            gRPC could not send the metadata.

    """
    pairs = check_metadata(metadata)
    has_authorization = has_token(pairs)
    if has_authorization and token is not None:
        raise InvalidArgumentError(f"expected a token or {AUTHORIZATION} in the metadata, got both", field="token")
    field = TOKEN if token is None else "token"
    if token is None:
        token = os.environ.get(TOKEN) or None
    if has_authorization or token is None:
        return pairs
    # No error message may contain the token, as gRPC's own would.
    if not (isinstance(token, str) and token.isascii() and token.isprintable() and token and " " not in token):
        raise InvalidArgumentError("expected printable ASCII without spaces, got something else", field=field)
    if not (encrypted or is_local(address)):
        raise InvalidArgumentError(
            f"expected TLS (credentials=, or {CA} in the environment) to send a token to {address}, got plaintext, "
            "which others on the network can read",
            field=field,
        )
    return *pairs, (AUTHORIZATION, f"Bearer {token}")
