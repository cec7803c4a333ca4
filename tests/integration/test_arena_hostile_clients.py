"""Hostile clients of arenas, each a process of its own: wrong ids and ranges, memory that changes, clients that die."""

from __future__ import annotations

import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import psutil
import pytest

import poolrpc
from poolrpc import MaxPool2d, PoolClient
from scripts.server_process import ServerProcess, serving

if TYPE_CHECKING:
    from collections.abc import Iterator

if sys.platform != "linux":
    pytest.skip("arenas need memfd, which only Linux has", allow_module_level=True)

MIB = 2**20


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Return a server process for all tests of this file, so that a crash fails every later test."""
    # Without the watchdog, whose connection would be one more from some moment on.
    listen = f"unix:{tmp_path_factory.mktemp('arena') / 'pool.sock'}"
    with serving("--watchdog-seconds", "0", listen=listen) as made:
        yield made
        assert made.process.poll() is None


def mapped_by(server: ServerProcess) -> int:
    """Return the number of arenas that a server process has mapped."""
    return Path(f"/proc/{server.process.pid}/maps").read_text().count("memfd:poolrpc-arena")


def descriptors_of(server: ServerProcess) -> int:
    """Return the number of a server process's descriptors."""
    return psutil.Process(server.process.pid).num_fds()


@pytest.fixture
def undisturbed(server: ServerProcess) -> Iterator[PoolClient]:
    """Return a client, and call through an arena during the test: all results are right, and nothing is left behind."""
    x = np.random.default_rng(7).standard_normal((2, 8, 96, 96), np.float32)
    expected = x.reshape(2, 8, 48, 2, 48, 2).max((3, 5))
    with PoolClient(server.address) as client:
        assert client.pool(x, MaxPool2d(2)).transport == "local"
        before = mapped_by(server), descriptors_of(server)
        stop, faults, count = threading.Event(), [], 0

        def call() -> None:
            nonlocal count
            while not stop.is_set():
                try:
                    result = client.pool(x, MaxPool2d(2))
                    if result.transport != "local" or not np.array_equal(result.output, expected):
                        faults.append(result)
                    count += 1
                except poolrpc.PoolError as error:
                    faults.append(error)

        caller = threading.Thread(target=call)
        caller.start()
        try:
            yield client
        finally:
            stop.set()
            caller.join()
        assert not faults
        assert count
        # The server notices that a client is gone while these calls are made.
        for _ in range(5000):
            after = mapped_by(server), descriptors_of(server)
            if after[0] <= before[0] and after[1] <= before[1] + 1:
                break
            client.server_info()
        assert after[0] <= before[0]
        assert after[1] <= before[1] + 1  # the client's second connection, for calls of two threads at a time
        assert server.process.poll() is None


PRELUDE = """
import array, errno, fcntl, mmap, os, secrets, socket, sys, threading

path = sys.argv[1]

def report(*words):
    print(*words, sep="\\t", flush=True)

def connect():
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(path + ".arena")
    return connection

def attach(size):
    from poolrpc.v1 import pool_pb2
    connection = connect()
    connection.send(pool_pb2.AttachRequest(size=size).SerializeToString())
    packet, ancillary, _, _ = connection.recvmsg(8192, socket.CMSG_SPACE(4))
    answer = pool_pb2.AttachResponse.FromString(packet)
    if not ancillary:
        raise SystemExit(f"rejected: {answer}")
    descriptor, = array.array("i", ancillary[0][2][:4])
    return connection, answer.arena_id, descriptor

def channel():
    import grpc
    return grpc.insecure_channel("unix:" + path, [("grpc.enable_retries", 0)])

def request(arena_id, input, output, layer=None, shape=(1, 16, 64, 64), indices=False):
    from poolrpc.v1 import pool_pb2
    layer = layer or {"max_pool": {"spatial_dims": 2, "kernel_size": [2]}}
    message = pool_pb2.PoolRequest(
        input={"dtype": pool_pb2.DATA_TYPE_FLOAT32, "shape": shape}, branches=[{"layers": [layer]}],
        arena={"arena_id": arena_id, "input": dict(zip(("offset", "length"), input)),
               "output": dict(zip(("offset", "length"), output))})
    if indices:
        message.operand.dtype = pool_pb2.DATA_TYPE_INT64
        message.operand.shape.extend(shape)
    return message

def call(channel, message, timeout=60):
    import grpc
    from poolrpc.v1 import pool_pb2
    method = channel.unary_unary("/poolrpc.v1.PoolService/Pool", pool_pb2.PoolRequest.SerializeToString,
                                 pool_pb2.PoolResponse.FromString)
    try:
        method(message, timeout=timeout)
        return "OK", ""
    except grpc.RpcError as error:
        return error.code().name, error.details()
"""


@contextmanager
def hostile(server: ServerProcess, program: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Run a program in a second process, with the path of the server's socket."""
    path = server.address.removeprefix("unix:")
    command = [sys.executable, "-c", PRELUDE + program, path, *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603 - ours
        try:
            yield process
        finally:
            process.kill()


def run(server: ServerProcess, program: str, *arguments: str) -> list[list[str]]:
    """Run a program to its end, and return the lines that it reported, in fields."""
    with hostile(server, program, *arguments) as process:
        lines = process.communicate(timeout=60)[0].splitlines()
        assert process.returncode == 0
    return [each.split("\t") for each in lines]


IDS = """
connection, arena_id, descriptor = attach(2**20)
gone, old_id, old = attach(2**20)
gone.close()
calls = channel()
ids = {"its own": arena_id, "freed": old_id, "random": secrets.token_bytes(16), "none": b"", "short": arena_id[:15],
       "long": arena_id + b"\\0", "bit": bytes([arena_id[0] ^ 1]) + arena_id[1:], "reversed": arena_id[::-1],
       "large": bytes(2**19)}
for name, each in ids.items():
    for _ in range(10_000 if name == "freed" else 1):
        code, _ = call(calls, request(each, (0, 2**18), (2**18, 2**16)))
        if code != "OK":
            break
    report(name, code)
"""


@pytest.mark.usefixtures("undisturbed")
def test_ids_of_other_arenas_are_not_found(server: ServerProcess) -> None:
    """An id that was freed, guessed, cut or made up is NOT_FOUND."""
    codes = dict(run(server, IDS))
    assert codes.pop("its own") == "OK"
    assert set(codes.values()) == {"NOT_FOUND"}


RANGES = """
connection, arena_id, descriptor = attach(2**20)
calls = channel()
for line in sys.stdin:
    one, two, three, four = map(int, line.split())
    report(*call(calls, request(arena_id, (one, two), (three, four))))
"""
INPUT, OUTPUT = 2**18, 2**16  # bytes of the request's tensors
REJECTED = {
    "input over the end by 64": ((MIB - INPUT + 64, INPUT, 0, OUTPUT), "arena.input.length"),
    "input over the end by 1": ((MIB - INPUT, INPUT + 1, 0, OUTPUT), "arena.input.length"),
    "output over the end by 64": ((0, INPUT, MIB - OUTPUT + 64, OUTPUT), "arena.output.length"),
    "offset that wraps": ((2**64 - 64, 64, INPUT, OUTPUT), "arena.input.offset"),
    "offset that wraps to the input": ((2**64 - 64, INPUT + 64, INPUT, OUTPUT), "arena.input.offset"),
    "output that wraps": ((0, INPUT, 2**64 - 64, OUTPUT), "arena.output.offset"),
    "half of 64 bits": ((2**63, 2**63, INPUT, OUTPUT), "arena.input.offset"),
    "length of 2^64-1": ((0, 2**64 - 1, INPUT, OUTPUT), "arena.input.length"),
    "output length of 2^64-1": ((0, INPUT, INPUT, 2**64 - 1), "arena.output.length"),
    "input after the end": ((MIB + 64, INPUT, 0, OUTPUT), "arena.input.offset"),
    "input at the end": ((MIB, INPUT, 0, OUTPUT), "arena.input.length"),
    "input misaligned": ((4, INPUT, INPUT + 64, OUTPUT), "arena.input.offset: expected a multiple of 64, got 4"),
    "output misaligned": ((0, INPUT, INPUT + 63, OUTPUT), "arena.output.offset: expected a multiple of 64"),
    "overlap": ((0, INPUT, INPUT - 64, OUTPUT), "arena.output: expected a range apart from the input's"),
    "overlap from before": ((OUTPUT - 64, INPUT, 0, OUTPUT), "arena.output"),
    "the same range": ((0, INPUT, 0, INPUT), "arena.output"),
    "output inside the input": ((0, INPUT, 64, OUTPUT), "arena.output"),
    "input too small": ((0, INPUT - 64, INPUT, OUTPUT), "arena.input: expected a range of at least 262144 bytes"),
    "empty input": ((0, 0, INPUT, OUTPUT), "arena.input: expected a range of at least 262144 bytes"),
    "output too small": ((0, INPUT, INPUT, OUTPUT - 1), "arena.output: expected a range of at least 65536 bytes"),
    "empty output": ((0, INPUT, INPUT, 0), "arena.output: expected a range of at least 65536 bytes"),
}


@pytest.mark.usefixtures("undisturbed")
def test_invalid_ranges_are_rejected(server: ServerProcess) -> None:
    """Ranges past the end, wrapping, misaligned, overlapping or too small are INVALID_ARGUMENT."""
    good = (0, INPUT, MIB - OUTPUT, OUTPUT), (0, INPUT, INPUT, OUTPUT), (OUTPUT, MIB - OUTPUT, 0, OUTPUT)
    ranges = [*(each for each, _ in REJECTED.values()), *good]
    with hostile(server, RANGES) as process:
        out, _ = process.communicate("".join(f"{' '.join(map(str, each))}\n" for each in ranges), timeout=60)
    answers = [each.split("\t") for each in out.splitlines()]
    for (name, (_, words)), (code, details) in zip(REJECTED.items(), answers[: len(REJECTED)], strict=True):
        assert (name, code) == (name, "INVALID_ARGUMENT"), details
        assert words in details, name
    assert [code for code, _ in answers[len(REJECTED) :]] == ["OK"] * len(good)


SHRINK = """
connection, arena_id, descriptor = attach(2**20)
calls = channel()
for name, act in {
    "shrink": lambda: os.ftruncate(descriptor, 0),
    "by path": lambda: os.truncate(f"/proc/self/fd/{descriptor}", 4096),
    "grow": lambda: os.ftruncate(descriptor, 2**30),
    "append": lambda: os.pwrite(descriptor, b"x", 2**20),
    "seal": lambda: fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE),
}.items():
    try:
        act()
        report(name, "done")
    except OSError as error:
        report(name, errno.errorcode[error.errno])
import ctypes
hole = ctypes.CDLL(None, use_errno=True).fallocate(descriptor, 3, ctypes.c_long(0), ctypes.c_long(2**20))
report("hole", hole)
report("call", call(calls, request(arena_id, (0, 2**18), (2**18, 2**16)))[0])
"""


@pytest.mark.usefixtures("undisturbed")
def test_an_arena_cannot_be_resized(server: ServerProcess) -> None:
    """Shrinking, growing or sealing the memory is EPERM, and a hole reads as zeros."""
    outcomes = dict(run(server, SHRINK))
    assert outcomes.pop("hole") in ("0", "-1")
    assert outcomes.pop("call") == "OK"
    assert outcomes == dict.fromkeys(outcomes, "EPERM")


REWRITE = """
import numpy as np
connection, arena_id, descriptor = attach(2**23)
memory = np.frombuffer(mmap.mmap(descriptor, 2**23), np.uint8)
count = 16 * 64 * 64
x, indices = memory[: 4 * count].view(np.float32), memory[4 * count : 12 * count].view(np.int64)
random = np.random.default_rng(1)
good, bad = random.integers(0, 128 * 128, count), random.integers(-2**63, 2**63 - 1, count)
done = threading.Event()

def rewrite():
    while not done.is_set():
        indices[:] = good
        x[:] = np.nan
        indices[::7] = bad[::7]
        x[:] = random.standard_normal(count)

indices[:] = good
thread = threading.Thread(target=rewrite, daemon=True)
thread.start()
calls = channel()
unpool = {"max_unpool": {"spatial_dims": 2, "kernel_size": [2]}}
average = {"avg_pool": {"spatial_dims": 2, "kernel_size": [3]}}
fractional = {"fractional_max_pool": {"spatial_dims": 2, "kernel_size": [2], "output_size": {"cells": [9]},
              "return_indices": True}}
for i in range(300):
    layer = (unpool, {"max_pool": {"spatial_dims": 2, "kernel_size": [3], "return_indices": True}}, average, unpool,
             fractional)[i % 5]
    message = request(arena_id, (0, 12 * count), (12 * count, 2**23 - 12 * count), layer, indices=layer is unpool)
    report(list(layer)[0], call(calls, message)[0])
done.set()
thread.join()
"""


@pytest.mark.usefixtures("undisturbed")
def test_tensors_may_change_while_the_server_reads_them(server: ServerProcess) -> None:
    """Indices and inputs that a client keeps rewriting are answered or rejected, and the server goes on."""
    outcomes = run(server, REWRITE)
    assert len(outcomes) == 300
    assert {code for _, code in outcomes} <= {"OK", "INVALID_ARGUMENT"}
    assert {code for name, code in outcomes if name != "max_unpool"} == {"OK"}


KILLED = """
connection, arena_id, descriptor = attach(2**24)
calls = channel()
from poolrpc.v1 import pool_pb2
method = calls.unary_unary("/poolrpc.v1.PoolService/Pool", pool_pb2.PoolRequest.SerializeToString,
                          pool_pb2.PoolResponse.FromString)
heavy = {"lp_pool": {"spatial_dims": 2, "kernel_size": [7], "stride": [1], "norm_type": 3.5}}
half = 2**23
computing = False
while not computing:  # on a busy machine, the small call may take longer than the large one
    future = method.future(request(arena_id, (0, half), (half, half), heavy, (1, 8, 512, 512)), timeout=60)
    status = call(calls, request(arena_id, (0, 2**18), (2**18, 2**16)))[0]
    computing = not future.done()
report(status)
future.result()
"""


@pytest.mark.usefixtures("undisturbed")
def test_the_arena_of_a_client_killed_during_a_call_is_freed(server: ServerProcess) -> None:
    """The arena of a client that is killed while the server computes in it is freed when that has ended."""
    with hostile(server, KILLED) as process:
        assert process.stdout.readline() == "OK\n"
        assert mapped_by(server) == 2
        process.kill()
        process.wait()


IDLE = """
connections = []
for _ in range(1000):
    try:
        connections.append(connect())
    except OSError as error:
        report(errno.errorcode[error.errno])
report("connected")
sys.stdin.readline()
"""


def test_idle_connections_are_bounded(server: ServerProcess, undisturbed: PoolClient) -> None:
    """A thousand connections that attach nothing are bounded; arenas go on working, and other clients send bytes."""
    before = descriptors_of(server)
    x = np.ones((1, 4, 128, 128), np.float32)
    with hostile(server, IDLE) as process:
        while process.stdout.readline() not in ("connected\n", ""):
            pass
        assert descriptors_of(server) < before + 80
        with PoolClient(server.address) as another:
            assert another.pool(x, MaxPool2d(2)).transport in ("unary", "arena", "local")
        assert undisturbed.pool(x, MaxPool2d(2), transport="arena").transport == "arena"
        process.communicate("\n")


SHORT_LIVED = """
import signal
from poolrpc.v1 import pool_pb2
outcomes = {}
for i in range(int(sys.argv[2])):
    child = os.fork()
    if not child:
        try:
            connection, arena_id, descriptor = attach(2**20)
            with mmap.mmap(descriptor, 2**20) as memory:
                memory[:] = bytes([i % 256]) * 2**20
                if i % 10 == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    outcomes[status] = outcomes.get(status, 0) + 1
report(outcomes.get(0, 0), outcomes.get(signal.SIGKILL, 0))
"""


@pytest.mark.slow
@pytest.mark.usefixtures("undisturbed")
def test_a_thousand_short_lived_clients_leave_nothing(server: ServerProcess) -> None:
    """A thousand clients that attach an arena and end, one in ten by SIGKILL, leave the server as it was."""
    process = psutil.Process(server.process.pid)
    assert run(server, SHORT_LIVED, "50") == [["45", "5"]]
    before = process.memory_info().rss, process.num_threads()
    assert run(server, SHORT_LIVED, "1000") == [["900", "100"]]
    assert process.memory_info().rss < before[0] + 16 * MIB
    assert process.num_threads() <= before[1] + 2
