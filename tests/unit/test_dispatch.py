"""One call through admission, validation and the engine, as a door hands it over."""

import numpy as np
import pytest
import torch

from poolrpc import (
    AvgPool2d,
    CancelledError,
    DeadlineExceededError,
    InvalidArgumentError,
    MaxPool2d,
    ServerInfo,
    UnavailableError,
    UnsupportedError,
)
from poolrpc.codec import BranchResult, Request
from poolrpc.tensors import TensorSpec
from poolrpc_server.admission import Admission
from poolrpc_server.dispatch import Call, Dispatcher
from poolrpc_server.engine import Engine
from poolrpc_server.validate import Limits

INFO = ServerInfo("0", "0", "cpu", 1, {}, {})
X = np.arange(32, dtype=np.float32).reshape(1, 2, 4, 4)
INPUT, PAYLOAD = TensorSpec("float32", X.shape), X.tobytes()
HALVED = BranchResult(((1, 2, 2, 2),), TensorSpec("float32", (1, 2, 2, 2)))


@pytest.fixture(scope="module")
def engine():
    """An engine of one thread on the CPU."""
    made = Engine("cpu", 1)
    yield made
    made.close()


@pytest.fixture
def admission():
    """An admission of 1000 bytes."""
    return Admission(1000)


@pytest.fixture
def dispatcher(admission, engine):
    """A dispatcher with both."""
    return Dispatcher(Limits(2**20, 64, 10**6), admission, engine, INFO)


def call(*branches, spec=INPUT, payload=PAYLOAD, remaining=lambda: None, active=lambda: True):
    """Give a call as a door makes it."""
    return Call(Request(spec, branches), payload, remaining, active)


def test_a_call_is_answered_with_specs_and_bytes_in_order(dispatcher):
    """Each branch has its shapes, its output and its indices; the bytes follow each other in that order."""
    results, payload = dispatcher.pool(call((MaxPool2d(2, return_indices=True),), (AvgPool2d(2), AvgPool2d(2))))
    indices = TensorSpec("int64", (1, 2, 2, 2))
    assert results == [
        BranchResult(HALVED.shapes, HALVED.output, indices),
        BranchResult(((1, 2, 2, 2), (1, 2, 1, 1)), TensorSpec("float32", (1, 2, 1, 1))),
    ]
    x = torch.from_numpy(X)
    values, places = torch.nn.MaxPool2d(2, return_indices=True)(x)
    means = torch.nn.AvgPool2d(2)(torch.nn.AvgPool2d(2)(x))
    assert payload == b"".join(part.numpy().tobytes() for part in (values, places, means))


def test_a_channels_last_call_is_answered_in_its_layout(dispatcher):
    """The specs and the bytes of the answer have the layout of the input."""
    last = np.ascontiguousarray(np.moveaxis(X, 1, -1))
    spec = TensorSpec("float32", last.shape, "NHWC")
    results, payload = dispatcher.pool(call((MaxPool2d(2),), spec=spec, payload=last.tobytes()))
    assert results == [BranchResult(((1, 2, 2, 2),), TensorSpec("float32", (1, 2, 2, 2), "NHWC"))]
    expected = np.moveaxis(torch.nn.MaxPool2d(2)(torch.from_numpy(X)).numpy(), 1, -1)
    assert payload == expected.tobytes()


@pytest.mark.parametrize("left", [0.0, -1.0])
def test_a_call_past_its_deadline_is_not_computed(dispatcher, left):
    """A call whose time is up on arrival, or in its turn, ends with its deadline."""
    with pytest.raises(DeadlineExceededError, match="before the call was computed"):
        dispatcher.pool(call((MaxPool2d(2),), remaining=lambda: left))
    times = iter([5.0, left])
    with pytest.raises(DeadlineExceededError, match="before the call was computed"):
        dispatcher.pool(call((MaxPool2d(2),), remaining=lambda: next(times)))


def test_a_call_whose_caller_left_is_not_computed(dispatcher):
    """A caller that went away before the call's turn is not computed for."""
    there = iter([True, False])
    with pytest.raises(CancelledError, match="before the call was computed"):
        dispatcher.pool(call((MaxPool2d(2),), active=lambda: next(there)))


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (call((MaxPool2d(5),)), InvalidArgumentError),
        (call((MaxPool2d(2),), payload=b""), InvalidArgumentError),
        (call((AvgPool2d(2),), spec=TensorSpec("int8", (1, 2, 4, 4))), UnsupportedError),
        (call((MaxPool2d(2),), remaining=iter([5.0, 0.0]).__next__), DeadlineExceededError),
    ],
    ids=["layer", "payload", "dtype", "deadline"],
)
def test_what_fails_holds_no_bytes(dispatcher, admission, bad, error):
    """A call that was refused or not computed leaves room for the next."""
    with pytest.raises(error):
        dispatcher.pool(bad)
    with admission.hold(1000), pytest.raises(UnavailableError), admission.hold(1):
        pytest.fail("more bytes than the limit were admitted")


@pytest.mark.parametrize(("held", "room"), [(872, False), (841, False), (840, True)])
def test_inputs_and_outputs_count_beside_other_calls(dispatcher, admission, held, room):
    """A call of 128 bytes with 32 bytes of output needs 160 beside what is under way; without, it may come again."""
    with admission.hold(held):
        if room:
            assert dispatcher.pool(call((MaxPool2d(2),)))[0] == [HALVED]
            return
        with pytest.raises(UnavailableError) as raised:
            dispatcher.pool(call((MaxPool2d(2),)))
    assert raised.value.reason == "IN_FLIGHT_BYTES"
    assert raised.value.retry_delay > 0


@pytest.mark.parametrize("limit", [1, 100, 128, 159])
def test_alone_a_call_of_any_size_is_served(engine, limit):
    """A call that is over the limit by itself, or with its output, is served where nothing else is under way."""
    dispatcher = Dispatcher(Limits(2**20, 64, 10**6), Admission(limit), engine, INFO)
    assert dispatcher.pool(call((MaxPool2d(2),)))[0] == [HALVED]


def test_shapes_are_answered_without_a_payload(dispatcher):
    """A question about shapes is answered by the same rules, and computes nothing."""
    assert dispatcher.shapes((1, 2, 4, 4), [(MaxPool2d(2), AvgPool2d(2))], "NCHW") == [((1, 2, 2, 2), (1, 2, 1, 1))]
    with pytest.raises(InvalidArgumentError, match=r"^branches\[0\]\.layers\[0\]\.max_pool\.kernel_size: "):
        dispatcher.shapes((1, 2, 4, 4), [(MaxPool2d(5),)], "NCHW")
