"""A server process as a whole: its private folder, its limit on descriptors, and its forced end."""

import os
import resource
import stat
import subprocess
import sys
import tempfile

import pytest

from poolrpc_server.process import FAILED, FOLDER_PREFIX, private_folder, raise_descriptor_limit

HOLDING = """
from poolrpc_server.process import private_folder
with private_folder() as folder:
    (folder / "socket").touch()
    print(folder, flush=True)
    input()
"""


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """Return a folder of a short path in which this process and its children make temporary ones."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield type(tmp_path)(folder)


def test_a_private_folder_is_removed_at_the_end(temporary):
    """Only this user can enter the folder; it is removed with what is in it."""
    with private_folder() as folder:
        assert folder.parent == temporary
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        (folder / "socket").touch()
    assert list(temporary.iterdir()) == []


def test_the_folders_of_killed_processes_are_removed(temporary):
    """The next process removes what a killed one left, and keeps the folders of living ones and of other programs."""
    (temporary / "poolrpc-other").mkdir()
    (temporary / f"{FOLDER_PREFIX}link").symlink_to(temporary / "poolrpc-other")
    holders = [
        subprocess.Popen([sys.executable, "-c", HOLDING], stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # noqa: S603 - ours
        for _ in range(2)
    ]
    killed, living = holders
    try:
        left, kept = (each.stdout.readline().decode().strip() for each in holders)
        killed.kill()
        killed.wait()
        assert os.path.exists(left)  # noqa: PTH110 - text
        with private_folder() as folder:
            names = {each.name for each in temporary.iterdir()}
            assert names == {"poolrpc-other", f"{FOLDER_PREFIX}link", folder.name, os.path.basename(kept)}  # noqa: PTH119
        living.communicate(b"\n")
    finally:
        for each in holders:
            each.kill()
            each.communicate()
    assert {each.name for each in temporary.iterdir()} == {"poolrpc-other", f"{FOLDER_PREFIX}link"}


def test_a_temporary_folder_with_a_long_path_is_not_used(tmp_path, monkeypatch):
    """The path of a unix socket has a limit: another place is taken."""
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with private_folder() as folder:
        assert folder.parent != long
        assert len(os.fsencode(folder)) < 100
    assert not folder.exists()


def test_without_a_place_there_is_no_folder(monkeypatch):
    """If no folder can be made, the error is that of the last attempt."""
    monkeypatch.setattr(tempfile, "tempdir", "/none")
    monkeypatch.setattr("poolrpc_server.process.FURTHER_FOLDERS", ("/neither",))
    with pytest.raises(FileNotFoundError, match="neither"), private_folder():
        pass


def test_the_limit_on_descriptors_is_raised():
    """The soft limit becomes the hard limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard - 1, hard))
        raise_descriptor_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("blocked", [False, True])
def test_a_process_ends_by_force(blocked):
    """The reason and the stacks of all threads are on stderr; the status is FAILED even if nothing reads the log."""
    program = f"""
import os, threading
from poolrpc_server.process import exit_now
from poolrpc_server.telemetry import logs
logs.configure("json", "info")
waiting = threading.Thread(target=threading.Event().wait, name="hangs")
waiting.start()
if {blocked}:
    os.set_blocking(2, False)
    try:
        while True:
            os.write(2, bytes(4096))
    except BlockingIOError:
        os.set_blocking(2, True)
exit_now("it hangs")
"""
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE)  # noqa: S603 - ours
    try:
        assert process.wait(60) == FAILED
        shown = process.stderr.read()
    finally:
        process.kill()
        process.stderr.close()
    if not blocked:
        assert b'"reason": "it hangs"' in shown
        assert b"threading.py" in shown
