"""Overlapped blocks, on a device whose streams are threads that start each piece of work late."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from math import inf
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import poolrpc as p
from poolrpc._wire.codec import Request
from poolrpc.tensors import TensorSpec
from poolrpc_server.calls.validate import check_request
from poolrpc_server.compute import overlap
from poolrpc_server.compute.engine import Engine
from poolrpc_server.compute.kernels import eager
from poolrpc_server.compute.operands import whole_operand
from poolrpc_server.compute.overlap import AHEAD, block_limit, planes_of_block, run_in_blocks
from poolrpc_server.telemetry.stage_times import DEVICE_STAGES, StageTimes
from tests.engine_run import WIDE, run_of
from tests.late_device import STREAMS, LateEvent, late_backend
from tests.parity.reference import assert_same, reference, values

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from poolrpc.tensors import Layout
    from poolrpc_server.compute.device import Event, Stream
    from tests.late_device import LateBackend, LateStream


@pytest.fixture
def backend() -> Iterator[LateBackend]:
    """A late device."""
    with late_backend() as made:
        yield made


@pytest.fixture
def streams(backend: LateBackend) -> list[LateStream]:
    """The streams of one execution of a late device."""
    return backend.streams()


@pytest.fixture
def engine(backend: LateBackend) -> Iterator[Engine]:
    """An engine that copies blocks to a late device and back."""
    made = Engine("cpu", 1, backend=backend)
    yield made
    made.close()


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make blocks so small that small tensors have many."""
    monkeypatch.setattr(overlap, "BLOCK_BYTES", 4096)
    monkeypatch.setattr(overlap, "PAGEABLE_BLOCK_BYTES", 4096)


def pool(engine: Engine, layer: p.Layer, x: torch.Tensor, indices: torch.Tensor | None = None) -> list[torch.Tensor]:
    """Return the layer's outputs, as the engine computes them."""
    (outputs,) = engine.execute([run_of(engine, layer, x, indices)])
    return outputs


@given(
    planes=st.integers(1, 10**6),
    plane_bytes=st.integers(0, 2**40),
    page_locked=st.booleans(),
    limit=st.one_of(st.just(inf), st.floats(0, 2**40)),
)
def test_blocks_are_about_the_configured_size(
    planes: int, plane_bytes: int, *, page_locked: bool, limit: float
) -> None:
    """A block has one plane at least, all planes at most, and no more bytes than the limits unless it is one plane."""
    block = planes_of_block(planes, plane_bytes, page_locked=page_locked, limit=limit)
    most = min(limit, overlap.BLOCK_BYTES if page_locked else overlap.PAGEABLE_BLOCK_BYTES)
    assert 1 <= block <= planes
    assert block == 1 or block * plane_bytes <= most
    count = -(-planes // block)
    assert block * count - planes < count  # the last one is hardly smaller


@given(st.integers(2**20, 2**40), st.integers(1, 64), st.integers(1, 4))
def test_the_blocks_of_all_executions_fit_into_the_memory(memory: int, executions: int, streams: int) -> None:
    """All blocks that may be queued take a part of the memory that the device reports; a host's memory is no limit."""
    limit = block_limit(memory, executions, streams)
    assert limit * AHEAD * streams * executions <= memory / 2
    assert block_limit(0, executions, streams) == inf


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 40), st.integers(1, 10))
def test_every_plane_is_done_when_it_returns(planes: int, block: int) -> None:
    """Each plane goes through each stage once, in order, whatever the blocks and the delays."""
    done: dict[int, list[str]] = {plane: [] for plane in range(planes)}

    def stage(name: str) -> Callable[[int, int, str], str]:
        def run(start: int, stop: int, before: str | None) -> str:
            for plane in range(start, stop):
                done[plane].append(f"{before} {name}")
            return name

        return run

    with late_backend() as backend:
        run_in_blocks(backend.streams(), planes, block, [stage(name) for name in DEVICE_STAGES])
        assert [*done.values()] == [["None upload", "upload kernel", "kernel download"]] * planes


def test_a_limited_number_of_blocks_is_queued(streams: list[LateStream]) -> None:
    """No more than AHEAD blocks are queued on a stream, so that a cancelled call ends soon."""
    most = []

    def check() -> None:
        most.append(sum(stream.submitted - stream.done for stream in streams))

    run_in_blocks(streams, 60, 1, [lambda *_: None], check)
    assert max(most) <= AHEAD * STREAMS
    assert len(most) == 60


def test_stages_of_different_blocks_overlap(streams: list[LateStream]) -> None:
    """One block is uploaded while another is computed and a third is downloaded."""
    together = threading.Barrier(STREAMS, timeout=60)

    def stage(number: int) -> Callable[[int, int, object], object]:
        return lambda start, *_: together.wait() if number + start == STREAMS - 1 else None

    run_in_blocks(streams, STREAMS, 1, [stage(number) for number in range(STREAMS)])
    assert not together.broken


@pytest.mark.parametrize("late", [False, True])
def test_no_work_is_queued_any_more_when_a_failure_is_raised(
    backend: LateBackend, streams: list[LateStream], *, late: bool
) -> None:
    """The memory of a failed or cancelled call may be reused at once, wherever the failure was noticed."""
    calls: list[int] = []
    failed: list[int] = []
    after: list[int] = []

    def fail(start: int) -> None:
        calls.append(start)
        if len(calls) == 5:
            failed.append(start)
            raise KeyError(start)

    first, check = ((lambda start, *_: fail(start)), None) if late else ((lambda *_: None), (lambda: fail(0)))
    with pytest.raises(KeyError):
        run_in_blocks(streams, 100, 1, [first, lambda start, *_: after.append(start)], check)
    assert backend.queued == 0
    assert not late or not {*failed} & {*after}  # the stage after a failed one is left out
    assert sum(stream.done for stream in streams) < 100


OPERANDS: list[tuple[p.Layer, tuple[int, ...], torch.Tensor]] = [
    (p.SegmentPool("mean"), (3, 40, 90), torch.tensor([0, 3, 3, 50, 90])),
    (p.GlobalPool1d("mean"), (3, 40, 90), torch.arange(270.0).view(3, 90) % 3),
    (p.RoIPool(5), (2, 3, 20, 30), torch.tensor([[1.0, 0, 0, 9, 9], [0, 2, 1, 30, 8]])),
    (p.RoIAlign(5), (2, 3, 20, 30), torch.tensor([[1.0, 0, 0, 9, 9], [0, 2, 1, 30, 8]])),
]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("layer", "shape", "operand"), OPERANDS, ids=["offsets", "weights", "RoIPool", "RoIAlign"])
def test_every_block_has_the_operand(
    engine: Engine, layer: p.Layer, shape: tuple[int, ...], operand: torch.Tensor
) -> None:
    """Blocks of planes have the segments and the weights of the whole tensor; boxes are computed at once."""
    x = values(shape, "float32", 2)
    plain = Engine("cpu", 1)
    for chain in (layer, (layer, p.ToDtype("float64"))):
        (expected,) = plain.execute([run_of(plain, chain, x, operand)])
        for got, other in zip(pool(engine, chain, x, operand), expected, strict=True):
            assert_same(got, other, chain)
    plain.close()


@pytest.mark.parametrize(
    ("layer", "shape", "device"),
    [(p.GlobalPool1d("mean"), (2, 90), "meta"), (p.RoIPool(5), (1, 5), "cpu"), (p.RoIAlign(5), (1, 5), "cpu")],
)
def test_boxes_stay_in_the_hosts_memory(layer: p.Layer, shape: tuple[int, ...], device: str) -> None:
    """Operators read boxes with NumPy, which cannot read a device's memory; weights are uploaded."""
    spec, operand = TensorSpec("float32", (2, 3, 90, 90)[: 2 + layer.spatial_dims]), torch.zeros(shape)
    request = Request(spec, ((layer,),), TensorSpec("float32", shape))
    given = whole_operand(operand.numpy().tobytes(), request, layer.spatial_dims)
    assert given.on(torch.device("meta")).device.type == device


def test_nothing_of_a_tensor_without_cells_is_queued(backend: LateBackend, engine: Engine) -> None:
    """An empty batch has an empty output, and the device has nothing to do."""
    for layer in (p.MaxPool2d(2), p.AdaptiveAvgPool2d(1), p.GlobalPool2d("std")):
        run = run_of(engine, layer, torch.zeros(0, 3, 8, 8))
        run.finish = len
        assert engine.execute([run]) == [1]
    assert all(stream.submitted == 0 for stream in backend.made)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_the_steps_of_a_chain_are_downloaded_block_by_block(engine: Engine, layout: Layout) -> None:
    """Each returned output and its indices have torch's values on a device, and the others stay there."""
    x = values((3, 5, 24, 20), "float32", 0)
    chain = (
        p.MaxPool2d(2, return_indices=True),
        p.AvgPool2d(2),
        p.AvgPool2d(2, 1),
        p.MaxPool2d(2, return_indices=True),
    )
    expected, output = [], x
    for step, layer in enumerate(chain):
        output, indices = reference(layer, output)
        expected += [output] * (step != 1) + ([] if indices is None else [indices])
    memory = x if layout == "NCHW" else x.movedim(1, -1).contiguous()
    request = Request(TensorSpec("float32", tuple(memory.shape), layout), (chain,), None, ((0, 2, 3),))
    checked = check_request(request, WIDE, engine.schedule)

    def finish(outputs: Sequence[memoryview]) -> list[torch.Tensor]:
        return [
            torch.frombuffer(bytearray(data), dtype=getattr(torch, spec.dtype)).reshape(spec.shape)
            for data, spec in zip(outputs, checked.outputs, strict=True)
        ]

    run = engine.run(checked.schedule, memory.view(torch.uint8).numpy().tobytes(), finish)
    for one, other in zip(engine.execute([run])[0], expected, strict=True):
        assert_same(one if layout == "NCHW" else one.movedim(-1, 1), other, layout)


class Lost:
    """A stream whose submissions fail after a part of the work was queued."""

    def __init__(self, stream: LateStream) -> None:
        self.stream = stream

    def submit(self, work: Callable[[], object]) -> None:
        """Queue the work, and fail."""
        self.stream.submit(work)
        raise MemoryError

    def record(self) -> Event:
        """Queue an event."""
        return self.stream.record()


def test_work_queued_by_a_failed_submission_is_waited_for(streams: list[LateStream]) -> None:
    """A submission that fails halfway leaves nothing that is still reading or writing the call's memory."""
    lost: Sequence[Stream] = [Lost(stream) for stream in streams]
    with pytest.raises(MemoryError):
        run_in_blocks(lost, 9, 1, [lambda *_: None])
    assert sum(stream.done for stream in streams) == 1


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    "layer",
    [
        p.MaxPool2d(3, 2, 1),
        p.MaxPool2d(2, return_indices=True),
        p.MaxPool2d(7, 1, 3),
        p.AvgPool2d(3, 1, 1),
        p.LPPool2d(2, 2),
        p.LPPool2d(1.7, 2),
        p.AdaptiveMaxPool2d(1),
        p.AdaptiveAvgPool2d(3),
        p.FractionalMaxPool2d(2, output_size=5, seed=3),
    ],
    ids=repr,
)
def test_blocks_have_the_bits_of_the_whole(engine: Engine, layer: p.Layer) -> None:
    """An execution in blocks has torch's result, also if its memory was another execution's just before."""
    for turn in range(3):
        x = values((5, 13, 24, 20), "float32", turn)
        expected = [each for each in reference(layer, x) if each is not None]
        for got, other in zip(pool(engine, layer, x), expected, strict=True):
            assert_same(got, other, layer)


@pytest.mark.usefixtures("small_blocks")
def test_unpooling_in_blocks(engine: Engine) -> None:
    """Each block has its part of the indices, and an index out of range in any block is an error."""
    x, indices = torch.nn.MaxPool2d(2, return_indices=True)(values((3, 40, 12, 12), "float32", 0))
    assert_same(pool(engine, p.MaxUnpool2d(2), x, indices)[0], torch.nn.MaxUnpool2d(2)(x, indices), "blocks")
    indices[2, 39, 5, 5] = 144
    with pytest.raises(p.InvalidArgumentError, match=r"expected indices in 0\.\.143"):
        pool(engine, p.MaxUnpool2d(2), x, indices)


@pytest.mark.usefixtures("small_blocks")
def test_small_requests_in_a_batch(engine: Engine) -> None:
    """A batch is computed in one block, and each request has its own output."""
    checked = check_request(Request(TensorSpec("float32", (1, 2, 8, 8)), ((p.MaxPool2d(2),),)), WIDE, engine.schedule)
    inputs = [values((1, 2, 8, 8), "float32", 2 * turn) for turn in range(5)]
    runs = [engine.run(checked.schedule, x.numpy().tobytes(), lambda outputs: bytes(outputs[0])) for x in inputs]
    for x, got in zip(inputs, engine.execute(runs), strict=True):
        output = torch.frombuffer(bytearray(got), dtype=torch.float32).reshape(1, 2, 4, 4)
        assert_same(output, torch.nn.MaxPool2d(2)(x), "batch")


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("layer", "fits"), [(p.MaxPool2d(2), True), (p.LPPool2d(1.7, 2), False)], ids=repr)
def test_a_device_without_memory(
    monkeypatch: pytest.MonkeyPatch, engine: Engine, layer: p.Layer, *, fits: bool
) -> None:
    """A call that needs too much memory is computed in smaller blocks if its planes are independent; else it fails."""
    family, sizes = layer.family, []
    bind = eager.OPERATIONS[family]

    def bound(*arguments: object) -> eager.Operator:
        operator = bind(*arguments)

        def run(x: torch.Tensor, *others: object) -> eager.Pooled:
            sizes.append(x.shape[1])
            if x.shape[1] > 2:
                raise torch.OutOfMemoryError
            return operator(x, *others)

        return run

    monkeypatch.setitem(eager.OPERATIONS, family, bound)
    x = values((1, 50, 11, 12), "float32", 0)  # a size that no other test has: plans are cached
    if fits:
        assert_same(pool(engine, layer, x)[0], torch.nn.MaxPool2d(2)(x), layer)
        assert max(sizes) > 2
    else:
        with pytest.raises(p.LimitExceededError) as raised:
            pool(engine, layer, x)
        assert raised.value.reason == "DEVICE_MEMORY"
    assert engine.streams.blocks == 0


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("count", "planes"), [(1, 12), (3, 12), (1, 200)], ids=["staged", "batch", "in place"])
def test_memory_is_reused_only_when_its_events_are_reached(
    backend: LateBackend, engine: Engine, count: int, planes: int
) -> None:
    """When the outputs are read, and so before any memory is returned, no copy and no kernel is queued."""
    queued = []
    for turn in range(3):
        x = values((1, planes, 24, 20), "float32", turn)
        runs = [run_of(engine, p.MaxPool2d(2), x) for _ in range(count)]
        for run in runs:
            run.finish = counting(run.finish, queued, backend)
        for (output,) in engine.execute(runs):
            assert_same(output, torch.nn.MaxPool2d(2)(x), turn)
    assert queued == [0] * 3 * count


def counting(
    finish: Callable[[Sequence[memoryview]], list[torch.Tensor]], queued: list[int], backend: LateBackend
) -> Callable[[Sequence[memoryview]], list[torch.Tensor]]:
    """Return a run's finish that first notes the work that is queued."""

    def run(outputs: Sequence[memoryview]) -> list[torch.Tensor]:
        queued.append(backend.queued)
        return finish(outputs)

    return run


@pytest.mark.usefixtures("small_blocks")
def test_memory_that_is_reused_too_early_is_noticed(
    backend: LateBackend, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With events that do not wait, outputs are read while copies are queued: the tests above would fail."""
    monkeypatch.setattr(LateEvent, "wait", lambda _: None)
    queued: list[int] = []
    run = run_of(engine, p.MaxPool2d(2), values((1, 40, 24, 20), "float32", 0))
    run.finish = counting(run.finish, queued, backend)
    engine.execute([run])
    assert queued[0] > 0


@pytest.mark.usefixtures("small_blocks")
def test_calls_overlap(backend: LateBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two calls are on the device at the same time, each on streams of its own."""
    both, bind = threading.Barrier(2, timeout=60), eager.OPERATIONS["max_pool"]
    waited = threading.local()

    def bound(*arguments: object) -> eager.Operator:
        operator = bind(*arguments)

        def run(x: torch.Tensor, *others: object) -> eager.Pooled:
            if not hasattr(waited, "done"):
                waited.done = True
                both.wait()
            return operator(x, *others)

        return run

    monkeypatch.setitem(eager.OPERATIONS, "max_pool", bound)
    engine = Engine("cpu", 2, backend=backend)
    x = values((1, 1, 39, 41), "float32", 0)  # a size that no other test has: plans are cached
    with ThreadPoolExecutor(2) as threads:
        calls = [threads.submit(pool, engine, p.MaxPool2d(2), x) for _ in range(2)]
        for call in calls:
            assert_same(call.result(60)[0], torch.nn.MaxPool2d(2)(x), "two calls")
    engine.close()


@pytest.mark.usefixtures("small_blocks")
def test_a_cancelled_call_leaves_nothing_on_the_device(backend: LateBackend, engine: Engine) -> None:
    """A call that ends between blocks leaves nothing queued; its blocks are counted while they are queued."""
    run, counts = run_of(engine, p.MaxPool2d(2), values((1, 200, 24, 20), "float32", 0)), []

    def check() -> None:
        counts.append(engine.streams.blocks)
        if len(counts) == 20:
            raise p.CancelledError("the call has ended")

    run.check = check
    with pytest.raises(p.CancelledError):
        engine.execute([run])
    assert max(counts) == AHEAD * STREAMS
    assert (engine.streams.blocks, backend.queued) == (0, 0)


@pytest.mark.usefixtures("small_blocks")
def test_a_lost_device_fails_the_call(backend: LateBackend, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that loses the device reaches the caller as it is, so that the process ends; nothing is queued."""

    def lost(*_: object) -> eager.Operator:
        def run(*_: object) -> eager.Pooled:
            raise getattr(torch, "AcceleratorError", RuntimeError)("CUDA error: an illegal memory access")

        return run

    monkeypatch.setitem(eager.OPERATIONS, "max_pool", lost)
    with pytest.raises(RuntimeError) as raised:
        pool(engine, p.MaxPool2d(2), values((1, 40, 37, 41), "float32", 0))  # a size that no other test has
    assert backend.is_lost(raised.value)
    assert (engine.streams.blocks, backend.queued) == (0, 0)


@pytest.mark.parametrize(("memory", "blocks"), [(2**40, 1), (4 * AHEAD * STREAMS * 5 * 10_000, 10), (1, 100)])
def test_blocks_are_limited_by_the_memory_that_the_device_reports(memory: int, blocks: int) -> None:
    """On a slice of a device, blocks are so small that those of all executions fit into the slice's memory."""
    with late_backend(memory) as backend:
        engine = Engine("cpu", 5, backend=backend)
        x = values((1, 100, 20, 10), "float32", 0)  # planes of 1,000 bytes with their outputs
        assert_same(pool(engine, p.MaxPool2d(2), x)[0], torch.nn.MaxPool2d(2)(x), memory)
        engine.close()
    assert sum(stream.submitted for stream in backend.made) == blocks * len(DEVICE_STAGES)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("count", [1, 3])
def test_the_stages_of_an_execution_are_timed(engine: Engine, count: int) -> None:
    """Upload, kernel and download begin in this order, within the computation; a batch has them once for all."""
    runs = [run_of(engine, p.MaxPool2d(2), values((1, 40, 24, 20), "float32", 0)) for _ in range(count)]
    for run in runs:
        run.times = StageTimes(40, 1)
        run.finish = run.times.around(run.finish)
    engine.execute(runs)
    times = runs[0].times
    assert times is not None
    assert tuple(stage.name for stage in times.device) == DEVICE_STAGES
    assert all(run.times is not None and run.times.device == times.device for run in runs)
    begun, ended = ([getattr(stage, name) for stage in times.device] for name in ("started", "ended"))
    assert begun == sorted(begun)
    assert ended == sorted(ended)
    assert times.started <= begun[0]
    assert ended[-1] <= times.computed
    assert all(stage.busy_ns > 0 for stage in times.device)


def test_the_cpu_has_no_device_stages() -> None:
    """An execution on the CPU has no upload and no download."""
    engine = Engine("cpu", 1)
    run = run_of(engine, p.MaxPool2d(2), values((1, 4, 24, 20), "float32", 0))
    run.times = StageTimes(4, 1)
    engine.execute([run])
    assert run.times.device == ()
    assert engine.pinned_bytes == engine.backend.memory_bytes == engine.backend.reserved_bytes() == 0
    engine.close()


@pytest.mark.usefixtures("small_blocks")
def test_page_locked_buffers_are_counted(engine: Engine) -> None:
    """The engine's own buffers are page-locked, and counted until they are dropped."""
    assert engine.pinned_bytes == 0
    pool(engine, p.MaxPool2d(2), values((4, 40, 24, 20), "float32", 0))
    assert engine.pinned_bytes == engine.idle_bytes >= 4 * 40 * 12 * 10 * 4
    engine.drop_idle()
    assert engine.pinned_bytes == 0
