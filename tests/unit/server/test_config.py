"""The server's settings: flags, environment, defaults, bounds, and which addresses are safe."""

import os
import re
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path

import pytest

from poolrpc._shapes.limits import MAX_MESSAGE_BYTES, MAX_PAYLOAD_BYTES
from poolrpc_server.cli import main
from poolrpc_server.config import Config, ConfigError, parse
from poolrpc_server.resources import cpu_count

NUMBERS = [each.name for each in fields(Config) if each.metadata["unit"]]
LEAST = {"max_arena_bytes": -1} | dict.fromkeys(
    [
        "threads",
        "max_message_bytes",
        "max_inflight_bytes",
        "max_queue_seconds",
        "max_queue_delay",
        "max_connection_age_seconds",
        "max_connection_idle_seconds",
        "drain_seconds",
        "shutdown_grace",
    ],
    0,
)
BY_THE_MACHINE = ["threads", "max_message_bytes", "max_inflight_bytes", "max_arena_bytes"]
GIB = 2**30


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    """Take every setting of this process's own environment away, and make lines long enough for --help."""
    for name in [name for name in os.environ if name.startswith("POOLRPC_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "1000")


def flag(name):
    """Give the flag of a setting."""
    return f"--{name.replace('_', '-')}"


def test_without_anything_the_defaults_hold():
    """A bare command has the Config's own defaults, which are safe: the loopback address, and bounded everything."""
    config = parse([])
    assert config == Config()
    assert config.listen == ("127.0.0.1:50051",)
    assert not config.insecure
    assert config.max_output_bytes == MAX_PAYLOAD_BYTES


def test_threads_are_the_cpus_of_this_process():
    """Unless it is told how many, the server computes on as many threads as there are CPUs for it."""
    assert Config().threads == cpu_count()
    assert Config(threads=3).threads == 3


@pytest.mark.parametrize(
    ("memory", "message", "inflight", "arenas"),
    [
        (64 * GIB, MAX_MESSAGE_BYTES, 4 * GIB, 2 * GIB),
        (10 * GIB, 10 * GIB // 32, 4 * GIB, 2 * GIB),
        (GIB, GIB // 32, GIB * 2 // 5, GIB // 5),
        (4 * 2**20, 4 * 2**20, 4 * 2**20 * 2 // 5, 4 * 2**20 // 5),
    ],
)
def test_bytes_follow_the_memory(monkeypatch, memory, message, inflight, arenas):
    """Unless they are told, limits are parts of the memory that the server may use, up to what is of use."""
    monkeypatch.setattr("poolrpc_server.config.memory_bytes", lambda: memory)
    config = Config()
    assert (config.max_message_bytes, config.max_inflight_bytes, config.max_arena_bytes) == (message, inflight, arenas)
    told = Config(max_message_bytes=MAX_MESSAGE_BYTES, max_inflight_bytes=8 * GIB, max_arena_bytes=0)
    assert (told.max_message_bytes, told.max_inflight_bytes, told.max_arena_bytes) == (MAX_MESSAGE_BYTES, 8 * GIB, 0)


MODELS = str(Path(__file__).with_name("presets.toml"))

# A value of each setting other than its default, as it is written and as it is read.
OTHERS = {
    "listen": ("unix:/tmp/x.sock", ("unix:/tmp/x.sock",)),
    "tls_cert": ("cert.pem", "cert.pem"),
    "tls_key": ("key.pem", "key.pem"),
    "tls_client_ca": ("ca.pem", "ca.pem"),
    "token_file": ("tokens.txt", "tokens.txt"),
    "health_requires_token": ("true", True),
    "insecure": ("true", True),
    "model": ("stem=MaxPool2d(3, stride=2)", ("stem=MaxPool2d(3, stride=2)",)),
    "models": (MODELS, MODELS),
    "allow_client_shm": ("true", True),
    "device": ("cuda:1", "cuda:1"),
    "workers": ("2", 2),
    "threads": ("7", 7),
    "call_threads": ("9", 9),
    "max_message_bytes": ("1000", 1000),
    "max_output_bytes": ("2000", 2000),
    "max_output_growth": ("3", 3),
    "max_work": ("4000", 4000),
    "max_inflight_bytes": ("5000", 5000),
    "max_queue": ("12", 12),
    "max_queue_seconds": ("0.25", 0.25),
    "max_queue_delay": ("2", 2.0),
    "max_batch_bytes": ("6000", 6000),
    "max_arena_bytes": ("0", 0),
    "max_arenas": ("8", 8),
    "max_streams": ("5", 5),
    "stream_idle_seconds": ("1.5", 1.5),
    "keepalive_seconds": ("7.5", 7.5),
    "keepalive_timeout_seconds": ("3", 3.0),
    "min_ping_seconds": ("4", 4.0),
    "max_connection_age_seconds": ("600", 600.0),
    "max_connection_idle_seconds": ("0", 0.0),
    "max_connection_calls": ("11", 11),
    "max_metadata_bytes": ("4096", 4096),
    "metrics": ("127.0.0.1:9464", "127.0.0.1:9464"),
    "drain_seconds": ("0.5", 0.5),
    "shutdown_grace": ("6", 6.0),
    "log_format": ("json", "json"),
    "log_level": ("debug", "debug"),
}


# What a setting is refused without.
BESIDE = {
    "tls_cert": {"tls_key": "k"},
    "tls_key": {"tls_cert": "c"},
    "tls_client_ca": {"tls_cert": "c", "tls_key": "k"},
    "health_requires_token": {"token_file": "t"},
}


@pytest.mark.parametrize("name", [each.name for each in fields(Config)])
def test_a_setting_has_a_flag_and_a_variable(name, monkeypatch):
    """Each setting is given by its flag, or by its POOLRPC_ variable where there is no flag; the flag wins."""
    text, value = OTHERS[name]
    beside = BESIDE.get(name, {})
    expected = replace(Config(), **{name: value, **beside})
    assert expected != Config()
    for other, path in beside.items():
        monkeypatch.setenv(f"POOLRPC_{other.upper()}", path)
    given = [flag(name)] if isinstance(value, bool) else [flag(name), text]
    assert parse(given) == expected
    monkeypatch.setenv(f"POOLRPC_{name.upper()}", text)
    assert parse([]) == expected
    default = getattr(Config(), name)
    if not (isinstance(value, bool) or beside or default == ()):
        back = default[0] if isinstance(default, tuple) else str(default)
        assert parse([flag(name), back]) == Config()


@pytest.mark.parametrize(
    ("text", "addresses"),
    [
        ("127.0.0.1:0", ("127.0.0.1:0",)),
        ("[127.0.0.1:0, unix:/tmp/a b.sock]", ("127.0.0.1:0", "unix:/tmp/a b.sock")),
        ("[[::1]:50051]", ("[::1]:50051",)),
        ("[::1]:50051", ("[::1]:50051",)),
    ],
)
def test_several_addresses_in_the_environment_stand_in_brackets(monkeypatch, text, addresses):
    """POOLRPC_LISTEN has one address, or several as [a, b]."""
    monkeypatch.setenv("POOLRPC_LISTEN", text)
    assert parse([]).listen == addresses


def test_listen_is_repeatable():
    """Each --listen adds an address; the default isn't among them."""
    assert parse(["--listen", "localhost:0", "--listen", "unix:x"]).listen == ("localhost:0", "unix:x")


@pytest.mark.parametrize("each", fields(Config), ids=lambda each: each.name)
def test_help_has_every_default_and_unit(each, capsys):
    """--help says, for every setting, what it is, its default with the unit, and its variable."""
    with pytest.raises(SystemExit) as ended:
        parse(["--help"])
    assert ended.value.code == 0
    default = ", ".join(each.default) if isinstance(each.default, tuple) else each.default
    default = "none" if default == "" else default
    default = str(default).lower() if isinstance(default, bool) else default
    unit = f" {each.metadata['unit']}" if each.metadata["unit"] else ""
    variable = f"POOLRPC_{each.name.upper()}"
    said = " ".join(capsys.readouterr().out.split())
    text = re.escape(f"{each.metadata['help']} [default: {default}{unit}; {variable}]")
    entry = rf"{flag(each.name)}( [A-Z]+)? {text}"
    assert re.search(entry, said)
    assert Config.unit(each.name) == each.metadata["unit"]


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_has_a_least_value(name):
    """A count below 1, or below what else has a meaning, is refused with the unit and the value."""
    least = LEAST.get(name, 1)
    made = getattr(Config(**{name: least}), name)
    assert made == (getattr(Config(), name) if name in BY_THE_MACHINE else least)
    with pytest.raises(ConfigError, match=f"^{name}: expected at least {least} {Config.unit(name)}, got {least - 1}$"):
        Config(**{name: least - 1})
    with pytest.raises(ConfigError, match=f"^{name}: expected "):
        Config(**{name: float("nan")})


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_has_a_greatest_value(name):
    """A value that the server can't report, or wait for, is refused at the start and not when it is first used."""
    for value in [float("inf"), 1e300] if isinstance(getattr(Config(), name), float) else [2**64]:
        with pytest.raises(ConfigError, match=f"^{name}: expected "):
            Config(**{name: value})


def test_a_message_is_at_most_what_grpc_can_be_told():
    """GRPC's own limit is a C int: 2**31 - 1 bytes are taken, one more is refused."""
    assert Config(max_message_bytes=2**31 - 1).max_message_bytes == 2**31 - 1
    with pytest.raises(ConfigError, match=r"^max_message_bytes: expected "):
        Config(max_message_bytes=2**31)


@pytest.mark.parametrize(("name", "value"), [("log_format", "xml"), ("log_level", "INFO"), ("log_level", "")])
def test_a_choice_is_one_of_its_names(name, value):
    """An unknown format or level is refused with the names there are."""
    with pytest.raises(ConfigError, match=f"^{name}: expected one of .*, got '{value}'$"):
        Config(**{name: value})


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1:0",
        "127.1.2.3:50051",
        "localhost:65535",
        "[::1]:50051",
        "unix:x.sock",
        "unix:/run/x.sock",
        "unix:///x",
    ],
)
def test_an_address_of_this_machine_is_safe(address):
    """A loopback address and a unix socket need no leave."""
    assert Config(listen=(address,)).listen == (address,)


@pytest.mark.parametrize(
    "address", ["0.0.0.0:50051", "[::]:50051", "192.168.1.1:0", "10.0.0.1:1", "[2001:db8::1]:1", "example.com:50051"]
)
def test_a_public_address_needs_insecure(address):
    """An address that others reach is refused unless --insecure is given, and the message says so."""
    with pytest.raises(ConfigError, match=r"is public, .*--insecure") as raised:
        Config(listen=("127.0.0.1:0", address))
    assert address in str(raised.value)
    assert "\n" not in str(raised.value)
    assert Config(listen=(address,), insecure=True).listen == (address,)
    assert parse(["--listen", address, "--insecure"]).insecure


TLS = {"tls_cert": "c", "tls_key": "k"}


def test_a_public_address_is_safe_with_tls_and_tokens():
    """Both together make an address safe that others reach; one alone doesn't, and the message says which there is."""
    both = TLS | {"token_file": "t"}
    assert Config(listen=("0.0.0.0:1",), **both).listen == ("0.0.0.0:1",)
    for guards, had in (
        ({}, "neither"),
        (TLS, "TLS"),
        ({"token_file": "t"}, "tokens"),
        (TLS | {"tls_client_ca": "a"}, "TLS"),
    ):
        with pytest.raises(ConfigError, match=rf"TLS and tokens are expected \(.*\), got {had}: "):
            Config(listen=("0.0.0.0:1",), **guards)


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ({"tls_cert": "c"}, "tls_key"),
        ({"tls_key": "k"}, "tls_cert"),
        ({"tls_client_ca": "a"}, "tls_cert"),
        ({"health_requires_token": True}, "token_file"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_goes_together_is_asked_for(given, missing):
    """A certificate without its key, and the like, is refused with what is missing."""
    with pytest.raises(ConfigError, match=f"^{missing}: expected a file, for {next(iter(given))} is given, got none$"):
        Config(**given)


@pytest.mark.parametrize(
    "address",
    [
        "",
        "127.0.0.1",
        ":50051",
        "127.0.0.1:",
        "127.0.0.1:x",
        "127.0.0.1:-1",
        "127.0.0.1:65536",
        "unix:",
        "unix:///",
        "/x",
    ],
)
@pytest.mark.parametrize("insecure", [False, True])
def test_what_is_no_address_is_refused(address, insecure):
    """An address without a host or a port, or a socket without a path, is refused with what was expected."""
    with pytest.raises(ConfigError, match=r"^listen: expected (host:port or )?unix:PATH, got "):
        Config(listen=(address,), insecure=insecure)


@pytest.mark.parametrize("address", ["127.0.0.1:0", "localhost:9464", "[::1]:9464"])
def test_metrics_have_an_address_of_this_machine(address):
    """The address of the metrics is host:port, without leave if it is of this machine alone."""
    assert Config(metrics=address).metrics == address


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("0.0.0.0:9464", "metrics: '0.0.0.0:9464' is public, .*--insecure"),
        ("9464", "metrics: expected host:port"),
        ("unix:/tmp/x", "metrics: expected host:port, got 'unix:/tmp/x'$"),
    ],
)
def test_other_addresses_of_metrics_are_refused(address, words):
    """A public one needs --insecure; HTTP is on no unix socket."""
    with pytest.raises(ConfigError, match=f"^{words}"):
        Config(metrics=address)


def test_a_server_listens_somewhere():
    """No address at all is refused."""
    with pytest.raises(ConfigError, match=r"^listen: expected at least one address, got none$"):
        Config(listen=())


def test_a_config_does_not_change():
    """A Config is frozen, and its addresses are a tuple however they were given."""
    config = Config(listen=["127.0.0.1:0"])
    assert config.listen == ("127.0.0.1:0",)
    with pytest.raises(FrozenInstanceError):
        config.threads = 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["--threads", "many"],
        ["--drain-seconds", "soon"],
        ["--nothing"],
        ["--threads"],
        ["listen"],
        ["--insecure", "yes"],
    ],
    ids=" ".join,
)
def test_a_flag_that_is_none_ends_the_command(arguments, capsys):
    """What no flag takes ends with status 2, and a line on stderr that names it."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert any(argument in said.err.splitlines()[-1] for argument in arguments)


@pytest.mark.parametrize("variable", ["POOLRPC_THREADS", "POOLRPC_DRAIN_SECONDS", "POOLRPC_INSECURE"])
def test_a_variable_that_is_none_ends_the_command(variable, monkeypatch, capsys):
    """A value of the environment that can't be read ends the command just so."""
    monkeypatch.setenv(variable, "perhaps")
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 2
    assert "perhaps" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--listen", "0.0.0.0:1"], "is public"),
        (["--threads", "-1"], "threads: expected at least 0 threads, got -1"),
        (["--log-level", "loud"], "log_level: expected one of"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_setting_is_one_line(arguments, words, capsys):
    """A setting that is wrong ends the command with status 2 and one line on stderr."""
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert said.err.startswith("poolrpc-server: ")
    assert words in said.err


def test_help_does_not_wait_for_torch():
    """--help and a wrong setting are answered without importing torch."""
    program = (
        "import sys; from poolrpc_server.cli import main\n"
        "assert main(['--threads', '-1']) == 2\n"
        "sys.exit('torch' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)  # noqa: S603 - ours
    assert ended.returncode == 0
