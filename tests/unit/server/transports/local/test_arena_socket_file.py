"""The socket file: its mode, its removal, stale files, and paths that cannot be used."""

import errno
import os
import socket
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from poolrpc._wire.arena_packets import SUFFIX
from poolrpc_server.transports.local.arenas import ArenaListener
from tests.unit.server.transports.local.raw_client import listening, works

OTHER_USER = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can change the owner of a file")


def test_socket_file_is_private_and_removed_at_the_end(listener, path):
    """The mode is 0600, and closing the listener, even twice, removes the file."""
    assert Path(path + SUFFIX).stat().st_mode & 0o777 == 0o600
    listener.close()
    assert not Path(path + SUFFIX).exists()
    listener.close()


def test_stale_socket_is_replaced(path):
    """The socket file of a killed server does not prevent listening."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stale:
        stale.bind(path + SUFFIX)
    with listening(path) as listener:
        assert works(listener, path)


def test_socket_in_use_is_not_replaced(listener, path):
    """A second listener for the same path fails and leaves the first one working."""
    with pytest.raises(ValueError, match="expected no other server, got one"):
        ArenaListener(path, max_bytes=1, max_arenas=1)
    assert works(listener, path)


def test_socket_with_a_full_backlog_is_not_replaced(path):
    """A server whose backlog is full is not mistaken for a killed one."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as full, ExitStack() as connections:
        full.bind(path + SUFFIX)
        full.listen(0)
        codes = []
        while errno.EAGAIN not in codes:
            connection = connections.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            connection.setblocking(False)
            codes.append(connection.connect_ex(path + SUFFIX))
        with pytest.raises(ValueError, match="temporarily unavailable"):
            ArenaListener(path, max_bytes=1, max_arenas=1)
        assert Path(path + SUFFIX).is_socket()


def test_other_file_is_not_replaced(path):
    """A file at the path that is not a socket is kept."""
    Path(path + SUFFIX).write_text("mine")
    with pytest.raises(ValueError, match="expected no file"):
        ArenaListener(path, max_bytes=1, max_arenas=1)
    assert Path(path + SUFFIX).read_text() == "mine"


@as_root
def test_stale_socket_of_another_user_is_not_replaced(path):
    """A stale socket file that belongs to another user is kept."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stale:
        stale.bind(path + SUFFIX)
    os.chown(path + SUFFIX, OTHER_USER, OTHER_USER)
    with pytest.raises(ValueError, match="expected no file"):
        ArenaListener(path, max_bytes=1, max_arenas=1)


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o757])
def test_folder_that_others_can_write_to_is_rejected(path, folder, mode):
    """A folder in which others can rename files is rejected, unless it is sticky, as /tmp is."""
    folder.chmod(mode)
    with pytest.raises(ValueError, match="expected a folder that only its owner can write to"):
        ArenaListener(path, max_bytes=1, max_arenas=1)
    folder.chmod(mode | 0o1000)
    with listening(path) as listener:
        assert works(listener, path)


@as_root
def test_folder_of_another_user_is_rejected(path, folder):
    """A folder of another user, who can rename the files in it, is rejected."""
    os.chown(folder, OTHER_USER, OTHER_USER)
    with pytest.raises(ValueError, match="got one of user 65534"):
        ArenaListener(path, max_bytes=1, max_arenas=1)


@pytest.mark.parametrize("name", ["x" * 120, "none/pool.sock"], ids=["too long", "missing folder"])
def test_unusable_path_is_an_error(folder, name):
    """A path that the system rejects raises a ValueError with the reason, and no descriptor leaks."""
    before = psutil.Process().num_fds()
    with pytest.raises(ValueError, match=r"path too long|No such file"):
        ArenaListener(folder / name, max_bytes=1, max_arenas=1)
    assert psutil.Process().num_fds() <= before  # earlier tests may still be closing theirs


def test_file_of_a_successor_is_kept(path):
    """A closed listener removes only its own file."""
    with listening(path):
        Path(path + SUFFIX).unlink()
        Path(path + SUFFIX).write_text("another's")
    assert Path(path + SUFFIX).read_text() == "another's"
