"""Addresses of servers: every form that is taken, and the valid form in the error of any other."""

import os
from pathlib import Path, PurePosixPath

import pytest

from poolrpc import AsyncPoolClient, InvalidArgumentError, PoolClient

LONG = "/tmp/" + 103 * "x"  # noqa: S108 - nothing is written there


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1:50051",
        "localhost:1",
        "pool.internal:65535",
        "[::1]:50051",
        "[fe80::1%eth0]:50051",
        "dns:///pool.internal:50051",
        "dns://10.0.0.1/pool.internal:50051",
        "dns:pool.internal:50051",
        "ipv4:127.0.0.1:1,127.0.0.2:2",
        "ipv6:[::1]:1",
        "xds:///pool",
        "unix:/run/pool.sock",
        "unix:///run/pool.sock",
        "unix:pool.sock",
        "unix:/run/a b%41?#\u00e9.sock",
        "unix-abstract:pool",
        f"unix:{LONG[:-1]}",
    ],
)
def test_every_form_of_an_address_is_taken(address):
    """An address is kept as it is given."""
    with PoolClient(address) as client:
        assert client.address == address
        assert repr(client) == f"PoolClient({address!r})"


@pytest.mark.parametrize("path", [Path("/run/pool.sock"), PurePosixPath("/run/pool.sock")], ids=["Path", "pure"])
def test_a_path_object_is_a_unix_socket(path):
    """A path object can be nothing else."""
    with PoolClient(path) as client:
        assert client.address == "unix:/run/pool.sock"


async def test_an_async_client_takes_a_path_object():
    """AsyncPoolClient checks its address in the same way."""
    async with AsyncPoolClient(Path("/run/pool.sock")) as client:
        assert client.address == "unix:/run/pool.sock"
    with pytest.raises(InvalidArgumentError, match=r"^address: expected"):
        AsyncPoolClient("localhost")


@pytest.mark.parametrize(
    ("address", "hint"),
    [
        (None, r"got None \(NoneType\)$"),
        (b"127.0.0.1:50051", r"got b'127.0.0.1:50051' \(bytes\)$"),
        (50051, r'got 50051 \(int\); use for a port of this machine "127.0.0.1:50051"$'),
        (0, r"got 0 \(int\)$"),
        (True, r"got True \(bool\)$"),
        (("127.0.0.1", 50051), r"got \('127.0.0.1', 50051\) \(tuple\)$"),
        ("http://10.0.0.1:50051", r'; use "10.0.0.1:50051"$'),
        ("HTTP://pool.internal/v1", r'; use "pool.internal:50051"$'),
        ("https://pool.internal:443", r'; use "pool.internal:443", with credentials= or POOLRPC_CA for TLS$'),
        ("grpc://pool.internal", r'; use "pool.internal:50051"$'),
        ("tcp://:50051", r'; use ":50051"$'),
        ("/run/pool.sock", r'; use for a unix socket "unix:/run/pool.sock"$'),
        ("./pool.sock", r'; use for a unix socket "unix:./pool.sock"$'),
        ("localhost", r'; use with a port "localhost:50051"$'),
        ("[::1]", r'; use with a port "\[::1\]:50051"$'),
        ("::1", r'; use an IPv6 address in brackets, such as "\[::1\]:50051"$'),
        ("::1:50051", r"an IPv6 address in brackets"),
        ("dns:///pool.internal", r'; use with a port "dns:///pool.internal:50051"$'),
        (":50051", r'; use for a port of this machine "127.0.0.1:50051"$'),
        ("localhost:", r"; use a port of 1 to 65535$"),
        ("localhost:0", r"; use a port of 1 to 65535$"),
        ("localhost:65536", r"; use a port of 1 to 65535$"),
        ("localhost:http", r"; use a port of 1 to 65535$"),
        ("localhost:\u0665", r"; use a port of 1 to 65535$"),
        ("localhost:-1", r"; use a port of 1 to 65535$"),
        ("localhost:50051/", r"got 'localhost:50051/'$"),
        ("", r"got ''$"),
        (" localhost:50051", r"got ' localhost:50051'$"),
        ("localhost:50051\n", r"got 'localhost:50051.n'$"),
        ("a:1,b:2", r"an IPv6 address in brackets|got 'a:1,b:2'$"),
        ("ipv4:127.0.0.1", r"with a port"),
        ("unix:", r"got 'unix:'$"),
        ("unix:///", r"got 'unix:///'$"),
        ("unix://pool.sock", r'; use "unix:pool.sock"$'),
        ("unix-abstract:", r"got 'unix-abstract:'$"),
        (f"unix:{LONG}", r"^address: expected the path of a unix socket in at most 107 bytes, got 108: '/tmp/x"),
        (Path(LONG), r"at most 107 bytes, got 108"),
        ("unix:/" + 60 * "\u00e9", r"at most 107 bytes, got 121"),
        ("unix:/a\0b", r"got 'unix:/a"),
    ],
)
def test_what_is_not_an_address_is_rejected_with_the_valid_form(address, hint):
    """The error is raised at construction, with what was received and, if it is clear, what was meant."""
    with pytest.raises(InvalidArgumentError, match=hint) as raised:
        PoolClient(address)
    assert raised.value.violations[0].field == "address"
    assert raised.value.message.startswith("address: expected ")


@pytest.mark.parametrize("name", ["max_message_bytes", "timeout"])
@pytest.mark.parametrize("value", ["5", 0, -1, True, float("nan"), [1], b"1"], ids=repr)
def test_a_number_that_is_none_is_rejected_by_name(name, value):
    """The client's numbers are checked at construction."""
    with pytest.raises(InvalidArgumentError, match=rf"^{name}: expected .*, got "):
        PoolClient("localhost:1", **{name: value})


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (5, "options: expected a dict or pairs, got 5"),
        ([1], r"options: expected a dict or pairs, got \[1\]"),
        ({5: 1}, "options: expected names of gRPC's channel arguments, got 5"),
        ({"grpc.enable_retries": 1.5}, r"options\['grpc.enable_retries'\]: expected an integer, got 1.5"),
        ({"grpc.enable_retries": 2**31}, r"options\['grpc.enable_retries'\]: expected -2147483648 to 2147483647"),
        ({"grpc.enable_retries": None}, r"options\['grpc.enable_retries'\]: expected an integer, got None"),
    ],
)
def test_options_that_grpc_does_not_take_are_rejected(options, text):
    """GRPC's own errors name no argument."""
    with pytest.raises(InvalidArgumentError, match=f"^{text}"):
        PoolClient("localhost:1", options=options)


def test_credentials_of_another_type_are_rejected():
    """The text of a certificate is not what gRPC takes, and the error doesn't show it."""
    with pytest.raises(InvalidArgumentError, match=r"^credentials: expected what grpc.ssl_channel.* type bytes$"):
        PoolClient("localhost:1", credentials=b"-----BEGIN CERTIFICATE-----")


def test_the_environments_address_is_checked(monkeypatch, capsys):
    """The command reports an address from the environment like one from the command line."""
    from poolrpc.cli import main  # noqa: PLC0415 - reads the environment when it is called

    monkeypatch.setenv("POOLRPC_ADDRESS", "http://localhost:50051")
    assert main(["health"]) == 1
    assert capsys.readouterr().err.endswith('; use "localhost:50051"\n')
    assert os.environ["POOLRPC_ADDRESS"]
