"""Addresses that several workers share: ports, paths of unix sockets, and those that another server has."""

import socket
import subprocess
import sys
from contextlib import closing, suppress

import pytest

from poolrpc_server.sockets import is_listening, prepare_path
from poolrpc_server.workers.addresses import SharedPath, SharedPort, reserve

BRIEF = 0.05
"""Seconds to wait for an address that stays taken."""


def listening(path, kind=socket.SOCK_STREAM):
    """Return a socket that listens on a path."""
    listener = socket.socket(socket.AF_UNIX, kind)
    listener.bind(str(path))
    listener.listen()
    return listener


def leave_stale_socket(path):
    """Leave the file of a socket that no process listens on."""
    listening(path).close()


def listening_port(port=0, *, shared):
    """Return a socket that listens on a port, with the options that gRPC sets."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, int(shared))
    try:
        listener.bind(("127.0.0.1", port))
    except BaseException:
        listener.close()
        raise
    listener.listen()
    return listener


def port_of(address):
    """Return the port of an address."""
    return int(address.rpartition(":")[2])


def names(folder):
    """Return the names of the files in a folder."""
    return {each.name for each in folder.iterdir()}


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_workers_share_one_free_port(host):
    """Port 0 becomes one number for all workers; only sockets with SO_REUSEPORT may listen there."""
    with closing(reserve(f"{host}:0")) as shared:
        port = port_of(shared.address)
        assert shared.address == f"{host}:{port}"
        assert port
        assert [shared.worker_address(index) for index in range(3)] == [shared.address] * 3
        with pytest.raises(OSError, match="in use"):
            listening_port(port, shared=False)
        with listening_port(port, shared=True), listening_port(port, shared=True):
            shared.direct_to(1)
    with listening_port(port, shared=False):
        pass


@pytest.mark.parametrize("shared", [False, True])
def test_the_port_of_another_server_is_rejected(shared):
    """A port on which another process listens is not free, with SO_REUSEPORT or without."""
    with listening_port(shared=shared) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(ValueError, match=f"expected a free address, got '{address}': Address already in use"):
            reserve(address, BRIEF)


def test_a_port_is_reserved_before_a_worker_listens():
    """A second server does not get the port before the workers of the first listen either."""
    with closing(SharedPort("127.0.0.1:0")) as shared, pytest.raises(ValueError, match="expected a free address"):
        reserve(shared.address, BRIEF)


@pytest.mark.parametrize("shared", [False, True])
def test_a_port_with_connections_in_time_wait_is_free(shared):
    """A port can be reserved while connections of the last server are in TIME_WAIT."""
    with listening_port(shared=shared) as last:
        port = last.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            last.accept()[0].close()
            assert client.recv(1) == b""
    with closing(reserve(f"127.0.0.1:{port}")) as reserved, listening_port(port, shared=True):
        assert port_of(reserved.address) == port


def test_an_address_of_another_machine_is_rejected():
    """An address that does not belong to this machine can't be reserved."""
    with pytest.raises(ValueError, match=r"expected a free address, got '192\.0\.2\.1:0'"):
        reserve("192.0.2.1:0", BRIEF)


def test_a_path_leads_to_one_worker_after_the_other(tmp_path):
    """Relative links point at the sockets of one worker; the link for arenas only exists if the worker has them."""
    path, arenas = tmp_path / "pool.sock", tmp_path / "pool.sock.arena"
    with closing(reserve(f"unix:{path}")) as shared:
        assert shared.address == f"unix:{path}"
        assert shared.worker_address(1) == f"unix:{path}.1"
        with listening(f"{path}.0"), listening(f"{path}.0.arena", socket.SOCK_SEQPACKET), listening(f"{path}.1"):
            shared.direct_to(0)
            assert [each.readlink().name for each in (path, arenas)] == ["pool.sock.0", "pool.sock.0.arena"]
            assert is_listening(path)
            shared.direct_to(1)
            assert path.readlink().name == "pool.sock.1"
            assert "pool.sock.arena" not in names(tmp_path)
            assert "pool.sock.link" not in names(tmp_path)
    assert names(tmp_path) == set()


def test_files_of_ended_servers_are_removed(tmp_path):
    """Stale sockets and links of a server with more workers are removed; files of other names are kept."""
    path = tmp_path / "pool.sock"
    for name in ("pool.sock.0", "pool.sock.7", "pool.sock.7.arena"):
        leave_stale_socket(tmp_path / name)
    path.symlink_to("pool.sock.7")
    (tmp_path / "pool.sock.arena").symlink_to("pool.sock.7.arena")
    (tmp_path / "pool.sock.link").symlink_to("pool.sock.0")
    (tmp_path / "pool.sock.lock").touch()
    for name in ("other.sock", "pool.sock.x", "pool.sock2"):
        leave_stale_socket(tmp_path / name)
    with closing(SharedPath(str(path))):
        assert names(tmp_path) == {"pool.sock.lock", "other.sock", "pool.sock.x", "pool.sock2"}
    assert names(tmp_path) == {"other.sock", "pool.sock.x", "pool.sock2"}


@pytest.mark.parametrize("name", ["pool.sock", "pool.sock.arena", "pool.sock.3", "pool.sock.3.arena"])
def test_the_socket_of_another_server_is_rejected(tmp_path, name):
    """If a process listens on one of the names, the path is not free and no file is removed."""
    kind = socket.SOCK_SEQPACKET if name.endswith("arena") else socket.SOCK_STREAM
    with listening(tmp_path / name, kind):
        with pytest.raises(ValueError, match=r"expected a free address, got .*: another server listens on"):
            reserve(f"unix:{tmp_path / 'pool.sock'}", BRIEF)
        assert names(tmp_path) == {name}


def test_a_path_is_reserved_before_a_worker_listens(tmp_path):
    """A second server does not get the path before the workers of the first listen either."""
    address = f"unix:{tmp_path / 'pool.sock'}"
    with closing(reserve(address)):
        with pytest.raises(ValueError, match="another server has locked it"):
            reserve(address, BRIEF)
        assert names(tmp_path) == {"pool.sock.lock"}
    reserve(address).close()


def test_a_path_is_released_when_its_process_is_killed(tmp_path):
    """The reservation of a path ends with the process that holds it."""
    address = f"unix:{tmp_path / 'pool.sock'}"
    program = (
        "from poolrpc_server.workers.addresses import reserve\n"
        f"shared = reserve({address!r}); print('reserved', flush=True); input()"
    )
    with subprocess.Popen(  # noqa: S603 - ours
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout.readline() == "reserved\n"
        with pytest.raises(ValueError, match="another server has locked it"):
            reserve(address, BRIEF)
        owner.kill()
    reserve(address).close()


@pytest.mark.parametrize("make", ["file", "link"])
def test_a_file_that_is_not_a_socket_is_kept(tmp_path, make):
    """A regular file of that name, or a link to one, is kept and reported."""
    path, other = tmp_path / "pool.sock", tmp_path / "other"
    other.write_text("mine")
    path.write_text("mine") if make == "file" else path.symlink_to("other")
    with pytest.raises(ValueError, match="expected no file or the socket of a server that has ended"):
        reserve(f"unix:{path}", BRIEF)
    assert path.read_text() == "mine"


def test_a_missing_folder_is_rejected(tmp_path):
    """The message names a path whose folder does not exist."""
    with pytest.raises(ValueError, match=r"none/pool\.sock': No such file"):
        reserve(f"unix:{tmp_path / 'none' / 'pool.sock'}", BRIEF)


def test_a_single_process_prepares_its_path(tmp_path):
    """A socket that a process listens on is rejected, also through a link; a dangling link is removed."""
    path = tmp_path / "pool.sock"
    prepare_path(path)
    path.symlink_to("pool.sock.0")
    prepare_path(path)
    assert names(tmp_path) == set()
    path.symlink_to("pool.sock.0")
    with listening(tmp_path / "pool.sock.0"), pytest.raises(BlockingIOError):
        prepare_path(path)
    with suppress(FileNotFoundError):
        path.unlink()
    leave_stale_socket(path)
    prepare_path(path)
