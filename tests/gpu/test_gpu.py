"""CUDA: parity, pinned memory, streams, running out of memory, and the loss of the device."""

from __future__ import annotations

import mmap
import subprocess
import sys
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

import poolrpc as p
from poolrpc_server import Config
from poolrpc_server.app import FAILED, Server
from poolrpc_server.compute import overlap
from poolrpc_server.compute.device import PageLocks, backend_of
from poolrpc_server.compute.engine import Engine
from poolrpc_server.telemetry.stage_times import DEVICE_STAGES, StageTimes
from tests.engine_run import run_of
from tests.parity.grid import GRID, cases
from tests.parity.reference import assert_same, reference, values
from tests.scrape import Scrape

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BLOCKED = (
    p.MaxPool2d(3, 2, 1),
    p.MaxPool2d(2, return_indices=True),
    p.MaxPool2d(7, 1, 3),
    p.MaxPool2d((9, 7), 1),
    p.AvgPool2d(3, 1, 1),
    p.LPPool2d(2, 2),
    p.LPPool2d(1.7, 2),
    p.AdaptiveMaxPool2d(1),
    p.AdaptiveMaxPool2d(5, return_indices=True),
    p.AdaptiveAvgPool2d(3),
    p.FractionalMaxPool2d(2, output_size=5, seed=3),
)
MAX_CASES = 200
"""The most cases of each layer."""


@pytest.fixture(scope="module")
def cuda() -> torch.device:
    """The current CUDA device."""
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(scope="module")
def engine(cuda: torch.device) -> Iterator[Engine]:
    """An engine on the CUDA device, with a work budget, as a server's has."""
    made = Engine(str(cuda), 2, max_work=2.0**50)
    yield made
    made.close()


def assert_parity(engine: Engine, layer: p.Layer, x: torch.Tensor, indices: torch.Tensor | None = None) -> None:
    """Compute a request alone and in a batch of two, and compare it with torch's result on the same device."""
    # CUDA has no max of integers: these are computed on the CPU.
    device = "cuda" if x.is_floating_point() else "cpu"
    on_device = [None if each is None else each.to(device) for each in (x, indices)]
    expected = [each.cpu() for each in reference(layer, *on_device) if each is not None]
    run = run_of(engine, layer, x, indices)
    groups = [[run]] if run.key is None else [[run], [run, run_of(engine, layer, x, indices)]]
    for runs in groups:
        for outputs in engine.execute(runs):
            for got, other in zip(outputs, expected, strict=True):
                assert_same(got, other, (layer, x.shape, x.dtype, len(runs)))


@pytest.mark.parametrize(
    "name", [name for name in GRID if not p.LAYERS[name].operand or p.LAYERS[name].operand_optional]
)
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
        pool = p.LAYERS[f"MaxPool{layer.spatial_dims}d"]
        x, indices = reference(pool(layer.kernel_size, layer.stride, layer.padding, return_indices=True), full)
        sized = type(layer)(layer.kernel_size, layer.stride, layer.padding, tuple(full.shape[-layer.spatial_dims :]))
        assert_parity(engine, sized, x, indices)


BOXES = torch.tensor([[1, 0, 0, 9, 9], [0, 2.5, 1, 30, 8], [1, -3, -3, 4, 40]])
OPERANDS: list[tuple[p.Layer, tuple[int, ...], torch.Tensor]] = [
    *((p.SegmentPool(reduce), (4, 30, 900), torch.tensor([0, 3, 3, 500, 900])) for reduce in ("max", "mean", "std")),
    *(
        (p.GlobalPool1d(reduce), (4, 30, 900), torch.arange(3600.0).view(4, 900) % 3)
        for reduce in ("min", "mean", "median")
    ),
    (p.RoIPool(5, 0.5), (2, 16, 20, 30), BOXES),
    (p.RoIAlign(5, 0.5, aligned=True), (2, 16, 20, 30), BOXES),
]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("layer", "shape", "operand"), OPERANDS, ids=lambda each: each.name if isinstance(each, p.Layer) else ""
)
def test_operands_on_cuda(
    engine: Engine, layer: p.Layer, shape: tuple[int, ...], operand: torch.Tensor, dtype: str
) -> None:
    """A layer with an operand has the CPU's result on CUDA, within a rounding, and alone."""
    x = values(shape, dtype, 2)
    cpu = Engine("cpu", 1)
    (expected,) = cpu.execute([run_of(cpu, layer, x, operand)])[0]
    run = run_of(engine, layer, x, operand)
    assert run.key is None
    (got,) = engine.execute([run])[0]
    torch.testing.assert_close(got, expected, equal_nan=True)
    cpu.close()


def test_nothing_of_an_empty_batch_is_computed(engine: Engine) -> None:
    """It has an empty output."""
    run = run_of(engine, p.MaxPool2d(2), torch.zeros(0, 3, 8, 8))
    run.finish = len
    assert engine.execute([run]) == [1]


def test_more_planes_or_rows_than_a_launch_accepts(engine: Engine) -> None:
    """They are computed in parts, or on the CPU, and a launch that CUDA rejects would not lose the device."""
    assert_parity(engine, p.MaxPool2d(2), values((1, 70_000, 4, 4), "float32", 0))
    fractional, x = (
        p.FractionalMaxPool2d(2, output_size=2, return_indices=True, seed=5),
        values((1, 70_000, 4, 4), "float32", 1),
    )
    cpu = Engine("cpu", 1)
    for layer, tensor in ((fractional, x), (p.MaxPool3d((1, 2, 1)), values((1, 1, 1, 600_000, 1), "float32", 2))):
        (expected,) = cpu.execute([run_of(cpu, layer, tensor)])
        (got,) = engine.execute([run_of(engine, layer, tensor)])
        for one, other in zip(got, expected, strict=True):
            assert_same(one, other, layer)
    cpu.close()


def test_only_a_context_that_is_lost_loses_the_device(cuda: torch.device) -> None:
    """A device that isn't there, for example, is an error of CUDA, after which the device still works."""
    with pytest.raises(RuntimeError) as raised:
        torch.zeros(1, device="cuda:99")
    assert not backend_of(cuda).is_lost(raised.value)
    assert torch.ones(1, device=cuda).item() == 1


def test_host_memory_is_pinned_and_reused(cuda: torch.device) -> None:
    """Buffers are pinned, and after the first execution of a size no memory is allocated."""
    assert torch.frombuffer(backend_of(cuda).allocate(2**20), dtype=torch.uint8).is_pinned()
    engine = Engine(str(cuda), 1)
    x = values((4, 16, 64, 64), "float32", 0)
    engine.execute([run_of(engine, p.MaxPool2d(2), x)])
    first = engine.pinned_bytes
    assert first >= x.nbytes
    for _ in range(10):
        engine.execute([run_of(engine, p.MaxPool2d(2), x)])
    assert engine.pinned_bytes == first
    engine.close()


def test_copies_overlap_with_the_kernel_of_another_stream(cuda: torch.device) -> None:
    """Copies and a kernel of one stream end while a kernel of another stream still runs."""
    backend = backend_of(cuda)
    memory = torch.frombuffer(backend.allocate(2**20), dtype=torch.uint8)
    back = torch.frombuffer(backend.allocate(8), dtype=torch.int64)
    memory.fill_(1)
    memory.to(cuda).sum().item()  # so that CUDA is initialised
    busy = torch.cuda.Event()

    def sleep() -> None:
        # A kernel that waits for billions of cycles: many times as long as the copies take.
        torch.cuda._sleep(10**10)  # noqa: SLF001 - torch's own tests use it
        busy.record()

    one, two, _ = backend.streams()
    before = one.record()
    one.submit(sleep)
    two.submit(lambda: back.copy_(memory.to(cuda, non_blocking=True).sum().reshape(1), non_blocking=True))
    copied = two.record()
    copied.wait()
    assert not busy.query()
    assert back.item() == 2**20
    after = one.record()
    after.wait()
    assert busy.query()
    assert after.seconds_since(before) > copied.seconds_since(before) > 0


def test_the_stages_of_an_execution_are_timed(cuda: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Upload, kernel and download have times within those of the computation, and nothing is queued afterwards."""
    monkeypatch.setattr(overlap, "PAGEABLE_BLOCK_BYTES", 2**20)
    engine = Engine(str(cuda), 1)
    run = run_of(engine, p.MaxPool2d(2), values((16, 64, 64, 64), "float32", 0))
    run.times = StageTimes(16 * 64, 1)
    run.finish = run.times.around(run.finish)
    engine.execute([run])
    times = run.times
    assert tuple(stage.name for stage in times.device) == DEVICE_STAGES
    slack = 10**6  # the device's clock and the host's are read at slightly different times
    assert all(times.started - slack <= stage.started < stage.ended for stage in times.device)
    assert all(stage.ended <= times.computed + slack and stage.busy_ns > 0 for stage in times.device)
    assert engine.streams.blocks == 0
    assert 0 < engine.backend.reserved_bytes() < engine.backend.memory_bytes
    engine.close()


@pytest.mark.parametrize("layer", BLOCKED, ids=repr)
def test_blocks_have_the_bits_of_the_whole(engine: Engine, monkeypatch: pytest.MonkeyPatch, layer: p.Layer) -> None:
    """A large tensor, computed in many blocks on several streams, has torch's result on the same device."""
    monkeypatch.setattr(overlap, "PAGEABLE_BLOCK_BYTES", 2**16)
    for turn in range(4):
        assert_parity(engine, layer, values((32, 33, 24, 20 + turn), "float32", turn))


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int64", "bool", "float16"])
def test_integers_are_uploaded_as_they_are_and_converted_there(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """Steps that convert a tensor before its layers run on the device, in any blocks, with torch's bits."""
    monkeypatch.setattr(overlap, "PAGEABLE_BLOCK_BYTES", 2**16)
    x = values((32, 3, 24, 20), dtype, 0)
    text = "[ToDtype('float32', scale=True), Normalize((0.4, 0.5, 0.6), (0.2, 0.3, 0.4)), MaxPool2d(2), Round(), "
    for chain in map(p.parse_chain, (f"{text}AvgPool2d(2)]", f"{text}ToDtype('uint8')]")):
        run = run_of(engine, chain, x)
        assert run.schedule.device.type == "cuda"
        expected = x.to("cuda")
        for layer in chain:
            expected, _ = reference(layer, expected)
        assert_same(engine.execute([run])[0][0], expected.cpu(), (chain, dtype))


def test_memory_is_page_locked(cuda: torch.device) -> None:
    """Memory is locked up to the limit, and what the driver rejects is counted, with no error pending in torch."""
    size = 16 * mmap.PAGESIZE
    locks = PageLocks(backend_of(cuda), size)
    memory, other = mmap.mmap(-1, size), mmap.mmap(-1, size)
    tensor = torch.frombuffer(memory, dtype=torch.uint8)
    unlock = locks.lock(memory)
    assert tensor.is_pinned()
    assert locks.nbytes == size
    locks.lock(other)()
    assert not torch.frombuffer(other, dtype=torch.uint8).is_pinned()
    assert (locks.nbytes, locks.failures) == (size, 0)
    second = PageLocks(backend_of(cuda), size)
    second.lock(memory)()  # which is already locked
    assert (second.nbytes, second.failures) == (0, 1)
    assert tensor.to(cuda).sum().item() == 0
    unlock()
    assert locks.nbytes == 0
    assert not tensor.is_pinned()


def test_arenas_are_page_locked_while_they_last(tmp_path: Path) -> None:
    """A client's arena is page-locked, its calls have torch's result on the device, and nothing is locked after it."""
    address, x = f"unix:{tmp_path / 'pool.sock'}", values((16, 64, 56, 56), "float32", 2)
    expected = torch.nn.functional.max_pool2d(x.cuda(), 3, 2, 1).cpu()
    server = Server(Config(listen=(address,), device="cuda", metrics="127.0.0.1:0"))
    server.start()
    try:
        with p.PoolClient(address) as client:
            for _ in range(3):
                result = client.pool(x.numpy(), p.MaxPool2d(3, 2, 1), transport="arena")
                assert_same(result.output, expected, "arena")
            assert Scrape(server.metrics_address)("poolrpc_page_locked_bytes") >= x.numel() * 4
        del result
        while Scrape(server.metrics_address)("poolrpc_page_locked_bytes"):
            pass
        assert Scrape(server.metrics_address)("poolrpc_page_lock_failures") == 0
    finally:
        server.stop(0)


def test_a_call_that_exceeds_the_memory_is_computed_in_smaller_blocks(engine: Engine, cuda: torch.device) -> None:
    """Blocks take little memory. A request that can't be divided fails permanently, and the next one is computed."""
    total = torch.cuda.get_device_properties(cuda).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(cuda) + 2**26) / total, cuda)
    x = torch.zeros(1, 32, 1024, 1024)
    try:
        with pytest.raises(p.LimitExceededError) as raised:
            engine.execute([run_of(engine, p.AdaptiveAvgPool2d(7), x)])
        assert raised.value.reason == "DEVICE_MEMORY"
        (outputs,) = engine.execute([run_of(engine, p.MaxPool2d(2), x)])
        assert outputs[0].shape == (1, 32, 512, 512)
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
        "eager.OPERATIONS['max_pool'] = bad\n"
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
