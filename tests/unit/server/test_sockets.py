"""Addresses to listen on: which are free, and why others are not."""

import socket
from pathlib import Path

import pytest

from poolrpc_server.sockets import require_free


@pytest.fixture
def taken():
    """Return a port of 127.0.0.1 on which a socket listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize(
    "address", ["127.0.0.1:0", "localhost:0", "0.0.0.0:0", "dns-name-without-address.invalid:1", "unix:relative.sock"]
)
def test_a_free_address_is_accepted(address):
    """A free port or path is accepted, and so is a name that cannot be resolved: gRPC has a resolver of its own."""
    require_free(address)


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])  # noqa: S104 - it is taken
def test_a_port_in_use_is_rejected(host, taken):
    """A port on which another socket listens is rejected, on its own address and on all addresses."""
    with pytest.raises(ValueError, match=f"^expected a free address, got '{host}:{taken}': it is in use$"):
        require_free(f"{host}:{taken}")


def test_a_port_whose_connections_ended_is_free():
    """A port with connections in TIME_WAIT, as after a restart, is free."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        client = socket.create_connection(address)
        accepted, _ = server.accept()
        accepted.close()  # the side that closes first waits
        client.close()
    require_free(f"127.0.0.1:{address[1]}")


def test_one_free_address_of_a_name_is_enough(taken, monkeypatch):
    """A name is rejected if none of its addresses is free, as gRPC does it."""
    found = [
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port))
        for host, port in (("127.0.0.1", taken), ("127.0.0.2", taken), ("192.0.2.1", taken))
    ]
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: found)
    require_free(f"name:{taken}")
    del found[1]
    with pytest.raises(ValueError, match=r"it is in use$"):
        require_free(f"name:{taken}")


def test_an_address_of_another_machine_is_rejected():
    """An address that is not one of this machine's is rejected with that reason."""
    with pytest.raises(ValueError, match=r"got '192\.0\.2\.1:0': it does not belong to this machine$"):
        require_free("192.0.2.1:0")


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET])
def test_a_path_in_use_is_rejected(kind, tmp_path):
    """A path is rejected while a socket listens there; the file of one that has ended is not in the way."""
    path = tmp_path / "pool.sock"
    with socket.socket(socket.AF_UNIX, kind) as server:
        server.bind(str(path))
        server.listen()
        with pytest.raises(ValueError, match=f"^expected a free address, got 'unix:{path}': it is in use$"):
            require_free(f"unix:{path}")
    assert path.exists()
    require_free(f"unix:{path}")


def test_a_path_has_at_most_107_bytes(tmp_path):
    """A longer path is rejected with its length, rather than as one that is in use."""
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    path = f"{folder}/pool.sock"
    with pytest.raises(ValueError, match=f"^expected a path of at most 107 bytes, got {len(path)}: "):
        require_free(f"unix:{path}")


def test_a_path_needs_its_folder(tmp_path: Path):
    """A path in a folder that does not exist is rejected with the folder's name."""
    with pytest.raises(ValueError, match=f"there is no folder {tmp_path / 'none'}$"):
        require_free(f"unix:{tmp_path / 'none' / 'pool.sock'}")
