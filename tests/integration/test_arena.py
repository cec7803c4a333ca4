"""Arenas end to end: both clients over a unix socket, what falls back to bytes, and clients that mean harm."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import pytest

import poolrpc
import poolrpc_server
from poolrpc import (
    AdaptiveAvgPool2d,
    AdaptiveMaxPool2d,
    AsyncPoolClient,
    AvgPool1d,
    AvgPool2d,
    FractionalMaxPool2d,
    GlobalAvgPool,
    GlobalMaxPool,
    LPPool2d,
    MaxPool2d,
    MaxPool3d,
    MaxUnpool2d,
    PoolClient,
)
from scripts.server_process import ServerProcess, serving

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from conftest import Gate

if sys.platform != "linux":
    pytest.skip("arenas need Linux, which alone has memfd", allow_module_level=True)

MIB = 2**20
ARENA = 64 * MIB
"""What a client asks for."""
RNG = np.random.default_rng(7)
X = RNG.standard_normal((3, 5, 40, 42), np.float32)
X[0, 1, 3:5] = np.nan
X[1, 2] = -np.inf
HELD = FractionalMaxPool2d(2, output_size=8)
"""What the gate holds."""


@pytest.fixture(scope="module")
def unix() -> Iterator[str]:
    """The address of a server in this process, on a unix socket."""
    with poolrpc_server.embedded() as client:
        yield client.address


@pytest.fixture
def client(unix: str) -> Iterator[PoolClient]:
    """A client of that server."""
    with PoolClient(unix) as made:
        yield made


@pytest.fixture(params=["sync", "async"])
def pool_each(request: pytest.FixtureRequest, unix: str) -> Iterator[Callable[..., list[poolrpc.PoolResult]]]:
    """Give pool_each of either client."""
    if request.param == "sync":
        with PoolClient(unix) as client:
            yield client.pool_each
        return

    def call(*arguments: Any, **options: Any) -> list[poolrpc.PoolResult]:
        async def run() -> list[poolrpc.PoolResult]:
            async with AsyncPoolClient(unix) as client:
                return await client.pool_each(*arguments, **options)

        return asyncio.run(run())

    yield call


def assert_same(ours: list[poolrpc.PoolResult], theirs: list[poolrpc.PoolResult], transport: str = "arena") -> None:
    """Check that results came by the arena, and are those of the other path, bit by bit."""
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.transport == transport
        assert one.shapes == other.shapes
        assert (one.output.dtype, one.output.shape) == (other.output.dtype, other.output.shape)
        assert one.output.tobytes() == other.output.tobytes()
        assert (one.indices is None) == (other.indices is None)
        if one.indices is not None:
            np.testing.assert_array_equal(one.indices, other.indices)


def halved(x: np.ndarray) -> np.ndarray:
    """Give what MaxPool2d(2) gives."""
    *lead, h, w = x.shape
    return x.reshape(*lead, h // 2, 2, w // 2, 2).max((-3, -1))


def mappings() -> int:
    """Count the arenas that this process has mapped, as a client or as a server."""
    return Path("/proc/self/maps").read_text().count("memfd:poolrpc-arena")


def shared(array: np.ndarray) -> bool:
    """Tell whether all of an array lies in an arena that this process has mapped."""
    start = array.ctypes.data
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "memfd:poolrpc-arena" in line:
            low, high = (int(each, 16) for each in line.split()[0].split("-"))
            if low <= start and start + array.nbytes <= high:
                return True
    return False


# The same answers

CHAINS = {
    "max": [MaxPool2d(3, 2, 1, return_indices=True)],
    "max dilated": [MaxPool2d(2, 1, dilation=3, ceil_mode=True)],
    "average": [AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False)],
    "lp": [LPPool2d(3.5, 2)],
    "adaptive max": [AdaptiveMaxPool2d((4, 3), return_indices=True)],
    "adaptive average": [AdaptiveAvgPool2d((None, 5))],
    "fractional": [FractionalMaxPool2d(2, output_size=5, return_indices=True, seed=11)],
    "chain": [MaxPool2d(2), FractionalMaxPool2d(2, output_ratio=0.5, seed=3), AvgPool2d(2, stride=1)],
}


@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("case", CHAINS)
def test_an_arena_gives_the_bits_of_a_call(
    pool_each: Callable[..., list[poolrpc.PoolResult]], case: str, layout: str, *, batched: bool
) -> None:
    """Whatever the layer, layout and client: by the arena comes what one message gives."""
    x = X if layout == "NCHW" else np.moveaxis(X, 1, -1)
    x = x if batched else x[1]
    assert_same(
        pool_each(x, [CHAINS[case]], layout=layout, transport="arena"),
        pool_each(x, [CHAINS[case]], layout=layout, transport="unary"),
    )


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("copy", [True, False], ids=["copy", "no copy"])
def test_branches_and_unpool_by_the_arena(
    pool_each: Callable[..., list[poolrpc.PoolResult]], layout: str, *, copy: bool
) -> None:
    """Several outputs, and indices both ways, each have their place in the arena."""
    x = np.nan_to_num(X if layout == "NCHW" else np.moveaxis(X, 1, -1))
    branches = [*CHAINS.values(), GlobalMaxPool(), [MaxPool2d(2), GlobalAvgPool()]]
    options = {"layout": layout, "copy": copy}
    assert_same(
        pool_each(x, branches, transport="arena", **options), pool_each(x, branches, layout=layout, transport="unary")
    )
    (pooled,) = pool_each(x, [MaxPool2d(2, return_indices=True)], transport="arena", **options)
    layers = [MaxUnpool2d(2), [MaxUnpool2d(2, output_size=(41, 42)), AvgPool2d(2)]]
    options["indices"] = pooled.indices
    assert_same(
        pool_each(pooled.output, layers, transport="arena", **options),
        pool_each(pooled.output, layers, transport="unary", **options),
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", "uint8", "int8", "int16", "int32", "int64"])
def test_every_dtype_by_the_arena(pool_each: Callable[..., list[poolrpc.PoolResult]], dtype: str) -> None:
    """Elements of any size, and outputs of odd sizes one after the other."""
    kind = pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype
    x = (np.nan_to_num(X, neginf=-9) * 5).astype(kind)[:, :, :37, :29]
    layers: list[Any] = [MaxPool2d(3, return_indices=True), MaxPool2d(5, 3)]
    layers += [AdaptiveMaxPool2d(1), AvgPool2d(2)] if dtype.lstrip("b").startswith("float") else []
    assert_same(pool_each(x, layers, transport="arena"), pool_each(x, layers, transport="unary"))


@pytest.mark.parametrize(
    ("x", "layer"),
    [
        pytest.param(X.reshape(3, 5, -1), AvgPool1d(3), id="1d"),
        pytest.param(X[None], MaxPool3d(2, return_indices=True), id="3d"),
        pytest.param(X[:, :, ::2, ::-1], MaxPool2d(2), id="strides"),
        pytest.param(X.astype(">f4"), MaxPool2d(2), id="big-endian"),
        pytest.param(X[:1, :1, :3, :3], MaxPool2d(2), id="small"),
        pytest.param(X[:0], MaxPool2d(2, return_indices=True), id="empty batch"),
    ],
)
def test_other_tensors_by_the_arena(
    pool_each: Callable[..., list[poolrpc.PoolResult]], x: np.ndarray, layer: poolrpc.Layer
) -> None:
    """Other ranks, strides and byte orders, a tensor of a few bytes, and one of none, which needs no arena."""
    (expected,) = pool_each(x, [layer], transport="unary")
    (result,) = pool_each(x, [layer], transport="arena")
    assert_same([result], [expected], "arena" if x.size else result.transport)


def test_the_arena_is_taken_by_itself(pool_each: Callable[..., list[poolrpc.PoolResult]]) -> None:
    """On a unix socket a tensor of 256 KiB goes by the arena, one of less does not, and one of many MiB does."""
    for side, transport in ((255, "unary"), (256, "arena"), (2048, "arena")):
        x = np.ones((1, 1, side, side), np.float32)
        assert pool_each(x, [MaxPool2d(2)])[0].transport == transport


def test_map_goes_by_the_arena(client: PoolClient) -> None:
    """Groups of small tensors lie in the arena end to end, whatever their sizes."""
    given = [RNG.standard_normal((n, 3, 9, 7), np.float32) for n in range(1, 120)]
    results = list(client.map(given, MaxPool2d(2, return_indices=True)))
    assert {each.transport for each in results} == {"arena"}
    assert_same(results, [client.pool(each, MaxPool2d(2, return_indices=True), transport="unary") for each in given])


def test_a_refused_request_is_refused_the_same(pool_each: Callable[..., list[poolrpc.PoolResult]]) -> None:
    """What is wrong with a request doesn't depend on the way: the same class and field."""
    x = np.zeros((1, 1, 256, 256), np.float32)
    with pytest.raises(poolrpc.InvalidArgumentError) as caught:
        pool_each(x, [MaxPool2d(500)], transport="arena")
    assert caught.value.violations[0].field == "branches[0].layers[0].max_pool.kernel_size"
    with pytest.raises(poolrpc.UnsupportedError):
        pool_each(x.astype(np.int32), [AvgPool2d(2)], transport="arena")
    with pytest.raises(poolrpc.InvalidArgumentError, match=r"expected indices in 0\.\.262143"):
        pool_each(x, [MaxUnpool2d(2)], indices=np.full(x.shape, 2**40), transport="arena")
    assert pool_each(x, [MaxPool2d(2)])[0].transport == "arena"


# Memory that is shared


def test_empty_and_no_copy_lie_in_the_arena(client: PoolClient) -> None:
    """client.empty's arrays and results with copy=False lie in memory that the server shares; others do not."""
    x = client.empty((2, 3, 64, 64), np.float32)
    x[...] = RNG.standard_normal(x.shape, np.float32)
    assert shared(x)
    there, here = client.pool(x, MaxPool2d(2), transport="arena", copy=False), client.pool(x, MaxPool2d(2))
    assert shared(there.output)
    assert not shared(here.output)
    assert here.output.flags.owndata
    np.testing.assert_array_equal(there.output, halved(x))
    np.testing.assert_array_equal(here.output, halved(x))
    again = client.pool(there.output, MaxPool2d(2), transport="arena", copy=False)  # a result is an input as it lies
    np.testing.assert_array_equal(again.output, halved(halved(x)))
    np.testing.assert_array_equal(there.output, halved(x))


def test_the_server_reads_an_array_where_it_lies(gate: Gate) -> None:
    """S05: what is written to client.empty's array before the server computes is what it computes on: it isn't sent."""
    with poolrpc_server.embedded(threads=2) as client, ThreadPoolExecutor(2) as threads:
        x, y = client.empty((1, 1, 64, 64), np.float32), np.zeros((1, 1, 64, 64), np.float32)
        x[...] = 0
        answers = [threads.submit(client.pool, each, HELD, transport="arena") for each in (x, y)]
        assert gate.entered.wait(20)
        x[...] = y[...] = 5
        gate.opened.set()
        assert (answers[0].result().output == 5).all()
        assert (answers[1].result().output == 0).all()


def test_views_outlive_the_client_and_the_server() -> None:
    """A result that lies in the arena, and a view of it, stay as they are after close and after the server's end."""
    x, before = RNG.standard_normal((2, 3, 64, 64), np.float32), mappings()
    with poolrpc_server.embedded() as client:
        mine = client.empty(x.shape)
        mine[...] = x
        view = client.pool(mine, MaxPool2d(2), transport="arena", copy=False).output[:, 1, ::2]
        with pytest.raises(poolrpc.InvalidArgumentError):
            client.pool(mine, MaxPool2d(99), transport="arena")
    gc.collect()
    assert shared(view[0, 0])
    np.testing.assert_array_equal(view, halved(x)[:, 1, ::2])
    view[...] = mine[0, 0, 0, 0]
    assert (view == x[0, 0, 0, 0]).all()
    del view, mine
    gc.collect()
    assert mappings() <= before


@pytest.mark.parametrize("source", ["inside", "outside"])
@pytest.mark.parametrize("goal", ["inside", "outside", "same buffer", "input itself", "pair"])
def test_out_with_the_arena(client: PoolClient, source: str, goal: str) -> None:
    """An `out` is filled wherever it lies: in the arena, beside it, next to the input, or on it."""
    buffer = client.empty((2, 2, 3, 64, 64))
    x = buffer[0] if source == "inside" else np.empty((2, 3, 64, 64), np.float32)
    x[...] = RNG.standard_normal(x.shape, np.float32)
    layer = MaxPool2d(3, 1, 1, return_indices=goal == "pair")
    expected = client.pool(x, layer, transport="unary")
    out: Any = {
        "inside": client.empty(x.shape),
        "outside": np.empty(x.shape, np.float32),
        "same buffer": buffer[1],
        "input itself": x,
        "pair": (client.empty(x.shape), np.empty(x.shape, np.int64)),
    }[goal]
    for copy in (True, False):
        result = client.pool(x, layer, transport="arena", out=out, copy=copy)
        assert (result.output, result.indices)[: 2 if goal == "pair" else 1] == (out if goal == "pair" else (out,)) or (
            result.output is (out[0] if goal == "pair" else out)
        )
        assert_same([result], [expected])
        if goal == "input itself":
            break


def test_out_may_be_a_file(pool_each: Callable[..., list[poolrpc.PoolResult]], tmp_path: Path) -> None:
    """By the arena too, a result may go to a mapped file, and come from one."""
    x = np.memmap(tmp_path / "x", np.float32, "w+", shape=(2, 3, 128, 128))
    x[...] = RNG.standard_normal(x.shape, np.float32)
    y = np.memmap(tmp_path / "y", np.float32, "w+", shape=(2, 3, 64, 64))
    seen: list[tuple[int, int]] = []
    (result,) = pool_each(x, [MaxPool2d(2)], out=[y], progress=lambda *at: seen.append(at))
    assert result.transport == "arena"
    assert result.output is y
    y.flush()
    assert (tmp_path / "y").read_bytes() == halved(np.asarray(x)).tobytes()
    assert seen == [(6, 6)]


def test_an_arena_is_used_again(tmp_path: Path) -> None:
    """A thousand calls, with results kept or not, take one arena: its memory is given back as arrays end."""
    with serving(listen=f"unix:{tmp_path / 'pool.sock'}") as server, PoolClient(server.address) as client:
        x = RNG.standard_normal((4, 8, 128, 128), np.float32)
        expected = halved(x)
        kept: list[np.ndarray] = []
        for i in range(1000):
            result = client.pool(x, MaxPool2d(2), copy=i % 2 == 0)
            assert result.transport == "arena"
            kept = [*kept[-3:], result.output]
            assert i % 50 or np.array_equal(result.output, expected)
        assert mapped_by(server) == 1


def test_threads_share_an_arena(client: PoolClient) -> None:
    """Calls of many threads at a time have their own places: each gets its own answer."""

    def work(number: int) -> None:
        for i in range(15):
            x = np.full((1, 4, 64, 64 + 2 * number), number * 100 + i, np.float32)
            if i % 2:
                mine = client.empty(x.shape)
                mine[...] = x
                x = mine
            result = client.pool(x, AvgPool2d(2), transport="arena", copy=i % 3 == 0)
            assert (result.output == number * 100 + i).all()
            assert result.transport == "arena"

    with ThreadPoolExecutor(12) as threads:
        for each in [threads.submit(work, number) for number in range(12)]:
            each.result()


async def test_async_calls_share_an_arena(unix: str) -> None:
    """Calls that overlap in one event loop have their own places too."""
    async with AsyncPoolClient(unix) as client:

        async def call(number: int) -> None:
            x = client.empty((1, 4, 64, 64)) if number % 2 else np.empty((1, 4, 64, 64), np.float32)
            x[...] = number
            result = await client.pool(x, AvgPool2d(2), transport="arena", copy=number % 3 == 0)
            assert (result.output == number).all()
            assert result.transport == "arena"

        await asyncio.gather(*(call(number) for number in range(64)))


# Where there is none


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("where", ["tcp", "no arenas"])
def test_without_an_arena_bytes_are_sent(address: str, where: str, kind: str) -> None:
    """On TCP, or where the server has none, transport="arena" is an UnavailableError, and None does without."""
    x, large = np.ones((1, 4, 128, 128), np.float32), np.ones((1, 256, 128, 128), np.float32)

    async def run(address: str) -> None:
        async with AsyncPoolClient(address) as client:
            with pytest.raises(poolrpc.UnavailableError, match="expected an arena, got none") as caught:
                await client.pool(x, MaxPool2d(2), transport="arena")
            assert caught.value.reason == "ARENA"
            assert [(await client.pool(each, MaxPool2d(2))).transport for each in (x, large)] == ["unary", "stream"]
            mine = client.empty(x.shape, "float64")
            assert (mine.shape, mine.dtype) == (x.shape, np.float64)
            assert not shared(mine)

    def sync(address: str) -> None:
        with PoolClient(address) as client:
            with pytest.raises(poolrpc.UnavailableError, match="expected an arena, got none") as caught:
                client.pool(x, MaxPool2d(2), transport="arena")
            assert caught.value.reason == "ARENA"
            assert [client.pool(each, MaxPool2d(2)).transport for each in (x, large)] == ["unary", "stream"]
            mine = client.empty(x.shape, "float64")
            assert (mine.shape, mine.dtype) == (x.shape, np.float64)
            assert not shared(mine)

    def check(address: str) -> None:
        asyncio.run(run(address)) if kind == "async" else sync(address)

    if where == "tcp":
        check(address)
    else:
        with poolrpc_server.embedded(max_arena_bytes=0) as client:
            check(client.address)


def test_a_full_quota_falls_back() -> None:
    """Where another client has the quota, bytes are sent; so too what is larger than any arena that can be had."""
    x, large = np.ones((1, 4, 128, 128), np.float32), np.ones((1, 256, 128, 128), np.float32)
    with poolrpc_server.embedded(max_arena_bytes=ARENA) as first, PoolClient(first.address) as second:
        assert first.pool(x, MaxPool2d(2)).transport == "arena"
        assert [second.pool(each, MaxPool2d(2)).transport for each in (x, large)] == ["unary", "stream"]
        with pytest.raises(poolrpc.UnavailableError, match="at most 67108864 bytes of arenas") as caught:
            second.pool(x, MaxPool2d(2), transport="arena")
        assert caught.value.reason == "ARENA"
        assert not shared(second.empty(x.shape))
        taken = [first.empty(ARENA // 4, np.uint8) for _ in range(4)]
        assert all(map(shared, taken))
        assert not shared(first.empty(1024, np.uint8))
        assert first.pool(x, MaxPool2d(2)).transport == "unary"
        del taken
        assert first.pool(x, MaxPool2d(2)).transport == "arena"
        assert not shared(first.empty(ARENA + 1, np.uint8))
        assert first.pool(x, MaxPool2d(2)).transport == "arena"


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_server_that_is_started_anew(tmp_path: Path, kind: str) -> None:
    """After a restart on the same path the next call is answered right, and a later one by an arena again."""
    address = f"unix:{tmp_path / 'pool.sock'}"
    soon = {"grpc.min_reconnect_backoff_ms": 50, "grpc.initial_reconnect_backoff_ms": 50}
    x = RNG.standard_normal((2, 3, 128, 128), np.float32)

    def serve() -> poolrpc_server.Server:
        server = poolrpc_server.Server(poolrpc_server.Config(listen=(address,)))
        server.start()
        return server

    async def run() -> None:
        server = serve()
        async with AsyncPoolClient(address, options=soon) as client:
            assert (await client.pool(x, MaxPool2d(2))).transport == "arena"
            server.stop(grace=0)
            server = serve()
            result = await client.pool(x, MaxPool2d(2))
            np.testing.assert_array_equal(result.output, halved(x))
            assert (await client.pool(x, MaxPool2d(2))).transport == "arena"
        server.stop(grace=0)

    def sync() -> None:
        server = serve()
        with PoolClient(address, options=soon) as client:
            mine = client.empty(x.shape)
            mine[...] = x
            kept = client.pool(mine, MaxPool2d(2), copy=False)
            assert kept.transport == "arena"
            server.stop(grace=0)
            server = serve()
            for given, transport in ((mine, "unary"), (mine, "arena"), (x, "arena")):
                result = client.pool(given, MaxPool2d(2))
                assert result.transport == transport
                np.testing.assert_array_equal(result.output, halved(x))
            np.testing.assert_array_equal(kept.output, halved(x))
            server.stop(grace=0)
            server = serve()
            with pytest.raises(poolrpc.NotFoundError) as caught:
                client.pool(x, MaxPool2d(2), transport="arena")
            assert caught.value.reason == "ARENA"
            assert client.pool(x, MaxPool2d(2), transport="arena").transport == "arena"
        server.stop(grace=0)

    asyncio.run(run()) if kind == "async" else sync()


def test_an_arena_that_the_server_may_still_write_to_is_let_go(gate: Gate) -> None:
    """After a timeout the next call has another arena, which the old call's late answer doesn't reach."""
    with poolrpc_server.embedded(threads=2) as client:
        x = client.empty((1, 1, 128, 128))
        x[...] = 7
        with pytest.raises(poolrpc.DeadlineExceededError):
            client.pool(x, HELD, transport="arena", timeout=0.3)
        assert gate.entered.is_set()
        y = RNG.standard_normal((1, 1, 128, 128), np.float32)
        results = [client.pool(y, MaxPool2d(2), transport="arena", copy=False) for _ in range(8)]
        mine = client.empty((1, 1, 128, 128))
        mine[...] = y
        again = client.pool(x, MaxPool2d(2))  # what lies in the old arena is sent like any array
        assert (again.output == 7).all()
        gate.opened.set()
        assert (client.pool(x, HELD, transport="arena").output == 7).all()
    # The server has ended, so the old call has written what it had to write.
    for each in results:
        np.testing.assert_array_equal(each.output, halved(y))
    np.testing.assert_array_equal(mine, y)
    assert (x == 7).all()


async def test_a_cancelled_task_lets_its_arena_go(gate: Gate) -> None:
    """So does a task that is cancelled while the server computes."""
    with poolrpc_server.embedded(threads=2) as embedded:
        async with AsyncPoolClient(embedded.address) as client:
            x = client.empty((1, 1, 128, 128))
            x[...] = 7
            task = asyncio.create_task(client.pool(x, HELD, transport="arena"))
            assert await asyncio.to_thread(gate.entered.wait, 20)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            y = RNG.standard_normal((1, 1, 128, 128), np.float32)
            result = await client.pool(y, MaxPool2d(2), transport="arena", copy=False)
            gate.opened.set()
            assert (await client.pool(x, HELD, transport="arena")).transport == "arena"
    np.testing.assert_array_equal(result.output, halved(y))


def test_a_client_may_be_closed_amid_a_call(gate: Gate) -> None:
    """Closing a client whose call is being computed ends the call; the server computes on in memory that is there."""
    with poolrpc_server.embedded(threads=2) as other, ThreadPoolExecutor(1) as threads:
        client = PoolClient(other.address)
        x = client.empty((1, 1, 128, 128))
        x[...] = 7
        call = threads.submit(client.pool, x, HELD, transport="arena", copy=False)
        assert gate.entered.wait(20)
        client.close()
        with pytest.raises(poolrpc.CancelledError):
            call.result(20)
        gate.opened.set()
        assert (other.pool(x, HELD, transport="arena").output == 7).all()


def test_objects_have_no_place_in_an_arena(client: PoolClient) -> None:
    """References are nothing that another process may read, or change: an array of them is refused, or ordinary."""
    try:
        array = client.empty(3, object)
    except (poolrpc.PoolError, TypeError, ValueError):
        return
    assert not shared(array)


# Clients that mean harm, each a process of its own


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server process for all that follows: a crash would fail every later test."""
    with serving(listen=f"unix:{tmp_path_factory.mktemp('arena') / 'pool.sock'}") as made:
        yield made
        assert made.process.poll() is None


def mapped_by(server: ServerProcess) -> int:
    """Count the arenas that a server process has mapped."""
    return Path(f"/proc/{server.process.pid}/maps").read_text().count("memfd:poolrpc-arena")


def descriptors_of(server: ServerProcess) -> int:
    """Count a server process's descriptors."""
    return psutil.Process(server.process.pid).num_fds()


@pytest.fixture
def undisturbed(server: ServerProcess) -> Iterator[PoolClient]:
    """Give a client, and call all the while, by an arena: every answer is right; then the server is as it was."""
    x = RNG.standard_normal((2, 8, 96, 96), np.float32)
    expected = halved(x)
    with PoolClient(server.address) as client:
        assert client.pool(x, MaxPool2d(2)).transport == "arena"
        before = mapped_by(server), descriptors_of(server)
        stop, faults, count = threading.Event(), [], 0

        def call() -> None:
            nonlocal count
            while not stop.is_set():
                try:
                    result = client.pool(x, MaxPool2d(2))
                    if result.transport != "arena" or not np.array_equal(result.output, expected):
                        faults.append(result)
                    count += 1
                except poolrpc.PoolError as error:
                    faults.append(error)

        caller = threading.Thread(target=call)
        caller.start()
        try:
            yield client
        finally:
            stop.set()
            caller.join()
        assert not faults
        assert count
        # Each call takes its time, in which the server sees who is gone.
        for _ in range(5000):
            after = mapped_by(server), descriptors_of(server)
            if after[0] <= before[0] and after[1] <= before[1]:
                break
            client.server_info()
        assert after[0] <= before[0]
        assert after[1] <= before[1]
        assert server.process.poll() is None


PRELUDE = """
import array, errno, fcntl, mmap, os, secrets, socket, sys, threading

path = sys.argv[1]

def say(*words):
    print(*words, sep="\\t", flush=True)

def connect():
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(path + ".arena")
    return connection

def attach(size):
    from poolrpc.v1 import pool_pb2
    connection = connect()
    connection.send(pool_pb2.AttachRequest(size=size).SerializeToString())
    packet, ancillary, _, _ = connection.recvmsg(8192, socket.CMSG_SPACE(4))
    answer = pool_pb2.AttachResponse.FromString(packet)
    if not ancillary:
        raise SystemExit(f"refused: {answer}")
    descriptor, = array.array("i", ancillary[0][2][:4])
    return connection, answer.arena_id, descriptor

def channel():
    import grpc
    return grpc.insecure_channel("unix:" + path, [("grpc.enable_retries", 0)])

def request(arena_id, input, output, layer=None, shape=(1, 16, 64, 64), indices=False):
    from poolrpc.v1 import pool_pb2
    layer = layer or {"max_pool": {"spatial_dims": 2, "kernel_size": [2]}}
    message = pool_pb2.PoolRequest(
        input={"dtype": pool_pb2.DATA_TYPE_FLOAT32, "shape": shape}, branches=[{"layers": [layer]}],
        arena={"arena_id": arena_id, "input": dict(zip(("offset", "length"), input)),
               "output": dict(zip(("offset", "length"), output))})
    if indices:
        message.indices.dtype = pool_pb2.DATA_TYPE_INT64
        message.indices.shape.extend(shape)
    return message

def call(channel, message, timeout=60):
    import grpc
    from poolrpc.v1 import pool_pb2
    method = channel.unary_unary("/poolrpc.v1.PoolService/Pool", pool_pb2.PoolRequest.SerializeToString,
                                 pool_pb2.PoolResponse.FromString)
    try:
        method(message, timeout=timeout)
        return "OK", ""
    except grpc.RpcError as error:
        return error.code().name, error.details()
"""


@contextmanager
def hostile(server: ServerProcess, program: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Run a program in a second process, with the path of the server's socket."""
    path = server.address.removeprefix("unix:")
    command = [sys.executable, "-c", PRELUDE + program, path, *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603 - ours
        try:
            yield process
        finally:
            process.kill()


def said(server: ServerProcess, program: str, *arguments: str) -> list[list[str]]:
    """Run a program to its end, and give the lines that it said, in fields."""
    with hostile(server, program, *arguments) as process:
        lines = process.communicate(timeout=60)[0].splitlines()
        assert process.returncode == 0
    return [each.split("\t") for each in lines]


IDS = """
connection, arena_id, descriptor = attach(2**20)
gone, old_id, old = attach(2**20)
gone.close()
ways = channel()
ids = {"its own": arena_id, "freed": old_id, "random": secrets.token_bytes(16), "none": b"", "short": arena_id[:15],
       "long": arena_id + b"\\0", "bit": bytes([arena_id[0] ^ 1]) + arena_id[1:], "reversed": arena_id[::-1],
       "large": bytes(2**20)}
for name, each in ids.items():
    for _ in range(10_000 if name == "freed" else 1):
        code, _ = call(ways, request(each, (0, 2**18), (2**18, 2**16)))
        if code != "OK":
            break
    say(name, code)
"""


@pytest.mark.usefixtures("undisturbed")
def test_an_arena_that_is_none_of_the_callers(server: ServerProcess) -> None:
    """S03: an id that was freed, guessed, cut, or made up is NOT_FOUND."""
    codes = dict(said(server, IDS))
    assert codes.pop("its own") == "OK"
    assert set(codes.values()) == {"NOT_FOUND"}


RANGES = """
connection, arena_id, descriptor = attach(2**20)
ways = channel()
for line in sys.stdin:
    one, two, three, four = map(int, line.split())
    say(*call(ways, request(arena_id, (one, two), (three, four))))
"""
INPUT, OUTPUT = 2**18, 2**16  # bytes of the request's tensors
REFUSED = {
    "input over the end by 64": ((MIB - INPUT + 64, INPUT, 0, OUTPUT), "arena.input.length"),
    "input over the end by 1": ((MIB - INPUT, INPUT + 1, 0, OUTPUT), "arena.input.length"),
    "output over the end by 64": ((0, INPUT, MIB - OUTPUT + 64, OUTPUT), "arena.output.length"),
    "offset that wraps": ((2**64 - 64, 64, INPUT, OUTPUT), "arena.input.offset"),
    "offset that wraps to the input": ((2**64 - 64, INPUT + 64, INPUT, OUTPUT), "arena.input.offset"),
    "output that wraps": ((0, INPUT, 2**64 - 64, OUTPUT), "arena.output.offset"),
    "half of 64 bits": ((2**63, 2**63, INPUT, OUTPUT), "arena.input.offset"),
    "length of 2^64-1": ((0, 2**64 - 1, INPUT, OUTPUT), "arena.input.length"),
    "output length of 2^64-1": ((0, INPUT, INPUT, 2**64 - 1), "arena.output.length"),
    "input after the end": ((MIB + 64, INPUT, 0, OUTPUT), "arena.input.offset"),
    "input at the end": ((MIB, INPUT, 0, OUTPUT), "arena.input.length"),
    "input misaligned": ((4, INPUT, INPUT + 64, OUTPUT), "arena.input.offset: expected a multiple of 64, got 4"),
    "output misaligned": ((0, INPUT, INPUT + 63, OUTPUT), "arena.output.offset: expected a multiple of 64"),
    "overlap": ((0, INPUT, INPUT - 64, OUTPUT), "arena.output: expected a range apart from the input's"),
    "overlap from before": ((OUTPUT - 64, INPUT, 0, OUTPUT), "arena.output"),
    "the same": ((0, INPUT, 0, INPUT), "arena.output"),
    "output inside of the input": ((0, INPUT, 64, OUTPUT), "arena.output"),
    "input too small": ((0, INPUT - 64, INPUT, OUTPUT), "arena.input: expected a range of at least 262144 bytes"),
    "input of nothing": ((0, 0, INPUT, OUTPUT), "arena.input: expected a range of at least 262144 bytes"),
    "output too small": ((0, INPUT, INPUT, OUTPUT - 1), "arena.output: expected a range of at least 65536 bytes"),
    "output of nothing": ((0, INPUT, INPUT, 0), "arena.output: expected a range of at least 65536 bytes"),
}


@pytest.mark.usefixtures("undisturbed")
def test_ranges_that_are_none(server: ServerProcess) -> None:
    """S02, S06: ranges past the end, wrapping, misaligned, overlapping or too small are INVALID_ARGUMENT."""
    good = (0, INPUT, MIB - OUTPUT, OUTPUT), (0, INPUT, INPUT, OUTPUT), (OUTPUT, MIB - OUTPUT, 0, OUTPUT)
    asked = [*(each for each, _ in REFUSED.values()), *good]
    with hostile(server, RANGES) as process:
        out, _ = process.communicate("".join(f"{' '.join(map(str, each))}\n" for each in asked), timeout=60)
    answers = [each.split("\t") for each in out.splitlines()]
    for (name, (_, words)), (code, details) in zip(REFUSED.items(), answers[: len(REFUSED)], strict=True):
        assert (name, code) == (name, "INVALID_ARGUMENT"), details
        assert words in details, name
    assert [code for code, _ in answers[len(REFUSED) :]] == ["OK"] * len(good)


SHRINK = """
connection, arena_id, descriptor = attach(2**20)
ways = channel()
for name, act in {
    "shrink": lambda: os.ftruncate(descriptor, 0),
    "by path": lambda: os.truncate(f"/proc/self/fd/{descriptor}", 4096),
    "grow": lambda: os.ftruncate(descriptor, 2**30),
    "append": lambda: os.pwrite(descriptor, b"x", 2**20),
    "seal": lambda: fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE),
}.items():
    try:
        act()
        say(name, "done")
    except OSError as error:
        say(name, errno.errorcode[error.errno])
import ctypes
hole = ctypes.CDLL(None, use_errno=True).fallocate(descriptor, 3, ctypes.c_long(0), ctypes.c_long(2**20))
say("hole", hole)
say("call", call(ways, request(arena_id, (0, 2**18), (2**18, 2**16)))[0])
"""


@pytest.mark.usefixtures("undisturbed")
def test_nobody_can_shrink_an_arena(server: ServerProcess) -> None:
    """S04: to shrink, grow or seal the memory is EPERM; holes read as zeros, and kill nobody."""
    outcomes = dict(said(server, SHRINK))
    assert outcomes.pop("hole") in ("0", "-1")
    assert outcomes.pop("call") == "OK"
    assert outcomes == dict.fromkeys(outcomes, "EPERM")


REWRITE = """
import numpy as np
connection, arena_id, descriptor = attach(2**23)
memory = np.frombuffer(mmap.mmap(descriptor, 2**23), np.uint8)
count = 16 * 64 * 64
x, places = memory[: 4 * count].view(np.float32), memory[4 * count : 12 * count].view(np.int64)
random = np.random.default_rng(1)
good, bad = random.integers(0, 128 * 128, count), random.integers(-2**63, 2**63 - 1, count)
done = threading.Event()

def rewrite():
    while not done.is_set():
        places[:] = good
        x[:] = np.nan
        places[::7] = bad[::7]
        x[:] = random.standard_normal(count)

places[:] = good
thread = threading.Thread(target=rewrite, daemon=True)
thread.start()
ways = channel()
unpool = {"max_unpool": {"spatial_dims": 2, "kernel_size": [2]}}
average = {"avg_pool": {"spatial_dims": 2, "kernel_size": [3]}}
fractional = {"fractional_max_pool": {"spatial_dims": 2, "kernel_size": [2], "output_size": {"cells": [9]},
              "return_indices": True}}
for i in range(300):
    layer = (unpool, {"max_pool": {"spatial_dims": 2, "kernel_size": [3], "return_indices": True}}, average, unpool,
             fractional)[i % 5]
    message = request(arena_id, (0, 12 * count), (12 * count, 2**23 - 12 * count), layer, indices=layer is unpool)
    say(list(layer)[0], call(ways, message)[0])
done.set()
thread.join()
"""


@pytest.mark.usefixtures("undisturbed")
def test_tensors_that_change_while_they_are_read(server: ServerProcess) -> None:
    """S05: indices and inputs that a client rewrites all the while are answered or refused; the server lives."""
    outcomes = said(server, REWRITE)
    assert len(outcomes) == 300
    assert {code for _, code in outcomes} <= {"OK", "INVALID_ARGUMENT"}
    assert {code for name, code in outcomes if name != "max_unpool"} == {"OK"}


KILLED = """
connection, arena_id, descriptor = attach(2**24)
ways = channel()
from poolrpc.v1 import pool_pb2
method = ways.unary_unary("/poolrpc.v1.PoolService/Pool", pool_pb2.PoolRequest.SerializeToString,
                          pool_pb2.PoolResponse.FromString)
heavy = {"lp_pool": {"spatial_dims": 2, "kernel_size": [11], "stride": [1], "norm_type": 3.5}}
half = 2**23
future = method.future(request(arena_id, (0, half), (half, half), heavy, (1, 8, 512, 512)), timeout=60)
say(call(ways, request(arena_id, (0, 2**18), (2**18, 2**16)))[0], future.done())
future.result()
"""


@pytest.mark.usefixtures("undisturbed")
def test_a_client_that_is_killed_amid_a_call(server: ServerProcess) -> None:
    """S07: the arena of a client that is killed while the server computes in it is gone once that has ended."""
    with hostile(server, KILLED) as process:
        assert process.stdout.readline() == "OK\tFalse\n"
        assert mapped_by(server) == 2
        process.kill()
        process.wait()


SILENT = """
connections = []
for _ in range(1000):
    try:
        connections.append(connect())
    except OSError as error:
        say(errno.errorcode[error.errno])
say("connected")
sys.stdin.readline()
"""


def test_a_thousand_who_say_nothing(server: ServerProcess, undisturbed: PoolClient) -> None:
    """Connections without a word are bounded; meanwhile the arenas that there are work, and others send bytes."""
    before = descriptors_of(server)
    x = np.ones((1, 4, 128, 128), np.float32)
    with hostile(server, SILENT) as process:
        while process.stdout.readline() not in ("connected\n", ""):
            pass
        assert descriptors_of(server) < before + 80
        with PoolClient(server.address) as another:
            assert another.pool(x, MaxPool2d(2)).transport in ("unary", "arena")
        assert undisturbed.pool(x, MaxPool2d(2)).transport == "arena"
        process.communicate("\n")


ZYGOTE = """
import signal
from poolrpc.v1 import pool_pb2
outcomes = {}
for i in range(int(sys.argv[2])):
    child = os.fork()
    if not child:
        try:
            connection, arena_id, descriptor = attach(2**20)
            with mmap.mmap(descriptor, 2**20) as memory:
                memory[:] = bytes([i % 256]) * 2**20
                if i % 10 == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    outcomes[status] = outcomes.get(status, 0) + 1
say(outcomes.get(0, 0), outcomes.get(signal.SIGKILL, 0))
"""


@pytest.mark.slow
@pytest.mark.usefixtures("undisturbed")
def test_a_thousand_clients_come_and_go(server: ServerProcess) -> None:
    """S08: a thousand clients' arenas, made and dropped, one in ten by SIGKILL, leave the server as it was."""
    process = psutil.Process(server.process.pid)
    assert said(server, ZYGOTE, "50") == [["45", "5"]]
    before = process.memory_info().rss, process.num_threads()
    assert said(server, ZYGOTE, "1000") == [["900", "100"]]
    assert process.memory_info().rss < before[0] + 16 * MIB
    assert process.num_threads() <= before[1] + 2
