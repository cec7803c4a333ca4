"""The recipes of docs/recipes.md: the server's engine compared with their usual code in torch, on one thread."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

import poolrpc as p
from benchmarks.kernels import random
from benchmarks.rounds import interleave, row
from poolrpc._wire.codec import Request
from poolrpc.chains import as_branches
from poolrpc.tensors import TensorSpec, keep_freed_memory
from poolrpc_server.compute.buffers import use_one_heap
from poolrpc_server.compute.engine import Engine, Run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

FEATURES = (8, 512, 20, 20)
MAPS = (8, 2048, 7, 7)
SOUNDS = (8, 1500, 300)
STEM = (8, 64, 112, 112)
BLUR = torch.tensor([1.0, 2.0, 1.0]).outer(torch.tensor([1.0, 2.0, 1.0])) / 16


def spp(x: torch.Tensor) -> Sequence[torch.Tensor]:
    """Spatial pyramid pooling."""
    return [functional.adaptive_max_pool2d(x, size) for size in (1, 2, 4)]


def sppf(x: torch.Tensor) -> Sequence[torch.Tensor]:
    """YOLO's fast spatial pyramid pooling."""
    steps = [x]
    for _ in range(3):
        steps.append(functional.max_pool2d(steps[-1], 5, 1, 2))
    return steps[1:]


def gem(x: torch.Tensor) -> Sequence[torch.Tensor]:
    """Generalised mean pooling, as cirtorch has it."""
    return [functional.avg_pool2d(x.clamp(min=1e-6).pow(3), x.shape[-2:]).pow(1 / 3)]


def soft(x: torch.Tensor) -> Sequence[torch.Tensor]:
    """SoftPool of windows of 2 x 2."""
    weights = x.exp()
    return [functional.avg_pool2d(x * weights, 2) / functional.avg_pool2d(weights, 2)]


def blurred(x: torch.Tensor) -> Sequence[torch.Tensor]:
    """A max pooling that does not alias, as timm has it."""
    dense = functional.pad(functional.max_pool2d(x, 2, 1), (1, 1, 1, 1), "reflect")
    return [functional.conv2d(dense, BLUR.expand(x.shape[1], 1, 3, 3), stride=2, groups=x.shape[1])]


def median(x: torch.Tensor) -> Sequence[torch.Tensor]:
    """A median filter of 3 x 3, as kornia has it: of unfolded windows."""
    windows = functional.unfold(x.flatten(0, 1).unsqueeze(1), 3).view(*x.shape[:2], 9, -1)
    return [windows.median(2).values.view(*x.shape[:2], x.shape[2] - 2, x.shape[3] - 2)]


CASES: dict[str, tuple[tuple[int, ...], Any, Callable[[torch.Tensor], Sequence[torch.Tensor]], bool]] = {
    "SPP": (FEATURES, [p.AdaptiveMaxPool2d(size) for size in (1, 2, 4)], spp, False),
    "SPPF": (FEATURES, [p.MaxPool2d(5, 1, 2)] * 3, sppf, True),
    "catavgmax": (
        MAPS,
        [p.GlobalPool2d("mean"), p.GlobalPool2d("max")],
        lambda x: [x.mean((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)],
        False,
    ),
    "GeM": (MAPS, [p.GlobalPool2d(p.PowerMean(3))], gem, False),
    "mean and std": (
        SOUNDS,
        [p.GlobalPool1d("mean"), p.GlobalPool1d("std")],
        lambda x: [x.mean(-1, keepdim=True), x.std(-1, keepdim=True)],
        False,
    ),
    "R-MAC": (
        MAPS,
        [p.MaxPool2d(7), p.MaxPool2d(4, 3), p.MaxPool2d(3, 2)],
        lambda x: [functional.max_pool2d(x, kernel, stride) for kernel, stride in ((7, 7), (4, 3), (3, 2))],
        False,
    ),
    "SoftPool": (STEM, [p.Pool2d(p.Softmax(), 2)], soft, False),
    "blurred max": (STEM, [[p.MaxPool2d(2, 1), p.BlurPool2d()]], blurred, False),
    "min": (STEM, [p.Pool2d("min", 3, 2, 1)], lambda x: [-functional.max_pool2d(-x, 3, 2, 1)], False),
    "median": (STEM, [p.Pool2d("median", 3, 1)], median, False),
    "SAME max": (
        STEM,
        [p.MaxPool2d(3, 2, "same")],
        lambda x: [functional.max_pool2d(functional.pad(x, (0, 1, 0, 1), value=-torch.inf), 3, 2)],
        False,
    ),
}
"""For each recipe: a shape, branches or a chain, torch's code, and whether it is a chain whose steps are returned."""


def run(rounds: int) -> Iterator[dict[str, Any]]:
    """Yield a row for each recipe."""
    torch.set_num_threads(1)
    use_one_heap()  # as the server does
    keep_freed_memory()
    engine = Engine("cpu", 1)
    with torch.inference_mode():
        for name, (shape, layers, theirs, chained) in CASES.items():
            x = random(shape, "float32").div_(20)
            branches = (tuple(layers),) if chained else as_branches(layers)
            outputs = (tuple(range(len(layers))),) if chained else ()
            request = Request(TensorSpec("float32", shape), branches, None, outputs)
            schedule = engine.schedule(request, len(shape) - 2, request.results())
            payload = x.view(torch.uint8).numpy().reshape(-1).data
            copied = engine.execute([engine.run(schedule, payload, lambda parts: [bytearray(part) for part in parts])])[
                0
            ]
            results = [torch.frombuffer(part, dtype=torch.float32) for part in copied]
            equal = all(
                torch.allclose(ours, other.flatten(), rtol=1e-4, atol=1e-5)
                for ours, other in zip(results, theirs(x), strict=True)
            )
            ours: Run = engine.run(schedule, payload, lambda _: None)
            contenders = {
                "torch": lambda theirs=theirs, x=x: theirs(x),
                "engine": lambda ours=ours: engine.execute([ours]),
            }
            case = f"{name}, {'x'.join(map(str, shape))}"
            yield row(case, "torch", "engine", interleave(contenders, rounds), equal=equal)
    engine.close()
