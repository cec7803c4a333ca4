"""The server's settings: flags, environment variables, defaults, ranges, and which addresses are safe."""

import json
import os
import re
import subprocess
import sys
from contextlib import suppress
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path

import numpy as np
import pytest

from poolrpc._shapes.limits import MAX_MESSAGE_BYTES, MAX_PAYLOAD_BYTES
from poolrpc_server.cli import main
from poolrpc_server.config import AUTOMATIC, Config, ConfigError
from poolrpc_server.config_sources import parse, parse_size, unknown_variables
from poolrpc_server.resources import cpu_count

NUMBERS = [each.name for each in fields(Config) if each.metadata["unit"]]
MINIMUM = (
    {"max_arena_bytes": -1, "max_page_locked_bytes": -1}
    | dict.fromkeys(
        [
            "threads",
            "call_threads",
            "max_message_bytes",
            "max_output_bytes",
            "max_inflight_bytes",
            "max_streams",
            "max_connections",
            "max_queue_seconds",
            "max_queue_delay",
            "max_connection_age_seconds",
            "max_connection_idle_seconds",
            "drain_seconds",
            "shutdown_grace",
            "watchdog_seconds",
        ],
        0,
    )
    | dict.fromkeys(["max_compute_seconds", "receive_timeout"], 0.001)
)
GIB, MIB = 2**30, 2**20
OWN = 320 * MIB
"""Memory of a process without calls."""


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    """Remove the settings in this process's environment, and make lines long enough for --help."""
    for name in [name for name in os.environ if name.startswith("POOLRPC_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "1000")


def flag(name):
    """Return the flag of a setting."""
    return f"--{name.replace('_', '-')}"


def test_without_flags_the_defaults_apply():
    """A command without flags has the defaults of Config, which are safe: a loopback address, and finite limits."""
    config = parse([])
    assert config == Config()
    assert config.listen == ("127.0.0.1:50051",)
    assert not config.insecure


def test_the_default_of_threads_is_the_number_of_cpus():
    """By default the server computes on as many threads as it may use CPUs."""
    assert Config().threads == cpu_count()
    assert Config(threads=3).threads == 3


@pytest.fixture
def resources(monkeypatch):
    """Return a function that sets the memory and the open files that the server may have."""

    def set_resources(memory, descriptors=2**20):
        monkeypatch.setattr("poolrpc_server.config.memory_bytes", lambda: memory)
        monkeypatch.setattr("poolrpc_server.config.max_descriptors", lambda: descriptors)

    return set_resources


BYTES = ("max_inflight_bytes", "max_arena_bytes", "max_message_bytes", "max_output_bytes")
COUNTS = ("call_threads", "max_streams", "max_connections")


@pytest.mark.parametrize(
    ("memory", "workers", "nbytes", "counts"),
    [
        # What is left, 192 MiB, is divided: half in flight, a quarter for arenas. A message of 16 MiB would be more
        # than the eighth of the bytes in flight, but at most a quarter of them.
        (512 * MIB, 1, (96 * MIB, 48 * MIB, 16 * MIB, 24 * MIB), (96, 2, 2048)),
        (GIB, 1, (352 * MIB, 176 * MIB, 45 * MIB, 88 * MIB), (256, 5, 4096)),
        (GIB, 2, (192 * MIB, 96 * MIB, 16 * MIB, 24 * MIB), (96, 2, 2048)),
        (4 * GIB, 1, (1888 * MIB, 944 * MIB, 237 * MIB, 472 * MIB), (256, 16, 4096)),
        (4 * GIB, 4, (1408 * MIB, 704 * MIB, 45 * MIB, 88 * MIB), (256, 5, 4096)),
        (64 * GIB, 1, (4 * GIB, 2 * GIB, 513 * MIB, MAX_PAYLOAD_BYTES), (256, 16, 4096)),
        (64 * GIB, 8, (4 * GIB, 2 * GIB, 65 * MIB, 128 * MIB), (256, 8, 4096)),
        # The least with which a server starts.
        (OWN + 64 * MIB, 1, (32 * MIB, 16 * MIB, 8 * MIB, 8 * MIB), (32, 2, 1536)),
        (2 * OWN + 64 * MIB, 2, (32 * MIB, 16 * MIB, 4 * MIB, 4 * MIB), (16, 2, 1408)),
    ],
)
def test_limits_follow_the_memory(resources, memory, workers, nbytes, counts):
    """What the processes themselves leave of the memory is divided; what each of them has decides the other limits."""
    resources(memory)
    config = Config(workers=workers)
    assert tuple(getattr(config, name) for name in BYTES) == nbytes
    assert tuple(getattr(config, name) for name in COUNTS) == counts


@pytest.mark.parametrize("workers", [1, 2, 16])
@pytest.mark.parametrize("more", [64 * MIB, 100 * MIB, 192 * MIB, GIB, 100 * GIB])
def test_limits_leave_the_memory_of_the_processes(resources, workers, more):
    """Bytes in flight and arenas together leave what the processes need, and some messages fit at a time."""
    memory = workers * OWN + more
    resources(memory)
    config = Config(workers=workers)
    assert workers * OWN + config.max_inflight_bytes + config.max_arena_bytes <= memory
    each = config.max_inflight_bytes // workers
    assert 4 * MIB <= config.max_message_bytes <= max(each // 4, 4 * MIB)
    assert config.max_message_bytes <= MAX_MESSAGE_BYTES
    assert config.max_output_bytes <= max(each // 4, 4 * MIB)


@pytest.mark.parametrize(
    ("workers", "memory", "words"),
    [
        (1, 384 * MIB - 1, "expected at least 384 MiB of memory for 1 process, got 383 MiB; "),
        (1, 0, "expected at least 384 MiB of memory for 1 process, got 0 MiB; "),
        (2, GIB // 2, "expected at least 704 MiB of memory for 2 processes, got 512 MiB; "),
    ],
)
def test_a_server_needs_some_memory(resources, workers, memory, words):
    """With too little memory the error says how much is needed, and how to start regardless."""
    resources(memory)
    with pytest.raises(ConfigError, match=f"^{words}--max-inflight-bytes and --max-arena-bytes set the limits reg"):
        Config(workers=workers)
    for incomplete in ({"max_inflight_bytes": MIB}, {"max_arena_bytes": 0}):
        with pytest.raises(ConfigError, match="of memory"):
            Config(workers=workers, **incomplete)
    config = Config(workers=workers, max_inflight_bytes=4 * MIB, max_arena_bytes=0)
    assert (config.max_inflight_bytes, config.max_arena_bytes) == (4 * MIB, 0)
    assert (config.call_threads, config.max_streams) == (16, 2)


def test_limits_follow_the_bytes_in_flight(resources):
    """An operator who sets the bytes in flight alone gets threads, streams and messages that go with them."""
    resources(GIB)
    config = Config(max_inflight_bytes=64 * MIB)
    assert (config.max_message_bytes, config.max_output_bytes) == (16 * MIB, 16 * MIB)
    assert (config.call_threads, config.max_streams) == (64, 2)
    config = Config(max_inflight_bytes=8 * GIB)
    assert (config.max_message_bytes, config.max_output_bytes) == (MAX_MESSAGE_BYTES, MAX_PAYLOAD_BYTES)
    assert (config.call_threads, config.max_streams) == (256, 16)


@pytest.mark.parametrize(
    ("memory", "descriptors", "connections"),
    [(64 * GIB, 256, 128), (64 * GIB, 2**31 - 1, 4096), (512 * MIB, 2**31 - 1, 2048), (64 * GIB, 4, 16)],
)
def test_connections_follow_the_open_files_and_the_memory(resources, memory, descriptors, connections):
    """Half of the open files are left for everything else."""
    resources(memory, descriptors)
    assert Config().max_connections == connections


def test_explicit_limits_are_kept(resources):
    """A limit that is set is not adapted to the memory."""
    resources(512 * MIB)
    given = dict(zip((*BYTES, *COUNTS), (8 * GIB, 0, MAX_MESSAGE_BYTES, MAX_PAYLOAD_BYTES, 1, 1, 1), strict=True))
    config = Config(**given)
    assert {name: getattr(config, name) for name in given} == given


MODELS = str(Path(__file__).with_name("presets.toml"))

# A value other than the default of every setting: as written on the command line, and as parsed.
OTHER_VALUES = {
    "listen": ("unix:/tmp/x.sock", ("unix:/tmp/x.sock",)),
    "tls_cert": ("cert.pem", "cert.pem"),
    "tls_key": ("key.pem", "key.pem"),
    "tls_client_ca": ("ca.pem", "ca.pem"),
    "token_file": ("tokens.txt", "tokens.txt"),
    "health_requires_token": ("true", True),
    "insecure": ("true", True),
    "disable_local_calls": ("true", True),
    "model": ("stem=MaxPool2d(3, stride=2)", ("stem=MaxPool2d(3, stride=2)",)),
    "models": (MODELS, MODELS),
    "allow_client_shm": ("true", True),
    "device": ("cuda:1", "cuda:1"),
    "workers": ("2", 2),
    "watchdog_seconds": ("0", 0.0),
    "threads": ("7", 7),
    "call_threads": ("9", 9),
    "max_compute_seconds": ("0.5", 0.5),
    "receive_timeout": ("0.25", 0.25),
    "max_connections": ("13", 13),
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
    "max_page_locked_bytes": ("7000", 7000),
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
    "insecure_metrics": ("true", True),
    "explorer": ("127.0.0.1:8080", "127.0.0.1:8080"),
    "probes": ("127.0.0.1:9465", "127.0.0.1:9465"),
    "drain_seconds": ("0.5", 0.5),
    "shutdown_grace": ("6", 6.0),
    "log_format": ("json", "json"),
    "log_level": ("debug", "debug"),
}


# The settings without which a setting is rejected.
REQUIRED = {
    "tls_cert": {"tls_key": "k"},
    "tls_key": {"tls_cert": "c"},
    "tls_client_ca": {"tls_cert": "c", "tls_key": "k"},
    "health_requires_token": {"token_file": "t"},
}


@pytest.mark.parametrize("name", [each.name for each in fields(Config)])
def test_a_setting_has_a_flag_and_a_variable(name, monkeypatch):
    """Every setting has a flag and a POOLRPC_ variable; the flag takes precedence."""
    text, value = OTHER_VALUES[name]
    required = REQUIRED.get(name, {})
    expected = Config(**{name: value, **required})
    assert getattr(expected, name) == value
    assert expected != Config()
    if name not in ("max_inflight_bytes", "max_arena_bytes", "workers"):  # others follow these
        assert expected == replace(Config(), **{name: value, **required})
    for other, path in required.items():
        monkeypatch.setenv(f"POOLRPC_{other.upper()}", path)
    arguments = [flag(name)] if isinstance(value, bool) else [flag(name), text]
    assert parse(arguments) == expected
    monkeypatch.setenv(f"POOLRPC_{name.upper()}", text)
    assert parse([]) == expected
    default = getattr(Config(), name)
    if not (isinstance(value, bool) or required or default == ()):
        text = default[0] if isinstance(default, tuple) else str(default)
        assert parse([flag(name), text]) == Config()


@pytest.mark.parametrize(
    ("text", "addresses"),
    [
        ("127.0.0.1:0", ("127.0.0.1:0",)),
        ("[127.0.0.1:0, unix:/tmp/a b.sock]", ("127.0.0.1:0", "unix:/tmp/a b.sock")),
        ("[[::1]:50051]", ("[::1]:50051",)),
        ("[::1]:50051", ("[::1]:50051",)),
    ],
)
def test_several_addresses_in_a_variable_are_in_brackets(monkeypatch, text, addresses):
    """POOLRPC_LISTEN contains one address, or several as [a, b]."""
    monkeypatch.setenv("POOLRPC_LISTEN", text)
    assert parse([]).listen == addresses


def test_listen_is_repeatable():
    """Each --listen adds an address; the default is not included."""
    assert parse(["--listen", "localhost:0", "--listen", "unix:x"]).listen == ("localhost:0", "unix:x")


@pytest.mark.parametrize("setting", fields(Config), ids=lambda setting: setting.name)
def test_help_has_every_default_and_unit(setting, capsys):
    """--help shows, for every setting, its help, its default with the unit, and its variable."""
    with pytest.raises(SystemExit) as exit_info:
        parse(["--help"])
    assert exit_info.value.code == 0
    default = ", ".join(setting.default) if isinstance(setting.default, tuple) else setting.default
    default = "none" if default == "" else default
    default = str(default).lower() if isinstance(default, bool) else default
    unit = " process" if setting.name == "workers" else f" {setting.metadata['unit']}".rstrip()
    variable = f"POOLRPC_{setting.name.upper()}"
    output = " ".join(capsys.readouterr().out.split())
    text = re.escape(f"{setting.metadata['help']} [default: {default}{unit}; {variable}]")
    assert re.search(rf"{flag(setting.name)}( [A-Z]+)? {text}", output)
    assert Config.unit(setting.name) == setting.metadata["unit"]
    assert setting.metadata["help"].endswith(".")


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_has_a_minimum(name):
    """A number below its minimum, or NaN, is rejected with the unit and the value."""
    minimum = MINIMUM.get(name, 1)
    value = getattr(Config(**{name: minimum}), name)
    assert value == (getattr(Config(), name) if name in AUTOMATIC else minimum)
    if isinstance(minimum, float):
        with pytest.raises(ConfigError, match=f"^{name}: expected at least {minimum} seconds, got 0$"):
            Config(**{name: 0})
        return
    with pytest.raises(
        ConfigError, match=f"^{name}: expected at least {minimum} {Config.unit(name, minimum)}, got {minimum - 1}$"
    ):
        Config(**{name: minimum - 1})
    with pytest.raises(ConfigError, match=f"^{name}: expected "):
        Config(**{name: float("nan")})


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_has_a_maximum(name):
    """A value that is too large is rejected when the server starts, not when it is first used."""
    for value in [float("inf"), 1e300] if isinstance(getattr(Config(), name), float) else [2**64]:
        with pytest.raises(ConfigError, match=f"^{name}: expected "):
            Config(**{name: value})


def test_the_maximum_of_message_bytes_is_grpcs():
    """GRPC's own limit is a C int: 2**31 - 1 bytes are accepted, one more is rejected."""
    assert Config(max_message_bytes=2**31 - 1).max_message_bytes == 2**31 - 1
    with pytest.raises(ConfigError, match=r"^max_message_bytes: expected at most 2147483647 bytes, got 2147483648$"):
        Config(max_message_bytes=2**31)


@pytest.mark.parametrize(("name", "value"), [("log_format", "xml"), ("log_level", "INFO"), ("log_level", "")])
def test_a_choice_is_one_of_its_names(name, value):
    """An unknown format or level is rejected with the known names."""
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
def test_a_local_address_is_safe(address):
    """A loopback address and a unix socket do not need --insecure."""
    assert Config(listen=(address,)).listen == (address,)


@pytest.mark.parametrize(
    "address", ["0.0.0.0:50051", "[::]:50051", "192.168.1.1:0", "10.0.0.1:1", "[2001:db8::1]:1", "example.com:50051"]
)
def test_a_public_address_needs_insecure(address):
    """An address that other machines can reach is rejected without --insecure, which the message names."""
    with pytest.raises(ConfigError, match=r"for a public address, got neither .*--insecure") as raised:
        Config(listen=("127.0.0.1:0", address))
    assert address in str(raised.value)
    assert "\n" not in str(raised.value)
    assert Config(listen=(address,), insecure=True).listen == (address,)
    assert parse(["--listen", address, "--insecure"]).insecure


TLS = {"tls_cert": "c", "tls_key": "k"}


def test_a_public_address_is_safe_with_tls_and_tokens():
    """A public address needs both; the message says which of them is set."""
    assert Config(listen=("0.0.0.0:1",), **TLS | {"token_file": "t"}).listen == ("0.0.0.0:1",)
    for settings, found in (
        ({}, "neither"),
        (TLS, "TLS"),
        ({"token_file": "t"}, "tokens"),
        (TLS | {"tls_client_ca": "a"}, "TLS"),
    ):
        with pytest.raises(ConfigError, match=rf"expected TLS and tokens \(.*\) for a public address, got {found} "):
            Config(listen=("0.0.0.0:1",), **settings)


@pytest.mark.parametrize(
    ("settings", "missing"),
    [
        ({"tls_cert": "c"}, "tls_key"),
        ({"tls_key": "k"}, "tls_cert"),
        ({"tls_client_ca": "a"}, "tls_cert"),
        ({"health_requires_token": True}, "token_file"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_setting_that_another_requires_is_named(settings, missing):
    """A certificate without its key, for example, is rejected with the name of the missing setting."""
    with pytest.raises(
        ConfigError, match=f"^{missing}: expected a file, because {next(iter(settings))} is set, got none$"
    ):
        Config(**settings)


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
def test_an_invalid_address_is_rejected(address, insecure):
    """An address without a host or a port, or a socket without a path, is rejected with what was expected."""
    with pytest.raises(ConfigError, match=r"^listen: expected (host:port or )?unix:PATH, got "):
        Config(listen=(address,), insecure=insecure)


@pytest.mark.parametrize("address", ["127.0.0.1:0", "localhost:9464", "[::1]:9464"])
def test_a_loopback_address_of_metrics_is_safe(address):
    """The address of the metrics is host:port; a loopback address does not need --insecure-metrics."""
    assert Config(metrics=address).metrics == address


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("0.0.0.0:9464", "metrics: expected a loopback address, .* got '0.0.0.0:9464'.*--insecure-metrics"),
        ("9464", "metrics: expected host:port"),
        ("unix:/tmp/x", "metrics: expected host:port, got 'unix:/tmp/x'$"),
    ],
)
def test_other_addresses_of_metrics_are_rejected(address, words):
    """A public address needs --insecure-metrics; metrics are not served on a unix socket."""
    with pytest.raises(ConfigError, match=f"^{words}"):
        Config(metrics=address, insecure=True)


@pytest.mark.parametrize("address", ["127.0.0.1:8080", "localhost:0", "[::1]:8080"])
def test_a_loopback_address_of_the_explorer_is_safe(address):
    """The explorer's address is host:port; on loopback it needs nothing else."""
    assert Config(explorer=address).explorer == address


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "explorer: expected TLS and tokens .*, got neither for '0.0.0.0:80'.*--insecure with tokens"),
        ({"insecure": True}, "explorer: expected TLS and tokens .*, got neither"),
        ({"tls_cert": "c", "tls_key": "k"}, "explorer: expected TLS and tokens .*, got TLS"),
        ({"tls_cert": "c", "tls_key": "k", "insecure": True}, "explorer: expected TLS and tokens .*, got TLS"),
        ({"token_file": "t"}, "explorer: expected TLS and tokens .*, got tokens"),
    ],
)
def test_a_public_explorer_needs_tokens(settings, words):
    """A public explorer needs tokens even with --insecure, which only stands for TLS."""
    with pytest.raises(ConfigError, match=words):
        Config(explorer="0.0.0.0:80", **settings)
    tokens = {"token_file": "t"}
    for protection in ({"tls_cert": "c", "tls_key": "k"}, {"insecure": True}):
        assert Config(explorer="0.0.0.0:80", **tokens, **protection).explorer == "0.0.0.0:80"


@pytest.mark.parametrize("address", ["8080", "unix:/tmp/x", "127.0.0.1:99999", ":80"])
def test_an_explorer_has_a_host_and_a_port(address):
    """The page is not served on a unix socket."""
    with pytest.raises(ConfigError, match=r"explorer: expected host:port, got"):
        Config(explorer=address)


def test_a_public_address_of_metrics_leaves_that_of_calls_protected():
    """--insecure-metrics allows a public address of the metrics, and none of the calls."""
    assert Config(metrics="0.0.0.0:9464", insecure_metrics=True).metrics == "0.0.0.0:9464"
    with pytest.raises(ConfigError, match=r"^listen: .* for a public address, got neither .*--insecure "):
        Config(listen=("0.0.0.0:1",), insecure_metrics=True)


def test_the_probes_may_have_a_public_address():
    """The address of the probes is host:port, which may be public: kubelet calls the pod's address."""
    assert Config(probes="0.0.0.0:9465").probes == "0.0.0.0:9465"
    with pytest.raises(ConfigError, match=r"^probes: expected host:port, got 'unix:/x'$"):
        Config(probes="unix:/x")


def test_a_server_needs_an_address():
    """An empty list of addresses is rejected."""
    with pytest.raises(ConfigError, match=r"^listen: expected at least one address, got none$"):
        Config(listen=())


def test_a_config_is_immutable():
    """A Config is frozen, and its addresses are a tuple even if they were given as a list."""
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
def test_an_invalid_argument_ends_the_command(arguments, capsys):
    """An argument that no flag accepts ends the command with status 2 and a line on stderr that names it."""
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert any(argument in captured.err.splitlines()[-1] for argument in arguments)


@pytest.mark.parametrize("variable", ["POOLRPC_THREADS", "POOLRPC_DRAIN_SECONDS", "POOLRPC_INSECURE"])
def test_an_invalid_variable_ends_the_command(variable, monkeypatch, capsys):
    """An environment variable with an invalid value ends the command with status 2 and names the value."""
    monkeypatch.setenv(variable, "perhaps")
    with pytest.raises(SystemExit) as exit_info:
        main([])
    assert exit_info.value.code == 2
    assert "perhaps" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--listen", "0.0.0.0:1"], "for a public address"),
        (["--threads", "-1"], "threads: expected at least 0 threads, got -1"),
        (["--log-level", "loud"], "log_level: expected one of"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_setting_is_one_line(arguments, words, capsys):
    """A wrong setting ends the command with status 2 and one line on stderr."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert captured.err.startswith("poolrpc-server: ")
    assert words in captured.err


def test_help_does_not_wait_for_torch():
    """A wrong setting is reported without importing torch."""
    program = (
        "import sys; from poolrpc_server.cli import main\n"
        "assert main(['--threads', '-1']) == 2\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)  # noqa: S603 - ours
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("65536", 65536),
        ("64MiB", 64 * MIB),
        ("64 MiB", 64 * MIB),
        ("64mib", 64 * MIB),
        ("64Mi", 64 * MIB),
        ("64M", 64 * MIB),
        ("512k", 512 * 2**10),
        ("1.5GiB", 3 * GIB // 2),
        ("1T", 2**40),
        ("64MB", 64_000_000),
        ("2kB", 2000),
    ],
)
def test_a_size_may_have_a_unit(text, nbytes, monkeypatch, tmp_path):
    """In a flag, a variable and a file: k, M, G and T and KiB to TiB are powers of 1024, kB to TB of 1000."""
    assert parse_size(text) == nbytes
    assert parse(["--max-inflight-bytes", text]).max_inflight_bytes == nbytes
    path = tmp_path / "poolrpc.toml"
    path.write_text(f'max-inflight-bytes = "{text}"\n')
    assert parse(["--config", str(path)]).max_inflight_bytes == nbytes
    monkeypatch.setenv("POOLRPC_MAX_INFLIGHT_BYTES", text)
    assert parse([]).max_inflight_bytes == nbytes


@pytest.mark.parametrize("name", [each.name for each in fields(Config) if each.metadata["unit"] == "bytes"])
def test_every_setting_in_bytes_takes_a_size(name):
    """Each flag in bytes takes a unit, and a plain number as before."""
    size = "8k" if name == "max_metadata_bytes" else "8MiB"
    assert getattr(parse([flag(name), size]), name) == parse_size(size)
    assert getattr(parse([flag(name), "9000"]), name) == 9000


def test_the_automatic_value_of_a_size_is_minus_one():
    """A size of -1, which means automatic, is a size."""
    assert parse(["--max-arena-bytes", "-1"]) == Config()


@pytest.mark.parametrize("text", ["", "x", "MiB", "1e9", "0x10", "64MiBs", "5b", "0.3k", "1.5", "1,5GiB", "nan", "-k"])
def test_an_invalid_size_is_rejected(text, capsys):
    """Text that is not a whole number of bytes ends the command, and the message shows the form and the text."""
    with pytest.raises(SystemExit):
        parse([f"--max-batch-bytes={text}"])
    expected = f"argument --max-batch-bytes: expected a size in bytes, such as 1048576, 64MiB or 1GiB, got {text!r}"
    assert capsys.readouterr().err.endswith(f"{expected}\n")


@pytest.fixture
def file(tmp_path):
    """Return a function that writes a configuration file, and returns the flag that names it."""

    def write(text):
        path = tmp_path / "poolrpc.toml"
        path.write_text(text, encoding="utf-8")
        return f"--config={path}"

    return write


def in_toml(value):
    """Return a setting's value in TOML."""
    return json.dumps(list(value) if isinstance(value, tuple) else value)


@pytest.mark.parametrize("name", [each.name for each in fields(Config)])
def test_a_setting_may_be_in_a_file(name, monkeypatch, file):
    """Every setting may be in the file that --config names, under its flag's name, with - or _."""
    _, value = OTHER_VALUES[name]
    expected = Config(**{name: value, **REQUIRED.get(name, {})})
    for key in (name, name.replace("_", "-")):
        lines = [f"{key} = {in_toml(value)}", *(f"{each} = '{path}'" for each, path in REQUIRED.get(name, {}).items())]
        given = file("\n".join(lines))
        assert parse([given]) == expected
        monkeypatch.setenv("POOLRPC_CONFIG", given.removeprefix("--config="))
        assert parse([]) == expected
        monkeypatch.delenv("POOLRPC_CONFIG")


def test_a_flag_precedes_a_variable_and_a_variable_the_file(monkeypatch, file):
    """Flag, variable, file, default: the first that is given counts, also for lists and for what is true or false."""
    given = file(
        'threads = 1\nmax_queue = 1\nmax_arenas = 1\nlisten = ["unix:/tmp/file"]\nmodel = ["a=MaxPool2d(2)"]\n'
        "insecure = true\nallow_client_shm = true\n"
    )
    monkeypatch.setenv("POOLRPC_THREADS", "2")
    monkeypatch.setenv("POOLRPC_MAX_QUEUE", "2")
    monkeypatch.setenv("POOLRPC_INSECURE", "false")
    monkeypatch.setenv("POOLRPC_MODEL", "[b=MaxPool2d(2), c=MaxPool2d(3)]")
    config = parse([given, "--threads", "3", "--listen", "unix:/tmp/flag"])
    assert (config.threads, config.max_queue, config.max_arenas) == (3, 2, 1)
    assert (config.listen, config.model) == (("unix:/tmp/flag",), ("b=MaxPool2d(2)", "c=MaxPool2d(3)"))
    assert (config.insecure, config.allow_client_shm, config.workers) == (False, True, 1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("max-quue = 3", "expected the name of a flag, got 'max-quue'; did you mean max-queue?"),
        ("MAX_QUEUE = 3", "expected the name of a flag, got 'MAX_QUEUE'"),
        ("config = 'x'", "expected the name of a flag, got 'config'"),
        ("nonsense = 3", "expected the name of a flag, got 'nonsense'"),
        ("[server]\nthreads = 3", "expected the name of a flag, got 'server'"),
        ("max-queue = 3\nmax_queue = 4", "max_queue: expected each setting once, got it with - and with _"),
        ("threads = true", "threads: expected a number, got True"),
        ("threads = [1]", "threads: expected a number, got [1]"),
        ("drain_seconds = 12:00:00", "drain_seconds: expected a number, got datetime.time(12, 0)"),
        ("insecure = 1", "insecure: expected true or false, got 1"),
        ("insecure = 'true'", "insecure: expected true or false, got 'true'"),
        ("device = 3", "device: expected a string, got 3"),
        ("listen = 50051", "listen: expected a string, got 50051"),
        ("listen = [50051]", "listen: expected a list of strings, got [50051]"),
        ("threads", "expected TOML, got "),
    ],
)
def test_a_wrong_setting_in_a_file_is_one_line(text, words, file, capsys):
    """What a file may not contain ends the command with status 2 and a line with the file, the key and the value."""
    given = file(text)
    assert main([given]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert given.removeprefix("--config=") in error
    assert words in error


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("threads = 'many'", "argument --threads: invalid int value: 'many' (from the configuration file)"),
        ("threads = 1.5", "argument --threads: invalid int value: '1.5'"),
        ("max_batch_bytes = '1x'", "argument --max-batch-bytes: expected a size"),
        ("threads = -1", "threads: expected at least 0 threads, got -1"),
        ("drain_seconds = nan", "drain_seconds: expected at least 0 seconds, got nan"),
        ("listen = '0.0.0.0:1'", "listen: expected TLS and tokens"),
    ],
)
def test_a_setting_in_a_file_is_checked_as_a_flag(text, words, file, capsys):
    """The type, the range and the safety of a setting are the same wherever it is given."""
    with suppress(SystemExit):
        assert main([file(text)]) == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "argument --threads: invalid int value: 'x' (from POOLRPC_THREADS)"),
        (["--threads", "y"], "argument --threads: invalid int value: 'y'"),
        (["--threads=y"], "argument --threads: invalid int value: 'y'"),
    ],
)
def test_an_error_names_the_variable_that_a_value_is_from(arguments, words, monkeypatch, capsys):
    """An operator who set a variable finds it in the error; a flag that replaces it is named alone."""
    monkeypatch.setenv("POOLRPC_THREADS", "x")
    with pytest.raises(SystemExit):
        main(arguments)
    assert capsys.readouterr().err.splitlines()[-1].endswith(words)


@pytest.mark.parametrize("name", ["none.toml", "."])
def test_a_file_that_cannot_be_read_ends_the_command(name, tmp_path, capsys):
    """A file that does not exist, or a folder, ends the command with status 2 and its name."""
    with pytest.raises(SystemExit) as exit_info:
        main(["--config", str(tmp_path / name)])
    assert exit_info.value.code == 2
    assert str(tmp_path / name) in capsys.readouterr().err.splitlines()[-1]


def test_unknown_variables():
    """A POOLRPC_ variable that is not a setting is found, with the closest setting; those of others are not."""
    environment = {
        "POOLRPC_TREADS": "1",
        "POOLRPC_MAX_QUEUE_BYTES": "1",
        "POOLRPC_PORT": "50051",
        "POOLRPC_XYZ": "",
        "POOLRPC_THREADS": "1",
        "POOLRPC_CONFIG": "poolrpc.toml",
        "THREADS": "1",
        **dict.fromkeys(["POOLRPC_TOKEN", "POOLRPC_CA", "POOLRPC_CLIENT_CERT", "POOLRPC_ADDRESS"], "x"),
    }
    unknown = unknown_variables(environment)
    assert list(unknown) == ["POOLRPC_TREADS", "POOLRPC_MAX_QUEUE_BYTES", "POOLRPC_PORT", "POOLRPC_XYZ"]
    assert unknown["POOLRPC_TREADS"] == "POOLRPC_THREADS"
    assert unknown["POOLRPC_XYZ"] == ""


def test_variables_of_kubernetes_are_known():
    """The variables that every container has for a Kubernetes service named poolrpc are no mistakes."""
    address = "tcp://10.0.0.1:50051"
    names = ("SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_GRPC", "PORT", "PORT_50051_TCP", "PORT_50051_TCP_ADDR")
    names += ("METRICS_SERVICE_HOST",)
    assert unknown_variables({f"POOLRPC_{name}": address for name in names}) == {}


@pytest.mark.parametrize("value", ["2", b"2", 2.5, None, True, [2], np.ones(2)], ids=repr)
def test_a_number_of_another_type_is_rejected_by_name(value):
    """From Python, as in embedded(threads=...), a setting may be of any type."""
    with pytest.raises(ConfigError, match=r"^threads: expected an integer, got "):
        Config(threads=value)


@pytest.mark.parametrize("value", ["2", b"2", None, True, [2.0]], ids=repr)
def test_seconds_of_another_type_are_rejected_by_name(value):
    """A time is any number."""
    with pytest.raises(ConfigError, match=r"^shutdown_grace: expected a number, got "):
        Config(shutdown_grace=value)


def test_numpys_numbers_are_converted():
    """A setting is Python's int or float."""
    config = Config(threads=np.int64(2), shutdown_grace=np.float32(2))
    assert (type(config.threads), type(config.shutdown_grace)) == (int, float)
