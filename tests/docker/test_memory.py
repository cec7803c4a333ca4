"""Servers in containers of little memory: no mixture of valid calls makes the kernel kill one."""

from __future__ import annotations

import subprocess
import sys
import uuid
from contextlib import contextmanager
from typing import TYPE_CHECKING

import grpc
import numpy as np
import pytest

import poolrpc
from poolrpc._wire.codec import Request, encode_request
from poolrpc.tensors import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

POOL = "/poolrpc.v1.PoolService/Pool"
CALLERS = "import sys; from tests.docker.test_memory import call; call(*sys.argv[1:])"


def call(address: str, kind: str, nbytes: str, rounds: str) -> None:
    """Make calls of a kind, one after the other; print how many were answered wrongly and how many were lost."""
    x = np.random.default_rng(0).random((int(nbytes) // (4 * 128 * 128), 1, 128, 128), np.float32)
    expected = x.reshape(len(x), 1, 64, 2, 64, 2).max(axis=(3, 5))
    wrong = lost = 0
    if kind == "plain":  # gRPC alone, which announces nothing and does not retry
        message = encode_request(Request(TensorSpec("float32", x.shape), ((poolrpc.MaxPool2d(2),),)))
        message.payload = x.tobytes()
        data = message.SerializeToString()
        with grpc.insecure_channel(address, [("grpc.max_receive_message_length", -1)]) as channel:
            pool = channel.unary_unary(POOL)
            for _ in range(int(rounds)):
                try:
                    wrong += pool(data, timeout=120)[-expected.nbytes :] != expected.tobytes()
                except grpc.RpcError:
                    lost += 1
    else:
        with poolrpc.PoolClient(address, timeout=120) as client:
            for _ in range(int(rounds)):
                try:
                    wrong += not np.array_equal(client.pool(x, poolrpc.MaxPool2d(2), transport=kind).output, expected)
                except poolrpc.UnavailableError:
                    lost += 1
    print(wrong, lost)  # noqa: T201 - read by the test


@contextmanager
def container(engine: Callable[..., str], image: str, memory: str, *flags: str) -> Iterator[tuple[str, str]]:
    """Run a server in a container with so much memory and no swap; yield its name and its address."""
    name = f"poolrpc-memory-{uuid.uuid4().hex[:8]}"
    limits = f"--memory={memory}", f"--memory-swap={memory}", "--cpus=2", "--read-only", "--tmpfs=/tmp"
    ports = "-p", "127.0.0.1::50051"
    engine("run", "-d", "--name", name, *limits, *ports, image, "--listen", "0.0.0.0:50051", "--insecure", *flags)
    try:
        yield name, engine("port", name, "50051").splitlines()[0]
    finally:
        engine("rm", "-f", name)


@pytest.mark.parametrize(
    ("memory", "flags", "callers", "kind", "nbytes", "rounds"),
    [
        ("512m", (), 8, "plain", 15_900_000, 8),
        ("512m", (), 16, "unary", 15_900_000, 12),
        ("512m", (), 6, "stream", 60_000_000, 4),
        ("512m", ("--call-threads", "32", "--max-message-bytes", str(4 * 2**20)), 32, "plain", 3_900_000, 6),
        ("1g", (), 16, "stream", 120_000_000, 2),
        ("4g", (), 32, "unary", 60_000_000, 2),
    ],
)
def test_valid_calls_do_not_exhaust_the_memory(  # noqa: PLR0913, PLR0917 - the cases
    engine: Callable[..., str],
    server_image: str,
    memory: str,
    flags: tuple[str, ...],
    callers: int,
    kind: str,
    nbytes: int,
    rounds: int,
) -> None:
    """With default limits, callers that together send several times the memory get right answers or rejections."""
    with container(engine, server_image, memory, *flags) as (name, address):
        with grpc.insecure_channel(address) as channel:
            grpc.channel_ready_future(channel).result(timeout=300)
        processes = [
            subprocess.Popen(  # noqa: S603 - this module
                [sys.executable, "-c", CALLERS, address, kind, str(nbytes), str(rounds)], stdout=subprocess.PIPE
            )
            for _ in range(callers)
        ]
        results = [process.communicate()[0].split() for process in processes]
        assert engine("inspect", "-f", "{{.State.OOMKilled}} {{.State.Running}}", name) == "false true"
        assert engine("inspect", "-f", "{{.RestartCount}}", name) == "0"
        wrong, lost = (sum(int(each[i]) for each in results) for i in (0, 1))
        assert wrong == 0
        assert lost < callers * rounds
        with poolrpc.PoolClient(address, timeout=60) as client:
            assert client.pool(np.ones((1, 1, 2, 2), np.float32), poolrpc.MaxPool2d(2)).output == 1


def test_a_server_does_not_start_with_too_little_memory(engine: Callable[..., str], server_image: str) -> None:
    """Below the minimum the server ends at once, and says how much memory it expects."""
    with pytest.raises(RuntimeError, match=r"expected at least 384 MiB of memory for 1 process, got 256 MiB"):
        engine("run", "--rm", "--memory=256m", "--memory-swap=256m", server_image)
