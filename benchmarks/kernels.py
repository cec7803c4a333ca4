"""The server's engine compared with eager torch, layer by layer and for chains, on one thread.

The grid has the pooling layers of known networks (ResNet, VGG, Inception, DenseNet, YOLO's SPP, 1d audio, 3d video),
planes from 4x4 to 1024x1024 at one size in bytes, small calls, every dtype, and images with channels last. The arrays
that are timed are also compared. Each row also has the duration in clones of the input, which is the lower bound, and
the duration that the engine estimates, as the request's work: how many times too long it is.
"""

from __future__ import annotations

from dataclasses import fields
from math import exp, log
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

import poolrpc as p
from benchmarks.rounds import interleave, row
from poolrpc._wire.codec import Request
from poolrpc.tensors import TensorSpec, keep_freed_memory
from poolrpc_server.compute.buffers import use_one_heap
from poolrpc_server.compute.engine import Engine, Run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

STEM = (8, 64, 112, 112)
HALVES = ("float16", "bfloat16")
INTEGERS = ("uint8", "int8", "int16", "int32", "int64")
Case = tuple[str, p.Layer | list[p.Layer], tuple[int, ...], str, str]


def cases() -> Iterator[Case]:
    """Yield (group, layer or chain, shape, dtype, layout) of every case."""
    yield from maxima()
    yield from special_maxima()
    yield from averages()
    yield from others()
    yield from planes()
    yield from chains()


def maxima() -> Iterator[Case]:
    """Yield the cases of MaxPool."""
    pools = [
        (2, 2),
        (3, 2, 1),
        (3, 1, 1),
        (5, 1, 2),
        (3, 2, 0, 2, False, True),
        (3, 3),
        (4, 4),
        (3, 2),
        (2, 1),
        (7, 2, 3),
    ]
    for arguments in pools:
        yield "max", p.MaxPool2d(*arguments), STEM, "float32", "NCHW"
    for channels, size in ((64, 224), (128, 112), (256, 56), (512, 28), (512, 14)):
        yield "max", p.MaxPool2d(2), (1, channels, size, size), "float32", "NCHW"  # VGG
    for channels, size in ((192, 28), (480, 14), (832, 7)):
        yield "max", p.MaxPool2d(3, 1, 1), (4, channels, size, size), "float32", "NCHW"  # Inception's branches
    for channels, size in ((64, 55), (192, 27), (256, 13), (288, 35), (768, 17)):
        yield "max", p.MaxPool2d(3, 2), (4, channels, size, size), "float32", "NCHW"  # AlexNet, Inception's reductions
    for kernel in (5, 9, 13):
        yield "max", p.MaxPool2d(kernel, 1, kernel // 2), (1, 512, 20, 20), "float32", "NCHW"  # YOLO's SPP
    yield "max", p.MaxPool2d(63, 1, 31), (1, 16, 256, 256), "float32", "NCHW"
    for arguments in ((2, 2), (3, 1, 1), (1, 2)):
        yield "max", p.MaxPool3d(*arguments), (2, 64, 16, 56, 56), "float32", "NCHW"
    yield "max", p.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)), (2, 64, 16, 56, 56), "float32", "NCHW"
    for arguments in ((2, 2), (4, 4), (3, 1, 1), (25, 1, 12)):
        yield "max 1d", p.MaxPool1d(*arguments), (8, 64, 16000), "float32", "NCHW"


def special_maxima() -> Iterator[Case]:
    """Yield the cases of MaxPool with other dtypes, with indices, and with channels last."""
    for dtype in (*HALVES, "float64", *INTEGERS):
        for arguments in ((2, 2), (3, 2, 1)):
            yield "max, other dtypes", p.MaxPool2d(*arguments), (2, 64, 112, 112), dtype, "NCHW"
    for arguments in ((2, 2), (3, 2, 1), (3, 1, 1)):
        layer = p.MaxPool2d(*arguments, return_indices=True)
        yield "max with indices", layer, STEM, "float32", "NCHW"
        yield "max with indices", layer, (2, 64, 112, 112), "uint8", "NCHW"
        for shape, dtype in (
            ((8, 64, 112, 112), "float32"),
            ((8, 3, 224, 224), "float32"),
            ((8, 3, 224, 224), "uint8"),
        ):
            yield "max, channels last", p.MaxPool2d(*arguments), shape, dtype, "NHWC"


def averages() -> Iterator[Case]:
    """Yield the cases of AvgPool."""
    for arguments in (
        (2, 2),
        (3, 2, 1),
        (3, 1, 1),
        (3, 2),
        (2, 1),
        (3, 3),
        (3, 2, 1, True, False),
        (3, 1, 1, False, False),
    ):
        yield "average up to 3x3", p.AvgPool2d(*arguments), STEM, "float32", "NCHW"
    for channels, size in ((128, 56), (256, 28), (512, 14)):
        yield "average up to 3x3", p.AvgPool2d(2), (4, channels, size, size), "float32", "NCHW"  # DenseNet
    for channels, size in ((192, 35), (768, 17), (1280, 8)):
        yield "average up to 3x3", p.AvgPool2d(3, 1, 1), (4, channels, size, size), "float32", "NCHW"  # Inception
    for arguments in ((5, 1, 2), (4, 4), (7, 7)):
        yield "average", p.AvgPool2d(*arguments), STEM, "float32", "NCHW"
    yield "average", p.AvgPool2d(7, 1), (8, 2048, 7, 7), "float32", "NCHW"
    for arguments in ((2, 2), (3, 1, 1)):
        yield "average", p.AvgPool3d(*arguments), (2, 64, 16, 56, 56), "float32", "NCHW"
        yield "average", p.AvgPool1d(*arguments), (8, 64, 16000), "float32", "NCHW"
        for dtype in (*HALVES, "float64"):
            yield "average, other dtypes", p.AvgPool2d(*arguments), (2, 64, 112, 112), dtype, "NCHW"
        for shape in ((8, 64, 112, 112), (8, 3, 224, 224)):
            yield "average, channels last", p.AvgPool2d(*arguments), shape, "float32", "NHWC"


def others() -> Iterator[Case]:
    """Yield the cases of the other families."""
    for shape in ((8, 2048, 7, 7), (8, 512, 14, 14), STEM):
        yield "global max", p.GlobalPool2d("max"), shape, "float32", "NCHW"
        yield "global average", p.GlobalPool2d("mean"), shape, "float32", "NCHW"
    for size in (2, 7, 28, 56):
        yield "adaptive max", p.AdaptiveMaxPool2d(size), STEM, "float32", "NCHW"
        yield "adaptive average", p.AdaptiveAvgPool2d(size), STEM, "float32", "NCHW"
    for shape, size in (((4, 512, 17, 17), 7), ((4, 512, 13, 13), 7), (STEM, 6), ((8, 512, 7, 7), 7)):
        yield "adaptive max", p.AdaptiveMaxPool2d(size), shape, "float32", "NCHW"
        yield "adaptive average", p.AdaptiveAvgPool2d(size), shape, "float32", "NCHW"
    for norm in (1, 2, 3, float("inf")):
        for arguments in ((2, 2), (3, 1)):
            yield "power average", p.LPPool2d(norm, *arguments), STEM, "float32", "NCHW"
    yield "fractional max", p.FractionalMaxPool2d(2, output_ratio=0.7), (2, 64, 112, 112), "float32", "NCHW"


def chains() -> Iterator[Case]:
    """Yield chains, whose intermediate results need not leave the CPU's cache."""
    for shape in (STEM, (32, 512, 14, 14)):
        for chain in (
            [p.MaxPool2d(3, 1, 1)] * 3,
            [p.MaxPool2d(2), p.AvgPool2d(2), p.MaxPool2d(2)],
            [p.LPPool2d(2, 3, 1), p.MaxPool2d(3, 2, 1), p.GlobalPool2d("mean")],
            [p.LPPool2d(1.7, 2, 1), p.AvgPool2d(2)],
        ):
            yield "chains", chain, shape, "float32", "NCHW"


def planes() -> Iterator[Case]:
    """Yield 8 MB of planes of each size, and calls so small that the cost of a call itself dominates."""
    for size in (4, 5, 7, 8, 14, 28, 56, 112, 256, 512, 1024):
        shape = (1, max(1, 2_000_000 // size**2), size, size)
        for layer in (p.MaxPool2d(2), p.MaxPool2d(3, 2, 1)):
            yield "max, 8 MB of planes", layer, shape, "float32", "NCHW"
        yield "average, 8 MB of planes", p.AvgPool2d(2), shape, "float32", "NCHW"
    for shape in ((1, 1, 4, 4), (1, 3, 32, 32), (1, 64, 7, 7), (1, 64, 14, 14), (1, 256, 14, 14), (1, 64, 56, 56)):
        for layer in (p.MaxPool2d(2), p.MaxPool2d(3, 1, 1), p.AvgPool2d(3, 1, 1), p.GlobalPool2d("max")):
            yield "small calls", layer, shape, "float32", "NCHW"


def eager(layer: Any) -> Callable[[torch.Tensor], Any]:  # noqa: ANN401 - a module's result, with or without indices
    """Return torch.nn's module of the same parameters."""
    if isinstance(layer, list):
        return torch.nn.Sequential(*map(eager, layer))  # type: ignore[arg-type]  # each is a module
    parameters = {each.name: getattr(layer, each.name) for each in fields(layer)}
    if layer.family.startswith("global"):
        name = "AdaptiveMaxPool2d" if layer.reduce == "max" else "AdaptiveAvgPool2d"
        return getattr(torch.nn, name)(1)
    parameters.pop("seed", None)
    return getattr(torch.nn, layer.name)(**parameters)


def random(shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    """Return random cells in a range in which every dtype has ties."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(shape, generator=generator) * 40).to(getattr(torch, dtype))


def same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Return whether two outputs are equal; NaN is equal to NaN."""
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return False
    return bool(((ours == theirs) | (ours.isnan() & theirs.isnan())).all())


def prepare(engine: Engine, chain: tuple[p.Layer, ...], memory: torch.Tensor, layout: Any) -> Run:  # noqa: ANN401 - a Layout
    """Return the engine's run of a chain, whose result is copies of its outputs."""
    spec = TensorSpec(str(memory.dtype).removeprefix("torch."), tuple(memory.shape), layout)
    request = Request(spec, (chain,))
    results = request.results()
    schedule = engine.schedule(request, memory.ndim - 2, results)
    return engine.run(schedule, memory.contiguous().view(torch.uint8).numpy().reshape(-1).data, lambda _: None)


def outputs_of(engine: Engine, run: Run) -> list[torch.Tensor]:
    """Execute a run once, and return its outputs."""
    copies = Run(run.schedule, run.inputs, lambda outputs: [bytearray(each) for each in outputs])
    return [
        torch.frombuffer(data, dtype=getattr(torch, spec.dtype)).view(spec.shape)
        for data, spec in zip(engine.execute([copies])[0], run.schedule.outputs, strict=True)
    ]


def run(rounds: int) -> Iterator[dict[str, Any]]:
    """Yield the rows, then the geometric mean of each group."""
    torch.set_num_threads(1)
    use_one_heap()  # as the server does
    keep_freed_memory()
    groups: dict[str, list[float]] = {}
    engine = Engine("cpu", 1)
    with torch.inference_mode():
        for group, layers, shape, dtype, layout in cases():
            chain = tuple(layers) if isinstance(layers, list) else (layers,)
            x = random(shape, dtype)
            memory = x.movedim(1, -1).contiguous() if layout == "NHWC" else x
            # torch pools only small uint8 images with channels last: for others the planes are made contiguous.
            images = memory.movedim(-1, 1) if layout == "NHWC" and dtype != "uint8" else x
            module = eager(layers)
            ours = prepare(engine, chain, memory, layout)
            output, *indices = outputs_of(engine, ours)
            theirs = module(images)
            theirs, their_indices = theirs if isinstance(theirs, tuple) else (theirs, None)
            output = output.movedim(-1, 1) if layout == "NHWC" else output
            # A fractional layer's samples are random; the parity tests compare it with the same samples.
            equal = chain[0].family == "fractional_max_pool" or same(output, theirs)
            if indices:
                equal &= bool(torch.equal(indices[0].movedim(-1, 1) if layout == "NHWC" else indices[0], their_indices))
            runs: dict[str, Callable[[], object]] = {
                "eager": lambda module=module, images=images: module(images),
                "plan": lambda ours=ours: engine.execute([ours]),
                "clone": memory.clone,
            }
            times = interleave(runs, rounds)
            name = f"{layers!r} {dtype} {'x'.join(map(str, shape))} {layout}"
            result = row(name, "eager", "plan", times, group=group, equal=equal)
            result["clones"] = round(median(times["plan"]) / median(times["clone"]), 2)
            # Of the schedule itself, which experience doesn't correct.
            result["estimated_ms"] = round(ours.seconds * 1000, 3)
            result["estimate"] = round(ours.seconds / median(times["plan"]), 2)
            kernels = [chosen.name if chosen else "eager torch" for _, chosen in ours.schedule.branches[0].steps]
            result["kernel"] = ", ".join(kernels)
            groups.setdefault(group, []).append(result["ratio"])
            yield result
    engine.close()
    for group, ratios in groups.items():
        yield {
            "case": f"geometric mean: {group}",
            "contender": "plan",
            "baseline": "eager",
            "ratio": round(exp(sum(map(log, ratios)) / len(ratios)), 2),
            "least": min(ratios),
            "cases": len(ratios),
        }
