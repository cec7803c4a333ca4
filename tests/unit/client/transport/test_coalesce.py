"""Many tensors as few requests: which travel together, what each gets of the answer, and in which order."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from poolrpc import (
    AvgPool2d,
    FractionalMaxPool2d,
    GlobalAvgPool,
    InternalError,
    InvalidArgumentError,
    LimitExceededError,
    LPPool2d,
    MaxPool1d,
    MaxPool2d,
    UnavailableError,
    UnsupportedError,
)
from poolrpc._transport import coalesce
from poolrpc._transport.coalesce import Group, Grouping, Order
from poolrpc._transport.transfer import PoolResult
from tests.unit.client.transport.peer import Peer

CHAIN = (MaxPool2d(2), MaxPool2d(2, return_indices=True))


@pytest.fixture(scope="module")
def peer():
    """A server of wide limits."""
    made = Peer()
    yield made
    made.close()


def tensor(*shape, dtype=np.float32):
    """Give a tensor of that shape, no cell like another."""
    return np.arange(np.prod(shape), dtype=dtype).reshape(shape)


def grouped(tensors, *layers, layout="NCHW"):
    """Give the tensors of each group."""
    return [list(group.tensors) for group in Grouping(layers or CHAIN, layout).over(tensors)]


def outcomes(peer, group):
    """Give what becomes of a group's tensors."""
    sent = group.transfer()
    return group.outcomes(sent.results(peer.unary(sent.message(2**30)))[0])


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
        ([OTHER_SIZE, tensor(8, 9), OTHER_SIZE], [1, 0, 1]),
        ([A, A, "no tensor", A], [2, 0, 1]),
        ([A, np.zeros(3, "complex64"), np.zeros(3, "complex64"), A], [1, 0, 0, 1]),
    ],
    ids=["none", "one", "alike", "plane size", "dtype", "no planes", "rank", "no tensor", "no such dtype"],
)
def test_tensors_that_follow_each_other_travel_together(tensors, sizes):
    """A group has one dtype and one plane size, whatever N and C; what can't be sent, and what is empty, is alone."""
    groups = grouped(tensors)
    assert [len(each) for each in groups] == sizes
    sent = [id(each) for group in groups for each in group]
    assert sent == [id(each) for each in tensors if isinstance(each, np.ndarray) and each.ndim > 2]


@pytest.mark.parametrize(
    ("most", "sizes"), [(10**9, [5]), (1600, [2, 2, 1]), (1536, [2, 2, 1]), (1535, [1] * 5), (1, [1] * 5)]
)
def test_a_group_is_of_so_many_bytes(monkeypatch, most, sizes):
    """Tensors of 768 bytes travel together up to a size; one that is larger travels alone."""
    monkeypatch.setattr(coalesce, "GROUP_BYTES", most)
    assert [len(each) for each in grouped([A] * 5)] == sizes


def test_groups_are_given_as_soon_as_they_are_complete():
    """A group waits for the tensor that doesn't belong to it, or for the end, and for nothing more."""
    grouping = Grouping(CHAIN, "NCHW")
    assert [list(grouping.add(each)) for each in (A, B)] == [[], []]
    (first,) = grouping.add(OTHER_SIZE)
    assert [len(each.tensors) for each in (first, *grouping.add("no tensor"))] == [2, 1, 0]
    assert list(grouping.finish()) == []
    assert list(grouping.add(A)) == []
    assert [len(each.tensors) for each in grouping.finish()] == [1]
    assert list(grouping.finish()) == []


def test_a_layer_that_tells_planes_apart_gets_each_tensor_alone():
    """A fractional layer's planes are counted from each tensor's first, so these never travel together."""
    fractional = FractionalMaxPool2d(2, 3)
    assert [len(each) for each in grouped([A, A, A], fractional)] == [1, 1, 1]
    assert [len(each) for each in grouped([A, A, A], MaxPool2d(2), fractional)] == [1, 1, 1]


def test_what_cannot_be_split_to_the_bit_goes_alone():
    """Torch's pow depends on where a cell is in its tensor, so tensors of an LPPool of a general norm go alone."""
    assert [len(each) for each in grouped([A, A, A], LPPool2d(3, 2))] == [1, 1, 1]
    assert [len(each) for each in grouped([A, A, A], LPPool2d(2, 2))] == [3]


def test_a_global_layer_has_the_tensors_own_rank():
    """Tensors of other ranks are other planes, and an unbatched one is taken as a batched one of fewer axes."""
    line, image = tensor(2, 3, 8), tensor(2, 3, 8, 8)
    assert [len(each) for each in grouped([line, line, image, image, line], GlobalAvgPool())] == [2, 2, 1]


async def numbered(tensors):
    """Give tensors as they come."""
    for each in tensors:
        yield each


async def test_both_kinds_of_iterable_are_grouped_alike():
    """Tensors from a list, a generator and an async generator make the same groups."""
    tensors = [A, B, OTHER_SIZE, "no tensor", EMPTY, C, A]
    expected = [[id(each) for each in group] for group in grouped(tensors)]
    for source in (tensors, iter(tensors), numbered(tensors)):
        groups = [group async for group in Grouping(CHAIN, "NCHW").over_async(source)]
        assert [[id(each) for each in group.tensors] for group in groups] == expected


def test_a_generator_is_read_no_farther_than_needed():
    """The next tensor is asked for when the groups before it were taken."""
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
def test_an_unknown_layout_is_refused_at_once(layout):
    """A layout is looked at before there are tensors."""
    with pytest.raises(InvalidArgumentError, match=r"^layout: "):
        Grouping(CHAIN, layout)


@given(
    st.lists(st.tuples(st.none() | st.integers(1, 3), st.integers(1, 4)), min_size=1, max_size=6),
    st.sampled_from(["NCHW", "NHWC"]),
    st.sampled_from([CHAIN, (AvgPool2d(3, 1),), (MaxPool2d(2, return_indices=True),)]),
)
def test_each_tensor_gets_what_it_would_get_alone(sizes, layout, chain):
    """Batched or not, of any N and C, in either layout: output, indices and every step's shape are the tensor's own."""
    channels = sizes[0][1]  # with channels last they are the plane's
    tensors = [
        tensor(*(() if n is None else (n,)), *((c, 8, 8) if layout == "NCHW" else (8, 8, channels))) + 1000 * i
        for i, (n, c) in enumerate(sizes)
    ]
    there = Peer()
    (group,) = Grouping(chain, layout).over(tensors)
    together = outcomes(there, group)
    assert len(there.calls) == 1
    for each, alone in zip(together, group.apart(), strict=True):
        (expected,) = outcomes(there, alone)
        assert each.shapes == expected.shapes
        assert np.array_equal(each.output, expected.output)
        assert (each.indices is None) == (expected.indices is None) == (not chain[-1].returns_indices)
        if each.indices is not None:
            assert np.array_equal(each.indices, expected.indices)
    there.close()


def test_a_result_is_apart_from_the_others_of_its_group(peer):
    """Writing to one output changes no other."""
    (group,) = Grouping(CHAIN, "NCHW").over([A, A, A])
    first, second, third = outcomes(peer, group)
    first.output[:], third.output[:] = -1, -1
    assert np.array_equal(second.output, outcomes(peer, group.apart()[0])[0].output)


def test_a_group_of_one_is_sent_as_it_is(peer):
    """A tensor that travels alone keeps its shape on the wire."""
    for each in (A, C, EMPTY):
        (group,) = Grouping(CHAIN, "NCHW").over([each])
        (result,) = outcomes(peer, group)
        assert tuple(peer.calls[-1].input.shape) == each.shape
        assert result.shape == (*each.shape[:-2], 2, 2)


@pytest.mark.parametrize(
    ("bad", "chain", "error"),
    [
        ("no tensor", CHAIN, InvalidArgumentError),
        (np.zeros((1, 1, 4, 4), "complex64"), CHAIN, UnsupportedError),
        (tensor(4, 4), CHAIN, InvalidArgumentError),
        (A, (MaxPool2d(2), MaxPool1d(2)), InvalidArgumentError),
    ],
    ids=["no tensor", "dtype", "rank", "layers"],
)
def test_what_cannot_be_sent_says_why_when_its_turn_comes(bad, chain, error):
    """The group of such a tensor has the failure, raises it in place of a request, and gives it as its one outcome."""
    (group,) = Grouping(chain, "NCHW").over([bad])
    assert isinstance(group.failure, error)
    with pytest.raises(error) as raised:
        group.transfer()
    assert [str(each) for each in group.failed(raised.value)] == [str(group.failure)]
    assert not group.blames(raised.value)


def test_a_failure_of_a_group_is_each_tensors_own():
    """Each tensor gets an error of its own, of the same class, reason and message."""
    group = Group([A, B], CHAIN, "NCHW")
    error = LimitExceededError("too large", reason="WORK_BUDGET", metadata={"limit": "1"})
    given_ = group.failed(error)
    assert len({id(each) for each in (error, *given_)}) == 3
    for each in given_:
        assert (type(each), str(each), each.reason, each.metadata) == (
            LimitExceededError,
            "too large",
            error.reason,
            error.metadata,
        )
    given_[0].tensor = 5
    assert given_[1].tensor is None


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
def test_one_tensor_may_be_to_blame_for_a_group(error, blamed):
    """An error that may be one tensor's makes the others worth another try; one of all of them, or of one, doesn't."""
    assert Group([A, B], CHAIN, "NCHW").blames(error) == blamed
    assert not Group([A], CHAIN, "NCHW").blames(error)
    assert [list(each.tensors) for each in Group([A, B], CHAIN, "NCHW").apart()] == [[A], [B]]


RESULTS = [PoolResult(tensor(1), ((i,),)) for i in range(3)]


def test_results_are_given_in_order():
    """Outcomes come one by one, and the bar moves when those of a group are taken."""
    order, moved = Order(return_exceptions=False), []
    assert list(order.give(RESULTS[:2], moved.append)) == RESULTS[:2]
    assert list(order.give(RESULTS[2:], moved.append)) == RESULTS[2:]
    assert moved == [2, 1]


def test_an_error_is_raised_in_its_turn_with_the_tensors_number():
    """The results before it come first; the error says which tensor it was, for programs and for people."""
    order, error = Order(return_exceptions=False), InvalidArgumentError("bad")
    list(order.give(RESULTS[:2], lambda _: None))
    giving = order.give([RESULTS[2], error], lambda _: None)
    assert next(giving) is RESULTS[2]
    with pytest.raises(InvalidArgumentError, match="bad") as raised:
        next(giving)
    assert raised.value.tensor == 3
    assert raised.value.__notes__ == ["tensor 3 of the map"]


def test_errors_are_given_in_place_of_results_where_they_are_asked_for():
    """An error stands where its tensor's result would, with the tensor's number, and the rest goes on."""
    order, error = Order(return_exceptions=True), InvalidArgumentError("bad")
    assert list(order.give([RESULTS[0], error, RESULTS[1]], lambda _: None)) == [RESULTS[0], error, RESULTS[1]]
    assert error.tensor == 1
    later = UnavailableError("gone")
    assert list(order.give([later], lambda _: None)) == [later]
    assert later.tensor == 3


def test_a_bar_is_shown_where_it_is_asked_for(capsys):
    """A bar tells how many of the tensors are done; without one, nothing is written."""
    for shown in (False, True):
        with coalesce.bar([A, B], shown=shown) as advance:
            advance(2)
        assert ("2/2" in capsys.readouterr().err) == shown
    with coalesce.bar(iter([A]), shown=True) as advance:
        advance(1)
    assert "1tensor" in capsys.readouterr().err.replace(" ", "")
