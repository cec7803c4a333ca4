"""Traces of real clients and a real server, sent to a real collector: OTLP's own service, on 127.0.0.1."""

from __future__ import annotations

import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1 import trace_pb2

from poolrpc import InvalidArgumentError, MaxPool2d, PoolClient
from scripts.server_process import serving

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from opentelemetry.proto.common.v1.common_pb2 import KeyValue

SERVER, CLIENT = trace_pb2.Span.SPAN_KIND_SERVER, trace_pb2.Span.SPAN_KIND_CLIENT
ERROR, UNSET = trace_pb2.Status.STATUS_CODE_ERROR, trace_pb2.Status.STATUS_CODE_UNSET
POOL, STREAM = "poolrpc.v1.PoolService/Pool", "poolrpc.v1.PoolService/PoolStream"

X = np.arange(2 * 3 * 8 * 8, dtype=np.float32).reshape(2, 3, 8, 8)

PROGRAM = """
import sys
import numpy as np
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from poolrpc import AsyncPoolClient, MaxPool2d, AvgPool2d, PoolClient, PoolError
provider = TracerProvider()
provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
trace.set_tracer_provider(provider)
tracer = trace.get_tracer("test")
x = np.ones((2, 3, 8, 8), np.float32)
address = sys.argv[1]
"""
"""Sets up tracing in a program; our client needs no setting."""


def plain(attributes: Any) -> dict[str, Any]:
    """Return OTLP's attributes as a dict."""

    def value(each: KeyValue) -> Any:
        return getattr(each.value, str(each.value.WhichOneof("value")))

    return {each.key: value(each) for each in attributes}


@dataclass(frozen=True)
class ReceivedSpan:
    """A span that the collector has received.

    Attributes:
        span: The span, as OTLP has it.
        resource: The attributes of its process.

    """

    span: trace_pb2.Span
    resource: dict[str, Any]

    @property
    def attributes(self) -> dict[str, Any]:
        """The span's attributes."""
        return plain(self.span.attributes)


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps what it receives.

    Attributes:
        endpoint: Its URL.
        headers: The metadata of all calls.

    """

    def __init__(self) -> None:
        self.endpoint = ""
        self.headers: list[tuple[str, Any]] = []
        self._seen: list[ReceivedSpan] = []
        self._changed = threading.Condition()

    def Export(  # noqa: N802 - OTLP's
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        """Receive spans."""
        with self._changed:
            self.headers.extend(context.invocation_metadata())
            self._seen.extend(
                ReceivedSpan(span, plain(each.resource.attributes))
                for each in request.resource_spans
                for scope in each.scope_spans
                for span in scope.spans
            )
            self._changed.notify_all()
        return trace_service_pb2.ExportTraceServiceResponse()

    def all(self) -> list[ReceivedSpan]:
        """Return every span so far."""
        with self._changed:
            return [*self._seen]

    def wait_for(self, count: int, *, name: str | None = None, kind: int = SERVER) -> list[ReceivedSpan]:
        """Wait for so many spans of a kind, optionally of one name, and return them in the order of their start."""

        def found() -> list[ReceivedSpan]:
            spans = [each for each in self._seen if each.span.kind == kind and name in (None, each.span.name)]
            return sorted(spans, key=lambda each: each.span.start_time_unix_nano)

        with self._changed:
            self._changed.wait_for(lambda: len(found()) >= count, 60)
            assert len(found()) == count, [each.span.name for each in self._seen]
            return found()

    def below(self, parent: ReceivedSpan) -> list[ReceivedSpan]:
        """Return the children of one of this collector's spans, in the order of their start."""
        spans = [each for each in self.all() if each.span.parent_span_id == parent.span.span_id]
        return sorted(spans, key=lambda each: (each.span.start_time_unix_nano, each.span.end_time_unix_nano))


@contextmanager
def collecting() -> Iterator[Collector]:
    """Run a collector."""
    made = Collector()
    server = grpc.server(ThreadPoolExecutor(4))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(made, server)  # type: ignore[no-untyped-call]  # generated
    made.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield made
    finally:
        server.stop(0).wait()


@pytest.fixture
def collector() -> Iterator[Collector]:
    """Return a collector."""
    with collecting() as made:
        yield made


def sending(endpoint: str, **more: str) -> dict[str, str]:
    """Return the environment with which a process sends its spans to an endpoint without delay."""
    return {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_BSP_SCHEDULE_DELAY": "20", **more}


def run(program: str, address: str, endpoint: str) -> str:
    """Run a program with a traced client, and return its output."""
    done = subprocess.run(  # noqa: S603 - our own
        [sys.executable, "-c", PROGRAM + program + "\nprovider.shutdown()", address],
        env={**os.environ, **sending(endpoint, OTEL_SERVICE_NAME="caller")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_call_is_one_trace(collector: Collector) -> None:
    """The client's span has the server's as its child, which has validate, queue, compute and encode, in order."""
    with serving(env=sending(collector.endpoint)) as server:
        run("PoolClient(address).pool(x, MaxPool2d(2))", server.address, collector.endpoint)
        (theirs,), (ours,) = collector.wait_for(1, kind=CLIENT), collector.wait_for(1)
        (line,) = server.wait_for("call")
    assert theirs.span.name == ours.span.name == POOL
    assert ours.span.parent_span_id == theirs.span.span_id
    assert ours.span.trace_id == theirs.span.trace_id
    assert line["trace_id"] == ours.span.trace_id.hex()
    host, _, port = server.address.rpartition(":")
    request = {"poolrpc.layers": "((MaxPool2d(2),),)", "poolrpc.shape": "(2, 3, 8, 8)", "poolrpc.dtype": "float32"}
    rpc = {"rpc.system": "grpc", "rpc.service": "poolrpc.v1.PoolService", "rpc.method": "Pool"}
    answered = {**rpc, **request, "rpc.grpc.status_code": 0}
    where = {"server.address": host, "server.port": int(port), "poolrpc.transport": "unary"}
    assert theirs.attributes == {**answered, **where}
    found = ours.attributes
    assert found.pop("network.peer.port") > 0
    more = {"poolrpc.output": "[(2, 3, 4, 4)]", "poolrpc.executions": 1}
    assert found == {**answered, **more, "network.peer.address": "127.0.0.1"}
    stages = collector.below(ours)
    assert sorted(each.span.name for each in stages) == ["compute", "encode", "queue", "validate"]
    by_name = {each.span.name: each for each in stages}
    ends = [time for name in ("validate", "queue", "compute", "encode") for time in times(by_name[name])]
    assert ends == sorted(ends)
    # The validate span starts within the clock's resolution of the call's start.
    assert times(ours)[0] <= times(by_name["queue"])[0]
    assert ends[-1] <= times(ours)[1]
    assert by_name["queue"].attributes == {"poolrpc.priority": 1}
    assert by_name["compute"].attributes == {
        "poolrpc.planes": 6,
        "poolrpc.batch_requests": 1,
        "poolrpc.batch_planes": 6,
    }
    assert {each.span.status.code for each in (theirs, ours, *stages)} == {UNSET}
    assert (theirs.resource["service.name"], ours.resource["service.name"]) == ("caller", "poolrpc")
    assert ours.resource["service.instance.id"]
    assert ours.resource["process.pid"] == server.process.pid


def times(seen: ReceivedSpan) -> tuple[int, int]:
    """Return when a span started and ended."""
    return seen.span.start_time_unix_nano, seen.span.end_time_unix_nano


def test_errors_in_spans(collector: Collector) -> None:
    """A caller's mistake is an error of the client's span alone, a server's fault an error of both spans."""
    program = """
from poolrpc import AdaptiveAvgPool2d
try:
    PoolClient(address).pool(x, AdaptiveAvgPool2d(4096))  # over a limit, which only the server checks
except PoolError as error:
    print(error.code)
"""
    unknown = """
import grpc
from opentelemetry import propagate
carrier = {}
with tracer.start_as_current_span("by hand"):
    propagate.inject(carrier)
pool = grpc.insecure_channel(address).unary_unary("/poolrpc.v1.PoolService/Pool")
try:
    pool(b"\\xff", metadata=tuple(carrier.items()))
except grpc.RpcError as error:
    print(error.code().name)
"""
    with serving(env=sending(collector.endpoint)) as server:
        assert run(program, server.address, collector.endpoint) == "RESOURCE_EXHAUSTED\n"
        assert run(unknown, server.address, collector.endpoint) == "INTERNAL\n"
        (theirs,) = collector.wait_for(1, kind=CLIENT)
        bad, broken = collector.wait_for(2)
    assert theirs.attributes["rpc.grpc.status_code"] == 8
    assert theirs.span.status.code == ERROR
    assert bad.span.parent_span_id == theirs.span.span_id
    assert bad.attributes["rpc.grpc.status_code"] == 8
    assert bad.attributes["error.type"] == "RESOURCE_EXHAUSTED"
    assert "expected" in bad.attributes["poolrpc.error"]
    assert bad.span.status.code == UNSET
    assert not collector.below(bad)
    assert broken.attributes["rpc.grpc.status_code"] == 13
    assert broken.span.status.code == ERROR
    (root,) = [each for each in collector.all() if each.span.name == "by hand"]
    assert broken.span.parent_span_id == root.span.span_id


def test_the_stage_that_fails_is_marked(collector: Collector) -> None:
    """An error of the computation marks the compute span: here indices that only their bytes show to be wrong."""
    with serving(env=sending(collector.endpoint)) as server, PoolClient(server.address) as client:
        from poolrpc import MaxUnpool2d  # noqa: PLC0415 - this test's alone

        with pytest.raises(InvalidArgumentError):
            client.pool(X, MaxUnpool2d(2), indices=np.full(X.shape, 10**6))
        (ours,) = collector.wait_for(1)
    stages = {each.span.name: each for each in collector.below(ours)}
    assert sorted(stages) == ["compute", "queue", "validate"]
    assert stages["compute"].span.status.code == ERROR
    assert stages["compute"].attributes["error.type"] == "InvalidArgumentError"
    assert stages["queue"].span.status.code == UNSET


def test_a_stream_has_the_stages_of_its_blocks(collector: Collector) -> None:
    """Each block has queue, compute and encode spans below the stream's span; requests of map have spans too."""
    program = """
with tracer.start_as_current_span("all"), PoolClient(address) as client:
    client.pool(np.ones((3, 1024, 1024, 2), np.float32), MaxPool2d(2), transport="stream")
    list(client.map([x, x.astype(np.float64)], AvgPool2d(2)))
"""
    with serving(env=sending(collector.endpoint)) as server:
        run(program, server.address, collector.endpoint)
        (stream,), pools = collector.wait_for(1, name=STREAM), collector.wait_for(2, name=POOL)
    names = [each.span.name for each in collector.below(stream)]
    blocks = stream.attributes["poolrpc.executions"]
    assert blocks > 1
    assert sorted(names) == sorted(["queue", "compute", "encode"] * blocks)
    (root,) = [each for each in collector.all() if each.span.name == "all"]
    assert {each.span.trace_id for each in (stream, *pools)} == {root.span.trace_id}
    assert [each.attributes["poolrpc.transport"] for each in collector.below(root)] == ["stream", "unary", "unary"]
    assert all(each.span.kind == CLIENT for each in collector.below(root))


def test_a_long_stream_has_the_stages_of_its_first_blocks(collector: Collector) -> None:
    """The number of a stream's spans is bounded; its own span has the number of all blocks."""
    from poolrpc_server.calls.stream_blocks import BLOCK_BYTES  # noqa: PLC0415 - this test's alone
    from poolrpc_server.telemetry.record import MAX_EXECUTIONS  # noqa: PLC0415 - this test's alone

    planes = MAX_EXECUTIONS + 2
    x = np.zeros((1, planes, BLOCK_BYTES // 4096, 1024), np.float32)
    with serving(env=sending(collector.endpoint)) as server, PoolClient(server.address) as client:
        client.pool(x, MaxPool2d(8, stride=8), transport="stream")
        (stream,) = collector.wait_for(1)
    assert stream.attributes["poolrpc.executions"] > MAX_EXECUTIONS
    assert len([each for each in collector.below(stream) if each.span.name == "compute"]) == MAX_EXECUTIONS


def test_requests_of_a_batch_have_spans_of_their_own(collector: Collector) -> None:
    """They start and end together, and have the size of the batch."""
    with (
        serving("--threads", "1", "--max-queue-delay", "500", env=sending(collector.endpoint)) as server,
        PoolClient(server.address) as client,
        ThreadPoolExecutor(4) as executor,
    ):
        client.server_info()  # connected
        list(executor.map(lambda _: client.pool(X, MaxPool2d(2)), range(4)))
        calls = collector.wait_for(4, name=POOL)
        computes = [each for call in calls for each in collector.below(call) if each.span.name == "compute"]
    batches = {each.attributes["poolrpc.batch_requests"] for each in computes}
    assert max(batches) > 1
    largest = [each for each in computes if each.attributes["poolrpc.batch_requests"] == max(batches)]
    # They are recorded one after the other, within a fraction of the time of one computation.
    for one, other in pairwise(largest):
        assert times(one)[0] < times(other)[1]
        assert times(other)[0] < times(one)[1]
    assert {each.attributes["poolrpc.planes"] for each in computes} == {6}
    assert {each.attributes["poolrpc.batch_planes"] for each in largest} == {6 * max(batches)}


def test_other_clients_and_methods_have_spans(collector: Collector) -> None:
    """AsyncPoolClient's calls, shapes and info are traced; the server does not trace health checks."""
    program = """
import asyncio
async def main():
    async with AsyncPoolClient(address) as client:
        with tracer.start_as_current_span("all"):
            await client.pool(x, MaxPool2d(2))
            await client.pool(x, MaxPool2d(2), transport="stream")
            await client.output_shape((1, 1, 4, 4), MaxPool2d(2))
            print((await client.server_info()).features["traces"])
            await client.health()
asyncio.run(main())
"""
    with serving(env=sending(collector.endpoint)) as server:
        printed = run(program, server.address, collector.endpoint)
        theirs, ours = collector.wait_for(5, kind=CLIENT), collector.wait_for(4)
        assert printed == f"{server.start_line['traces']}\n"
    methods = ["Pool", "PoolStream", "InferShape", "GetServerInfo"]
    assert [each.attributes["rpc.method"] for each in theirs] == [*methods, "Check"]
    assert [each.attributes["rpc.method"] for each in ours] == methods
    assert len({each.span.trace_id for each in (*theirs, *ours)}) == 1


@pytest.mark.slow
def test_every_worker_sends_its_own_spans(collector: Collector) -> None:
    """Workers are instances of one service; a server that stops sends its spans before it ends."""
    slow = sending(collector.endpoint, OTEL_BSP_SCHEDULE_DELAY="600000", OTEL_SERVICE_NAME="pooling")
    with serving("--workers", "2", "--drain-seconds", "0.1", env=slow) as server:
        assert server.start_line["traces"] == f"otlp {collector.endpoint}"
        while len({each["worker"] for each in server.lines("call")}) < 2:
            with PoolClient(server.address) as client:
                client.pool(X, MaxPool2d(2))
        assert not collector.all()  # until it stops
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0
        calls = server.lines("call")
    spans = collector.wait_for(len(calls))
    assert {each.resource["service.name"] for each in spans} == {"pooling"}
    assert len({each.resource["service.instance.id"] for each in spans}) == 2
    pids = {each["worker"]: each["pid"] for each in server.lines("worker serving")}
    assert {each.resource["process.pid"] for each in spans} == set(pids.values())
    assert {each["trace_id"] for each in calls} == {each.span.trace_id.hex() for each in spans}


def test_there_are_no_traces_by_default() -> None:
    """Without OTEL_ variables server and client call without importing OpenTelemetry, and the server says so."""
    program = """
import sys, threading
from poolrpc_server.app import serve
from poolrpc_server.config import Config
from poolrpc_server.process import ProcessControl
import numpy as np, poolrpc
class Calling(ProcessControl):
    def serving(self, facts, collect):
        threading.Thread(target=self.call, args=[facts]).start()
    def call(self, facts):
        with poolrpc.PoolClient(facts["addresses"][0]) as client:
            client.pool(np.ones((1, 1, 4, 4), np.float32), poolrpc.MaxPool2d(2))
            print(facts["traces"], client.server_info().features["traces"])
        self.stopping.set()
serve(Config(listen=("127.0.0.1:0",), drain_seconds=0.01), control=Calling())
print([name for name in sys.modules if name.startswith("opentelemetry")])
"""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    done = subprocess.run([sys.executable, "-c", program], env=clean, capture_output=True, text=True, check=False)  # noqa: S603 - our own
    assert (done.returncode, done.stdout) == (0, "off off\n[]\n"), done.stderr


def test_a_call_that_is_not_sampled_keeps_its_trace_id(collector: Collector) -> None:
    """OTEL_TRACES_SAMPLER is respected; the log has the caller's trace id all the same."""
    env = sending(collector.endpoint, OTEL_TRACES_SAMPLER="always_off")
    with serving("--drain-seconds", "0.1", env=env) as server:
        run("PoolClient(address).pool(x, MaxPool2d(2))", server.address, collector.endpoint)
        (theirs,) = collector.wait_for(1, kind=CLIENT)
        (line,) = server.wait_for("call")
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0
    assert line["trace_id"] == theirs.span.trace_id.hex()
    assert [each.span.kind for each in collector.all()] == [CLIENT]


def test_exporter_headers_are_secret(collector: Collector) -> None:
    """Headers are sent to the collector, and are neither in the log nor in the server's info, which has the address."""
    env = sending(collector.endpoint, OTEL_EXPORTER_OTLP_HEADERS="x-key=s3cret")
    with serving(env=env) as server, PoolClient(server.address) as client:
        info = client.server_info()
        collector.wait_for(1)
    assert info.features == {"tls": "off", "tokens": "off", "metrics": "off", "traces": f"otlp {collector.endpoint}"}
    assert ("x-key", "s3cret") in collector.headers
    assert "s3cret" not in f"{server.log}{info}"


@contextmanager
def closed_address() -> Iterator[str]:
    """Return an address on which nothing listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


@contextmanager
def silent_address() -> Iterator[str]:
    """Return an address that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        yield f"http://127.0.0.1:{silent.getsockname()[1]}"


@pytest.mark.slow
@pytest.mark.parametrize("place", [closed_address, silent_address])
def test_a_collector_that_is_down_delays_nothing(place: Callable[[], Any]) -> None:
    """Calls are answered as fast as with a collector that is up, and the server stops with status 0."""
    flags = "--shutdown-grace", "60", "--drain-seconds", "0.1"
    seconds: tuple[list[float], list[float]] = ([], [])
    with place() as endpoint, collecting() as up, ExitStack() as stack:
        servers = [stack.enter_context(serving(*flags, env=sending(each))) for each in (endpoint, up.endpoint)]
        clients = [stack.enter_context(PoolClient(server.address)) for server in servers]
        for _ in range(200):
            for client, times in zip(clients, seconds, strict=True):
                started = time.perf_counter()
                client.pool(X, MaxPool2d(2))
                times.append(time.perf_counter() - started)
        for server in servers:
            server.process.send_signal(signal.SIGTERM)
            assert server.wait() == 0
            stray = [each for each in server.lines("text") if not re.fullmatch(r"[IWE]\d{4} .*\n?", each["text"])]
            assert not stray  # the exporter's messages are lines of the log too
    down, answered = map(statistics.median, seconds)
    assert down < 3 * answered


@pytest.mark.slow
def test_wrong_variables_are_a_warning() -> None:
    """An exporter or a protocol that does not exist is reported at the start, and the server serves."""
    for env, said in (
        ({"OTEL_TRACES_EXPORTER": "smoke"}, "expected one that is installed (console, otlp_proto_grpc), got 'smoke'"),
        (
            {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "pigeon"},
            "expected one of grpc, http/protobuf, got 'pigeon'",
        ),
    ):
        with serving(env=env) as server, PoolClient(server.address) as client:
            client.pool(X, MaxPool2d(2))
            (warning,) = server.lines("no traces")
            assert said in warning["error"]
            assert server.start_line["traces"] == "off"
