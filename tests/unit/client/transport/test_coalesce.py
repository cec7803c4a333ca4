"""Coalescing: which tensors are sent together, the part of the result that each gets, and the order of delivery."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from poolrpc import (
    AvgPool2d,
    FractionalMaxPool2d,
    InternalError,
    InvalidArgumentError,
    LimitExceededError,
    LPPool2d,
    MaxPool1d,
    MaxPool2d,
    PoolResult,
    UnavailableError,
    UnsupportedError,
)
from poolrpc._transport.coalesce import Group, Grouping, Order, progress_bar
from tests.unit.client.transport.peer import Peer, call_unary

CHAIN = (MaxPool2d(2), MaxPool2d(2, return_indices=True))


def tensor(*shape, dtype=np.float32):
    """Return a tensor of that shape whose elements all differ."""
    return np.arange(np.prod(shape), dtype=dtype).reshape(shape)


def grouped(tensors, *layers, **options):
    """Return the tensors of each group."""
    return [list(group.tensors) for group in Grouping(layers or CHAIN, "NCHW", **options).over(tensors)]


def outcomes(peer, group):
    """Return the outcomes of a group's tensors."""
    return group.outcomes(call_unary(peer, group.transfer())[0])


A, B, C = tensor(1, 3, 8, 8), tensor(2, 3, 8, 8), tensor(5, 8, 8)
OTHER_SIZE, OTHER_DTYPE, EMPTY = tensor(1, 3, 8, 9), tensor(1, 3, 8, 8, dtype=np.float64), tensor(0, 3, 8, 8)


@pytest.mark.parametrize(
    ("tensors", "sizes"),
    [
        ([], []),
        ([A], [1]),
        ([A, B, C, A], [4]),
        ([A, A, OTHER_SIZE, A], [2, 1, 1]),
        ([A, OTHER_DTYPE, OTHER_DTYPE, A], [1, 2, 1]),
        ([A, EMPTY, EMPTY, A, A], [1, 1, 1, 2]),
        ([OTHER_SIZE, tensor(8, 9), OTHER_SIZE], [1, 1, 1]),
        ([A, A, "not a tensor", A], [2, 0, 1]),
        ([A, np.zeros(3, "complex64"), np.zeros(3, "complex64"), A], [1, 0, 0, 1]),
    ],
    ids=["none", "one", "equal", "plane size", "dtype", "no planes", "rank", "not a tensor", "unknown dtype"],
)
def test_consecutive_tensors_are_grouped(tensors, sizes):
    """A group has one dtype and one plane size, with any N and C; invalid and empty tensors are alone."""
    groups = grouped(tensors)
    assert [len(each) for each in groups] == sizes
    sent = [id(each) for group in groups for each in group]
    assert sent == [id(each) for each in tensors if isinstance(each, np.ndarray) and each.ndim > 1]


@pytest.mark.parametrize(
    ("group_bytes", "sizes"), [(10**9, [5]), (1600, [2, 2, 1]), (1536, [2, 2, 1]), (1535, [1] * 5), (1, [1] * 5)]
)
def test_the_size_of_a_group_is_limited(group_bytes, sizes):
    """Tensors of 768 bytes are grouped up to the limit; a larger tensor is alone."""
    assert [len(each) for each in grouped([A] * 5, group_bytes=group_bytes)] == sizes


def test_a_group_is_returned_when_it_is_complete():
    """A group is complete when the next tensor does not belong to it, or at the end."""
    grouping = Grouping(CHAIN, "NCHW")
    assert [list(grouping.add(each)) for each in (A, B)] == [[], []]
    (first,) = grouping.add(OTHER_SIZE)
    assert [len(each.tensors) for each in (first, *grouping.add("not a tensor"))] == [2, 1, 0]
    assert list(grouping.finish()) == []
    assert list(grouping.add(A)) == []
    assert [len(each.tensors) for each in grouping.finish()] == [1]
    assert list(grouping.finish()) == []


def test_tensors_of_a_layer_that_numbers_planes_are_alone():
    """A fractional layer numbers planes from each tensor's first, so its tensors are never grouped."""
    fractional = FractionalMaxPool2d(2, 3)
    assert [len(each) for each in grouped([A, A, A], fractional)] == [1, 1, 1]
    assert [len(each) for each in grouped([A, A, A], MaxPool2d(2), fractional)] == [1, 1, 1]


def test_tensors_of_an_unsplittable_layer_are_alone():
    """Torch's pow depends on the position in a tensor, so tensors of an LPPool of a general norm are not grouped."""
    assert [len(each) for each in grouped([A, A, A], LPPool2d(3, 2))] == [1, 1, 1]
    assert [len(each) for each in grouped([A, A, A], LPPool2d(2, 2))] == [3]


async def async_iterator(tensors):
    """Yield the tensors."""
    for each in tensors:
        yield each


async def test_every_kind_of_iterable_is_grouped_equally():
    """Tensors from a list, a generator and an async generator make the same groups."""
    tensors = [A, B, OTHER_SIZE, "not a tensor", EMPTY, C, A]
    expected = [[id(each) for each in group] for group in grouped(tensors)]
    for source in (tensors, iter(tensors), async_iterator(tensors)):
        groups = [group async for group in Grouping(CHAIN, "NCHW").over_async(source)]
        assert [[id(each) for each in group.tensors] for group in groups] == expected


def test_a_generator_is_read_only_as_far_as_needed():
    """The next tensor is read when the groups before it have been taken."""
    read = []

    def source():
        for each in (A, OTHER_SIZE, A, OTHER_SIZE):
            read.append(each)
            yield each

    groups = Grouping(CHAIN, "NCHW").over(source())
    assert read == []
    next(groups)
    assert len(read) == 2
    next(groups)
    assert len(read) == 3


@pytest.mark.parametrize("layout", ["nchw", "", None])
def test_an_unknown_layout_is_rejected_at_once(layout):
    """The layout is checked before there are tensors."""
    with pytest.raises(InvalidArgumentError, match=r"^layout: "):
        Grouping(CHAIN, layout)


@given(
    st.lists(st.tuples(st.none() | st.integers(1, 3), st.integers(1, 4)), min_size=1, max_size=6),
    st.sampled_from(["NCHW", "NHWC"]),
    st.sampled_from([CHAIN, (AvgPool2d(3, 1),), (MaxPool2d(2, return_indices=True),)]),
)
def test_each_tensor_has_the_result_of_a_call_of_its_own(sizes, layout, chain):
    """The output, the indices and the shapes are those of a single call, for any N and C, in either layout."""
    channels = sizes[0][1]  # with channels last, a plane has all channels
    tensors = [
        tensor(*(() if n is None else (n,)), *((c, 8, 8) if layout == "NCHW" else (8, 8, channels))) + 1000 * i
        for i, (n, c) in enumerate(sizes)
    ]
    peer = Peer()
    (group,) = Grouping(chain, layout).over(tensors)
    together = outcomes(peer, group)
    assert len(peer.calls) == 1
    for each, alone in zip(together, group.split(), strict=True):
        (expected,) = outcomes(peer, alone)
        assert each.shapes == expected.shapes
        assert np.array_equal(each.output, expected.output)
        assert (each.indices is None) == (expected.indices is None) == (not chain[-1].returns_indices)
        if each.indices is not None:
            assert np.array_equal(each.indices, expected.indices)
    peer.close()


def test_results_of_a_group_do_not_overlap(peer):
    """Writing to one output changes no other."""
    (group,) = Grouping(CHAIN, "NCHW").over([A, A, A])
    first, second, third = outcomes(peer, group)
    first.output[:], third.output[:] = -1, -1
    assert np.array_equal(second.output, outcomes(peer, group.split()[0])[0].output)


def test_a_single_tensor_is_sent_unchanged(peer):
    """A tensor that is not grouped keeps its shape in the request."""
    for each in (A, C, EMPTY):
        (group,) = Grouping(CHAIN, "NCHW").over([each])
        (result,) = outcomes(peer, group)
        assert tuple(peer.calls[-1].input.shape) == each.shape
        assert result.shape == (*each.shape[:-2], 2, 2)


@pytest.mark.parametrize(
    ("invalid", "chain", "error"),
    [
        ("not a tensor", CHAIN, InvalidArgumentError),
        (np.zeros((1, 1, 4, 4), "complex64"), CHAIN, UnsupportedError),
        (tensor(4, 4), CHAIN, InvalidArgumentError),
        (A, (MaxPool2d(2), MaxPool1d(2)), InvalidArgumentError),
    ],
    ids=["not a tensor", "dtype", "rank", "layers"],
)
def test_an_invalid_tensor_is_a_group_with_its_error(invalid, chain, error):
    """The group raises the error instead of making a request, and has it as its only outcome."""
    (group,) = Grouping(chain, "NCHW").over([invalid])
    with pytest.raises(error) as raised:
        group.transfer()
    assert [str(each) for each in group.failed(raised.value)] == [str(raised.value)]
    assert not group.may_be_one_tensors_fault(raised.value)


def test_each_tensor_of_a_group_has_its_own_error():
    """The errors are independent, with the same class, reason and message."""
    group = Group([A, B], CHAIN, "NCHW")
    error = LimitExceededError("too large", reason="WORK_BUDGET", metadata={"limit": "1"})
    errors = group.failed(error)
    assert len({id(each) for each in (error, *errors)}) == 3
    for each in errors:
        assert (type(each), str(each), each.reason, each.metadata) == (
            LimitExceededError,
            "too large",
            error.reason,
            error.metadata,
        )
    errors[0].tensor = 5
    assert errors[1].tensor is None


@pytest.mark.parametrize(
    ("error", "blamed"),
    [
        (InvalidArgumentError("x"), True),
        (LimitExceededError("x"), True),
        (InternalError("x"), True),
        (UnavailableError("x"), False),
        (UnsupportedError("x"), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_that_one_tensor_may_cause_splits_the_group(error, blamed):
    """Other errors, and those of a single tensor, are final."""
    assert Group([A, B], CHAIN, "NCHW").may_be_one_tensors_fault(error) == blamed
    assert not Group([A], CHAIN, "NCHW").may_be_one_tensors_fault(error)
    assert [list(each.tensors) for each in Group([A, B], CHAIN, "NCHW").split()] == [[A], [B]]


RESULTS = [PoolResult(tensor(1), ((i,),)) for i in range(3)]


def test_results_are_delivered_in_order():
    """The progress bar advances when the results of a group have been taken."""
    order, advanced = Order(return_exceptions=False), []
    assert list(order.deliver(RESULTS[:2], advanced.append)) == RESULTS[:2]
    assert list(order.deliver(RESULTS[2:], advanced.append)) == RESULTS[2:]
    assert advanced == [2, 1]


def test_an_error_is_raised_in_order_with_the_number_of_its_tensor():
    """The results before it are delivered first; the number is an attribute and a note."""
    order, error = Order(return_exceptions=False), InvalidArgumentError("bad")
    list(order.deliver(RESULTS[:2], lambda _: None))
    delivery = order.deliver([RESULTS[2], error], lambda _: None)
    assert next(delivery) is RESULTS[2]
    with pytest.raises(InvalidArgumentError, match="bad") as raised:
        next(delivery)
    assert raised.value.tensor == 3
    assert raised.value.__notes__ == ["tensor 3 of the map"]


def test_errors_are_delivered_in_place_of_results_if_requested():
    """The error has the number of its tensor, and the next results follow."""
    order, error = Order(return_exceptions=True), InvalidArgumentError("bad")
    assert list(order.deliver([RESULTS[0], error, RESULTS[1]], lambda _: None)) == [RESULTS[0], error, RESULTS[1]]
    assert error.tensor == 1
    later = UnavailableError("gone")
    assert list(order.deliver([later], lambda _: None)) == [later]
    assert later.tensor == 3


def test_a_progress_bar_is_shown_if_requested(capsys):
    """The bar shows how many tensors are done; otherwise nothing is written."""
    for shown in (False, True):
        with progress_bar([A, B], shown=shown) as advance:
            advance(2)
        assert ("2/2" in capsys.readouterr().err) == shown
    with progress_bar(iter([A]), shown=True) as advance:
        advance(1)
    assert "1tensor" in capsys.readouterr().err.replace(" ", "")
