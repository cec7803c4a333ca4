"""How streams end: idle and deadline limits, callers that leave, servers that stop; and what they hold meanwhile."""

from __future__ import annotations

import asyncio
import itertools
import logging
import signal
import threading
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import psutil
import pytest

import poolrpc
import poolrpc_server
from poolrpc import AsyncPoolClient, FractionalMaxPool2d, MaxPool2d, PoolClient, async_client
from poolrpc._transport.stream import StreamCall
from poolrpc_server.calls import streams
from poolrpc_server.compute.engine import IDLE_LIMIT, WORKSPACE_LIMIT
from scripts.server_process import serving
from tests.integration.connections import until
from tests.integration.stream_messages import (
    LARGE,
    METHOD,
    MIB,
    NO_RETRIES,
    OpenStream,
    assert_no_reader_stays,
    block,
    error_of,
    header,
    reader_threads,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.integration.conftest import Connect, Gate

RNG = np.random.default_rng(7)
X = RNG.standard_normal((3, 5, 10, 14), np.float32)
STREAM_BYTES = 48 * MIB
"""Bytes in flight for one stream of LARGE, which holds five blocks of 8 MiB and what computes one, and little else."""


def halved(x: np.ndarray) -> np.ndarray:
    """Return MaxPool2d(2) of a tensor with even height and width."""
    n, c, h, w = x.shape
    return x.reshape(n, c, h // 2, 2, w // 2, 2).max((3, 5))


def streams_in(caplog: pytest.LogCaptureFixture) -> list[Any]:
    """Return the log records of streams."""
    return [record for record in caplog.records if record.getMessage() == "call" and record.method == METHOD]


# Limits of time and number


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no stream give way to another call, however long a slow test lets it wait."""
    monkeypatch.setattr(streams, "STALLED_SECONDS", 3600)


def test_an_idle_stream_ends() -> None:
    """After --stream-idle-seconds a stream is DEADLINE_EXCEEDED; its bytes are free and no thread stays."""
    shape = (2, 1, 64, 64)
    x = np.ones(shape, np.float32)
    with (
        # Room for one such stream: five blocks, and what computes one.
        poolrpc_server.embedded(stream_idle_seconds=1, max_inflight_bytes=7 * x.nbytes) as client,
        grpc.insecure_channel(client.address) as channel,
    ):
        for sent in ([header(shape)], [header(shape), block(x.nbytes // 2)]):
            messages = OpenStream(*sent)
            responses = channel.stream_stream(METHOD)(messages, timeout=60)
            for _ in sent:
                next(responses)
            error = error_of(responses)
            assert isinstance(error, poolrpc.DeadlineExceededError)
            assert error.reason == "STREAM_IDLE"
            assert "expected the next message of the stream within 1 seconds" in str(error)
            messages.end()
            # A stream's bytes may be in flight for a moment after its client has its result: the call comes second.
            assert client.pool(x, MaxPool2d(2), transport="stream").output.all()
            assert client.pool(x, MaxPool2d(2), transport="unary").output.all()
        assert_no_reader_stays()


@pytest.mark.usefixtures("patient")
def test_an_open_stream_holds_its_bytes() -> None:
    """The bytes of a stream's blocks count as in flight until the stream ends."""
    shape = (1, 1, 64, 64)
    with (
        poolrpc_server.embedded(max_inflight_bytes=7 * 4 * 64 * 64) as client,
        PoolClient(client.address, options=NO_RETRIES) as once,
        grpc.insecure_channel(client.address) as channel,
    ):
        messages = OpenStream(header(shape))
        responses = channel.stream_stream(METHOD)(messages, timeout=60)
        next(responses)
        with pytest.raises(poolrpc.UnavailableError) as full:
            once.pool(np.ones(shape, np.float32), MaxPool2d(2), transport="unary")
        assert full.value.reason == "IN_FLIGHT_BYTES"
        messages.end()
        assert "got 0" in str(error_of(responses))
        assert client.pool(np.ones(shape, np.float32), MaxPool2d(2), transport="unary").output.all()


def test_a_stream_without_a_header_ends_too() -> None:
    """A stream on which nothing is ever sent ends with the idle limit."""
    with poolrpc_server.embedded(stream_idle_seconds=1) as client, grpc.insecure_channel(client.address) as channel:
        messages = OpenStream()
        error = error_of(channel.stream_stream(METHOD)(messages, timeout=60))
        messages.end()
    assert isinstance(error, poolrpc.DeadlineExceededError)
    assert error.reason == "STREAM_IDLE"
    assert_no_reader_stays()


def test_a_caller_that_does_not_read_is_ended() -> None:
    """A caller that sends blocks and reads no results is ended by the idle limit, and others are served."""
    shape = (4096, 1, 64, 64)
    with (
        poolrpc_server.embedded(stream_idle_seconds=1, max_streams=1) as client,
        grpc.insecure_channel(client.address, [*NO_RETRIES.items()]) as channel,
    ):
        blocks = itertools.repeat(block(64 * 64 * 64 * 4), 64)
        responses = channel.stream_stream(METHOD)(itertools.chain([header(shape, MaxPool2d(1))], blocks), timeout=120)
        next(responses)
        (reader,) = reader_threads()
        reader.join(60)
        assert not reader.is_alive()
        assert client.pool(X, MaxPool2d(2), transport="stream", timeout=60).shape == (3, 5, 5, 7)
        responses.cancel()


def test_a_stream_ends_at_its_deadline(caplog: pytest.LogCaptureFixture) -> None:
    """At the caller's deadline the stream's bytes are free, no thread stays, and the log has no server error."""
    shape = (1, 1, 64, 64)
    with (
        caplog.at_level(logging.INFO, "poolrpc_server"),
        poolrpc_server.embedded(max_inflight_bytes=7 * 4 * 64 * 64) as client,
        grpc.insecure_channel(client.address) as channel,
    ):
        messages = OpenStream(header(shape))
        responses = channel.stream_stream(METHOD)(messages, timeout=1)
        assert isinstance(error_of(responses), poolrpc.DeadlineExceededError)
        messages.end()
        assert client.pool(np.ones(shape, np.float32), MaxPool2d(2), transport="unary").output.all()
        assert_no_reader_stays()
    assert {record.status for record in streams_in(caplog)} <= {"CANCELLED", "DEADLINE_EXCEEDED"}
    assert "unexpected error" not in caplog.text


@pytest.mark.usefixtures("many_blocks")
def test_a_deadline_during_a_stream(gate: Gate, connect: Connect) -> None:
    """A stream whose blocks are not computed in time raises DeadlineExceededError while the client still sends."""
    with poolrpc_server.embedded(threads=1) as server:
        client = connect(server.address)
        for timeout in (0.001, 0.01, 0.3):
            with pytest.raises(poolrpc.DeadlineExceededError):
                client.pool(LARGE, FractionalMaxPool2d(2, output_size=8), transport="stream", timeout=timeout)
        gate.opened.set()
        assert client.pool(LARGE, MaxPool2d(2), transport="stream").shape == (64, 4, 64, 64)
    assert_no_reader_stays()


async def test_a_deadline_among_many_other_streams(gate: Gate) -> None:
    """A stream of an asyncio client ends at its own timeout, however many other streams the client has."""
    with poolrpc_server.embedded(threads=1, max_streams=64, call_threads=96) as embedded:
        async with AsyncPoolClient(embedded.address) as client:
            x = LARGE[:1]
            held = [
                asyncio.create_task(client.pool(x, FractionalMaxPool2d(2, output_size=8), transport="stream"))
                for _ in range(40)
            ]
            assert await asyncio.to_thread(gate.entered.wait, 60)
            try:
                with pytest.raises(poolrpc.DeadlineExceededError):
                    await asyncio.wait_for(client.pool(x, MaxPool2d(2), transport="stream", timeout=0.5), 60)
            finally:
                gate.opened.set()
            assert {each.shape for each in await asyncio.gather(*held)} == {(1, 4, 8, 8)}


def test_an_open_stream_that_waits_gives_way() -> None:
    """A stream that has waited for its client for a second is ended as soon as another one needs its place."""
    with (
        poolrpc_server.embedded(max_streams=1) as client,
        PoolClient(client.address, options=NO_RETRIES) as once,
        grpc.insecure_channel(client.address) as channel,
    ):
        messages = OpenStream(header())
        responses = channel.stream_stream(METHOD)(messages, timeout=60)
        next(responses)

        def answered() -> bool:
            try:
                return once.pool(X, MaxPool2d(2), transport="stream").shape == (3, 5, 5, 7)
            except poolrpc.UnavailableError:
                return False

        until(answered)
        assert error_of(responses).reason == "ENDED"
        messages.end()
    assert_no_reader_stays()


@pytest.mark.usefixtures("patient")
def test_the_number_of_streams_is_bounded() -> None:
    """One stream more than --max-streams is UNAVAILABLE with a retry delay; other calls are served."""
    with (
        poolrpc_server.embedded(max_streams=2) as client,
        PoolClient(client.address, options=NO_RETRIES) as once,
        grpc.insecure_channel(client.address) as channel,
    ):
        held = [OpenStream(header()) for _ in range(2)]
        calls = [channel.stream_stream(METHOD)(messages, timeout=60) for messages in held]
        for responses in calls:
            next(responses)
        with pytest.raises(poolrpc.UnavailableError, match="at most 2 streams at a time") as caught:
            once.pool(X, MaxPool2d(2), transport="stream")
        assert caught.value.reason == "STREAMS"
        assert caught.value.retry_delay > 0
        assert once.pool(X, MaxPool2d(2), transport="unary").shape == (3, 5, 5, 7)
        for messages, responses in zip(held, calls, strict=True):
            messages.end()
            assert "got 0" in str(error_of(responses))
    assert_no_reader_stays()


@pytest.mark.usefixtures("many_blocks")
@pytest.mark.parametrize("limit", [{"max_streams": 1}, {"max_inflight_bytes": STREAM_BYTES}])
def test_a_rejected_stream_is_tried_again(connect: Connect, limit: dict[str, int]) -> None:
    """A stream that finds the server full waits until another one ends; no block is lost between the attempts."""
    for _ in range(2):
        with poolrpc_server.embedded(**limit) as server, grpc.insecure_channel(server.address) as channel:
            messages = OpenStream(header())
            held = channel.stream_stream(METHOD)(messages, timeout=60)
            next(held)
            # The first attempt is rejected, because only the timer ends the other stream.
            release = threading.Timer(0.05, messages.end)
            release.start()
            result = connect(server.address).pool(LARGE, MaxPool2d(2), transport="stream")
            release.join()
            np.testing.assert_array_equal(result.output, halved(LARGE))


# Callers that leave


class LeftError(Exception):
    """Raised by a caller's own code in the middle of a stream."""


@pytest.fixture
def leaving(caplog: pytest.LogCaptureFixture) -> Iterator[str]:
    """Return the address of a server, one of whose streams the test leaves.

    Afterwards another call and stream are served, no thread stays, and the log has one stream that was CANCELLED.
    """
    with caplog.at_level(logging.INFO, "poolrpc_server"):
        with poolrpc_server.embedded(max_inflight_bytes=STREAM_BYTES) as client:
            yield client.address
            for transport in ("stream", "unary"):
                output = client.pool(LARGE[:4], MaxPool2d(2), transport=transport).output
                np.testing.assert_array_equal(output, halved(LARGE[:4]))
            assert_no_reader_stays()
            for thread in threading.enumerate():
                if thread.name.startswith("poolrpc-stream"):
                    thread.join(60)
                    assert not thread.is_alive()
        # The other stream may have been rejected before the one that was left had ended.
        statuses = [record.status for record in streams_in(caplog)]
        assert statuses.count("CANCELLED") == 1
        assert set(statuses) <= {"CANCELLED", "OK", "UNAVAILABLE"}
        assert "unexpected error" not in caplog.text


@pytest.mark.usefixtures("many_blocks")
def test_an_exception_of_progress_ends_the_stream(connect: Connect, leaving: str) -> None:
    """An exception of the progress callback is raised to the caller and ends the stream."""

    def progress(*_: int) -> None:
        raise LeftError

    client = connect(leaving)
    with pytest.raises(LeftError):
        client.pool(LARGE, MaxPool2d(2), transport="stream", progress=progress)
    client.close()


@pytest.mark.usefixtures("many_blocks")
def test_closing_the_client_ends_its_streams(leaving: str) -> None:
    """A stream whose client is closed raises CancelledError."""
    with PoolClient(leaving) as client, pytest.raises(poolrpc.CancelledError):
        client.pool(LARGE, MaxPool2d(2), transport="stream", progress=lambda *_: client.close())


@pytest.mark.usefixtures("many_blocks")
@pytest.mark.parametrize("how", ["cancel", "close"])
async def test_a_cancelled_task_ends_its_stream(leaving: str, how: str) -> None:
    """A stream ends with its task, and with its asyncio client."""
    client = AsyncPoolClient(leaving)
    closing: list[asyncio.Task[None]] = []

    def progress(*_: int) -> None:
        if how == "cancel":
            task.cancel()
        elif not closing:
            closing.append(asyncio.create_task(client.close()))

    task = asyncio.create_task(client.pool(LARGE, MaxPool2d(2), transport="stream", progress=progress))
    with pytest.raises((poolrpc.CancelledError, asyncio.CancelledError) if how == "close" else asyncio.CancelledError):
        await task
    await asyncio.gather(*closing)
    await client.close()


def test_a_stream_whose_loop_has_ended_does_not_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread of a cancelled stream would otherwise wait for ever for the loop to call `progress`."""
    stopped, ended = threading.Event(), threading.Event()

    class LateStream(StreamCall):
        def run(self, progress: Any) -> list[poolrpc.PoolResult]:
            stopped.wait(60)
            progress(1, 2)
            ended.set()
            return []

    monkeypatch.setattr(async_client, "StreamCall", LateStream)
    loop = asyncio.new_event_loop()

    async def leave() -> AsyncPoolClient:
        client = AsyncPoolClient("127.0.0.1:1")
        call = client.pool(LARGE, MaxPool2d(2), transport="stream", progress=lambda *_: None)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(call, 0.01)
        return client

    client = loop.run_until_complete(leave())
    stopped.set()
    assert ended.wait(30)
    loop.run_until_complete(client.close())
    loop.close()


@pytest.mark.slow
@pytest.mark.usefixtures("many_blocks")
def test_a_thousand_streams_that_are_reset_leave_nothing() -> None:
    """The server's memory and threads return to what they were after 1000 streams that were left."""

    def streamed(line: dict[str, Any]) -> bool:
        return line["event"] == "call" and line["method"] == METHOD

    class Reset:
        def __init__(self) -> None:
            self.count = 0

        def __call__(self, *_: int) -> None:
            self.count += 1
            raise LeftError

    with serving("--max-streams", "64", "--call-threads", "96") as server, PoolClient(server.address) as client:
        process, reset, x = psutil.Process(server.process.pid), Reset(), LARGE[:48]

        def measure(times: int) -> tuple[int, int]:
            for _ in range(times):
                with pytest.raises(LeftError):
                    client.pool(x, MaxPool2d(2), transport="stream", progress=reset)
            # All streams have ended once each has its line in the log. The calls in between give the server time.
            for _ in range(10_000):
                client.server_info()
                if sum(streamed(line) for line in server.log) >= reset.count:
                    break
            return process.memory_info().rss, process.num_threads()

        rss, threads = measure(20)
        after = measure(1000)
    lines = [line for line in server.log if streamed(line)]
    assert reset.count == len(lines) == 1020
    # gRPC may report the end of the messages before the cancellation of the call: then planes are missing.
    assert {line["status"] for line in lines} <= {"CANCELLED", "INVALID_ARGUMENT"}
    # The engine keeps buffers and workspaces, which admission counts and takes back; 1000 streams would take 12 GiB.
    assert after[0] < rss + WORKSPACE_LIMIT + IDLE_LIMIT + 24 * MIB
    # A thread is started for a stream that comes while all others are busy, up to --call-threads; 1000 would be left.
    assert after[1] <= threads + 96
    assert not server.lines("unexpected error")


# Servers that end


@pytest.mark.usefixtures("many_blocks")
def test_a_server_that_is_killed_during_a_stream(connect: Connect) -> None:
    """The stream raises UnavailableError."""
    with serving() as server:

        def kill(*_: int) -> None:
            if server.process.poll() is None:
                server.process.send_signal(signal.SIGKILL)
                server.process.wait()

        with pytest.raises(poolrpc.UnavailableError):
            connect(server.address).pool(LARGE, MaxPool2d(2), transport="stream", progress=kill)


@pytest.mark.usefixtures("many_blocks")
def test_a_stopping_server_finishes_its_streams() -> None:
    """A stream in flight at SIGTERM completes within the grace."""
    with serving("--drain-seconds", "0", "--shutdown-grace", "60") as server, PoolClient(server.address) as client:
        signals: list[int] = []

        def stop(*_: int) -> None:
            if not signals:
                server.process.send_signal(signal.SIGTERM)
                signals.append(signal.SIGTERM)

        result = client.pool(LARGE, MaxPool2d(2), transport="stream", progress=stop)
        np.testing.assert_array_equal(result.output, halved(LARGE))
        assert server.wait() == 0


@pytest.mark.slow
def test_an_open_stream_does_not_keep_a_stopping_server() -> None:
    """A stream without messages ends with the grace, and then the server exits with 0 and without an error."""
    flags = ["--drain-seconds", "0", "--shutdown-grace", "1"]
    with serving(*flags) as server, grpc.insecure_channel(server.address) as channel:
        messages = OpenStream(header())
        responses = channel.stream_stream(METHOD)(messages, timeout=120)
        next(responses)
        server.process.send_signal(signal.SIGTERM)
        assert isinstance(error_of(responses), poolrpc.UnavailableError)
        messages.end()
        assert server.wait() == 0
    assert not server.lines("unexpected error")


# Memory


def test_memory_is_bounded_by_the_blocks(tmp_path: Path) -> None:
    """A file of 64 MiB is pooled into another file while neither process grows by as much as the tensor."""
    shape = (1024, 4, 64, 64)
    x = np.memmap(tmp_path / "x", np.float32, "w+", shape=shape)
    x[...] = RNG.standard_normal(shape[1:], np.float32)
    y = np.memmap(tmp_path / "y", np.float32, "w+", shape=(1024, 4, 32, 32))
    with serving("--threads", "1") as server, PoolClient(server.address) as client:
        client.pool(x[:64], MaxPool2d(2), transport="stream")
        processes = [psutil.Process(server.process.pid), psutil.Process()]

        def unshared() -> list[int]:
            return [process.memory_info().rss - process.memory_info().shared for process in processes]

        before, peaks = unshared(), [unshared()]
        result = client.pool(x, MaxPool2d(2), out=y, progress=lambda *_: peaks.append(unshared()))
    assert result.transport == "stream"
    assert len(peaks) > 30
    grown = [max(peak) - start for peak, start in zip(zip(*peaks, strict=True), before, strict=True)]
    assert max(grown) < x.nbytes, grown
    np.testing.assert_array_equal(y[::100], halved(x[::100]))
