"""The credentials of a client: TLS and a token, from arguments or the environment, and never in plaintext."""

import grpc
import pytest

from poolrpc import AsyncPoolClient, InvalidArgumentError, PoolClient
from poolrpc.credentials import credentials_for, is_loopback, metadata_for

SECRET = "s3cret-t0ken"  # noqa: S105 - only of these tests
PUBLIC = "example.com:50051"
BEARER = (("authorization", f"Bearer {SECRET}"),)


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    """Remove what the environment of this process sets."""
    for name in ("POOLRPC_TOKEN", "POOLRPC_CA", "POOLRPC_CLIENT_CERT", "POOLRPC_CLIENT_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", ["POOLRPC_CA", "POOLRPC_CLIENT_CERT", "POOLRPC_CLIENT_KEY"])
@pytest.mark.parametrize("content", ["", " \n"])
def test_an_empty_file_is_no_certificate(tmp_path, monkeypatch, name, content):
    """A secret that is not there yet is an error, and not a reason to send anything in plaintext."""
    (tmp_path / "empty.pem").write_text(content)
    monkeypatch.setenv(name, str(tmp_path / "empty.pem"))
    with pytest.raises(InvalidArgumentError, match="which is empty") as raised:
        PoolClient(PUBLIC)
    assert raised.value.violations[0].field == name


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost"])
def test_a_loopback_host_is_this_machine(host):
    """Loopback hosts are recognised by address and by name."""
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host", ["192.168.0.1", "::", "10.0.0.1", "example.com", "localhost.example.com", "127.0.0.1.x", ""]
)
def test_any_other_host_is_not(host):
    """Other addresses and names, and invalid ones, are not loopback hosts."""
    assert not is_loopback(host)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1:50051",
        "localhost:50051",
        "ipv4:127.0.0.1:1,127.0.0.2:2",
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
def test_a_token_may_be_sent_to_this_machine_in_plaintext(address):
    """A loopback address or a unix socket needs no TLS."""
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
def test_a_token_is_sent_to_other_machines_with_tls_only(address, monkeypatch):
    """Without TLS, a token from an argument or from the environment is rejected, and not shown."""
    with pytest.raises(InvalidArgumentError, match=r"^token: expected TLS .* got plaintext") as raised:
        PoolClient(address, token=SECRET)
    assert address in str(raised.value)
    assert SECRET not in str(raised.value)
    assert metadata_for(address, (), SECRET, encrypted=True) == BEARER
    monkeypatch.setenv("POOLRPC_TOKEN", SECRET)
    with pytest.raises(InvalidArgumentError, match=r"^POOLRPC_TOKEN: expected TLS"):
        PoolClient(address)


def test_an_authorization_in_the_metadata_is_sent_as_it_is(monkeypatch):
    """It replaces the token of the environment; a token argument in addition to it is rejected."""
    own = (("x", "y"), ("Authorization", "Basic abc"))
    monkeypatch.setenv("POOLRPC_TOKEN", SECRET)
    assert metadata_for(PUBLIC, own, None, encrypted=False) == (("x", "y"), ("authorization", "Basic abc"))
    with pytest.raises(InvalidArgumentError, match=r"^token: .* got both$"):
        metadata_for(PUBLIC, own, SECRET, encrypted=True)


@pytest.mark.parametrize(
    "metadata",
    [
        {"Tenant": "a", "trace-bin": b"\0"},
        [("Tenant", "a"), ("trace-bin", b"\0")],
        iter([["TENANT", "a"], ("trace-bin", b"\0")]),
    ],
    ids=["dict", "pairs", "iterator"],
)
def test_metadata_is_a_dict_or_pairs_in_any_case(metadata):
    """Keys are sent in lower case, the only one that HTTP/2 has; keys that end with -bin have bytes."""
    assert metadata_for(PUBLIC, metadata, None, encrypted=False) == (("tenant", "a"), ("trace-bin", b"\0"))


@pytest.mark.parametrize(
    ("metadata", "text"),
    [
        ("a=b", "expected a dict or pairs, got an object of type str"),
        (5, "expected a dict or pairs, got an object of type int"),
        (["ab"], "expected a key and a value, got an object of type str"),
        ([("a", SECRET, "c")], "expected a key and a value, got an object of type tuple"),
        ([(5, SECRET)], "expected a key of letters, .* got 5"),
        ({"a b": SECRET}, "expected a key of letters, .* got 'a b'"),
        ({"": SECRET}, "expected a key of letters, .* got ''"),
        ({"grpc-timeout": SECRET}, "expected a key .* does not begin with grpc-, got 'grpc-timeout'"),
        ({"a": f"{SECRET}\n"}, "expected printable ASCII text for 'a', got something else of type str"),
        ({"a": SECRET.encode()}, "expected printable ASCII text for 'a', got something else of type bytes"),
        ({"a": None}, "expected printable ASCII text for 'a', got something else of type NoneType"),
        ({"a-bin": SECRET}, "expected bytes for 'a-bin', got something else of type str"),
    ],
)
def test_metadata_that_cannot_be_sent_is_rejected_and_not_shown(metadata, text):
    """The error is raised at construction and has no value, which may be secret."""
    with pytest.raises(InvalidArgumentError, match=f"^metadata: {text}") as raised:
        PoolClient("localhost:1", metadata=metadata)
    assert SECRET not in str(raised.value)


def test_a_token_argument_overrides_the_environment(monkeypatch):
    """POOLRPC_TOKEN is used if there is no argument, unless it is empty."""
    monkeypatch.setenv("POOLRPC_TOKEN", "another")
    assert metadata_for("localhost:1", [("a", "b")], SECRET, encrypted=False) == (("a", "b"), *BEARER)
    assert metadata_for("localhost:1", (), None, encrypted=False) == (("authorization", "Bearer another"),)
    monkeypatch.setenv("POOLRPC_TOKEN", "")
    assert metadata_for("localhost:1", (), None, encrypted=False) == ()


@pytest.mark.parametrize("token", ["", "two words", f"{SECRET}\n", f"{SECRET}é", f"{SECRET}\x00", SECRET.encode(), 5])
def test_an_invalid_token_is_rejected_and_not_shown(token):
    """A token that a header cannot carry is rejected before gRPC, whose own error would contain it."""
    with pytest.raises(InvalidArgumentError, match=r"^token: expected printable ASCII") as raised:
        metadata_for("localhost:1", (), token, encrypted=True)
    assert SECRET not in str(raised.value)


def test_the_environment_may_enable_tls(monkeypatch, tmp_path):
    """POOLRPC_CA enables TLS, except on a unix socket; an argument overrides it."""
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
def test_a_missing_file_is_named(monkeypatch, tmp_path, names, missing):
    """A client's certificate needs its key, and both need the server's authority."""
    for name in names:
        (tmp_path / name).write_text("PEM")
        monkeypatch.setenv(name, str(tmp_path / name))
    with pytest.raises(InvalidArgumentError, match=f"^{missing}: expected a file, because POOLRPC_CLIENT_"):
        credentials_for(PUBLIC, None)


def test_an_unreadable_file_is_named(monkeypatch, tmp_path):
    """The error has the variable and the path."""
    monkeypatch.setenv("POOLRPC_CA", str(tmp_path / "nowhere"))
    with pytest.raises(InvalidArgumentError, match=r"^POOLRPC_CA: expected a PEM file, got .*nowhere: No such file"):
        PoolClient(PUBLIC)


def test_a_client_does_not_show_its_token():
    """The repr of PoolClient has the address alone."""
    with PoolClient("localhost:1", token=SECRET) as client:
        assert repr(client) == "PoolClient('localhost:1')"


async def test_an_async_client_does_not_show_its_token():
    """The repr of AsyncPoolClient has the address alone."""
    async with AsyncPoolClient("localhost:1", token=SECRET) as client:
        assert repr(client) == "AsyncPoolClient('localhost:1')"
