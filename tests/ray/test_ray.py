"""Our client with a local Ray cluster that serves deploy/ray/serve.yaml: two replicas behind Ray's gRPC proxy."""

from __future__ import annotations

import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

import poolrpc as p
from tests.parity.reference import assert_same, reference, values

if TYPE_CHECKING:
    from scripts.ray_cluster import RayCluster

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

LAYERS = [
    (p.MaxPool1d(3, stride=2), (2, 3, 33)),
    (p.MaxPool2d(3, stride=2, padding=1), (2, 3, 16, 17)),
    (p.MaxPool2d(2, return_indices=True), (2, 3, 16, 16)),
    (p.MaxPool3d(2), (1, 2, 4, 6, 8)),
    (p.AvgPool2d(2, ceil_mode=True), (2, 3, 9, 9)),
    (p.LPPool2d(2, 3), (2, 3, 12, 12)),
    (p.AdaptiveAvgPool2d((3, 5)), (2, 3, 13, 11)),
    (p.AdaptiveMaxPool2d(4), (2, 3, 13, 11)),
    (p.FractionalMaxPool2d(2, output_ratio=0.6, seed=7), (2, 3, 20, 20)),
]


def as_numpy(x: torch.Tensor) -> np.ndarray:
    """Return a tensor as a NumPy array, including bfloat16."""
    import ml_dtypes  # noqa: PLC0415 - of the client, optional

    return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if x.dtype is torch.bfloat16 else x.numpy()


@pytest.mark.parametrize("transport", ["unary", "stream"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16", "uint8"])
def test_results_equal_torchs(client: p.PoolClient, dtype: str, transport: str) -> None:
    """The results of every family equal torch.nn's bit for bit, including NaN and indices, by unary call and stream."""
    for i, (layer, shape) in enumerate(LAYERS):
        if dtype not in layer.dtypes:
            continue
        x = values(shape, dtype, seed=i)
        expected, indices = reference(layer, x)
        result = client.pool(as_numpy(x), layer, transport=transport)
        assert result.transport == transport
        assert_same(result.output, expected, layer)
        if indices is not None:
            assert_same(result.indices, indices, layer)


def test_a_large_tensor_is_streamed(client: p.PoolClient) -> None:
    """The client chooses a stream as it does with our own server, and the result of many blocks equals torch's."""
    x = torch.randn(8, 64, 128, 128)
    result = client.pool(x, p.MaxPool2d(2))
    assert result.transport == "stream"
    assert torch.equal(torch.from_numpy(result.output), torch.nn.functional.max_pool2d(x, 2))


def test_shapes_info_and_health(client: p.PoolClient) -> None:
    """InferShape, GetServerInfo and the standard health check work; a replica has one thread for its one CPU."""
    assert client.output_shape((8, 64, 56, 56), p.MaxPool2d(3, stride=2, padding=1)) == (8, 64, 28, 28)
    info = client.server_info()
    assert (info.version, info.device, info.threads) == (p.__version__, "cpu", 1)
    assert info.limits["max_inflight_bytes"].value == 2**30
    assert client.health() == client.health("poolrpc.v1.PoolService") == "SERVING"
    with pytest.raises(p.NotFoundError):
        client.health("nothing")


@pytest.mark.parametrize("transport", ["unary", "stream"])
def test_errors_are_the_servers(client: p.PoolClient, transport: str) -> None:
    """Class, message, reason and metadata of an error that only the server finds pass through Ray's proxy."""
    with pytest.raises(p.LimitExceededError, match=r"expected at most .* bytes of AdaptiveAvgPool2d's output") as wrong:
        client.pool(np.zeros((1, 1, 8, 8), np.float32), p.AdaptiveAvgPool2d(65535), transport=transport)
    assert wrong.value.reason == "OUTPUT_TOO_LARGE"
    assert int(wrong.value.metadata["actual"]) > int(wrong.value.metadata["limit"])


def test_an_error_in_the_middle_of_a_stream_has_its_details(client: p.PoolClient) -> None:
    """An error in a later block has its details too, after the results of earlier blocks."""
    x = torch.randn(64, 32, 32, 32)
    output, indices = torch.nn.functional.max_pool2d(x, 2, return_indices=True)
    indices[-1, -1, -1, -1] = 10**6
    with pytest.raises(p.InvalidArgumentError) as wrong:
        client.pool(output, p.MaxUnpool2d(2), indices=indices, transport="stream")
    assert wrong.value.violations[0].field


def test_metadata_reaches_the_replica(cluster: RayCluster) -> None:
    """The replica reads the priority of a call, and rejects an invalid one."""
    with (
        p.PoolClient(cluster.address, metadata=[("priority", "9")]) as client,
        pytest.raises(p.InvalidArgumentError, match=r"metadata\.priority"),
    ):
        client.pool(np.zeros((1, 1, 4, 4), np.float32), p.MaxPool2d(2))


@pytest.mark.parametrize(("name", "value"), [("listen", "127.0.0.1:1"), ("threads", -1), ("insecure", False)])
def test_settings_are_checked_before_deploying(ray_environment: dict[str, str], name: str, value: object) -> None:
    """A wrong setting, one that Ray itself controls, and a missing `insecure` are rejected before deployment."""
    program = f"from poolrpc_server.transports.ray import app; app({ {'insecure': True, name: value} })"
    done = subprocess.run(  # noqa: S603 - our own command
        ["python", "-c", program],  # noqa: S607 - found on the environment's PATH
        capture_output=True,
        text=True,
        check=False,
        env=ray_environment,
    )
    assert done.returncode == 1
    assert f"ConfigError: {name}: expected" in done.stderr


def test_a_deadline_ends_the_call(client: p.PoolClient) -> None:
    """A call whose deadline passes fails, and the replica serves other calls."""
    x = np.zeros((16, 64, 128, 128), np.float32)
    for transport in ("unary", "stream"):
        with pytest.raises(p.DeadlineExceededError):
            client.pool(x, p.AvgPool2d(31, stride=1), timeout=0.05, transport=transport)
    assert client.pool(x[:1, :1], p.MaxPool2d(2)).shape == (1, 1, 64, 64)


def test_a_killed_replica_causes_no_errors(cluster: RayCluster, client: p.PoolClient) -> None:
    """One of two replicas is killed with SIGKILL during calls and streams: all of them succeed, by retries."""
    x = torch.randn(4, 16, 64, 64)
    expected = torch.nn.functional.max_pool2d(x, 3).numpy()
    started, killed = threading.Barrier(7), threading.Event()
    replicas = cluster.replicas()
    assert len(replicas) == 2

    def calls(transport: str) -> int:
        client.pool(x, p.MaxPool2d(3), transport=transport)
        started.wait(60)
        after = count = 0
        while after < 30:  # calls after the kill
            after += killed.is_set()
            count += np.array_equal(client.pool(x, p.MaxPool2d(3), transport=transport).output, expected)
        return count

    with ThreadPoolExecutor(6) as threads:
        calls_in_flight = [threads.submit(calls, each) for each in ("unary",) * 4 + ("stream",) * 2]
        started.wait(60)
        replicas[0].kill()
        killed.set()
        assert all(each.result(120) >= 30 for each in calls_in_flight)
    assert not replicas[0].is_running()
