"""Certificates, created while the tests run."""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING

import grpc
import trustme

if TYPE_CHECKING:
    from pathlib import Path


class Authority:
    """A certificate authority, with the files of what it has issued.

    Attributes:
        ca: The file of its own certificate.

    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._authority = trustme.CA()
        self.ca = folder / "ca.pem"
        folder.mkdir()
        self._authority.cert_pem.write_to_path(self.ca)

    def issue(self, name: str, *, expired: bool = False, days: int = 1) -> tuple[Path, Path]:
        """Return the files of a new certificate and its key, which is valid for so many days or has expired."""
        now = dt.datetime.now(dt.UTC)
        begin, end = now - dt.timedelta(days=2), now + dt.timedelta(days=-1 if expired else days)
        issued = self._authority.issue_cert(name, not_before=begin, not_after=end)
        chain, key = self._folder / f"{name}.{expired}.pem", self._folder / f"{name}.{expired}.key"
        chain.write_bytes(b"".join(each.bytes() for each in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(key)
        return chain, key

    def credentials(self, pair: tuple[Path, Path] | None = None) -> grpc.ChannelCredentials:
        """Return credentials of a client that trusts this authority, optionally with a certificate of its own."""
        chain, key = (each.read_bytes() for each in pair) if pair else (None, None)
        return grpc.ssl_channel_credentials(self.ca.read_bytes(), key, chain)


def tls_settings(pair: tuple[Path, Path]) -> dict[str, str]:
    """Return a server's settings for a certificate and its key."""
    return {"tls_cert": str(pair[0]), "tls_key": str(pair[1])}
