"""The services of the compose file: health, limits, a clean stop, and memory shared between two containers."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
import torch
import trustme

import poolrpc
from poolrpc_server.process import FAILED
from tests.docker.conftest import BASE_IMAGE, run, succeeds

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SLOW = poolrpc.AvgPool2d(31, stride=1)  # takes seconds for the shape below on any machine, because of its large kernel
SLOW_SHAPE = (1, 2, 1200, 1200)


@pytest.mark.parametrize("profile", ["", "gpu", "cluster", "observe", "client"])
def test_each_profile_is_valid(project: Callable[..., Any], profile: str) -> None:
    """Compose accepts the file with each profile."""
    with project("config", COMPOSE_PROFILES=profile) as running:
        running.compose("config", "-q")


def test_settings_are_passed_on(project: Callable[..., Any]) -> None:
    """Variables of the host reach the build and the server; those that are not set are left to the image's defaults."""
    arguments = {"PIP_EXTRA_INDEX_URL": "https://packages.example/simple", "VERSION": "1.2.3", "TORCH_CPU_INDEX": "x"}
    variables = {"POOLRPC_LOG_LEVEL": "debug", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector.example:4317"}
    with project("settings", COMPOSE_PROFILES="", POOLRPC_PULL_POLICY="", **arguments, **variables) as running:
        server = json.loads(running.compose("config", "--format", "json"))["services"]["server"]
    assert server["build"]["args"].items() >= arguments.items()
    assert server["environment"].items() >= variables.items()
    assert "REVISION" not in server["build"]["args"]
    assert server["environment"]["OTEL_TRACES_SAMPLER"] is None
    assert server["pull_policy"] == "build"


def test_up_builds_the_image(project: Callable[..., Any], server_image: str) -> None:
    """`up` builds with the host's settings, here from wheelhouse/ alone, and does not look for the image elsewhere."""
    assert server_image
    if not succeeds("docker", "buildx", "version"):
        pytest.skip("Compose builds with BuildKit only if Docker has the plugin buildx")
    settings = {"PIP_NO_INDEX": "1", "BASE_IMAGE": BASE_IMAGE, "VERSION": "test-up", "POOLRPC_IMAGE": "poolrpc:test-up"}
    with project("build", POOLRPC_PULL_POLICY="", POOLRPC_MEMORY="1g", POOLRPC_CPUS="1", **settings) as running:
        running.compose("up", "-d", "--wait", "server")
        (container,) = running.containers("server")
        assert container["Config"]["Labels"]["org.opencontainers.image.version"] == "test-up"
    run("docker", "image", "rm", "poolrpc:test-up")


def test_logs_are_rotated(project: Callable[..., Any], server_image: str) -> None:
    """Docker keeps at most 200 MB of a container's log."""
    assert server_image
    with project("logging") as running:
        running.compose("create", "--no-build", "server")
        (container,) = running.containers("server")
    assert container["HostConfig"]["LogConfig"] == {
        "Type": "json-file",
        "Config": {"max-file": "4", "max-size": "50m"},
    }


@pytest.fixture
def secrets(tmp_path: Path) -> Path:
    """A folder with a certificate for this machine, its authority and the token "token", for the overlay of TLS."""
    folder = tmp_path / "secrets"
    folder.mkdir()
    authority = trustme.CA()
    pair = authority.issue_cert("localhost", "127.0.0.1")
    authority.cert_pem.write_to_path(folder / "ca.crt")
    pair.private_key_pem.write_to_path(folder / "tls.key")
    pair.cert_chain_pems[0].write_to_path(folder / "tls.crt")
    (folder / "tokens").write_text(f"alice {hashlib.sha256(b'token').hexdigest()}\n")
    for each in folder.iterdir():
        each.chmod(0o644)  # the container's user is another one
    folder.chmod(0o755)
    return folder


TLS = ("docker-compose.yml", "deploy/compose/tls.yml")


def test_a_server_with_tls_and_tokens_is_healthy(project: Callable[..., Any], server_image: str, secrets: Path) -> None:
    """With the overlay, `up --wait` succeeds, calls need TLS and a token, and health checks leave the log JSON."""
    assert server_image
    files = {"COMPOSE_FILE": os.pathsep.join(TLS), "POOLRPC_SECRETS": str(secrets)}
    credentials = grpc.ssl_channel_credentials((secrets / "ca.crt").read_bytes())
    with project("tls", POOLRPC_MEMORY="1g", POOLRPC_CPUS="1", **files) as running:
        running.up("server")
        (container,) = running.containers("server")
        address = running.address("server")
        assert address.startswith("127.0.0.1:")
        with poolrpc.PoolClient(address, credentials=credentials, token="token") as client:  # noqa: S106 - the test's
            assert client.pool(np.ones((1, 1, 2, 2), np.float32), poolrpc.MaxPool2d(2)).output == 1
        with (
            poolrpc.PoolClient(address, credentials=credentials) as client,
            pytest.raises(poolrpc.UnauthenticatedError),
        ):
            client.pool(np.ones((1, 1, 2, 2), np.float32), poolrpc.MaxPool2d(2))
        last = container["State"]["Health"]["Log"][-1]  # those before it may have come before the server was ready
        assert (last["ExitCode"], last["Output"]) == (0, "")
        lines = running.compose("logs", "--no-log-prefix", "--no-color", "server").splitlines()
        assert lines
        assert [line for line in lines if not line.startswith("{")] == []
        with poolrpc.PoolClient(address) as client, pytest.raises(poolrpc.PoolError):
            client.server_info()


def first_exit_status(container: str, began: float) -> str:
    """Return the exit status with which a container has ended, or ends, for the first time since a time.

    Not that of `docker wait`, which is 0 if the container has started again before the engine reads it.
    """
    filters = ("--filter", f"container={container}", "--filter", "event=die")
    command = ["docker", "events", "--since", str(began), *filters, "--format", "{{.Actor.Attributes.exitCode}}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as events:  # noqa: S603 - ours
        assert events.stdout is not None
        try:
            return events.stdout.readline().strip()
        finally:
            events.terminate()


def test_a_server_that_hangs_is_restarted(
    project: Callable[..., Any], server_image: str, secrets: Path, tmp_path: Path
) -> None:
    """The thread that serves waits for a file that is never written: the server ends itself, and serves again."""
    assert server_image
    override = tmp_path / "watchdog.yml"
    override.write_text("services: {server: {environment: {POOLRPC_WATCHDOG_SECONDS: 15}}}")
    files = {"COMPOSE_FILE": os.pathsep.join([*TLS, str(override)]), "POOLRPC_SECRETS": str(secrets)}
    credentials = grpc.ssl_channel_credentials((secrets / "ca.crt").read_bytes())
    tokens = secrets / "tokens"
    good = tokens.read_text()
    with project("hang", POOLRPC_MEMORY="1g", POOLRPC_CPUS="1", **files) as running:
        running.up("server")
        container = running.containers("server")[0]["Id"]
        with poolrpc.PoolClient(running.address("server"), credentials=credentials, token="token") as client:  # noqa: S106 - the test's

            def call() -> None:
                with suppress(poolrpc.PoolError):
                    client.server_info(timeout=30)

            client.server_info()
            began = time.time()
            tokens.unlink()
            os.mkfifo(tokens)
            caller = threading.Thread(target=call)
            caller.start()
            # Opened when the server has opened it to read. It waits for what is never written, while the next server,
            # however soon it starts, finds a file.
            with tokens.open("w"):
                (secrets / "new").write_text(good)
                (secrets / "new").rename(tokens)
                assert first_exit_status(container, began) == str(FAILED)
            caller.join(60)
        running.up("server")
        # Docker has chosen another port.
        with poolrpc.PoolClient(running.address("server"), credentials=credentials, token="token") as client:  # noqa: S106 - the test's
            assert client.server_info()
        (after,) = running.containers("server")
        assert (after["Id"], after["RestartCount"]) == (container, 1)


def test_a_client_on_the_host_pools(project: Callable[..., Any], server_image: str) -> None:
    """`up --wait` returns when the server is healthy; a client on the host gets torch's result; the limits are set."""
    assert server_image
    x = np.random.default_rng(0).standard_normal((2, 8, 64, 64), np.float32)
    with project("outside", POOLRPC_MEMORY="1g", POOLRPC_CPUS="1") as running:
        running.up("server")
        with poolrpc.PoolClient(running.address("server")) as client:
            output = client.pool(x, poolrpc.MaxPool2d(3, stride=2)).output
            info = client.server_info()
        assert np.array_equal(output, torch.nn.functional.max_pool2d(torch.from_numpy(x), 3, 2).numpy())
        assert info.threads == 1
        assert info.limits["max_inflight_bytes"].value < 2**30
        assert running.address("server").startswith("127.0.0.1:")
        container = running.containers("server")[0]
        assert container["State"]["Health"]["Status"] == "healthy"
        host = container["HostConfig"]
        assert (host["ReadonlyRootfs"], host["CapDrop"], host["Init"]) == (True, ["ALL"], True)
        assert host["SecurityOpt"] == ["no-new-privileges:true"]
        assert (host["Memory"], host["NanoCpus"], host["PidsLimit"]) == (2**30, 10**9, 1024)


def test_sigterm_finishes_a_call_in_flight(project: Callable[..., Any], server_image: str) -> None:
    """If the container is stopped, a call that takes longer than the drain still gets its result; the status is 0."""
    assert server_image
    shapes: list[Any] = []
    calling = threading.Event()
    with project("sigterm", POOLRPC_CPUS="1") as running:
        running.up("server")
        # Without retries, so that the result is that of the call in flight, and not of a second one.
        with poolrpc.PoolClient(running.address("server"), options={"grpc.enable_retries": 0}) as client:
            client.health()

            def call() -> None:
                calling.set()
                shapes.append(client.pool(np.ones(SLOW_SHAPE), SLOW, transport="unary").output.shape)

            caller = threading.Thread(target=call)
            caller.start()
            assert calling.wait(60)
            running.compose("stop", "server")  # SIGTERM; the call arrives within --drain-seconds, and ends afterwards
            caller.join(60)
        assert shapes == [SLOW.output_shape(SLOW_SHAPE)]
        state = running.containers("server")[0]["State"]
        assert (state["ExitCode"], state["OOMKilled"]) == (0, False)
        log = running.log("server")
        stopping = next(index for index, line in enumerate(log) if line["event"] == "stopping")
        assert any(line.get("method", "").endswith("/Pool") and line["status"] == "OK" for line in log[stopping:])
        assert log[-1]["event"] == "stopped"


def test_a_hostile_request_is_rejected_and_nothing_is_killed(project: Callable[..., Any], server_image: str) -> None:
    """Messages, outputs and work over the container's limits are RESOURCE_EXHAUSTED; the server keeps running."""
    assert server_image
    x = np.ones((1, 100, 1000, 1000), np.float32)  # 400 MB, and as many for the output
    with project("hostile", POOLRPC_MEMORY="1g", POOLRPC_CPUS="1") as running:
        running.up("server")
        before = running.containers("server")[0]["State"]
        with poolrpc.PoolClient(running.address("server")) as client:
            for hostile, layer, transport in (
                (x, poolrpc.MaxPool2d(1), "unary"),
                (x[:, :1], poolrpc.AdaptiveAvgPool2d(30_000), "unary"),
                (x[:, :1], poolrpc.AvgPool2d(255, stride=1), "unary"),
                (x[:, :1], poolrpc.AdaptiveAvgPool2d(30_000), "stream"),
            ):
                with pytest.raises(poolrpc.LimitExceededError):
                    client.pool(hostile, layer, transport=transport)
            assert client.pool(x, poolrpc.MaxPool2d(10)).output.shape == (1, 100, 100, 100)  # as a stream, in blocks
            assert client.health() == "SERVING"
        after = running.containers("server")[0]
        assert (after["State"]["OOMKilled"], after["RestartCount"]) == (False, 0)
        assert after["State"]["StartedAt"] == before["StartedAt"]


def test_the_arena_works_across_containers(project: Callable[..., Any], server_image: str, client_image: str) -> None:
    """A client in a container without a network pools in shared memory, through the volume of sockets."""
    assert server_image
    assert client_image
    with project("arena") as running:
        running.up("server")
        assert running.compose("run", "--rm", "demo").split() == ["local", "(1,", "64,", "112,", "112)", "802816.0"]
        assert not any(each["HostConfig"]["IpcMode"] == "host" for each in running.containers("server"))
