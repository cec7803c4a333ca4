"""The engine: devices, turns, and what becomes of a request's bytes."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from threading import Event

import numpy as np
import pytest
import torch

from poolrpc import (
    LAYERS,
    AvgPool2d,
    CancelledError,
    FractionalMaxPool2d,
    FractionalMaxPool3d,
    MaxPool2d,
    MaxUnpool1d,
)
from poolrpc.codec import Request
from poolrpc.tensors import TensorSpec
from poolrpc_server.engine import SHARED_BYTES, Engine, resolve_device
from poolrpc_server.validate import Limits, check_request

LIMITS = Limits(2**20, 64, 10**7)


@pytest.fixture(scope="module")
def engine():
    """An engine of two threads on the CPU."""
    made = Engine("cpu", 2)
    yield made
    made.close()


def wanted():
    """Tell that the caller still waits."""


def pool(engine, x, layer, indices=None, layout="NCHW"):
    """Run a layer on an array, and give the first of its outputs in the array's dtype."""
    spec = TensorSpec(x.dtype.name, x.shape, layout)
    second = None if indices is None else TensorSpec("int64", indices.shape, layout)
    payload = x.tobytes() + (b"" if indices is None else indices.tobytes())
    checked = check_request(Request(spec, ((layer,),), second), payload, LIMITS)
    return np.frombuffer(engine.run(checked, wanted)[0], x.dtype).reshape(checked.shapes[0][-1])


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


def test_what_nobody_waits_for_is_not_computed(engine):
    """A caller that has left when its turn comes ends the request, by the caller's own error."""

    def left():
        raise CancelledError("the caller left")

    spec = TensorSpec("float32", (1, 1, 2, 2))
    checked = check_request(Request(spec, ((MaxPool2d(2),),)), bytes(16), LIMITS)
    with pytest.raises(CancelledError, match="the caller left"):
        engine.run(checked, left)
    assert [bytes(piece) for piece in engine.run(checked, wanted)] == [bytes(4)]


def test_closing_finishes_what_was_submitted():
    """A request that is under way when the engine closes has its answer."""
    engine, started, going_on = Engine("cpu", 1), Event(), Event()

    def wait():
        started.set()
        going_on.wait()

    spec = TensorSpec("float32", (1, 1, 2, 2))
    checked = check_request(Request(spec, ((MaxPool2d(2),),)), bytes(16), LIMITS)
    with ThreadPoolExecutor(2) as callers:
        answer = callers.submit(engine.run, checked, wait)
        started.wait()
        closed = callers.submit(engine.close)
        assert not answer.done()
        going_on.set()
        assert [bytes(piece) for piece in answer.result()] == [bytes(4)]
        closed.result()


@pytest.mark.parametrize("cls", LAYERS.values())
def test_an_input_is_left_as_it_was(engine, cls):
    """No layer writes to a request's bytes, which it reads where they lie."""
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
    engine.run(check_request(Request(specs[0], ((layer,),), *specs[1:]), payload, LIMITS), wanted)
    assert payload == before


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
    x = np.random.default_rng(0).standard_normal((3, 61, 128, 100)).astype(np.float32)
    assert x.nbytes > SHARED_BYTES
    alone = Engine("cpu", 1)
    for layer in (MaxPool2d(3, 1, 1), MaxPool2d(3, 1, 1, return_indices=True), AvgPool2d(3, 1, 1)):
        spec = TensorSpec("float32", x.shape)
        checked = check_request(Request(spec, ((layer,),)), x.tobytes(), Limits(2**30, 64, 2**40))
        shared = [bytes(each) for each in engine.run(checked, wanted)]
        assert shared == [bytes(each) for each in alone.run(checked, wanted)]
    alone.close()


def test_large_calls_at_once_wait_for_no_ring(engine):
    """More large calls than threads, at the same time, all come to their end."""
    x = np.random.default_rng(0).standard_normal((1, 128, 128, 150)).astype(np.float32)
    checked = check_request(
        Request(TensorSpec("float32", x.shape), ((MaxPool2d(3, 1, 1),),)), x.tobytes(), Limits(2**30, 64, 2**40)
    )
    with ThreadPoolExecutor(8) as callers:
        answers = [callers.submit(engine.run, checked, wanted) for _ in range(24)]
        assert len({bytes(answer.result(60)[0]) for answer in answers}) == 1
