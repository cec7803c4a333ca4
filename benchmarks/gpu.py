"""A CUDA device behind the server against a bare pinned copy and torch on the same device, and a few kernels alone.

On a GPU the copy decides: the upload of the input from page-locked memory is the least that a call can take. The parts
are the operators that replace torch's own, calls of each size by each transport, calls of uint8 that are converted on
the device against the same calls of float32, and small calls of several callers.
"""

from __future__ import annotations

import mmap
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from itertools import product
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks.rounds import interleave, row
from poolrpc import AvgPool2d, MaxPool2d, PoolClient, ToDtype
from poolrpc._wire.codec import Request
from poolrpc.tensors import TensorSpec, align
from poolrpc_server.calls.validate import Limits, check_request
from poolrpc_server.compute.engine import Engine
from scripts.server_process import serving

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from poolrpc import Layer
    from poolrpc.chains import Chain
    from poolrpc.tensors import Array

SHAPES = ((1, 3, 224, 224), (32, 64, 56, 56), (32, 64, 112, 112), (84, 64, 112, 112))
"""0.6, 25.7, 102.8 and 269.7 MB of float32."""
LAYERS = (MaxPool2d(2), AvgPool2d(3, 1, 1))
DTYPES = ("float32", "float16", "uint8")
CONVERT = ToDtype("float32", scale=True)
"""The step before the layer of a tensor of uint8."""
LIMITS = Limits(2**40, 2**40, 2**40, 2**50)

KERNEL_SHAPES = ((8, 64, 112, 112), (32, 64, 56, 56), (64, 2048, 7, 7))
KERNEL_SIZES = (5, 7, 9, 13)

SMALL, CALLERS, CALLS = (1, 3, 64, 64), (1, 8, 64), 256
"""Small calls: the shape, the numbers of callers, and the calls of all callers together."""

CASE_SECONDS = 3.0
"""The rounds of a case end after so many seconds: scripts/gpu.sh limits the whole."""

NO_DEVICE = 3
"""The exit status without a CUDA device."""


class Torch:
    """torch on a device: the copies and modules that calls are compared with."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._cuda = device.type == "cuda"

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor in page-locked memory; on a CPU, the tensor."""
        return tensor.pin_memory() if self._cuda else tensor

    def synchronize(self) -> None:
        """Wait for the device."""
        if self._cuda:
            torch.cuda.synchronize()

    def timed(self, operator: Callable[[], object]) -> Callable[[], None]:
        """Return a function that calls an operator and waits for the device."""

        def run() -> None:
            operator()
            self.synchronize()

        return run


def module_of(chain: Chain) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return what torch computes for a chain of this benchmark."""
    layer = chain[-1]
    module: torch.nn.Module = eval(f"torch.nn.{layer!r}")  # noqa: S307 - a layer's repr is torch.nn's expression
    if len(chain) == 1:
        return module
    return lambda x: module(x.to(torch.float32).mul_(1 / 255))  # type: ignore[no-any-return] # a module's result is untyped


def chain_of(layer: Layer, dtype: str) -> Chain:
    """Return the chain that is measured for a dtype."""
    return (CONVERT, layer) if dtype == "uint8" else (layer,)


def values(shape: Sequence[int], dtype: str) -> Array:
    """Return a tensor's values."""
    random = np.random.default_rng(0)
    if dtype == "uint8":
        return random.integers(0, 256, shape, np.uint8)
    return random.standard_normal(shape, np.float32).astype(dtype)


def engine_call(engine: Engine, chain: Chain, x: Array) -> Callable[[], object]:
    """Return a call of an engine with bytes from the network."""
    request = Request(TensorSpec(str(x.dtype), x.shape), (chain,))
    schedule, payload = check_request(request, LIMITS, engine.schedule).schedule, x.tobytes()
    return lambda: engine.execute([engine.run(schedule, payload, len)])


def engine_in_place(engine: Engine, chain: Chain, x: Array, ends: ExitStack) -> Callable[[], object]:
    """Return a call of an engine in page-locked memory of this process, as an arena's is."""
    request = Request(TensorSpec(str(x.dtype), x.shape), (chain,))
    schedule = check_request(request, LIMITS, engine.schedule).schedule
    start = align(x.nbytes)
    mapping = mmap.mmap(-1, start + schedule.outputs[0].nbytes)
    memory = memoryview(mapping)
    ends.callback(engine.page_locks.lock(mapping))
    np.frombuffer(memory, x.dtype, x.size)[:] = x.reshape(-1)
    location = engine.location([memory[: x.nbytes]], [memory[start:]])
    return lambda: engine.execute([engine.run_in_place(schedule, location)])


def shared(client: PoolClient, x: Array) -> Array:
    """Return an array in the client's arena, with the values of another."""
    array = client.empty(x.shape, x.dtype)
    array[...] = x
    return array


def transports(clients: dict[str, PoolClient], chain: Chain, x: Array) -> dict[str, Callable[[], Any]]:
    """Return the calls of a server by each transport."""
    unix, tcp = clients["unix"], clients["tcp"]
    array = shared(unix, x)
    return {
        "a call, in place in the arena": lambda: unix.pool(array, chain, copy=False, transport="arena"),
        "a call, through the arena": lambda: unix.pool(x, chain, transport="arena"),
        "a local call, in place": lambda: unix.pool(array, chain, copy=False, transport="local"),
        "a local call": lambda: unix.pool(x, chain, transport="local"),
        "a call over TCP": lambda: tcp.pool(x, chain),
    }


def contenders(  # noqa: PLR0913, PLR0917 - what is compared
    own: Torch, engines: dict[str, Engine], clients: dict[str, PoolClient], chain: Chain, x: Array, ends: ExitStack
) -> dict[str, Callable[[], Any]]:
    """Return the bare copies, torch from both kinds of memory, and the ways of this server, on one input."""
    device, module, pageable = own.device, module_of(chain), torch.from_numpy(x)
    pinned = own.pin(pageable)
    on_device = pinned.to(device)
    result = module(on_device)
    output = own.pin(torch.empty(result.shape, dtype=result.dtype))

    def copy() -> None:
        on_device.copy_(pinned, non_blocking=True)
        output.copy_(result, non_blocking=True)

    return {
        "pinned upload": own.timed(lambda: on_device.copy_(pinned, non_blocking=True)),
        "pinned copy both ways": own.timed(copy),
        "torch from pageable memory": lambda: module(pageable.to(device)).cpu(),
        "torch from pinned memory": lambda: output.copy_(module(pinned.to(device, non_blocking=True))),
        **{name: engine_call(engine, chain, x) for name, engine in engines.items()},
        "the engine, in page-locked memory": engine_in_place(engines["the engine"], chain, x, ends),
        **transports(clients, chain, x),
    }


def kernels(own: Torch, shapes: Sequence[Sequence[int]], rounds: int, **more: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of the operators that replace torch's own for a layer."""
    for shape in shapes:
        x = torch.randn(*shape, device=own.device)
        pairs: dict[str, tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor]]] = {
            "AdaptiveMaxPool2d(1)": (
                partial(torch.nn.functional.adaptive_max_pool2d, x, 1),
                partial(torch.amax, x, (2, 3), keepdim=True),
            )
        }
        for size in KERNEL_SIZES:
            if size < shape[2]:
                half = size // 2
                pairs[f"MaxPool2d({size}, 1, {half})"] = (
                    partial(torch.max_pool2d, x, size, 1, half),
                    lambda size=size, half=half, x=x: torch.max_pool2d(
                        torch.max_pool2d(x, (size, 1), 1, (half, 0)), (1, size), 1, (0, half)
                    ),
                )
        for name, (whole, other) in pairs.items():
            names = "torch's operator", "amax" if "Adaptive" in name else "axis by axis"
            equal = torch.equal(whole(), other())
            times = interleave(dict(zip(names, map(own.timed, (whole, other)), strict=True)), rounds)
            yield row(f"{name} {'x'.join(map(str, shape))}", *names, times, equal=equal, **more)


def sizes(
    own: Torch,
    engines: dict[str, Engine],
    clients: dict[str, PoolClient],
    shapes: Sequence[tuple[int, ...]],
    rounds: int,
    **more: str,
) -> Iterator[dict[str, Any]]:
    """Yield the rows of each layer, dtype and size: torch and the server against the bare upload."""
    for dtype, layer, shape in product(DTYPES, LAYERS, shapes):
        x, chain = values(shape, dtype), chain_of(layer, dtype)
        expected = module_of(chain)(torch.from_numpy(x).to(own.device)).cpu().numpy()
        with ExitStack() as unlock:
            runs = contenders(own, engines, clients, chain, x, unlock)
            equal = {
                name: bool(np.array_equal(runs[name]().output, expected)) for name in transports(clients, chain, x)
            }
            times = interleave(runs, rounds, seconds=CASE_SECONDS)
        baseline, *others = times
        case = f"{', '.join(map(repr, chain))} {dtype} {'x'.join(map(str, shape))}"
        for name in others:
            same = {"equal": equal[name]} if name in equal else {}
            yield row(case, baseline, name, times, bytes=prod(shape) * x.itemsize, **same, **more)


def narrow(
    clients: dict[str, PoolClient], shapes: Sequence[tuple[int, ...]], rounds: int, **more: str
) -> Iterator[dict[str, Any]]:
    """Yield the rows of calls of uint8 that are converted on the device, against the same calls of float32."""
    unix = clients["unix"]
    for layer, shape in product(LAYERS, shapes):
        runs = {}
        for dtype in ("float32", "uint8"):
            array, chain = shared(unix, values(shape, dtype)), chain_of(layer, dtype)
            runs[dtype] = partial(unix.pool, array, chain, copy=False, transport="arena")
        times = interleave(runs, rounds, seconds=CASE_SECONDS)
        yield row(f"{layer!r} {'x'.join(map(str, shape))}, in place in the arena", "float32", "uint8", times, **more)


def small(own: Torch, clients: dict[str, PoolClient], rounds: int, **more: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of small calls of several callers, against eager torch, one call after the other."""
    x, layer = values(SMALL, "float32"), MaxPool2d(2)
    module, tensor = module_of((layer,)), torch.from_numpy(x)

    def alone() -> None:
        for _ in range(CALLS):
            module(tensor.to(own.device)).cpu()

    for callers in CALLERS:
        with ThreadPoolExecutor(callers) as threads:

            def together(client: PoolClient, threads: ThreadPoolExecutor = threads) -> None:
                list(threads.map(lambda _: client.pool(x, layer), range(CALLS)))

            runs = {"torch, one call after the other": alone, **{n: partial(together, c) for n, c in clients.items()}}
            times = interleave(runs, rounds, seconds=CASE_SECONDS)
        for name in clients:
            case = f"{CALLS} calls of {'x'.join(map(str, SMALL))}, {callers} caller{'s' * (callers > 1)}"
            yield row(case, "torch, one call after the other", name, times, calls=CALLS, **more)


def measure(
    device: torch.device,
    shapes: Sequence[tuple[int, ...]],
    kernel_shapes: Sequence[Sequence[int]],
    rounds: int,
    **more: str,
) -> Iterator[dict[str, Any]]:
    """Yield all rows for a device.

    Args:
        device: The device; a test uses the CPU.
        shapes: The shapes of the tensors.
        kernel_shapes: The shapes of the tensors of the operators that replace torch's own.
        rounds: The most rounds of each case.
        more: Further fields of each row.

    """
    torch.set_grad_enabled(False)
    own = Torch(device)
    yield from kernels(own, kernel_shapes, rounds, **more)
    with ExitStack() as ends:
        engines = {
            "the engine": Engine(str(device), 1, page_lock_limit=2**36),
            "the engine on the CPU": Engine("cpu", 1),
        }
        for engine in engines.values():
            ends.callback(engine.close)
        address = f"unix:{Path(ends.enter_context(tempfile.TemporaryDirectory())) / 'pool.sock'}"
        flags = ("--device", device.type, "--threads", "1", "--listen", address)
        server = ends.enter_context(serving(*flags))
        clients = {
            name: ends.enter_context(PoolClient(each)) for name, each in (("unix", address), ("tcp", server.address))
        }
        yield from small(own, clients, rounds, **more)
        yield from narrow(clients, shapes, rounds, **more)
        yield from sizes(own, engines, clients, shapes, rounds, **more)


def run(rounds: int) -> Iterator[dict[str, Any]]:
    """Yield the rows, with the card."""
    if not torch.cuda.is_available():
        print("benchmarks gpu: expected a CUDA device, got none", file=sys.stderr)
        raise SystemExit(NO_DEVICE)
    yield from measure(torch.device("cuda"), SHAPES, KERNEL_SHAPES, rounds, card=torch.cuda.get_device_name())
