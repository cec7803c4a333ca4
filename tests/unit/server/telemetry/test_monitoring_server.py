"""The HTTP server of the metrics: its pages, and its answers while others hold connections or descriptors."""

import http.client
import resource
import socket
import threading
import urllib.error
from contextlib import ExitStack, contextmanager, suppress

import pytest
from prometheus_client import CollectorRegistry

from poolrpc_server.telemetry.metrics import Load, Metrics
from poolrpc_server.telemetry.monitoring_server import MAX_CONNECTIONS, MonitoringServer
from tests.scrape import get


def busy():
    """Return metrics of a server with arenas."""
    metrics = Metrics()
    metrics.watch(lambda: Load(arenas=3))
    return metrics


@pytest.fixture
def server():
    """Return an HTTP server of busy metrics, which is ready."""
    made = MonitoringServer("127.0.0.1:0", busy().collect, lambda: True)
    yield made
    made.close()


def test_pages_of_the_server(server):
    """/metrics shows the registry, /livez and /readyz are probes, and any other page is a 404 that names these."""
    status, text = get(server.address, "metrics")
    assert status == 200
    assert "poolrpc_arenas 3.0\n" in text
    assert get(server.address, "livez") == (200, "ok\n")
    assert get(server.address, "readyz") == (200, "ready\n")
    assert get(server.address, "x") == (404, "expected /metrics, /livez or /readyz, got /x\n")


def test_a_server_of_probes_alone_has_no_metrics():
    """Without metrics, the pages are /livez and /readyz."""
    made = MonitoringServer("127.0.0.1:0", None, lambda: True)
    try:
        assert get(made.address, "readyz") == (200, "ready\n")
        assert get(made.address, "metrics") == (404, "expected /livez or /readyz, got /metrics\n")
    finally:
        made.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_the_address_is_where_it_listens(host):
    """A free port is filled in, for IPv4 and IPv6; a server that is not ready answers 503."""
    made = MonitoringServer(f"{host}:0", busy().collect, lambda: False)
    try:
        assert made.address.startswith(f"{host}:")
        assert get(made.address, "livez")[0] == 200
        assert get(made.address, "readyz") == (503, "not ready\n")
    finally:
        made.close()
    with pytest.raises(urllib.error.URLError):
        get(made.address, "livez")


def test_an_address_has_one_server(server):
    """A second server on the same address fails at once."""
    with pytest.raises(OSError, match="in use"):
        MonitoringServer(server.address, busy().collect, lambda: True)


def test_a_client_that_leaves_is_not_logged(server, capfd):
    """A connection that breaks leaves nothing on stderr, and others are answered."""
    host, port = server.address.split(":")
    connection = socket.create_connection((host, int(port)))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset instead of an end
    connection.send(b"GET /metr")
    connection.close()
    assert get(server.address, "livez")[0] == 200
    assert capfd.readouterr().err == ""


def connect(server):
    """Return a connection to a server that sends nothing yet."""
    host, port = server.address.split(":")
    return socket.create_connection((host, int(port)), timeout=60)


def test_requests_that_are_not_for_a_page(server):
    """A probe may use HEAD; other methods and requests that are not HTTP get an error, and so does what is too long."""
    connection = http.client.HTTPConnection(server.address, timeout=60)
    connection.request("HEAD", "/livez")
    answer = connection.getresponse()
    assert (answer.status, answer.getheader("Content-Length"), answer.read()) == (200, "3", b"")
    connection.close()
    for request, status in ((b"POST /livez HTTP/1.1\r\n\r\n", b"405"), (b"\r\n\r\n", b"405"), (b"x" * 10**5, b"")):
        with connect(server) as raw:
            raw.sendall(request)
            answer = b""
            try:
                while piece := raw.recv(4096):
                    answer += piece
            except ConnectionResetError:  # the end of a request that was too long was not read
                pass
            assert answer.partition(b" ")[2][:3] == status


def test_metrics_are_compressed_for_a_client_that_asks(server):
    """Prometheus asks for gzip and for the format of OpenMetrics."""
    connection = http.client.HTTPConnection(server.address, timeout=60)
    headers = {"Accept": "application/openmetrics-text; version=1.0.0", "Accept-Encoding": "gzip"}
    connection.request("GET", "/metrics?name[]=poolrpc_arenas", headers=headers)
    answer = connection.getresponse()
    assert answer.getheader("Content-Encoding") == "gzip"
    assert answer.getheader("Content-Type").startswith("application/openmetrics-text")
    assert answer.read()[:2] == b"\x1f\x8b"
    connection.close()


def test_connections_that_send_nothing_make_way(server):
    """Pages are answered however many connections are silent, by the same two threads; the oldest ones are closed."""
    with ExitStack() as silent:
        threads = threading.active_count()
        connections = [silent.enter_context(connect(server)) for _ in range(4 * MAX_CONNECTIONS)]
        for page in ("livez", "readyz", "metrics"):
            assert get(server.address, page)[0] == 200
        assert threading.active_count() <= threads + 1  # the one that renders metrics
        assert all(each.recv(1) == b"" for each in connections[: 2 * MAX_CONNECTIONS])
        connections[-1].sendall(b"GET /livez HTTP/1.0\r\n\r\n")
        assert connections[-1].recv(12) == b"HTTP/1.1 200"


def test_a_slow_scrape_does_not_delay_a_probe():
    """/livez is answered while metrics are collected, and the scrape is not closed for silent connections."""
    collecting, proceed = threading.Event(), threading.Event()

    def collect():
        collecting.set()
        assert proceed.wait(60)
        return CollectorRegistry()

    server = MonitoringServer("127.0.0.1:0", collect, lambda: True)
    try:
        with connect(server) as scrape, ExitStack() as silent:
            scrape.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            assert collecting.wait(60)
            for _ in range(2 * MAX_CONNECTIONS):
                silent.enter_context(connect(server))
            assert get(server.address, "livez")[0] == 200
            proceed.set()
            assert scrape.recv(12) == b"HTTP/1.1 200"
    finally:
        proceed.set()
        server.close()


@contextmanager
def no_descriptors():
    """Use up the descriptors of this process for the block."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ExitStack() as taken:
        taken.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
        with socket.socket() as highest:
            resource.setrlimit(resource.RLIMIT_NOFILE, (highest.fileno() + 20, limits[1]))
        with suppress(OSError):
            while True:
                taken.enter_context(socket.socket())
        yield


def test_a_process_without_descriptors_answers(server):
    """A reserved descriptor serves one connection after the other, also after one that sends nothing."""
    host, port = server.address.split(":")
    with ExitStack() as clients:
        made = [clients.enter_context(socket.socket()) for _ in range(4)]
        with no_descriptors():
            silent = made[0]
            for each in made:
                each.settimeout(60)
                each.connect((host, int(port)))
                if each is not silent:
                    each.sendall(b"GET /livez HTTP/1.0\r\n\r\n")
                    assert each.recv(12) == b"HTTP/1.1 200"
            assert silent.recv(1) == b""
    assert get(server.address, "livez")[0] == 200
