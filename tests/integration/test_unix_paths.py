"""Unix sockets whose paths have characters that gRPC would decode, and folders that are too long for one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

import poolrpc_server
from poolrpc import MaxPool2d

if TYPE_CHECKING:
    from tests.integration.conftest import Connect

X = np.zeros((1, 4, 256, 256), np.float32)


@pytest.mark.parametrize("name", ["a b.sock", "a%41.sock", "%.sock", "a?b#c.sock", "\u00e9.sock"])
def test_a_path_may_have_any_character(connect: Connect, tmp_path: Path, name: str) -> None:
    """Server and client mean the same file, for calls and for shared memory; a path object leads there too."""
    path = tmp_path / name
    server = poolrpc_server.Server(poolrpc_server.Config(listen=(f"unix:{path}",)))
    server.start()
    try:
        assert path.is_socket()
        for address in (f"unix:{path}", f"unix://{path}", path):
            assert connect(address).pool(X, MaxPool2d(2)).transport == "local"
    finally:
        server.stop(grace=0)


def test_an_embedded_server_finds_a_short_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the path of TMPDIR is too long for a socket, its socket is elsewhere."""
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    monkeypatch.setattr("tempfile.tempdir", None)
    with poolrpc_server.embedded() as client:
        assert client.pool(X, MaxPool2d(2)).transport == "local"
        folder = Path(client.address.removeprefix("unix:")).parent
    assert not folder.exists()


def test_a_server_rejects_a_path_that_is_too_long() -> None:
    """The error has the limit and the length."""
    with pytest.raises(poolrpc_server.ConfigError, match=r"^listen: expected a path of at most 107 bytes, got 151"):
        poolrpc_server.Config(listen=(f"unix:/{'x' * 150}",))
