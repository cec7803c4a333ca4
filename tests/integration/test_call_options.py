"""The priority and the metadata of a call, by either client, transport and method."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from poolrpc import InvalidArgumentError, MaxPool2d

if TYPE_CHECKING:
    from collections.abc import Callable

    from poolrpc import PoolClient
    from tests.integration.conftest import Connect

X = np.ones((1, 2, 4, 4), np.float32)

CALLS: dict[str, Callable[..., Any]] = {
    "pool": lambda client, **options: client.pool(X, MaxPool2d(2), **options),
    "stream": lambda client, **options: client.pool(X, MaxPool2d(2), transport="stream", **options),
    "arena": lambda client, **options: client.pool(X, MaxPool2d(2), transport="arena", **options),
    "pool_each": lambda client, **options: client.pool_each(X, [MaxPool2d(2)], **options)[0],
    "map": lambda client, **options: [*client.map([X] * 3, MaxPool2d(2), in_flight=1, **options)][-1],
}


@pytest.fixture
def client(connect: Connect, unix_address: str) -> PoolClient:
    """Return either client of the server, whose own metadata has an invalid priority."""
    return connect(unix_address, metadata=[("priority", "9"), ("other", "1")])


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize(
    "options",
    [{"priority": 0}, {"priority": 2}, {"metadata": {"priority": "0"}}, {"metadata": [("Priority", "1"), ("a", "b")]}],
    ids=repr,
)
def test_a_calls_own_priority_and_metadata_replace_the_clients(
    client: PoolClient, call: Callable[..., Any], options: dict[str, Any]
) -> None:
    """The server rejects the client's own priority, and takes the one of the call; the next call has the client's."""
    assert call(client, **options).shape == (1, 2, 2, 2)
    with pytest.raises(InvalidArgumentError, match=r"^metadata.priority: expected one of 0, 1, 2, got '9'"):
        call(client)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_what_a_call_sends_is_checked_by_name(client: PoolClient, call: Callable[..., Any]) -> None:
    """An invalid priority or metadata is rejected before anything is sent; the server rejects what it does not know."""
    for options, match in (
        ({"priority": 3}, "^priority: expected 0 to 2, got 3"),
        ({"priority": "0"}, "^priority: expected an integer"),
        ({"metadata": {"a": 1}}, "^metadata: expected printable ASCII text for 'a'"),
        ({"metadata": "a"}, "^metadata: expected a dict or pairs"),
        ({"metadata": {"priority": "7"}}, "^metadata.priority: expected one of 0, 1, 2, got '7'"),
    ):
        with pytest.raises(InvalidArgumentError, match=match):
            call(client, **options)


def test_an_iterator_of_pairs_is_sent_with_every_request_of_a_map(client: PoolClient) -> None:
    """It is read once, though a map sends several requests."""
    tensors = [np.ones((1, 2, 4 + i % 2, 4), np.float32) for i in range(6)]
    results = [*client.map(tensors, MaxPool2d(2), metadata=iter([("priority", "1")]))]
    assert [each.shape for each in results] == [(1, 2, 2, 2)] * 6


def test_every_other_call_takes_metadata(client: PoolClient) -> None:
    """output_shape, server_info and health take it too, and check it."""
    for call in (
        lambda **options: client.output_shape(X.shape, MaxPool2d(2), **options),
        client.server_info,
        client.health,
    ):
        assert call(metadata={"a": "b"})
        with pytest.raises(InvalidArgumentError, match=r"^metadata: "):
            call(metadata={"a": 1})
