"""Who gets through to the services: TLS with certificates that may change, and a token with every call."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

from poolrpc.errors import PoolError
from poolrpc_server.reloading_file import ReloadingFile
from poolrpc_server.transports.grpc.interceptor import name_caller

if TYPE_CHECKING:
    from collections.abc import Callable

    from poolrpc_server.calls.tokens import TokenFile
    from poolrpc_server.transports.grpc.interceptor import CallInterceptor

HEALTH = "/grpc.health.v1.Health/"
"""Methods that need no token unless the operator says so: whoever probes has none."""

UNKNOWN = "/unknown/Unknown"
"""A method that isn't there, by one name: callers without a token can't fill logs and metrics with names."""


class Certificates:
    """The server's certificate and key, and whose clients' it takes, each from a PEM file that may change.

    Whoever connects after a change meets the new ones. Files that are half-written, or of which one is changed and the
    other not yet, leave the ones before in use.

    Args:
        cert: The file of the certificate, and those between it and its authority.
        key: The file of its key, which has no passphrase.
        client_ca: The file of the authorities of clients' certificates, which each client is then to have.
            Empty: clients need none.

    Raises:
        ValueError: The files can't be used, and why.

    """

    def __init__(self, cert: str, key: str, client_ca: str = "") -> None:
        self._paths = cert, key, client_ca
        paths = [path for path in self._paths if path]
        self._watched = ReloadingFile("the TLS files", paths, self._load)

    def credentials(self) -> grpc.ServerCredentials:
        """Give gRPC's credentials for one address; each needs its own, for gRPC hands each change to one once."""
        sent = self._watched.get()

        def changed() -> grpc.ServerCertificateConfiguration | None:
            nonlocal sent
            now = self._watched.get()
            if now is sent:
                return None
            sent = now
            return now

        return grpc.dynamic_ssl_server_credentials(
            sent,
            changed,  # type: ignore[arg-type]  # the stubs don't know that None is no change
            require_client_authentication=bool(self._paths[2]),
        )

    def _load(self) -> grpc.ServerCertificateConfiguration:
        cert, key, client_ca = self._paths
        # gRPC says no more of bad files than that a handshake failed, and that only in its own log.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(cert, key, password=_no_passphrase)
            if client_ca:
                context.load_verify_locations(client_ca)
        except ssl.SSLError as error:
            files = " and ".join(filter(None, self._paths))
            raise ValueError(f"expected a certificate and its key as PEM in {files}, got: {error}") from None
        authorities = Path(client_ca).read_bytes() if client_ca else None
        return grpc.ssl_server_certificate_configuration(
            [(Path(key).read_bytes(), Path(cert).read_bytes())], authorities
        )


def _no_passphrase() -> str:
    # Without this OpenSSL asks for it at the terminal, and waits.
    raise ValueError("expected a key without a passphrase")


class TokenInterceptor(grpc.ServerInterceptor):
    """Lets calls through that carry a token which is good for them; the others end before a message of theirs is read.

    Args:
        tokens: The tokens there are.
        calls: What answers, logs and counts the calls that are refused.
        health: Whether health checks need a token too.

    """

    def __init__(self, tokens: TokenFile, calls: CallInterceptor, *, health: bool = False) -> None:
        self._tokens = tokens
        self._calls = calls
        self._health = health

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler[Any, Any] | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Give the method's own handler, or one that refuses."""
        method = handler_call_details.method
        handler = continuation(handler_call_details)
        if method.startswith(HEALTH) and not self._health:
            return handler
        try:
            self._check_token(handler_call_details)
        except PoolError as error:
            return self._calls.refusal(UNKNOWN if handler is None else method, error)
        return handler

    def _check_token(self, details: grpc.HandlerCallDetails) -> None:
        metadata = details.invocation_metadata or ()
        token = self._tokens.authenticate([str(value) for key, value in metadata if key == "authorization"])
        name_caller(token.name)
        token.authorize(details.method)
