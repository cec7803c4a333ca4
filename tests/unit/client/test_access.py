"""What a client shows of itself: TLS and a token, as told or as the environment says, and never in clear."""

import grpc
import pytest

from poolrpc import AsyncPoolClient, InvalidArgumentError, PoolClient
from poolrpc.access import credentials_for, is_loopback, metadata_for

SECRET = "s3cret-t0ken"  # noqa: S105 - a test's
PUBLIC = "example.com:50051"
BEARER = (("authorization", f"Bearer {SECRET}"),)


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    """Take what this process's own environment says away."""
    for name in ("POOLRPC_TOKEN", "POOLRPC_CA", "POOLRPC_CLIENT_CERT", "POOLRPC_CLIENT_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost"])
def test_these_hosts_are_this_machine(host):
    """Loopback addresses, by number or by name."""
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host", ["192.168.0.1", "::", "10.0.0.1", "example.com", "localhost.example.com", "127.0.0.1.x", ""]
)
def test_these_hosts_are_not(host):
    """Every other, and what isn't understood."""
    assert not is_loopback(host)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1:50051",
        "localhost:50051",
        "localhost",
        "[::1]:50051",
        "dns:///localhost:50051",
        "dns:localhost:50051",
        "ipv4:127.0.0.1:50051",
        "ipv6:[::1]:50051",
        "unix:/run/pool.sock",
        "unix:///run/pool.sock",
        "unix-abstract:pool",
    ],
)
def test_a_token_goes_to_this_machine_in_clear(address):
    """Nobody is on the way to a loopback address or a unix socket."""
    assert metadata_for(address, (), SECRET, encrypted=False) == BEARER


@pytest.mark.parametrize(
    "address",
    [
        PUBLIC,
        "10.0.0.1:1",
        "0.0.0.0:1",
        "dns:///example.com:1",
        "dns://10.0.0.1/localhost:1",
        "ipv4:127.0.0.1:1,10.0.0.1:1",
        "xds:///localhost",
    ],
)
def test_a_token_goes_to_others_through_tls_alone(address, monkeypatch):
    """A token that would go in clear is refused, whoever it came from; with TLS it goes."""
    with pytest.raises(InvalidArgumentError, match=r"^token: expected TLS .* got plaintext") as raised:
        PoolClient(address, token=SECRET)
    assert address in str(raised.value)
    assert SECRET not in str(raised.value)
    assert metadata_for(address, (), SECRET, encrypted=True) == BEARER
    monkeypatch.setenv("POOLRPC_TOKEN", SECRET)
    with pytest.raises(InvalidArgumentError, match=r"^POOLRPC_TOKEN: expected TLS"):
        PoolClient(address)


def test_metadata_of_the_callers_own_goes_as_it_is(monkeypatch):
    """Who passes an authorization himself may; the environment's token is none of his, and a second one is refused."""
    own = (("x", "y"), ("Authorization", "Basic abc"))
    monkeypatch.setenv("POOLRPC_TOKEN", SECRET)
    assert metadata_for(PUBLIC, own, None, encrypted=False) == own
    with pytest.raises(InvalidArgumentError, match=r"^token: .* got both$"):
        metadata_for(PUBLIC, own, SECRET, encrypted=True)


def test_the_token_told_goes_before_the_environments(monkeypatch):
    """An argument wins over POOLRPC_TOKEN, which is used where there is none; an empty one is none."""
    monkeypatch.setenv("POOLRPC_TOKEN", "another")
    assert metadata_for("localhost:1", [("a", "b")], SECRET, encrypted=False) == (("a", "b"), *BEARER)
    assert metadata_for("localhost:1", (), None, encrypted=False) == (("authorization", "Bearer another"),)
    monkeypatch.setenv("POOLRPC_TOKEN", "")
    assert metadata_for("localhost:1", (), None, encrypted=False) == ()


@pytest.mark.parametrize("token", ["", "two words", f"{SECRET}\n", f"{SECRET}é", f"{SECRET}\x00"])
def test_what_is_no_token_is_refused_and_not_shown(token):
    """What a header can't carry is refused here: gRPC's own error would have the token in it."""
    with pytest.raises(InvalidArgumentError, match=r"^token: expected printable ASCII") as raised:
        metadata_for("localhost:1", (), token, encrypted=True)
    assert SECRET not in str(raised.value)


def test_the_environment_says_tls(monkeypatch, tmp_path):
    """POOLRPC_CA is TLS, but for a unix socket, and for who has credentials of his own."""
    assert credentials_for(PUBLIC, None) is None
    ca = tmp_path / "ca.pem"
    ca.write_text("-----BEGIN CERTIFICATE-----\n")
    monkeypatch.setenv("POOLRPC_CA", str(ca))
    assert isinstance(credentials_for(PUBLIC, None), grpc.ChannelCredentials)
    assert credentials_for("unix:/run/pool.sock", None) is None
    own = grpc.ssl_channel_credentials()
    assert credentials_for(PUBLIC, own) is own


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        (["POOLRPC_CA", "POOLRPC_CLIENT_CERT"], "POOLRPC_CLIENT_KEY"),
        (["POOLRPC_CA", "POOLRPC_CLIENT_KEY"], "POOLRPC_CLIENT_CERT"),
        (["POOLRPC_CLIENT_CERT", "POOLRPC_CLIENT_KEY"], "POOLRPC_CA"),
    ],
    ids=["no key", "no certificate", "no authority"],
)
def test_what_goes_together_is_asked_for(monkeypatch, tmp_path, names, missing):
    """A client's certificate needs its key, and both need the server's authority."""
    for name in names:
        (tmp_path / name).write_text("PEM")
        monkeypatch.setenv(name, str(tmp_path / name))
    with pytest.raises(InvalidArgumentError, match=f"^{missing}: expected a file, because POOLRPC_CLIENT_"):
        credentials_for(PUBLIC, None)


def test_a_file_that_is_not_there_is_named(monkeypatch, tmp_path):
    """The error says which variable names it, and the file."""
    monkeypatch.setenv("POOLRPC_CA", str(tmp_path / "nowhere"))
    with pytest.raises(InvalidArgumentError, match=r"^POOLRPC_CA: expected a PEM file, got .*nowhere: No such file"):
        PoolClient(PUBLIC)


def test_a_client_does_not_show_its_token():
    """Neither client's repr has the token."""
    with PoolClient("localhost:1", token=SECRET) as client:
        assert repr(client) == "PoolClient('localhost:1')"


async def test_an_async_client_does_not_show_its_token():
    """Nor has that of asyncio's client."""
    async with AsyncPoolClient("localhost:1", token=SECRET) as client:
        assert repr(client) == "AsyncPoolClient('localhost:1')"
