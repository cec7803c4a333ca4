"""The command `poolrpc` as a process: its statuses, and its last words, however it ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Start = Callable[..., subprocess.Popen[str]]

POOLRPC = (sys.executable, "-m", "poolrpc")


@pytest.fixture
def start(tmp_path: Path, address: str) -> Start:
    """Return a function that starts a command in an empty folder, against the server."""

    def command(
        *arguments: object, environment: dict[str, str] | None = None, closed: int | None = None, **options: Any
    ) -> subprocess.Popen[str]:
        # Closed by a shell: a function between fork and exec is not safe in a process with gRPC's threads.
        prefix = [] if closed is None else ["sh", "-c", f'exec "$@" {closed}>&-', "sh"]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
        return subprocess.Popen(  # noqa: S603 - our own command
            [*prefix, *POOLRPC, *map(str, arguments)],
            cwd=tmp_path,
            text=True,
            env=os.environ | {"POOLRPC_ADDRESS": address, "PYTHONUNBUFFERED": ""} | (environment or {}),
            **options,
        )

    return command


@pytest.fixture
def silent() -> socket.socket:
    """Return a socket that listens and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening


def outcome(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Return the status, stdout and stderr of a process that ends."""
    output, error = process.communicate(timeout=60)
    return process.returncode, output, error


def test_python_runs_the_package(start: Start) -> None:
    """`python -m poolrpc` is the command."""
    assert outcome(start("shape", "1x1x4x4", "MaxPool2d(2)")) == (0, "MaxPool2d(2) -> (1, 1, 2, 2)\n", "")


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["health"], ""),
        (["info"], ""),
        (["pool", "x.npy", "--layer", "MaxPool2d(2)"], ""),
        (["pool", ".", "--layer", "MaxPool2d(2)"], "poolrpc: 1 file: 0 pooled, 1 left\n"),
    ],
)
def test_ctrl_c_ends_with_status_130_and_no_traceback(
    start: Start, silent: socket.socket, tmp_path: Path, command: list[str], said: str
) -> None:
    """SIGINT during a call ends the command with status 130 and nothing on stderr, or how far it came."""
    np.save(tmp_path / "x.npy", np.ones((1, 1, 4, 4), np.float32))
    process = start(*command, "--address", f"127.0.0.1:{silent.getsockname()[1]}")
    with silent.accept()[0]:  # the command has called
        process.send_signal(signal.SIGINT)
        assert outcome(process) == (130, "", said)


PAUSE_AT_IMPORT = """
import os, sys
class Pause:
    def find_spec(self, name, *_):
        if name == os.environ["PAUSE_AT"]:
            os.write(1, b"importing\\n")
            os.read(0, 1)
sys.meta_path.insert(0, Pause())
"""


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(
    ("package", "module"),
    [
        ("poolrpc", "poolrpc.cli"),
        ("poolrpc", "numpy"),
        ("poolrpc", "grpc._cython"),
        ("poolrpc", "poolrpc.v1"),
        ("poolrpc_server", "poolrpc_server.config"),
        ("poolrpc_server", "structlog"),
        ("poolrpc_server", "torch"),
        ("poolrpc_server", "torch.nn"),
    ],
)
def test_ctrl_c_during_imports_ends_with_status_130_and_no_traceback(tmp_path: Path, package: str, module: str) -> None:
    """SIGINT while a command imports its packages ends it with status 130, and no traceback is on stderr."""
    (tmp_path / "sitecustomize.py").write_text(PAUSE_AT_IMPORT)
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(  # noqa: S603 - our own command
        [sys.executable, "-m", package, *(["--listen", "127.0.0.1:0"] if package == "poolrpc_server" else ["info"])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": path, "PAUSE_AT": module},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    status, _, error = outcome(process)
    assert status == 130
    assert "Traceback" not in error
    assert "KeyboardInterrupt" not in error


@pytest.mark.parametrize("arguments", [["--help"], ["info"], ["info", "--json"], ["shape", "1x1x4x4", "MaxPool2d(2)"]])
def test_a_reader_that_is_gone_ends_with_status_141(start: Start, arguments: list[str]) -> None:
    """If the reader of the output is gone, as head is, the status is that of SIGPIPE, and nothing is on stderr."""
    reading, writing = os.pipe()
    os.close(reading)
    process = start(*arguments, stdout=writing)
    os.close(writing)
    assert outcome(process)[::2] == (141, "")


def test_head_gets_its_line(start: Start) -> None:
    """`poolrpc info | head -1` prints one line."""
    process = start("info")
    head = subprocess.run(["head", "-n", "1"], stdin=process.stdout, capture_output=True, text=True, check=True)  # noqa: S607 - by PATH
    assert head.stdout.startswith("poolrpc ")
    assert process.wait(60) in (0, 141)  # head may be slower than the command
    assert process.stderr is not None
    assert process.stderr.read() == ""
    process.communicate()


@pytest.mark.parametrize("arguments", [["--version"], ["info"], ["shape", "1x1x4x4", "MaxPool2d(2)", "--json"]])
def test_a_full_disk_is_one_line(start: Start, arguments: list[str]) -> None:
    """If the output can't be written, the status is 1, and one line on stderr has the cause."""
    with open("/dev/full", "w") as full:  # noqa: PTH123 - a device
        process = start(*arguments, stdout=full)
    assert outcome(process)[::2] == (1, "poolrpc: the output can't be written: [Errno 28] No space left on device\n")


def test_a_closed_output_is_one_line(start: Start) -> None:
    """If stdout is closed, the status is 1, and one line on stderr has the cause."""
    process = start("shape", "1x1x4x4", "MaxPool2d(2)", closed=1)
    assert outcome(process)[::2] == (1, "poolrpc: the output can't be written: [Errno 9] Bad file descriptor\n")


@pytest.mark.parametrize("stderr", ["closed", "full"])
@pytest.mark.parametrize(("layer", "status"), [("MaxPool2d(0)", 1), ("MaxPool2d(2)", 0)])
def test_an_error_output_that_fails_changes_nothing(start: Start, stderr: str, layer: str, status: int) -> None:
    """The status and the output are the same if stderr is closed or can't be written."""
    with open("/dev/full", "w") as full:  # noqa: PTH123 - a device
        options = {"stderr": full} if stderr == "full" else {"closed": 2}
        process = start("shape", "1x1x4x4", layer, **options)
    assert outcome(process)[:2] == (status, "" if status else "MaxPool2d(2) -> (1, 1, 2, 2)\n")


@pytest.mark.parametrize(
    "environment", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C"}, {"PYTHONUTF8": "0", "LC_ALL": "C"}]
)
@pytest.mark.parametrize("name", ["größe.npy", os.fsdecode(b"\xff.npy")], ids=["unicode", "not unicode"])
@pytest.mark.parametrize("as_json", [False, True])
def test_a_terminal_may_lack_the_characters_of_a_name(
    start: Start, tmp_path: Path, environment: dict[str, str], name: str, *, as_json: bool
) -> None:
    """A name with characters that the output can't encode is printed with escapes, in results and in errors."""
    np.save(tmp_path / "x.npy", np.ones((1, 1, 4, 4), np.float32))
    command = ("pool", "x.npy", "--layer", "MaxPool2d(2)", *(["--json"] if as_json else []))
    status, output, error = outcome(
        start(*command, "--save", name, environment=environment, encoding="utf-8", errors="surrogateescape")
    )
    assert (status, error) == (0, "")
    assert "saved" in output
    status, output, error = outcome(
        start("pool", f"no-{name}", "--layer", "MaxPool2d(2)", environment=environment, errors="surrogateescape")
    )
    assert (status, output, error.count("\n")) == (1, "", 1)
    assert error.startswith("poolrpc: [Errno 2] No such file or directory: ")


@pytest.mark.parametrize("data", ["image", "npy", "npz"])
def test_a_file_on_the_standard_input(start: Start, tmp_path: Path, data: str) -> None:
    """`-` reads an image, a .npy or a .npz from the standard input, by its contents."""
    from PIL import Image  # noqa: PLC0415 - for this test only

    x, path = np.arange(16, dtype=np.uint8).reshape(4, 4), tmp_path / f"x.{data}"
    if data == "image":
        path = tmp_path / "x.png"
        Image.fromarray(x).save(path)
    elif data == "npy":
        np.save(path, x[None])
    else:
        np.savez(path, x=x[None])
    with path.open("rb") as file:
        status, output, error = outcome(start("pool", "-", "--layer", "MaxPool2d(2)", "--json", stdin=file))
    assert (status, error) == (0, "")
    assert '"values": [[' in output
    assert [
        int(each) for each in output.split('"values": ')[1].split("}")[0].replace("[", "").replace("]", "").split(",")
    ] == [
        5,
        7,
        13,
        15,
    ]


def test_a_warning_is_one_line(start: Start, tmp_path: Path) -> None:
    """A warning of Pillow, of an image with damaged metadata, is one line on stderr."""
    from PIL import Image  # noqa: PLC0415 - for this test only

    Image.new("RGB", (4, 4)).save(tmp_path / "x.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")
    status, _, error = outcome(start("pool", "x.jpg", "--layer", "MaxPool2d(2)"))
    assert status == 0
    assert all(line.startswith("poolrpc: ") for line in error.splitlines())
