"""Overlapped blocks, on a device whose streams are threads that start each piece of work late."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack
from queue import SimpleQueue
from random import Random
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
from poolrpc_server.compute.overlap import AHEAD, planes_of_block, run_in_blocks
from tests.engine_run import WIDE, run_of
from tests.parity.reference import assert_same, reference, values

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from poolrpc.tensors import Layout
    from poolrpc_server.compute.device import Event, Stream

STREAMS = 3


class LateEvent:
    """An event of a LateStream."""

    def __init__(self, stream: LateStream) -> None:
        self.stream, self.reached = stream, threading.Event()

    def wait(self) -> None:
        """Wait for it, and raise what the work before it raised."""
        assert self.reached.wait(60)
        if self.stream.errors:
            raise self.stream.errors[0]


class LateStream:
    """A stream that does its work in a thread of its own, each piece after a delay."""

    def __init__(self, seed: int) -> None:
        self.errors: list[BaseException] = []
        self.submitted = self.done = 0
        self._random = Random(seed)  # noqa: S311 - delays
        self._work: SimpleQueue[Callable[[], object] | LateEvent | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def submit(self, work: Callable[[], object]) -> None:
        """Queue work."""
        self.submitted += 1
        self._work.put(work)

    def record(self) -> Event:
        """Queue an event."""
        event = LateEvent(self)
        self._work.put(event)
        return event

    def close(self) -> None:
        """End the thread."""
        self._work.put(None)
        self._thread.join()

    def _run(self) -> None:
        torch.set_grad_enabled(False)
        while (work := self._work.get()) is not None:
            if isinstance(work, LateEvent):
                work.reached.set()
                continue
            time.sleep(self._random.random() / 500)
            try:
                work()
            except BaseException as error:  # noqa: BLE001 - raised where its event is waited for
                self.errors.append(error)
            self.done += 1


@pytest.fixture
def streams() -> Iterator[list[LateStream]]:
    """Some late streams."""
    with ExitStack() as ends:
        made = [LateStream(seed) for seed in range(STREAMS)]
        for stream in made:
            ends.callback(stream.close)
        yield made


@pytest.fixture
def engine(streams: list[LateStream]) -> Iterator[Engine]:
    """An engine that copies blocks to late streams and back; its device is the CPU."""
    made = Engine("cpu", 1, streams=lambda: streams)
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


@given(planes=st.integers(1, 10**6), plane_bytes=st.integers(0, 2**40), page_locked=st.booleans())
def test_blocks_are_about_the_configured_size(planes: int, plane_bytes: int, *, page_locked: bool) -> None:
    """A block has one plane at least, all planes at most, and no more bytes than the limit unless it is one plane."""
    block = planes_of_block(planes, plane_bytes, page_locked=page_locked)
    assert 1 <= block <= planes
    assert block == 1 or block * plane_bytes <= (overlap.BLOCK_BYTES if page_locked else overlap.PAGEABLE_BLOCK_BYTES)
    count = -(-planes // block)
    assert block * count - planes < count  # the last one is hardly smaller


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 40), st.integers(1, 10), st.integers(0, 2**32))
def test_every_plane_is_done_when_it_returns(planes: int, block: int, seed: int) -> None:
    """Each plane is done once, whatever the blocks and the delays."""
    done: list[int] = []
    with ExitStack() as ends:
        streams = [LateStream(seed + number) for number in range(STREAMS)]
        for stream in streams:
            ends.callback(stream.close)
        run_in_blocks(streams, planes, block, lambda start, stop: done.extend(range(start, stop)))
        assert sorted(done) == list(range(planes))


def test_a_limited_number_of_blocks_is_queued(streams: list[LateStream]) -> None:
    """No more than AHEAD blocks are queued on a stream, so that a cancelled call ends soon."""
    most = []

    def check() -> None:
        most.append(sum(stream.submitted - stream.done for stream in streams))

    run_in_blocks(streams, 60, 1, lambda *_: None, check)
    assert max(most) <= AHEAD * STREAMS
    assert len(most) == 60


@pytest.mark.parametrize("late", [False, True])
def test_no_work_is_queued_any_more_when_a_failure_is_raised(streams: list[LateStream], *, late: bool) -> None:
    """The memory of a failed or cancelled call may be reused at once, wherever the failure was noticed."""
    calls = []

    def fail(start: int) -> None:
        calls.append(start)
        if len(calls) == 5:
            raise KeyError(start)

    work, check = ((lambda start, _: fail(start)), None) if late else ((lambda *_: None), (lambda: fail(0)))
    with pytest.raises(KeyError):
        run_in_blocks(streams, 100, 1, work, check)
    assert all(stream.submitted == stream.done for stream in streams)
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
        run_in_blocks(lost, 9, 1, lambda *_: None)
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
    monkeypatch: pytest.MonkeyPatch, streams: list[LateStream], layer: p.Layer, *, fits: bool
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
    engine = Engine("cpu", 1, streams=lambda: streams)
    x = values((1, 50, 11, 12), "float32", 0)  # a size that no other test has: plans are cached
    try:
        if fits:
            for stream in streams:
                stream.errors = Forgetful()
            assert_same(pool(engine, layer, x)[0], torch.nn.MaxPool2d(2)(x), layer)
            assert max(sizes) > 2
        else:
            with pytest.raises(p.LimitExceededError) as raised:
                pool(engine, layer, x)
            assert raised.value.reason == "DEVICE_MEMORY"
    finally:
        engine.close()


class Forgetful(list[BaseException]):
    """Errors of a stream, each of which is raised once."""

    def __getitem__(self, index: object) -> BaseException:
        """Return the error, and forget all."""
        error = super().__getitem__(index)
        self.clear()
        return error
