"""The engine: devices, turns, and what becomes of a request's bytes."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields

import numpy as np
import pytest
import torch

from poolrpc import (
    LAYERS,
    AvgPool2d,
    FractionalMaxPool2d,
    FractionalMaxPool3d,
    InvalidArgumentError,
    MaxPool2d,
    MaxUnpool1d,
)
from poolrpc._wire.codec import Request
from poolrpc.tensors import TensorSpec, split_tensors
from poolrpc_server.calls.validate import Limits, check_request
from poolrpc_server.compute.buffers import aligned
from poolrpc_server.compute.engine import PARALLEL_BYTES, Engine, resolve_device

LIMITS = Limits(2**20, 2**20, 64, 10**7)
WIDE = Limits(2**40, 2**40, 64, 2**40)


@pytest.fixture(scope="module")
def engine():
    """An engine of two threads on the CPU."""
    made = Engine("cpu", 2)
    yield made
    made.close()


def scheduled(engine, spec, *layers, indices=None, limits=LIMITS):
    """Give a request that was checked, each layer a branch of its own."""
    return check_request(Request(spec, tuple((layer,) for layer in layers), indices), limits, engine.schedule)


def run(engine, checked, payload, finish=None):
    """Run a request, and give copies of its outputs' bytes, or what is made of them."""
    return engine.execute([engine.run(checked.schedule, payload, finish or copied)])[0]


def copied(outputs):
    """Give copies of outputs' bytes."""
    return [bytes(each) for each in outputs]


def pool(engine, x, layer, indices=None, layout="NCHW"):
    """Run a layer on an array, and give the first of its outputs in the array's dtype."""
    spec = TensorSpec(x.dtype.name, x.shape, layout)
    second = None if indices is None else TensorSpec("int64", indices.shape, layout)
    payload = x.tobytes() + (b"" if indices is None else indices.tobytes())
    checked = scheduled(engine, spec, layer, indices=second)
    return np.frombuffer(run(engine, checked, payload)[0], x.dtype).reshape(checked.results[0].output.shape)


SMALL = TensorSpec("float32", (1, 1, 2, 2))


@pytest.mark.parametrize("name", ["nope", "", "cpu:x", "meta", "cuda:99", "-1", "CPU", "x" * 1000])
def test_a_device_that_is_not_here_is_refused_in_one_line(name):
    """A name that torch doesn't know, and a device that this machine lacks, are refused with the name."""
    with pytest.raises(ValueError, match=f"^device: expected auto or a device .*got '{name}': ") as raised:
        resolve_device(name)
    assert "\n" not in str(raised.value)


def test_auto_is_the_first_device_there_is():
    """A machine has a GPU that torch can use, or the CPU."""
    gpu = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert resolve_device("auto").type == gpu
    assert resolve_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("cls", LAYERS.values())
def test_an_input_is_left_as_it_was(engine, cls):
    """No layer writes to a request's bytes, which it reads where they lie; the answer is that of any other way."""
    dims = cls.spatial_dims or 2
    arguments = {"kernel_size": 1, "norm_type": 2.0, "output_size": 2, "return_indices": True}
    if cls.takes_indices:
        del arguments["output_size"]
    names = {each.name for each in fields(cls)}
    layer = cls(**{name: value for name, value in arguments.items() if name in names})
    x = np.random.default_rng(0).standard_normal((2, 3, *[4] * dims)).astype(np.float32)
    indices = np.tile(np.arange(4**dims).reshape([4] * dims), (2, 3, *[1] * dims)) if cls.takes_indices else None
    specs = [TensorSpec("float32", x.shape), *([TensorSpec("int64", x.shape)] if cls.takes_indices else [])]
    payload = x.tobytes() + (b"" if indices is None else indices.tobytes())
    before = bytearray(payload)
    checked = scheduled(engine, specs[0], layer, indices=specs[1] if cls.takes_indices else None)
    outputs = [aligned(spec.nbytes) for spec in checked.outputs]
    engine.execute([engine.run_in_place(checked.schedule, split_tensors(payload, specs), outputs)])
    assert payload == before
    assert [bytes(each) for each in outputs] == run(engine, checked, payload)


def test_indices_need_no_alignment(engine):
    """Indices behind an input of an odd number of bytes are read all the same."""
    x, indices = np.array([[[1, 2, 3]]], np.float16), np.array([[[5, 0, 2]]])
    assert pool(engine, x, MaxUnpool1d(2), indices).tolist() == [[[2, 0, 3, 0, 0, 1]]]


@pytest.mark.parametrize("layer", [FractionalMaxPool2d(2, 3, seed=5), FractionalMaxPool3d(2, 3, seed=5)], ids=repr)
def test_a_seed_gives_a_plane_the_same_output_however_it_travels(engine, layer):
    """Another N and C, no batch, the other layout, and planes behind it change nothing for a plane of that number."""
    x = np.random.default_rng(1).standard_normal((2, 3, *[7] * layer.spatial_dims)).astype(np.float32)
    expected = pool(engine, x, layer)
    flat = x.reshape(6, *x.shape[2:])
    assert np.array_equal(pool(engine, flat, layer).reshape(expected.shape), expected)
    assert np.array_equal(pool(engine, x[:1], layer), expected[:1])
    last = np.ascontiguousarray(np.moveaxis(x, 1, -1))
    assert np.array_equal(np.moveaxis(pool(engine, last, layer, layout="NHWC"), -1, 1), expected)
    assert not np.array_equal(pool(engine, x, type(layer)(2, 3, seed=6)), expected)


def test_a_large_call_is_shared_with_idle_threads(engine):
    """Planes that two threads compute together are those that one computes, indices too."""
    x = np.random.default_rng(0).standard_normal((7, 61, 128, 100)).astype(np.float32)
    assert x.nbytes > PARALLEL_BYTES
    alone = Engine("cpu", 1)
    for layer in (MaxPool2d(3, 1, 1), MaxPool2d(3, 1, 1, return_indices=True), AvgPool2d(3, 1, 1)):
        spec = TensorSpec("float32", x.shape)
        shared, single = (run(each, scheduled(each, spec, layer, limits=WIDE), x.tobytes()) for each in (engine, alone))
        assert shared == single
    alone.close()


def test_large_calls_at_once_wait_for_no_ring(engine):
    """More large calls than threads, at the same time, all come to their end."""
    x = np.random.default_rng(0).standard_normal((1, 128, 128, 170)).astype(np.float32)
    checked, payload = scheduled(engine, TensorSpec("float32", x.shape), MaxPool2d(3, 1, 1), limits=WIDE), x.tobytes()
    with ThreadPoolExecutor(8) as callers:
        answers = [callers.submit(run, engine, checked, payload) for _ in range(24)]
        assert len({answer.result(60)[0] for answer in answers}) == 1


LARGE = TensorSpec("float32", (1, 16, 128, 64))


@pytest.mark.parametrize("spec", [SMALL, LARGE], ids=["small", "large"])
def test_answers_that_are_read_at_a_time_lie_apart(engine, spec):
    """A request that runs again while its last answer is still read gives memory of its own, then the same again."""
    checked = scheduled(engine, spec, MaxPool2d(2))
    ones, twos = (np.full(spec.shape, value, np.float32).tobytes() for value in (1, 2))
    for _ in range(3):

        def read_beside(first):
            ((second,), (first,)) = run(engine, checked, twos), copied(first)
            return first, second

        first, second = run(engine, checked, ones, read_beside)
        assert set(np.frombuffer(first, np.float32)) == {1}
        assert set(np.frombuffer(second, np.float32)) == {2}


def test_memory_is_used_again(engine):
    """The next run of a kernel has the memory of the one before."""
    checked = scheduled(engine, LARGE, MaxPool2d(2))
    places = set()
    for _ in range(5):
        payload = bytes(LARGE.nbytes)
        places.add(run(engine, checked, payload, lambda outputs: np.asarray(outputs[0]).ctypes.data))
    assert len(places) == 1


def test_small_memory_that_another_call_takes_first_is_not_missed(engine):
    """Calls of one request may look for idle memory at the same time; who finds none left makes some."""

    class Taken(list):
        """What seems to have an item, as a list does to one who looks before another takes its last."""

        def __bool__(self):
            return True

    checked = scheduled(engine, SMALL, MaxPool2d(2))
    checked.schedule.workspaces = Taken()
    assert run(engine, checked, bytes(16)) == [bytes(4)]


@pytest.mark.parametrize("spec", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("change", [-1, 1])
def test_a_payload_of_another_length_is_refused(engine, spec, change):
    """A byte more or fewer than the spec says is the payload's fault."""
    checked = scheduled(engine, spec, MaxPool2d(2))
    length = spec.nbytes + change
    with pytest.raises(InvalidArgumentError, match=rf"^payload: expected {spec.nbytes} bytes .*got {length}$"):
        run(engine, checked, bytes(length))


def test_a_chain_and_its_branches_are_torchs(engine):
    """Each branch of a request starts from the input, and each layer from what the one before gave."""
    x = torch.arange(128, dtype=torch.float32).reshape(1, 2, 8, 8)
    branches = ((MaxPool2d(2), AvgPool2d(2)), (MaxPool2d(2, return_indices=True),))
    checked = check_request(Request(TensorSpec("float32", (1, 2, 8, 8)), branches), LIMITS, engine.schedule)
    means = torch.nn.AvgPool2d(2)(torch.nn.MaxPool2d(2)(x))
    expected = [means, *torch.nn.MaxPool2d(2, return_indices=True)(x)]
    assert run(engine, checked, x.numpy().tobytes()) == [each.numpy().tobytes() for each in expected]


@pytest.mark.parametrize("layer", [FractionalMaxPool2d(2, 3, seed=2**64 - 1), FractionalMaxPool3d(2, 3)], ids=repr)
@pytest.mark.parametrize("first", [0, 1, 4, 5])
def test_a_fractional_layer_pools_planes_apart_as_in_their_tensor(engine, layer, first):
    """The layer for a tensor's planes from some number on gives what the layer gives for all of them."""
    x = np.random.default_rng(2).standard_normal((2, 3, *[7] * layer.spatial_dims)).astype(np.float32)
    flat = x.reshape(6, *x.shape[2:])
    expected = pool(engine, x, layer).reshape(6, *[3] * layer.spatial_dims)
    assert np.array_equal(pool(engine, flat[first:], layer.at_plane(first)), expected[first:])
    assert layer.at_plane(1).at_plane(first) == layer.at_plane(first + 1)
