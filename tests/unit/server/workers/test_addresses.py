"""Addresses of several processes: a port that all listen on, a path that leads to one; nobody else's is taken."""

import socket
import subprocess
import sys
from contextlib import closing, suppress

import pytest

from poolrpc_server.sockets import is_live, take
from poolrpc_server.workers.addresses import SharedPath, SharedPort, share


def listening(path, kind=socket.SOCK_STREAM):
    """Give a socket that listens on a path."""
    made = socket.socket(socket.AF_UNIX, kind)
    made.bind(str(path))
    made.listen()
    return made


def stale(path):
    """Leave a socket's file of an ended process."""
    listening(path).close()


def open_port(port=0, *, shared):
    """Give a socket that listens on a port, as gRPC has it."""
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, int(shared))
    try:
        made.bind(("127.0.0.1", port))
    except BaseException:
        made.close()
        raise
    made.listen()
    return made


def port_of(address):
    """Give an address's port."""
    return int(address.rpartition(":")[2])


def names(folder):
    """Give the names of what is in a folder."""
    return {each.name for each in folder.iterdir()}


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_free_port_is_chosen_once_for_all(host):
    """Port 0 becomes a number, the same for each process; those who share it may listen there, others may not."""
    with closing(share(f"{host}:0")) as place:
        port = port_of(place.address)
        assert place.address == f"{host}:{port}"
        assert port
        assert [place.of(index) for index in range(3)] == [place.address] * 3
        with pytest.raises(OSError, match="in use"):
            open_port(port, shared=False)
        with open_port(port, shared=True), open_port(port, shared=True):
            place.lead_to(1)
    with open_port(port, shared=False):
        pass


@pytest.mark.parametrize("shared", [False, True])
def test_a_port_of_another_server_is_refused(shared):
    """A port on which somebody listens isn't taken, whether he would share it or not."""
    with open_port(shared=shared) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(ValueError, match=f"{address}: can't be had: Address already in use"):
            share(address)


def test_a_port_is_kept_before_anybody_listens():
    """Between its being taken and the processes' listening, a second server doesn't get the port either."""
    with closing(SharedPort("127.0.0.1:0")) as place, pytest.raises(ValueError, match="can't be had"):
        share(place.address)


@pytest.mark.parametrize("shared", [False, True])
def test_the_rests_of_an_ended_servers_connections_do_not_hinder(shared):
    """A port is taken anew although connections of the last server are in TIME_WAIT."""
    with open_port(shared=shared) as last:
        port = last.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            last.accept()[0].close()
            assert client.recv(1) == b""
    with closing(share(f"127.0.0.1:{port}")) as place, open_port(port, shared=True):
        assert port_of(place.address) == port


def test_an_address_of_another_machine_is_refused():
    """A host that this machine doesn't have can't be listened on."""
    with pytest.raises(ValueError, match=r"192\.0\.2\.1:0: can't be had"):
        share("192.0.2.1:0")


def test_a_path_leads_to_one_process_after_the_other(tmp_path):
    """Links of names without a folder point at the sockets of one process; arenas only where it has some."""
    path, arenas = tmp_path / "pool.sock", tmp_path / "pool.sock.arena"
    with closing(share(f"unix:{path}")) as place:
        assert place.address == f"unix:{path}"
        assert place.of(1) == f"unix:{path}.1"
        with listening(f"{path}.0"), listening(f"{path}.0.arena", socket.SOCK_SEQPACKET), listening(f"{path}.1"):
            place.lead_to(0)
            assert [each.readlink().name for each in (path, arenas)] == ["pool.sock.0", "pool.sock.0.arena"]
            assert is_live(path)
            place.lead_to(1)
            assert path.readlink().name == "pool.sock.1"
            assert "pool.sock.arena" not in names(tmp_path)
            assert "pool.sock.link" not in names(tmp_path)
    assert names(tmp_path) == set()


def test_what_ended_servers_left_is_removed(tmp_path):
    """Stale sockets and links of a server with more workers go; files of other names stay."""
    path = tmp_path / "pool.sock"
    for name in ("pool.sock.0", "pool.sock.7", "pool.sock.7.arena"):
        stale(tmp_path / name)
    path.symlink_to("pool.sock.7")
    (tmp_path / "pool.sock.arena").symlink_to("pool.sock.7.arena")
    (tmp_path / "pool.sock.link").symlink_to("pool.sock.0")
    (tmp_path / "pool.sock.lock").touch()
    for name in ("other.sock", "pool.sock.x", "pool.sock2"):
        stale(tmp_path / name)
    with closing(SharedPath(str(path))):
        assert names(tmp_path) == {"pool.sock.lock", "other.sock", "pool.sock.x", "pool.sock2"}
    assert names(tmp_path) == {"other.sock", "pool.sock.x", "pool.sock2"}


@pytest.mark.parametrize("name", ["pool.sock", "pool.sock.arena", "pool.sock.3", "pool.sock.3.arena"])
def test_another_servers_socket_is_not_taken(tmp_path, name):
    """Where somebody listens on one of the names, the path is refused and everything stays."""
    kind = socket.SOCK_SEQPACKET if name.endswith("arena") else socket.SOCK_STREAM
    with listening(tmp_path / name, kind):
        with pytest.raises(ValueError, match="can't be had: expected no other server, got one"):
            share(f"unix:{tmp_path / 'pool.sock'}")
        assert names(tmp_path) == {name}


def test_a_path_is_kept_before_anybody_listens(tmp_path):
    """Between its being taken and the processes' listening, a second server doesn't get the path either."""
    address = f"unix:{tmp_path / 'pool.sock'}"
    with closing(share(address)):
        with pytest.raises(ValueError, match="expected no other server, got one"):
            share(address)
        assert names(tmp_path) == {"pool.sock.lock"}
    share(address).close()


def test_a_killed_owner_keeps_no_path(tmp_path):
    """What holds a path ends with the process that does."""
    address = f"unix:{tmp_path / 'pool.sock'}"
    program = (
        "from poolrpc_server.workers.addresses import share\n"
        f"held = share({address!r}); print('held', flush=True); input()"
    )
    with subprocess.Popen(  # noqa: S603 - ours
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="expected no other server"):
            share(address)
        owner.kill()
    share(address).close()


@pytest.mark.parametrize("make", ["file", "link"])
def test_a_file_is_not_taken_for_a_socket(tmp_path, make):
    """A file of the name, or a link to somewhere else, is somebody's: it stays, and is told of."""
    path, other = tmp_path / "pool.sock", tmp_path / "other"
    other.write_text("mine")
    path.write_text("mine") if make == "file" else path.symlink_to("other")
    with pytest.raises(ValueError, match="expected no file, or the socket of an ended server"):
        share(f"unix:{path}")
    assert path.read_text() == "mine"


def test_a_folder_that_is_not_there(tmp_path):
    """A path in no folder is refused by name."""
    with pytest.raises(ValueError, match=r"none/pool\.sock: can't be had: No such file"):
        share(f"unix:{tmp_path / 'none' / 'pool.sock'}")


def test_one_process_takes_a_path_that_nobody_has(tmp_path):
    """A live socket is another server's, also where a link leads to it; a link to nothing is removed."""
    path = tmp_path / "pool.sock"
    take(path)
    path.symlink_to("pool.sock.0")
    take(path)
    assert names(tmp_path) == set()
    path.symlink_to("pool.sock.0")
    with listening(tmp_path / "pool.sock.0"), pytest.raises(BlockingIOError):
        take(path)
    with suppress(FileNotFoundError):
        path.unlink()
    stale(path)
    take(path)
