"""TLS: the server's certificate and key, from files that may change."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from time import time

import grpc

from poolrpc_server.reloading_file import ReloadingFile
from poolrpc_server.telemetry.logs import log


@dataclass(frozen=True, slots=True, eq=False)
class _Loaded:
    """What was read from the files.

    Attributes:
        configuration: gRPC's form of it.
        context: Python's form of it.
        expiry: When the certificates of each setting's file expire first, in seconds since 1970.

    """

    configuration: grpc.ServerCertificateConfiguration
    context: ssl.SSLContext
    expiry: dict[str, float]


class Certificates:
    """The server's TLS certificate and key, and the authorities of its clients, from PEM files that may change.

    New connections use the new files. While a file is incomplete, or the certificate and the key do not match, the
    previous ones stay in use.

    Args:
        cert: The file of the certificate and its intermediate certificates.
        key: The file of the private key, without a passphrase.
        client_ca: The file of the authorities of clients' certificates: every client must then present a certificate.
            Empty: clients need no certificate.

    Raises:
        ValueError: A file is missing or not valid.

    """

    def __init__(self, cert: str, key: str, client_ca: str = "") -> None:
        self._paths = cert, key, client_ca
        paths = [path for path in self._paths if path]
        self._files = ReloadingFile("the TLS files", paths, self._load)

    def expiry(self) -> dict[str, float]:
        """Return when the certificates of each setting's file expire first, in seconds since 1970."""
        return self._files.get().expiry

    def credentials(self) -> grpc.ServerCredentials:
        """Return gRPC's credentials for one address.

        Every address needs credentials of its own, because they report each change of the files only once.
        """
        current = self._files.get()

        def changed() -> grpc.ServerCertificateConfiguration | None:
            nonlocal current
            latest = self._files.get()
            if latest is current:
                return None
            current = latest
            return latest.configuration

        return grpc.dynamic_ssl_server_credentials(
            current.configuration,
            changed,  # type: ignore[arg-type]  # the stubs don't know that None means "no change"
            require_client_authentication=bool(self._paths[2]),
        )

    def context(self) -> ssl.SSLContext:
        """Return a context for Python's own sockets, whose handshakes have the latest files."""

        def use_latest(connection: ssl.SSLObject, _: str | None, __: ssl.SSLContext) -> None:
            connection.context = self._files.get().context

        first = self._files.get().context
        first.sni_callback = use_latest  # called in every handshake, with a name or without
        return first

    def _load(self) -> _Loaded:
        cert, key, client_ca = self._paths
        # OpenSSL checks the files first: gRPC itself only reports that a handshake failed, and only in its own log.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(cert, key, password=_no_passphrase)
            if client_ca:
                context.load_verify_locations(client_ca)
                context.verify_mode = ssl.CERT_REQUIRED
        except ssl.SSLError as error:
            files = " and ".join(filter(None, self._paths))
            raise ValueError(f"expected a certificate and its key as PEM in {files}, got: {error}") from None
        chain = Path(cert).read_bytes()
        authorities = Path(client_ca).read_bytes() if client_ca else None
        configuration = grpc.ssl_server_certificate_configuration([(Path(key).read_bytes(), chain)], authorities)
        found = {"tls_cert": chain, "tls_client_ca": authorities}
        expiry = {setting: first for setting, pem in found.items() if (first := _expiry(pem))}
        for setting, seconds in expiry.items():
            if seconds <= time():
                expired = datetime.fromtimestamp(seconds, UTC).isoformat()
                log.warning("a certificate has expired: clients reject it", setting=setting, expired=expired)
        return _Loaded(configuration, context, expiry)


def _expiry(pem: bytes | None) -> float | None:
    """Return when the first certificate of a file expires; None if that is unknown."""
    if not pem:
        return None
    from cryptography import x509  # noqa: PLC0415 - not pure Python, so scripts/gpu.sh cannot bring it, and only TLS needs it

    try:
        return min(each.not_valid_after_utc.timestamp() for each in x509.load_pem_x509_certificates(pem))
    except ValueError as error:  # what OpenSSL accepts, and this library does not: it serves, unwatched
        log.warning("expiry of a certificate unknown", error=str(error))
        return None


def _no_passphrase() -> str:
    # Without this callback OpenSSL would prompt for the passphrase at the terminal.
    raise ValueError("expected a key without a passphrase")
