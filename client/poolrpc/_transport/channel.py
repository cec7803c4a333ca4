"""The methods that a client calls, and the settings of its channels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from poolrpc._shapes.parameters import integer
from poolrpc._shapes.rules import clip
from poolrpc._version import __version__
from poolrpc.errors import InvalidArgumentError
from poolrpc.v1 import pool_pb2, standard_pb2

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import grpc

POOL_SERVICE = "poolrpc.v1.PoolService"
POOL = f"{POOL_SERVICE}/Pool"
POOL_STREAM = f"{POOL_SERVICE}/PoolStream"
INFER_SHAPE = f"{POOL_SERVICE}/InferShape"
GET_SERVER_INFO = f"{POOL_SERVICE}/GetServerInfo"
HEALTH_CHECK = "grpc.health.v1.Health/Check"

MAX_ATTEMPTS = 5
"""The number of times that a call is sent at most."""

FIRST_BACKOFF, MAX_BACKOFF = 0.1, 2.0
"""The first and the longest time between two attempts, in seconds; each is twice as long as the one before."""

MAX_RETRY_TOKENS, RETRY_TOKEN_RATIO = 1000, 0.5
"""The budget of retries: a failure takes a token, a success returns this part of one, and below half there are none."""

SERVICE_CONFIG = {
    "loadBalancingConfig": [{"round_robin": {}}],
    # Pooling changes nothing on the server, so gRPC retries a call that finds it full, draining or gone. A gRPC server
    # that stops answers CANCELLED to calls that it has not started (github.com/grpc/grpc/issues/41785); a call that
    # this client cancels is not retried. Streams have retries of their own, in poolrpc._transport.stream.
    "methodConfig": [
        {
            "name": [
                *({"service": POOL_SERVICE, "method": method} for method in ("Pool", "InferShape", "GetServerInfo")),
                {"service": HEALTH_CHECK.partition("/")[0]},
            ],
            "retryPolicy": {
                "maxAttempts": MAX_ATTEMPTS,
                "initialBackoff": f"{FIRST_BACKOFF}s",
                "maxBackoff": f"{MAX_BACKOFF}s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"],
            },
        }
    ],
    # No retries while most attempts fail. The budget is large, because a server process that dies may fail hundreds of
    # calls at once, which should all be retried.
    "retryThrottling": {"maxTokens": MAX_RETRY_TOKENS, "tokenRatio": RETRY_TOKEN_RATIO},
}


NO_PROXY = {
    "grpc.enable_http_proxy": 0,
    # The proxy of GRPC_ADDRESS_HTTP_PROXY has a switch of its own: the addresses that use it, here none.
    "grpc.address_http_proxy_enabled_addresses": "",
}
"""The arguments of a channel that ignores the proxies of the environment (http_proxy and others)."""

PROXY_OPTIONS = ("grpc.enable_http_proxy", "grpc.http_proxy", "grpc.address_http_proxy")
"""The arguments with which a user may ask for a proxy."""


def channel_arguments(
    options: Mapping[str, Any] | Iterable[tuple[str, Any]],
    max_message_bytes: int,
    *,
    is_local: bool,
    has_plain_token: bool,
) -> list[tuple[str, Any]]:
    """Return the arguments of a channel.

    Args:
        options: The user's arguments, which override those of this function.
        max_message_bytes: The largest message, in bytes, in each direction.
        is_local: Whether the address only leads to this machine; no proxy is used then.
        has_plain_token: Whether the calls have a token and no TLS; no proxy, which could read the token, is used then.

    Raises:
        InvalidArgumentError: An argument is not one that gRPC takes, or asks for a proxy in spite of a plain token.

    """
    own = check_options(options)
    if has_plain_token and (found := [name for name in PROXY_OPTIONS if own.get(name)]):
        msg = f"expected TLS to send a token through a proxy, which could read it, got plaintext and {found[0]}"
        raise InvalidArgumentError(msg, field="options")
    import json  # noqa: PLC0415 - keeps `import poolrpc` fast

    arguments = {
        "grpc.max_send_message_length": max_message_bytes,
        "grpc.max_receive_message_length": max_message_bytes,
        "grpc.service_config": json.dumps(SERVICE_CONFIG),
        # gRPC only retries a call whose message it has kept; its default is 256 KB.
        "grpc.per_rpc_retry_buffer_size": max_message_bytes,
        # With gRPC's defaults, an attempt that fails at the socket of a worker that is stopping is followed by a second
        # without any attempt; and a server that has restarted is found after up to two minutes.
        "grpc.initial_reconnect_backoff_ms": 100,
        "grpc.max_reconnect_backoff_ms": 5000,
        "grpc.primary_user_agent": f"poolrpc/{__version__}",
        **(NO_PROXY if is_local or has_plain_token else {}),
        **own,
    }
    return list(arguments.items())


def check_options(options: object) -> dict[str, Any]:
    """Return channel arguments as a dict of values that gRPC takes.

    Raises:
        InvalidArgumentError: They are something else.

    """
    try:
        own: dict[str, Any] = dict(options)  # type: ignore[call-overload]  # TypeError and ValueError are caught
    except (TypeError, ValueError):
        msg = f"expected a dict or pairs, got {clip(options)}"
        raise InvalidArgumentError(msg, field="options") from None
    for name, value in own.items():
        if not isinstance(name, str):
            raise InvalidArgumentError(f"expected names of gRPC's channel arguments, got {clip(name)}", field="options")
        if isinstance(value, str | bytes):
            continue
        # gRPC takes an int of 32 bits; a bool, and an integer of NumPy, are converted.
        own[name] = integer(f"options[{name!r}]", int(value) if isinstance(value, bool) else value, -(2**31), 2**31 - 1)
    return own


def unary_methods(channel: Any) -> dict[str, Any]:  # noqa: ANN401 - a channel of grpc or grpc.aio
    """Return the unary methods of a channel, by name."""
    return {
        # Messages with payloads are framed by poolrpc._wire.framing, so gRPC gets their bytes as they are.
        POOL: channel.unary_unary(f"/{POOL}"),
        INFER_SHAPE: channel.unary_unary(
            f"/{INFER_SHAPE}",
            pool_pb2.InferShapeRequest.SerializeToString,
            pool_pb2.InferShapeResponse.FromString,
        ),
        GET_SERVER_INFO: channel.unary_unary(
            f"/{GET_SERVER_INFO}",
            pool_pb2.GetServerInfoRequest.SerializeToString,
            pool_pb2.GetServerInfoResponse.FromString,
        ),
        HEALTH_CHECK: channel.unary_unary(
            f"/{HEALTH_CHECK}",
            standard_pb2.HealthCheckRequest.SerializeToString,
            standard_pb2.HealthCheckResponse.FromString,
        ),
    }


def stream_method(channel: grpc.Channel) -> grpc.StreamStreamMultiCallable[bytes, bytes]:
    """Return the method that streams tensors."""
    return channel.stream_stream(f"/{POOL_STREAM}")
