"""A server on a device of its own memory: a late device, behind the interface of a GPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from poolrpc import AvgPool2d, MaxPool2d, PoolClient
from poolrpc_server.telemetry.stage_times import DEVICE_STAGES
from scripts.server_process import serving
from tests.integration.injection import injected
from tests.integration.test_traces import collecting, sending, times
from tests.scrape import Scrape

ROOT = Path(__file__).parents[2]
LATE = f"""
    sys.path.insert(0, {str(ROOT)!r})
    from poolrpc_server.compute import engine
    from tests.late_device import LateBackend

    engine.backend_of = lambda _: LateBackend(2**30, lockable=LOCKABLE)
"""
X = np.random.default_rng(3).standard_normal((8, 64, 56, 56), np.float32)
MAX = torch.nn.functional.max_pool2d(torch.from_numpy(X), 2).numpy()


def test_the_stages_on_a_device_are_logged_counted_and_traced(tmp_path: Path) -> None:
    """Upload, kernel and download are in the log line, the metrics, and spans below that of the computation."""
    program = LATE.replace("LOCKABLE", "True")
    with (
        collecting() as collector,
        serving("--metrics", "127.0.0.1:0", env=injected(tmp_path, program) | sending(collector.endpoint)) as server,
        PoolClient(server.address) as client,
    ):
        assert np.array_equal(client.pool(X, MaxPool2d(2), transport="unary").output, MAX)
        (line,) = server.wait_for("call")
        names = [f"{stage}_ms" for stage in DEVICE_STAGES]
        assert list(line)[list(line).index("compute_ms") + 1 :][:3] == names
        assert all(line[name] > 0 for name in names)
        shown = Scrape(server.start_line["metrics"])
        for stage, name in zip(DEVICE_STAGES, names, strict=True):
            assert shown("poolrpc_device_seconds_count", stage=stage) == 1
            assert shown("poolrpc_device_seconds_sum", stage=stage) == pytest.approx(line[name] / 1000, abs=1e-6)
        assert shown("poolrpc_device_memory_limit_bytes") == 2**30
        assert shown("poolrpc_device_blocks") == 0
        assert shown("poolrpc_pinned_bytes") >= MAX.nbytes
        (call,) = collector.wait_for(1)
        (compute,) = (each for each in collector.below(call) if each.span.name == "compute")
        stages = collector.below(compute)
        assert [each.span.name for each in stages] == list(DEVICE_STAGES)
        for span, name in zip(stages, names, strict=True):
            assert span.attributes["poolrpc.busy_seconds"] == pytest.approx(line[name] / 1000, abs=1e-6)
            assert times(compute)[0] <= times(span)[0] < times(span)[1] <= times(compute)[1]


@pytest.mark.parametrize("lockable", [True, False])
def test_arenas_on_a_device(tmp_path: Path, *, lockable: bool) -> None:
    """An arena is page-locked while it lasts; if that fails, the failure is counted and its calls work as well."""
    path = f"unix:{tmp_path / 'pool.sock'}"
    program = LATE.replace("LOCKABLE", str(lockable))
    with serving("--metrics", "127.0.0.1:0", listen=path, env=injected(tmp_path, program)) as server:
        address = server.start_line["metrics"]
        with PoolClient(path) as client:
            for _ in range(3):
                result = client.pool(X, MaxPool2d(2), transport="arena")
                assert np.array_equal(result.output, MAX)
                assert result.transport == "arena"
            shown = Scrape(address)
            assert (shown("poolrpc_page_locked_bytes") >= X.nbytes) == lockable
            assert (shown("poolrpc_page_lock_failures") > 0) == (not lockable)
        del result
        while Scrape(address)("poolrpc_page_locked_bytes"):
            pass


def test_streams_and_batches_on_a_device(tmp_path: Path) -> None:
    """Streams, coalesced small tensors and chains have the values of the CPU."""
    program = LATE.replace("LOCKABLE", "True")
    expected = torch.nn.functional.avg_pool2d(torch.from_numpy(MAX), 2).numpy()
    with serving(env=injected(tmp_path, program)) as server, PoolClient(server.address) as client:
        chain = [MaxPool2d(2), AvgPool2d(2)]
        assert np.array_equal(client.pool(X, chain, transport="stream").output, expected)
        small = list(X[:, :8, :8, :8])
        for x, result in zip(small, client.map(small, MaxPool2d(2)), strict=True):
            assert np.array_equal(result.output, torch.nn.functional.max_pool2d(torch.from_numpy(x), 2).numpy())
