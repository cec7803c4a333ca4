"""CUDA: parity, pinned memory, streams, running out of memory, and the loss of the device."""

from __future__ import annotations

import subprocess
import sys
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

import poolrpc as p
from poolrpc._wire.codec import Request
from poolrpc.tensors import TensorSpec
from poolrpc_server.app import FAILED
from poolrpc_server.calls.validate import Limits, check_request
from poolrpc_server.compute.device import DeviceStreams, synchronize
from poolrpc_server.compute.engine import Engine, Run
from tests.parity.grid import GRID, cases
from tests.parity.reference import assert_same, reference, values

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

WIDE = Limits(2**40, 2**40, 2**40, 2**50)
MAX_CASES = 200
"""The most cases of each layer."""


@pytest.fixture(scope="module")
def cuda() -> torch.device:
    """The current CUDA device."""
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(scope="module")
def engine(cuda: torch.device) -> Iterator[Engine]:
    """An engine on the CUDA device."""
    made = Engine(str(cuda), 2)
    yield made
    made.close()


def a_run(engine: Engine, layer: p.Layer, x: torch.Tensor, indices: torch.Tensor | None = None) -> Run:
    """Return a run of one layer, whose result is its outputs."""
    dtype = str(x.dtype).removeprefix("torch.")
    second = None if indices is None else TensorSpec("int64", tuple(indices.shape))
    request = Request(TensorSpec(dtype, tuple(x.shape)), ((layer,),), second)
    checked = check_request(request, WIDE, engine.schedule)
    parts = [x] if indices is None else [x, indices]
    payload = b"".join(each.contiguous().view(torch.uint8).numpy().tobytes() for each in parts)

    def finish(outputs: Sequence[memoryview]) -> list[torch.Tensor]:
        return [
            torch.frombuffer(bytearray(data), dtype=getattr(torch, spec.dtype)).reshape(spec.shape)
            for data, spec in zip(outputs, checked.outputs, strict=True)
        ]

    return engine.run(checked.schedule, payload, finish)


def assert_parity(engine: Engine, layer: p.Layer, x: torch.Tensor, indices: torch.Tensor | None = None) -> None:
    """Compute a request alone and in a batch of two, and compare it with torch's result on the same device."""
    # CUDA has no max of integers: these are computed on the CPU.
    device = "cuda" if x.is_floating_point() else "cpu"
    on_device = [None if each is None else each.to(device) for each in (x, indices)]
    expected = [each.cpu() for each in reference(layer, *on_device) if each is not None]
    run = a_run(engine, layer, x, indices)
    groups = [[run]] if run.key is None else [[run], [run, a_run(engine, layer, x, indices)]]
    for runs in groups:
        for outputs in engine.execute(runs):
            for got, other in zip(outputs, expected, strict=True):
                assert_same(got, other, (layer, x.shape, x.dtype, len(runs)))


@pytest.mark.parametrize("name", [name for name in GRID if "Unpool" not in name])
def test_parity_on_cuda(engine: Engine, name: str) -> None:
    """Every layer has torch's result on CUDA, bit for bit, alone and in a batch."""
    every = list(cases(name))
    step = max(1, len(every) // MAX_CASES) | 1
    for turn, (layer, shape, dtype) in enumerate(islice(every, 0, None, step)):
        assert_parity(engine, layer, values(shape, dtype, turn))


@pytest.mark.parametrize("name", [name for name in GRID if "Unpool" in name])
def test_unpool_parity_on_cuda(engine: Engine, name: str) -> None:
    """Unpooling the result of a MaxPool is torch's on CUDA too."""
    for turn, (layer, shape, dtype) in enumerate(cases(name)):
        full = values(layer.output_shape(shape), dtype, turn)
        pool = getattr(torch.nn, f"MaxPool{layer.spatial_dims}d")
        x, indices = pool(layer.kernel_size, layer.stride, layer.padding, return_indices=True)(full)
        sized = type(layer)(layer.kernel_size, layer.stride, layer.padding, tuple(full.shape[-layer.spatial_dims :]))
        assert_parity(engine, sized, x, indices)


def test_host_memory_is_pinned_and_reused(cuda: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first execution of a size no memory is allocated, and all that was is pinned."""
    made: list[memoryview] = []
    allocate = DeviceStreams.allocate

    def recorded(self: DeviceStreams, size: int) -> memoryview:
        made.append(allocate(self, size))
        return made[-1]

    monkeypatch.setattr(DeviceStreams, "allocate", recorded)
    engine = Engine(str(cuda), 1)
    x = values((4, 16, 64, 64), "float32", 0)
    engine.execute([a_run(engine, p.MaxPool2d(2), x)])
    first = len(made)
    assert first > 0
    for _ in range(10):
        engine.execute([a_run(engine, p.MaxPool2d(2), x)])
    assert len(made) == first
    assert all(torch.frombuffer(each, dtype=torch.uint8).is_pinned() for each in made)
    engine.close()


def test_copies_overlap_with_the_kernel_of_another_stream(cuda: torch.device) -> None:
    """Copies and a kernel of one stream end while a kernel of another stream still runs."""
    streams = DeviceStreams(cuda, 2)
    busy, done = torch.cuda.Event(), torch.cuda.Event()
    memory = torch.frombuffer(streams.allocate(2**20), dtype=torch.uint8)
    memory.fill_(1)
    memory.to(cuda).sum().item()  # so that CUDA is initialised
    with streams.stream():
        # A kernel that waits for billions of cycles: many times as long as the copies take.
        torch.cuda._sleep(10**10)  # noqa: SLF001 - torch's own tests use it
        busy.record()
        with streams.stream():
            total = memory.to(cuda, non_blocking=True).sum()
            back = torch.frombuffer(streams.allocate(8), dtype=torch.int64)
            back.copy_(total.reshape(1), non_blocking=True)
            done.record()
            synchronize(cuda)
            assert done.query()
            assert not busy.query()
            assert back.item() == 2**20
        synchronize(cuda)
    assert busy.query()


def test_out_of_memory_is_a_limit_and_the_engine_still_works(engine: Engine, cuda: torch.device) -> None:
    """A request that exceeds the device's memory fails permanently, and the next one that fits is computed."""
    total = torch.cuda.get_device_properties(cuda).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(cuda) + 2**26) / total, cuda)
    try:
        with pytest.raises(p.LimitExceededError) as raised:
            engine.execute([a_run(engine, p.MaxPool2d(2), torch.zeros(1, 32, 1024, 1024))])
        assert raised.value.reason == "DEVICE_MEMORY"
        assert_parity(engine, p.MaxPool2d(2), values((1, 3, 16, 16), "float32", 0))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, cuda)


def test_a_lost_device_ends_the_process(tmp_path: Path) -> None:
    """A permanent CUDA error is UNAVAILABLE to its caller, and ends the server with the exit status for a restart."""
    address = f"unix:{tmp_path / 'pool.sock'}"
    program = (
        "import torch\n"
        "from poolrpc_server import Config, serve\n"
        "from poolrpc_server.compute.kernels import eager\n"
        "bad = lambda *_: lambda *_: torch.zeros(4, device='cuda')[torch.tensor([9], device='cuda')].cpu()\n"
        "eager.FAMILIES['max_pool'] = bad\n"
        f"serve(Config(listen=({address!r},), device='cuda', max_arena_bytes=0))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)  # noqa: S603 - ours
    with p.PoolClient(address, options={"grpc.enable_retries": 0}) as client:
        while True:
            try:
                client.health()
                break
            except p.UnavailableError:
                assert process.poll() is None
        with pytest.raises(p.UnavailableError) as raised:
            client.pool(np.ones((1, 1, 4, 4), np.float32), p.MaxPool2d(2))
    assert raised.value.reason == "DEVICE_FAILED"
    _, log = process.communicate(timeout=60)
    assert process.returncode == FAILED, log
