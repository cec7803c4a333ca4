"""The explorer's HTTP server: who may call it, and its limits on what clients send, how slowly, and how many."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import ssl
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from http.client import HTTPConnection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from poolrpc_server import Config, Server
from poolrpc_server.transports.http.connection import MAX_BODY_BYTES, MAX_HEAD_BYTES
from poolrpc_server.transports.http.server import MAX_CONNECTIONS
from scripts.server_process import serving
from tests.integration.certificates import Authority, tls_settings
from tests.integration.http_calls import PLANE, HttpAnswer, raw, read_answer, read_raw, send

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator

    from tests.integration.conftest import Gate

REQUEST = {"layer": "MaxPool2d(2)", "input": PLANE}
HELD = {"layer": "GlobalPool2d('max')", "input": PLANE}
"""A request whose computation a gate holds up."""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """Return a server with an explorer."""
    made = Server(Config(listen=("127.0.0.1:0",), explorer="127.0.0.1:0", metrics="127.0.0.1:0"))
    made.start()
    yield made
    made.stop(0)


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    """Return a function that starts a server with an explorer."""
    with ExitStack() as stack:

        def start(**settings: Any) -> Server:
            chosen = {"listen": ("127.0.0.1:0",), "explorer": "127.0.0.1:0", "metrics": "127.0.0.1:0", **settings}
            made = Server(Config(**chosen))
            stack.callback(made.stop, 0)
            made.start()
            return made

        yield start


def metric(server: Server, line: str) -> float:
    """Return a value of the metrics."""
    lines = send(server.metrics_address, "/metrics").content.decode().splitlines()
    return next(float(each.rpartition(" ")[2]) for each in lines if each.startswith(line))


def head(path: str = "/v1/pool", *headers: str, method: str = "POST") -> bytes:
    """Return the first line and the headers of a request."""
    return "\r\n".join((f"{method} {path} HTTP/1.1", "Host: localhost", *headers, "", "")).encode()


def is_closed(connection: socket.socket) -> bool:
    """Wait until the server has closed a connection."""
    try:
        while connection.recv(65536):
            pass
    except ConnectionError:
        pass
    return True


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "text/html"),
        ("/explorer.js", "text/javascript"),
        ("/explorer.css", "text/css"),
        ("/icon.svg", "image/svg+xml"),
    ],
)
def test_the_pages_files(server: Server, path: str, kind: str) -> None:
    """Each file has its type, and a tag by which a browser finds out that it has not changed."""
    answer = send(server.explorer_address, path)
    assert (answer.status, answer.headers["content-type"]) == (200, f"{kind}; charset=utf-8")
    again = send(server.explorer_address, path, headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status, again.content) == (304, b"")
    only_head = send(server.explorer_address, path, method="HEAD")
    assert (only_head.status, only_head.content) == (200, b"")
    assert only_head.headers["content-length"] == str(len(answer.content))


def test_the_page_names_nothing_outside(server: Server) -> None:
    """No file of the page has the address of another server, but the name of SVG's own format."""
    for path in ("/", "/explorer.js", "/explorer.css", "/icon.svg"):
        text = send(server.explorer_address, path).content.decode()
        assert set(re.findall(r"(?:https?:)?//[\w.]+\w", text)) <= {"http://www.w3.org"}, path


@pytest.mark.parametrize(("path", "status"), [("/nope", 404), ("/v1/pool", 405)])
def test_an_error_of_head_has_no_content(server: Server, path: str, status: int) -> None:
    """It has the headers of the error, and the connection goes on."""
    answer = send(server.explorer_address, path, method="HEAD")
    assert (answer.status, answer.content) == (status, b"")
    assert int(answer.headers["content-length"]) > 0


@pytest.mark.parametrize(
    "answer_of",
    [
        lambda address: send(address, "/"),
        lambda address: send(address, "/v1/pool", REQUEST),
        lambda address: send(address, "/v1/pool", "{"),
        lambda address: send(address, "/nothing"),
        lambda address: send(address, "/v1/pool", REQUEST, headers={"Origin": "http://other.test"}),
    ],
)
def test_every_answer_is_closed_to_other_pages(server: Server, answer_of: Callable[[str], HttpAnswer]) -> None:
    """Every answer has a strict policy of contents, and none allows pages of other origins to read it."""
    headers = answer_of(server.explorer_address).headers
    assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'self';")
    assert "unsafe" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cross-origin-resource-policy"] == "same-origin"
    assert not [each for each in headers if each.startswith("access-control-")]


def test_pages_of_other_origins_call_nothing(server: Server) -> None:
    """What a browser sends for a page of another origin is rejected before it is a call; its own page may call."""
    before = metric(server, 'poolrpc_transport_calls_total{transport="http"}')
    for origin in ("http://other.test", "null", f"http://{server.explorer_address}.other.test"):
        answer = send(server.explorer_address, "/v1/pool", REQUEST, headers={"Origin": origin})
        assert (answer.status, answer.error["reason"]) == (403, "ORIGIN")
    assert metric(server, 'poolrpc_transport_calls_total{transport="http"}') == before
    assert send(server.explorer_address, "/v1/pool", REQUEST, method="OPTIONS").status == 405
    own = {"Origin": f"http://{server.explorer_address}"}
    assert send(server.explorer_address, "/v1/pool", REQUEST, headers=own).status == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost:1", 200), ("127.0.0.1", 200), ("[::1]:80", 200), ("rebound.test", 403), ("127.0.0.1.test:80", 403)],
)
def test_a_name_that_leads_to_this_machine_is_not_its_own(server: Server, host: str, status: int) -> None:
    """On a loopback address, the host that a request names must be this machine: else it is DNS rebinding."""
    for path, body in (("/", None), ("/v1/pool", REQUEST)):
        answer = send(server.explorer_address, path, body, headers={"Host": host})
        assert answer.status == status
        assert status == 200 or answer.error["reason"] == "HOST"


@pytest.mark.parametrize(
    ("request_of", "status", "word"),
    [
        ({"path": "/v2"}, 404, "/v1/pool"),
        ({"path": "/../etc/passwd"}, 404, "/v1/pool"),
        ({"path": "/__init__.py"}, 404, "/v1/pool"),
        ({"path": "/v1/pool"}, 405, "POST"),
        ({"path": "/v1/info", "body": {}}, 405, "GET"),
        ({"path": "/", "body": {}}, 405, "GET"),
        ({"path": "/v1/pool", "body": REQUEST, "headers": {"Content-Encoding": "gzip"}}, 415, "Content-Encoding"),
        ({"path": "/v1/pool", "body": REQUEST, "headers": {"Priority": "7"}}, 400, "priority"),
        ({"path": "/v1/pool", "body": REQUEST, "headers": {"Timeout": "soon"}}, 400, "timeout"),
        ({"path": "/v1/pool", "body": REQUEST, "headers": {"Timeout": "-1"}}, 400, "timeout"),
        ({"path": "/v1/pool", "body": REQUEST, "headers": {"Timeout": "nan"}}, 400, "timeout"),
    ],
)
def test_requests_that_are_not_calls(server: Server, request_of: dict[str, Any], status: int, word: str) -> None:
    """Another path, method, encoding or option has its status, and the message names what is expected."""
    answer = send(server.explorer_address, **request_of)
    assert answer.status == status
    assert word in answer.error["message"]


def test_a_connection_has_many_requests(server: Server) -> None:
    """Requests on one connection are answered in order, also when they are sent before an answer is read."""
    body = json.dumps(REQUEST).encode()
    request = head("/v1/pool", f"Content-Length: {len(body)}") + body
    with closing(raw(server.explorer_address)) as connection:
        connection.sendall(request * 3 + head("/", method="GET") + head("/nothing", method="GET"))
        answers = connection.makefile("rb")
        seen = []
        for _ in range(5):
            status = int(answers.readline().split()[1])
            length = 0
            while (line := answers.readline()) != b"\r\n":
                length = int(line.split()[1]) if line.lower().startswith(b"content-length") else length
            answers.read(length)
            seen.append(status)
    assert seen == [200, 200, 200, 200, 404]


def test_bodies_in_chunks_and_after_a_question(server: Server) -> None:
    """A body may come in chunks, and curl's Expect: 100-continue is answered before the body is sent."""
    body = json.dumps(REQUEST).encode()
    with closing(raw(server.explorer_address)) as connection:
        connection.sendall(head("/v1/pool", "Transfer-Encoding: chunked"))
        for at in range(0, len(body), 10):
            part = body[at : at + 10]
            connection.sendall(b"%x\r\n%s\r\n" % (len(part), part))
        connection.sendall(b"0\r\n\r\n")
        assert read_raw(connection).json["output"] == [[6, 8], [9, 3]]
        connection.sendall(head("/v1/pool", f"Content-Length: {len(body)}", "Expect: 100-continue"))
        assert connection.recv(25) == b"HTTP/1.1 100 \r\n\r\n"
        connection.sendall(body)
        assert read_raw(connection).status == 200


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),  # without a host
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
        (head("/v1/pool", "Content-Length: -1"), 400),
        (head("/v1/pool", "Transfer-Encoding: gzip"), 501),
        (head("/v1/pool", "Transfer-Encoding: chunked") + b"zz\r\n", 400),
        (head("/", f"X: {'x' * 2 * MAX_HEAD_BYTES}", method="GET"), 431),
        (b"G" * (MAX_HEAD_BYTES + 1), 431),
        (head("/v1/pool", f"Content-Length: {MAX_BODY_BYTES + 1}"), 413),
        (head("/v1/pool", "Content-Length: 99999999999999999999"), 413),
    ],
)
def test_invalid_http(server: Server, sent: bytes, status: int) -> None:
    """What is not HTTP, or announces more than the server takes, has an answer at once, and the connection ends."""
    with closing(raw(server.explorer_address)) as connection:
        connection.sendall(sent)
        assert read_raw(connection).status == status
        assert is_closed(connection)
    assert send(server.explorer_address, "/v1/pool", REQUEST).status == 200


def test_a_body_in_chunks_has_a_limit(server: Server) -> None:
    """A body whose size is not announced is read up to the limit, and no further."""
    chunk = b"%x\r\n%s\r\n" % (2**20, b" " * 2**20)
    with closing(raw(server.explorer_address)) as connection:
        connection.sendall(head("/v1/pool", "Transfer-Encoding: chunked") + chunk * 5)
        answer = read_raw(connection)
    assert (answer.status, answer.error["reason"]) == (413, "MESSAGE_TOO_LARGE")


def test_a_client_that_does_not_send_is_ended(serve: Callable[..., Server]) -> None:
    """A body that does not come within the receive timeout ends the call and the connection, and is counted."""
    server = serve(receive_timeout=0.2)
    with closing(raw(server.explorer_address)) as connection:
        connection.sendall(head("/v1/pool", "Content-Length: 100") + b"{")
        assert is_closed(connection)
    assert metric(server, 'poolrpc_ended_total{reason="TIMEOUT"}') == 1
    assert metric(server, "poolrpc_inflight_bytes") == 0
    assert send(server.explorer_address, "/v1/pool", REQUEST).status == 200


@pytest.mark.slow
def test_a_client_that_does_not_read_is_ended(serve: Callable[..., Server]) -> None:
    """An answer that is not read in the time that its size allows is dropped, with all that it held."""
    server = serve(receive_timeout=0.2)
    tensor = {"data": base64.b64encode(bytes(3 * 2**19)).decode(), "shape": [1, 1536, 1024], "dtype": "uint8"}
    request = {"layer": "[ToDtype('float32'), MaxPool2d(1)]", "input": tensor, "encoding": "base64"}
    body = json.dumps(request).encode()
    with closing(raw(server.explorer_address)) as connection:
        connection.sendall(head("/v1/pool", f"Content-Length: {len(body)}") + body)
        while not metric(server, 'poolrpc_ended_total{reason="TIMEOUT"}'):
            pass
        assert metric(server, "poolrpc_inflight_bytes") == 0
    assert send(server.explorer_address, "/v1/pool", REQUEST).status == 200


def test_clients_that_send_nothing_keep_no_one_out(serve: Callable[..., Server]) -> None:
    """With as many connections as there may be, the oldest one without a call gives way to a new one."""
    server = serve()
    with ExitStack() as opened:
        idle = [opened.enter_context(closing(raw(server.explorer_address))) for _ in range(MAX_CONNECTIONS)]
        for connection in idle:
            connection.sendall(b"GET / HT")
        for _ in range(3):
            assert send(server.explorer_address, "/v1/pool", REQUEST).status == 200
        assert is_closed(idle[0])
        idle[-1].sendall(b"TP/1.1\r\nHost: localhost\r\n\r\n")
        assert read_raw(idle[-1]).status == 200


def test_threads_are_as_many_as_calls_at_a_time(serve: Callable[..., Server]) -> None:
    """Calls one after the other share a thread, and connections without a call have none."""

    def count() -> int:
        return sum(each.name.startswith("poolrpc-http") for each in threading.enumerate())

    before = count()
    server = serve()
    with ExitStack() as opened:
        for _ in range(20):
            opened.enter_context(closing(raw(server.explorer_address)))
            send(server.explorer_address, "/v1/load")
        assert count() - before <= 3  # that of the connections, one of a call, and one that a call has not yet left


def test_a_client_that_leaves_cancels_its_call(serve: Callable[..., Server], gate: Gate) -> None:
    """A queued call whose client closes the connection is not computed."""
    server = serve(threads=1)
    with ThreadPoolExecutor(1) as threads:
        held = threads.submit(send, server.explorer_address, "/v1/pool", HELD)
        assert gate.entered.wait(30)
        body = json.dumps(REQUEST).encode()
        with closing(raw(server.explorer_address)) as connection:
            connection.sendall(head("/v1/pool", f"Content-Length: {len(body)}") + body)
            while server.service.metrics is None or _queued(server) < 1:
                pass
        while _queued(server) or metric(server, "poolrpc_calls") > 1:
            pass
        gate.opened.set()
        assert held.result(30).status == 200
    assert gate.computed == 0
    assert metric(server, 'poolrpc_cancelled_total{stage="queue"}') == 1


def _queued(server: Server) -> float:
    return sum(send(server.explorer_address, "/v1/load").json["queue"])


def test_a_deadline_ends_the_wait(serve: Callable[..., Server], gate: Gate) -> None:
    """A call whose timeout passes in the queue is 504, nothing is computed, and the connection goes on."""
    server = serve(threads=1)
    with ThreadPoolExecutor(1) as threads, closing(HTTPConnection(server.explorer_address, timeout=30)) as connection:
        held = threads.submit(send, server.explorer_address, "/v1/pool", HELD)
        assert gate.entered.wait(30)
        connection.request("POST", "/v1/pool", json.dumps(REQUEST), {"Timeout": "0.05"})
        answer = read_answer(connection)
        assert (answer.status, answer.error["code"]) == (504, "DEADLINE_EXCEEDED")
        gate.opened.set()
        assert held.result(30).status == 200
        assert gate.computed == 0
        connection.request("POST", "/v1/pool", json.dumps(REQUEST))
        assert read_answer(connection).status == 200


def test_a_deadline_ends_a_slow_request(server: Server) -> None:
    """A call whose timeout passes before its body has come is 504."""
    with closing(raw(server.explorer_address)) as connection:
        connection.sendall(head("/v1/pool", "Content-Length: 100", "Timeout: 0.05") + b"{")
        assert read_raw(connection).status == 504


def test_a_full_server_asks_to_try_again(serve: Callable[..., Server], gate: Gate) -> None:
    """With a full queue, a call is 503 with the delay after which to try again, before its body is read."""
    server = serve(threads=1, max_queue=1)
    with ThreadPoolExecutor(2) as threads:
        held = threads.submit(send, server.explorer_address, "/v1/pool", HELD)
        assert gate.entered.wait(30)
        queued = threads.submit(send, server.explorer_address, "/v1/pool", REQUEST)
        while _queued(server) < 1:
            pass
        with closing(raw(server.explorer_address)) as connection:
            connection.sendall(head("/v1/pool", "Content-Length: 100"))
            answer = read_raw(connection)
        gate.opened.set()
        assert (held.result(30).status, queued.result(30).status) == (200, 200)
    assert (answer.status, answer.error["code"], answer.error["reason"]) == (503, "UNAVAILABLE", "QUEUE")
    assert int(answer.headers["retry-after"]) >= 1
    assert answer.error["retry_seconds"] > 0


def test_a_stopping_server_finishes_its_calls(gate: Gate) -> None:
    """A call that began before the stop is answered within the grace; afterwards no one listens."""
    server = Server(Config(listen=("127.0.0.1:0",), explorer="127.0.0.1:0"))
    server.start()
    with ThreadPoolExecutor(2) as threads, closing(raw(server.explorer_address)) as idle:
        held = threads.submit(send, server.explorer_address, "/v1/pool", HELD)
        assert gate.entered.wait(30)
        stopped = threads.submit(server.stop, 30)
        assert is_closed(idle)
        gate.opened.set()
        assert held.result(30).status == 200
        stopped.result(30)
    with pytest.raises(ConnectionRefusedError):
        raw(server.explorer_address)
    assert not [each for each in threading.enumerate() if each.name == f"poolrpc-http {server.explorer_address}"]


def test_a_server_that_stops_at_once_ends_its_calls(gate: Gate) -> None:
    """Without a grace, a call in flight ends with the server."""
    server = Server(Config(listen=("127.0.0.1:0",), explorer="127.0.0.1:0"))
    server.start()
    body = json.dumps(HELD).encode()
    with closing(raw(server.explorer_address)) as connection, ThreadPoolExecutor(1) as threads:
        connection.sendall(head("/v1/pool", f"Content-Length: {len(body)}") + body)
        assert gate.entered.wait(30)
        stopped = threads.submit(server.stop, 0)
        assert is_closed(connection)
        gate.opened.set()
        stopped.result(30)


def test_an_address_in_use_is_an_error(server: Server) -> None:
    """A second explorer on the same address is not started; the message names the setting."""
    with pytest.raises(ValueError, match=r"^explorer: expected a free address, got "):
        Server(Config(listen=("127.0.0.1:0",), explorer=server.explorer_address))


TOKENS = {
    "any": "",
    "json": "poolrpc.v1.JsonService",
    "shape": "poolrpc.v1.JsonService/Shape",
    "native": "poolrpc.v1.PoolService",
}
SHAPE = {"layer": "MaxPool2d(2)", "shape": [1, 1, 4, 4]}
CALLS = {
    "/v1/pool": REQUEST,
    "/v1/shape": SHAPE,
    "/v1/explain": SHAPE | {"shape": [4, 4]},
    "/v1/info": None,
    "/v1/load": None,
}
ALL = dict.fromkeys(CALLS, 200)


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], tuple[Server, Authority]]]:
    """Return a function that returns a server with tokens, "plaintext", with "TLS" or with "mTLS"."""
    folder = tmp_path_factory.mktemp("secured")
    lines = [f"{name} {hashlib.sha256(name.encode()).hexdigest()} {allowed}\n" for name, allowed in TOKENS.items()]
    (folder / "tokens").write_text("".join(lines))
    made: dict[str, tuple[Server, Authority]] = {}
    with ExitStack() as stack:

        def get(kind: str) -> tuple[Server, Authority]:
            if kind not in made:
                authority = Authority(folder / kind)
                tls = {} if kind == "plaintext" else tls_settings(authority.issue("localhost"))
                tls |= {"tls_client_ca": str(authority.ca)} if kind == "mTLS" else {}
                tokens = str(folder / "tokens")
                server = Server(Config(listen=("127.0.0.1:0",), explorer="localhost:0", token_file=tokens, **tls))
                server.start()
                stack.callback(server.stop, 0)
                made[kind] = server, authority
            return made[kind]

        yield get


@pytest.mark.parametrize("kind", ["plaintext", "TLS", "mTLS"])
@pytest.mark.parametrize(
    ("authorization", "expected"),
    [
        ("", dict.fromkeys(CALLS, 401)),
        ("Bearer wrong", dict.fromkeys(CALLS, 401)),
        ("Basic any", dict.fromkeys(CALLS, 401)),
        ("Bearer", dict.fromkeys(CALLS, 401)),
        ("Bearer any", ALL),
        ("bearer any", ALL),
        ("Bearer json", ALL),
        ("Bearer shape", dict.fromkeys(CALLS, 403) | {"/v1/shape": 200}),
        ("Bearer native", dict.fromkeys(CALLS, 403)),
    ],
)
def test_tokens(
    secured: Callable[[str], tuple[Server, Authority]], kind: str, authorization: str, expected: dict[str, int]
) -> None:
    """Each method needs a token that allows it, with TLS or without; the page's files need none."""
    server, authority = secured(kind)
    tls = _context(authority, certified=kind == "mTLS") if kind != "plaintext" else None
    headers = {"Authorization": authorization} if authorization else {}
    answers = {
        path: send(server.explorer_address, path, body, headers=headers, tls=tls) for path, body in CALLS.items()
    }
    assert {path: each.status for path, each in answers.items()} == expected
    for each in answers.values():
        assert (each.headers.get("www-authenticate") == "Bearer") == (each.status == 401)
    assert send(server.explorer_address, "/", tls=tls).status == 200


def _context(authority: Authority, *, certified: bool = False) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(authority.ca))
    if certified:
        context.load_cert_chain(*authority.issue("client.test"))
    return context


@pytest.mark.parametrize(
    ("kind", "context"),
    [
        ("TLS", lambda _: None),
        ("TLS", lambda _: ssl.create_default_context()),
        ("mTLS", _context),
    ],
)
def test_a_handshake_that_fails(
    secured: Callable[[str], tuple[Server, Authority]], kind: str, context: Callable[[Authority], ssl.SSLContext | None]
) -> None:
    """A client without TLS, with other authorities, or without the certificate that it needs gets no answer."""
    server, authority = secured(kind)
    with pytest.raises((OSError, ssl.SSLError)):
        send(server.explorer_address, "/", tls=context(authority))


def test_a_new_certificate_is_used(tmp_path: Path, serve: Callable[..., Server]) -> None:
    """New connections have the certificate that is in the file now."""
    authority = Authority(tmp_path / "ca")
    settings = tls_settings(authority.issue("elsewhere.test"))
    server = serve(explorer="localhost:0", **settings)
    with pytest.raises(ssl.SSLCertVerificationError):
        send(server.explorer_address, "/", tls=_context(authority))
    renewed = tls_settings(authority.issue("localhost"))
    for name in ("tls_cert", "tls_key"):
        Path(settings[name]).write_bytes(Path(renewed[name]).read_bytes())
    assert send(server.explorer_address, "/", tls=_context(authority)).status == 200


@pytest.mark.slow
def test_workers_share_the_address() -> None:
    """Several workers serve the explorer on one address."""
    with serving("--workers=2", "--explorer=127.0.0.1:0", "--threads=2", "--drain-seconds=0") as server:
        address = server.start_line["explorer"]
        assert not address.endswith(":0")
        for _ in range(20):
            assert send(address, "/v1/pool", REQUEST).json["output"] == [[6, 8], [9, 3]]
        server.process.terminate()
        assert server.wait() == 0
        assert {line["worker"] for line in server.log if line["event"] == "call"} == {0, 1}
