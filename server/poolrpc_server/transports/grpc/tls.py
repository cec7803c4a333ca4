"""TLS: the server's certificate and key, from files that may change."""

from __future__ import annotations

import ssl
from pathlib import Path

import grpc

from poolrpc_server.reloading_file import ReloadingFile


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
        self._configuration = ReloadingFile("the TLS files", paths, self._load)

    def credentials(self) -> grpc.ServerCredentials:
        """Return gRPC's credentials for one address.

        Every address needs credentials of its own, because they report each change of the files only once.
        """
        current = self._configuration.get()

        def changed() -> grpc.ServerCertificateConfiguration | None:
            nonlocal current
            latest = self._configuration.get()
            if latest is current:
                return None
            current = latest
            return latest

        return grpc.dynamic_ssl_server_credentials(
            current,
            changed,  # type: ignore[arg-type]  # the stubs don't know that None means "no change"
            require_client_authentication=bool(self._paths[2]),
        )

    def _load(self) -> grpc.ServerCertificateConfiguration:
        cert, key, client_ca = self._paths
        # OpenSSL checks the files first: gRPC itself only reports that a handshake failed, and only in its own log.
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
    # Without this callback OpenSSL would prompt for the passphrase at the terminal.
    raise ValueError("expected a key without a passphrase")
