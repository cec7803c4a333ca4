"""The engine: devices, threads, and the memory of requests."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields

import numpy as np
import pytest
import torch

from poolrpc import (
    LAYERS,
    AdaptiveAvgPool3d,
    AdaptiveMaxPool2d,
    AvgPool2d,
    FractionalMaxPool2d,
    FractionalMaxPool3d,
    InvalidArgumentError,
    LPPool2d,
    MaxPool2d,
    MaxPool3d,
    MaxUnpool1d,
    MaxUnpool2d,
)
from poolrpc._wire.codec import Request
from poolrpc.tensors import TensorSpec, split_tensors
from poolrpc_server.calls.validate import Limits, check_request
from poolrpc_server.compute.branch import BLOCK_WORK
from poolrpc_server.compute.buffers import aligned
from poolrpc_server.compute.engine import Engine, resolve_device
from tests.operand_bytes import operand_for

LIMITS = Limits(2**20, 2**20, 64, 10**7)
WIDE = Limits(2**40, 2**40, 64, 2**40)


def test_the_threads_are_started_at_once():
    """A submission that cannot start a thread fails, and is still executed by another, in memory of other calls."""
    before = {each for each in threading.enumerate() if each.name.startswith("poolrpc-helper")}
    made = Engine("cpu", 4)
    helpers = {each for each in threading.enumerate() if each.name.startswith("poolrpc-helper")} - before
    made.close()
    assert len(helpers) == 3


@pytest.fixture(scope="module")
def engine():
    """An engine of two threads on the CPU."""
    made = Engine("cpu", 2)
    yield made
    made.close()


def scheduled(engine, spec, *layers, indices=None, limits=LIMITS):
    """Return a checked request, with each layer as a branch."""
    return check_request(Request(spec, tuple((layer,) for layer in layers), indices), limits, engine.schedule)


def run(engine, checked, payload, finish=None):
    """Run a request, and return copies of its outputs' bytes, or what `finish` returns."""
    return engine.execute([engine.run(checked.schedule, payload, finish or copied)])[0]


def copied(outputs):
    """Return copies of the outputs' bytes."""
    return [bytes(each) for each in outputs]


def pool(engine, x, layer, indices=None, layout="NCHW"):
    """Run a layer on an array, and return its first output."""
    spec = TensorSpec(x.dtype.name, x.shape, layout)
    second = None if indices is None else TensorSpec("int64", indices.shape, layout)
    payload = x.tobytes() + (b"" if indices is None else indices.tobytes())
    checked = scheduled(engine, spec, layer, indices=second)
    return np.frombuffer(run(engine, checked, payload)[0], x.dtype).reshape(checked.results[0].output.shape)


SMALL = TensorSpec("float32", (1, 1, 2, 2))


@pytest.mark.parametrize("name", ["nope", "", "cpu:x", "meta", "cuda:99", "-1", "CPU", "x" * 1000])
def test_an_unknown_device_is_rejected_with_its_name(name):
    """The error for a name that torch doesn't know, or a device that this machine lacks, is one line with the name."""
    with pytest.raises(ValueError, match=f"^device: expected auto or a device .*got '{name}': ") as raised:
        resolve_device(name)
    assert "\n" not in str(raised.value)


def test_auto_is_the_gpu_or_the_cpu():
    """Auto is the GPU if torch can use one, else the CPU."""
    gpu = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert resolve_device("auto").type == gpu
    assert resolve_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("cls", LAYERS.values())
def test_inputs_are_not_changed(engine, cls):
    """No layer writes to a request's bytes, which it reads in place; the result is the same as from a copy."""
    dims = cls.spatial_dims
    arguments = {"kernel_size": 1, "norm_type": 2.0, "output_size": 2, "return_indices": True, "reduce": "max"}
    if cls.operand == "indices":
        del arguments["output_size"]
    names = {each.name for each in fields(cls)}
    layer = cls(**{name: value for name, value in arguments.items() if name in names})
    x = np.random.default_rng(0).standard_normal((2, 3, *[4] * dims)).astype(np.float32)
    operand, contents = operand_for([(layer,)], x.shape, optional=True)
    specs = [TensorSpec("float32", x.shape), *([operand] if operand else [])]
    payload = x.tobytes() + contents
    before = bytearray(payload)
    checked = scheduled(engine, specs[0], layer, indices=operand)
    outputs = [aligned(spec.nbytes) for spec in checked.outputs]
    location = engine.location(split_tensors(payload, specs), outputs)
    expected = run(engine, checked, payload)
    for again in (False, True, True):
        for output in outputs:
            output[:] = bytes(len(output))
        engine.execute([engine.run_in_place(checked.schedule, location, again=again)])
        assert payload == before
        assert [bytes(each) for each in outputs] == expected
    # A client may change an operand after it was checked, so it is copied first.
    assert len(location.workspaces) == (checked.schedule.cached and operand is None)
    location.end()


def test_indices_need_no_alignment(engine):
    """Indices may follow an input with an odd number of bytes."""
    x, indices = np.array([[[1, 2, 3]]], np.float16), np.array([[[5, 0, 2]]])
    assert pool(engine, x, MaxUnpool1d(2), indices).tolist() == [[[2, 0, 3, 0, 0, 1]]]


@pytest.mark.parametrize("layer", [FractionalMaxPool2d(2, 3, seed=5), FractionalMaxPool3d(2, 3, seed=5)], ids=repr)
def test_a_plane_has_the_same_output_in_any_shape_and_layout(engine, layer):
    """The output of a fractional layer for the plane of a number is the same for any N, C and layout."""
    x = np.random.default_rng(1).standard_normal((2, 3, *[7] * layer.spatial_dims)).astype(np.float32)
    expected = pool(engine, x, layer)
    flat = x.reshape(6, *x.shape[2:])
    assert np.array_equal(pool(engine, flat, layer).reshape(expected.shape), expected)
    assert np.array_equal(pool(engine, x[:1], layer), expected[:1])
    last = np.ascontiguousarray(np.moveaxis(x, 1, -1))
    assert np.array_equal(np.moveaxis(pool(engine, last, layer, layout="NHWC"), -1, 1), expected)
    assert not np.array_equal(pool(engine, x, type(layer)(2, 3, seed=6)), expected)


class Slots:
    """Slots of which one is always free; it counts how often that was borrowed and released."""

    def __init__(self):
        self.borrowed = self.released = 0

    def borrow(self, count):
        """Return one slot, or none if none is wanted."""
        self.borrowed += 1
        return min(count, 1)

    def release(self, slots):
        """Take a slot back."""
        self.released += slots


def test_a_large_request_is_divided_among_threads(engine, monkeypatch):
    """The result of two threads is that of one, with indices too, and the borrowed slot is released."""
    slots = Slots()
    monkeypatch.setattr(engine, "slots", slots)
    x = np.random.default_rng(0).standard_normal((7, 61, 128, 100)).astype(np.float32)
    alone = Engine("cpu", 1)
    for layer in (MaxPool2d(3, 1, 1), MaxPool2d(3, 1, 1, return_indices=True), AvgPool2d(3, 1, 1)):
        spec = TensorSpec("float32", x.shape)
        shared, single = (run(each, scheduled(each, spec, layer, limits=WIDE), x.tobytes()) for each in (engine, alone))
        assert shared == single
    assert slots.borrowed == slots.released == 3
    alone.close()


def test_large_requests_do_not_deadlock(engine, monkeypatch):
    """More large requests than threads, at the same time, all end."""
    monkeypatch.setattr(engine, "slots", Slots())
    x = np.random.default_rng(0).standard_normal((1, 128, 128, 170)).astype(np.float32)
    checked, payload = scheduled(engine, TensorSpec("float32", x.shape), MaxPool2d(3, 1, 1), limits=WIDE), x.tobytes()
    with ThreadPoolExecutor(8) as callers:
        answers = [callers.submit(run, engine, checked, payload) for _ in range(24)]
        assert len({answer.result(60)[0] for answer in answers}) == 1


LARGE = TensorSpec("float32", (1, 16, 128, 64))


@pytest.mark.parametrize("spec", [SMALL, LARGE], ids=["small", "large"])
def test_results_read_at_the_same_time_do_not_overlap(engine, spec):
    """A request that is executed while its previous result is still read has other memory."""
    checked = scheduled(engine, spec, MaxPool2d(2))
    ones, twos = (np.full(spec.shape, value, np.float32).tobytes() for value in (1, 2))
    for _ in range(3):

        def read_meanwhile(first):
            ((second,), (first,)) = run(engine, checked, twos), copied(first)
            return first, second

        first, second = run(engine, checked, ones, read_meanwhile)
        assert set(np.frombuffer(first, np.float32)) == {1}
        assert set(np.frombuffer(second, np.float32)) == {2}


def test_memory_is_reused(engine):
    """The next execution uses the memory of the previous one."""
    checked = scheduled(engine, LARGE, MaxPool2d(2))
    places = set()
    for _ in range(5):
        payload = bytes(LARGE.nbytes)
        places.add(run(engine, checked, payload, lambda outputs: np.asarray(outputs[0]).ctypes.data))
    assert len(places) == 1


@pytest.mark.parametrize("spec", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("change", [-1, 1])
def test_a_payload_of_another_length_is_rejected(engine, spec, change):
    """A payload with a byte more or fewer than its spec is invalid."""
    checked = scheduled(engine, spec, MaxPool2d(2))
    length = spec.nbytes + change
    with pytest.raises(InvalidArgumentError, match=rf"^payload: expected {spec.nbytes} bytes .*got {length}$"):
        run(engine, checked, bytes(length))


def test_chains_and_branches_are_torchs(engine):
    """Each branch starts from the input, and each layer from the output of the previous one."""
    x = torch.arange(128, dtype=torch.float32).reshape(1, 2, 8, 8)
    branches = ((MaxPool2d(2), AvgPool2d(2)), (MaxPool2d(2, return_indices=True),))
    checked = check_request(Request(TensorSpec("float32", (1, 2, 8, 8)), branches), LIMITS, engine.schedule)
    means = torch.nn.AvgPool2d(2)(torch.nn.MaxPool2d(2)(x))
    expected = [means, *torch.nn.MaxPool2d(2, return_indices=True)(x)]
    assert run(engine, checked, x.numpy().tobytes()) == [each.numpy().tobytes() for each in expected]


@pytest.mark.parametrize("layer", [FractionalMaxPool2d(2, 3, seed=2**64 - 1), FractionalMaxPool3d(2, 3)], ids=repr)
@pytest.mark.parametrize("first", [0, 1, 4, 5])
def test_a_fractional_layer_can_pool_planes_separately(engine, layer, first):
    """The layer for a tensor's planes from a number on has the same result as the layer for all of them."""
    x = np.random.default_rng(2).standard_normal((2, 3, *[7] * layer.spatial_dims)).astype(np.float32)
    flat = x.reshape(6, *x.shape[2:])
    expected = pool(engine, x, layer).reshape(6, *[3] * layer.spatial_dims)
    assert np.array_equal(pool(engine, flat[first:], layer.at_plane(first)), expected[first:])
    assert layer.at_plane(1).at_plane(first) == layer.at_plane(first + 1)


class LeftError(Exception):
    """The caller left."""


@pytest.mark.parametrize(
    "layers",
    [
        (MaxPool2d(3, 1, 1),),
        (LPPool2d(1.7, 3, 1),),
        (AvgPool2d(3, 1, 1), MaxPool2d(3, 1, 1), AdaptiveMaxPool2d(5)),
        (FractionalMaxPool2d(2, output_ratio=0.7, return_indices=True),),
    ],
    ids=repr,
)
def test_a_check_is_called_often_and_ends_an_execution(engine, layers):
    """It is called at least once for each layer and 20 ms of work, and what it raises is raised; then all goes on."""
    spec = TensorSpec("float32", (1, 512, 128, 100))
    checked = check_request(Request(spec, (layers, (MaxPool2d(2),))), WIDE, engine.schedule)
    made = engine.run(checked.schedule, bytes(spec.nbytes), len)
    expected = engine.execute([made])
    calls = []
    made.check = lambda: calls.append(None)
    assert engine.execute([made]) == expected
    assert len(calls) >= max(len(layers) + 1, checked.schedule.work / BLOCK_WORK)

    def leave():
        calls.append(None)
        if len(calls) == 3:
            raise LeftError

    calls.clear()
    made.check = leave
    if checked.schedule.work > 4 * BLOCK_WORK or len(layers) > 1:
        with pytest.raises(LeftError):
            engine.execute([made])
        assert len(calls) == 3
    made.check = None
    assert engine.execute([made]) == expected


def test_a_check_ends_an_execution_on_several_threads(engine, monkeypatch):
    """What it raises on any thread is raised, after the others have ended too, and the slots are released."""
    slots = Slots()
    monkeypatch.setattr(engine, "slots", slots)
    spec = TensorSpec("float32", (1, 512, 128, 100))
    made = engine.run(scheduled(engine, spec, LPPool2d(1.7, 2), limits=WIDE).schedule, bytes(spec.nbytes), len)
    main = threading.get_ident()

    def leave():
        if threading.get_ident() != main:
            raise LeftError

    made.check = leave
    with pytest.raises(LeftError):
        engine.execute([made])
    assert slots.borrowed == slots.released == 1


def test_a_check_is_not_called_for_a_batch_of_several(engine):
    """A batch is small, and one caller who leaves doesn't end it."""
    checked = scheduled(engine, SMALL, AvgPool2d(2))
    runs = [engine.run(checked.schedule, bytes(16), len) for _ in range(2)]
    for each in runs:
        each.check = pytest.fail
    assert engine.execute(runs) == [1, 1]


@pytest.mark.parametrize("dtype", ["float16", "float64"])
@pytest.mark.parametrize(
    "layer",
    [
        MaxUnpool2d(2),
        MaxPool3d(2, return_indices=True),
        AdaptiveAvgPool3d(3),
        FractionalMaxPool2d(2, 3, return_indices=True),
        LPPool2d(1.7, 2),
    ],
    ids=lambda layer: layer.name,
)
def test_one_channel_last_is_the_same_as_one_channel_first(dtype, layer):
    """A grey image with channels last has the outputs of one with channels first, whatever memory they are left in."""
    engine = Engine("cpu", 1, workspace_limit=0)
    for n, *plane in ((1, 5, 6, 8), (2, 8, 5, 6)):
        spatial = tuple(plane[3 - layer.spatial_dims :])
        payload = np.random.default_rng(0).standard_normal((n, *spatial)).astype(dtype).tobytes()
        if layer.operand == "indices":
            payload += np.arange(np.prod(spatial)).tobytes() * n
        answers = []
        for layout, shape in (("NCHW", (n, 1, *spatial)), ("NHWC", (n, *spatial, 1))):
            indices = TensorSpec("int64", shape, layout) if layer.operand == "indices" else None
            checked = scheduled(engine, TensorSpec(dtype, shape, layout), layer, indices=indices)
            answers.append(run(engine, checked, payload))
        assert answers[0] == answers[1]
    engine.close()
