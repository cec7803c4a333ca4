"""Types of the public API. `mypy tests/typing` fails if a type differs, or if a call marked as an error is accepted."""

from collections.abc import AsyncIterator, Iterator
from typing import Any, assert_type

import numpy as np
import torch
from torch import nn

import poolrpc
from poolrpc import (
    AdaptiveAvgPool2d,
    AsyncPoolClient,
    FractionalMaxPool2d,
    GlobalPool2d,
    InvalidArgumentError,
    Layer,
    Limit,
    LPPool2d,
    MaxPool2d,
    MaxUnpool2d,
    PoolClient,
    PoolError,
    PoolResult,
    SegmentPool,
    ServerInfo,
    UnavailableError,
    branch_shapes,
    parse_branches,
    parse_chain,
    parse_layer,
)
from poolrpc.keras import KerasPooling, from_layer
from poolrpc.onnx import OnnxPooling, from_node
from poolrpc.torch import RemotePool, replace_pooling

X = np.zeros((1, 3, 8, 8), np.float32)


def layers() -> None:
    """A layer's parameters and methods have types, and calls of wrong types are errors."""
    layer = MaxPool2d(3, stride=(2, 1), return_indices=True)
    assert_type(layer, MaxPool2d)
    assert_type(layer.kernel_size, int | tuple[int, ...])
    assert_type(layer.stride, int | tuple[int, ...] | None)
    assert_type(layer.return_indices, bool)
    assert_type(layer.dtypes, tuple[str, ...])
    assert_type(layer.spatial_dims, int)
    assert_type(GlobalPool2d.dtypes, tuple[str, ...])
    assert_type(GlobalPool2d("mean").dtypes, tuple[str, ...])
    assert_type(GlobalPool2d(reduce="mean").spatial_dims, int)
    assert_type(layer.output_shape((1, 3, 8, 8)), tuple[int, ...])
    assert_type(layer.work((8, 8)), int)
    assert_type(AdaptiveAvgPool2d((None, 7)).output_size, int | tuple[int | None, ...])
    assert_type(FractionalMaxPool2d(2, output_ratio=0.5).output_ratio, float | tuple[float, ...] | None)
    assert_type(LPPool2d(2, 3).norm_type, float)
    assert_type(poolrpc.LAYERS["MaxPool2d"], type[Layer])
    MaxPool2d()  # type: ignore[call-arg]
    MaxPool2d("3")  # type: ignore[arg-type]
    MaxPool2d(2, kernel=2)  # type: ignore[call-arg]
    MaxPool2d(2, dilation=None)  # type: ignore[arg-type]
    AdaptiveAvgPool2d(None)  # type: ignore[arg-type]
    GlobalPool2d()  # type: ignore[call-arg]
    GlobalPool2d("avg")  # type: ignore[arg-type]
    MaxUnpool2d(2, return_indices=True)  # type: ignore[call-arg]
    layer.padding = 1  # type: ignore[misc]
    layer.output_shape("8x8")  # type: ignore[arg-type]


def functions() -> None:
    """Expressions and shapes have types, and a layout is one of two."""
    assert_type(parse_layer("MaxPool2d(2)"), Layer)
    assert_type(parse_chain("MaxPool2d(2)"), tuple[Layer, ...])
    assert_type(parse_branches("MaxPool2d(2)"), tuple[tuple[Layer, ...], ...])
    assert_type(branch_shapes((1, 3, 8, 8), [(MaxPool2d(2),)]), list[tuple[tuple[int, ...], ...]])
    assert_type(branch_shapes((1, 3, 8, 8), ["MaxPool2d(2)", nn.MaxPool2d(2)]), list[tuple[tuple[int, ...], ...]])
    branch_shapes((8, 8, 3), [(MaxPool2d(2),)], "NHWC")
    branch_shapes((8, 8, 3), [(MaxPool2d(2),)], "HWC")  # type: ignore[arg-type]


def errors(error: PoolError, invalid: InvalidArgumentError, unavailable: UnavailableError) -> None:
    """Errors have typed attributes, and are builtin errors too."""
    assert_type((error.code, error.message, error.reason), tuple[str, str, str])
    assert_type(error.metadata, dict[str, str])
    assert_type(error.tensor, int | None)
    assert_type([each.field for each in invalid.violations], list[str])
    assert_type(unavailable.retry_delay, float | None)
    builtin: tuple[ValueError, ConnectionError] = (invalid, unavailable)
    assert_type(builtin, tuple[ValueError, ConnectionError])


def client(client: PoolClient) -> None:
    """The blocking client returns results; a layout and a transport are literals."""
    result = client.pool(X, MaxPool2d(2))
    assert_type(result, PoolResult)
    assert_type(result.shapes, tuple[tuple[int, ...], ...])
    assert_type(client.pool_each(X, [MaxPool2d(2), [MaxPool2d(2), GlobalPool2d("mean")]]), list[PoolResult])
    assert_type(client.pool_each(X, [GlobalPool2d("mean"), GlobalPool2d("max")], join="cat"), PoolResult)
    client.pool_each(X, [GlobalPool2d("mean")], join="concat")  # type: ignore[call-overload]
    assert_type(client.pool_steps(X, "[MaxPool2d(2), AvgPool2d(2)]"), list[PoolResult])
    assert_type(client.pool_steps(X, [MaxPool2d(2)] * 3, [0, 2], out=[None, (X, X)]), list[PoolResult])
    client.pool_steps(X, MaxPool2d(2), 0)  # type: ignore[arg-type]
    client.pool_steps(X, MaxPool2d(2), out=X)  # type: ignore[arg-type]
    assert_type(client.map([X], MaxPool2d(2)), Iterator[PoolResult])
    assert_type(client.map([X], MaxPool2d(2), return_exceptions=False), Iterator[PoolResult])
    assert_type(client.map([X], MaxPool2d(2), return_exceptions=True), Iterator[PoolResult | PoolError])
    assert_type(client.output_shape((1, 3, 8, 8), MaxPool2d(2)), tuple[int, ...])
    assert_type(client.server_info(), ServerInfo)
    assert_type(client.server_info().limits, dict[str, Limit])
    assert_type(client.health(), str)
    with client as entered:
        assert_type(entered, PoolClient)
    client.pool(X, MaxPool2d(2), layout="NHWC", transport="stream")
    client.pool(X, MaxPool2d(2), layout="nchw")  # type: ignore[arg-type]
    client.pool(X, MaxPool2d(2), transport="udp")  # type: ignore[arg-type]
    assert_type(client.pool(X, "MaxPool2d(2)"), PoolResult)
    assert_type(client.pool(X, nn.Sequential(nn.MaxPool2d(2))), PoolResult)
    assert_type(client.pool(X, ["MaxPool2d(2)", nn.AvgPool2d(2), MaxPool2d(2)]), PoolResult)
    assert_type(client.pool_each(X, "[[MaxPool2d(2)]]"), list[PoolResult])
    assert_type(client.pool_each(X, ["MaxPool2d(2)", [nn.MaxPool2d(2), MaxPool2d(2)]]), list[PoolResult])
    assert_type(client.map([X], nn.MaxPool2d(2)), Iterator[PoolResult])
    assert_type(client.output_shape((1, 3, 8, 8), "MaxPool2d(2)"), tuple[int, ...])
    client.pool(X, [[MaxPool2d(2)]])  # type: ignore[list-item]
    client.pool(X, 2)  # type: ignore[arg-type]
    client.pool(X, MaxPool2d)  # type: ignore[arg-type]
    client.pool(X, MaxPool2d(2), timeout="1")  # type: ignore[arg-type]
    client.pool(X, MaxPool2d(2), None)  # type: ignore[call-arg, arg-type]
    assert_type(client.pool(X, SegmentPool("max"), offsets=[0, 1]), PoolResult)
    assert_type(client.map([X], SegmentPool("max"), lengths=[[1, 2]]), Iterator[PoolResult])
    assert_type(SegmentPool("max").output_shape((1, 2, 3), operand_shape=(3,)), tuple[int, ...])
    client.pool(X, SegmentPool("max"), mask=X)  # type: ignore[call-arg]
    client.pool(X, MaxPool2d(2), priority=0, metadata=[("a", "1"), ("b-bin", b"2")])
    client.pool_each(X, [MaxPool2d(2)], priority=2, metadata=[("a", "1")])
    client.output_shape((1, 3, 8, 8), MaxPool2d(2), metadata={"a": "1"})
    client.server_info(metadata={"a": "1"})
    client.pool(X, MaxPool2d(2), priority="0")  # type: ignore[arg-type]
    client.pool(X, MaxPool2d(2), metadata={"a": 1})  # type: ignore[arg-type]


async def async_client(client: AsyncPoolClient) -> None:
    """The client for asyncio has the same types."""
    assert_type(await client.pool(X, MaxPool2d(2)), PoolResult)
    assert_type(await client.pool_each(X, [MaxPool2d(2)]), list[PoolResult])
    assert_type(await client.pool_steps(X, [MaxPool2d(2)], range(1)), list[PoolResult])
    assert_type(await client.pool(X, [nn.MaxPool2d(2), "AvgPool2d(2)"]), PoolResult)
    assert_type(client.map([X], MaxPool2d(2)), AsyncIterator[PoolResult])
    assert_type(client.map([X], MaxPool2d(2), return_exceptions=True), AsyncIterator[PoolResult | PoolError])
    assert_type(await client.output_shape((1, 3, 8, 8), MaxPool2d(2)), tuple[int, ...])
    assert_type(await client.server_info(), ServerInfo)
    assert_type(await client.health(), str)
    async with client as entered:
        assert_type(entered, AsyncPoolClient)
    await client.pool(X, MaxPool2d(2), layout="nchw")  # type: ignore[arg-type]
    await client.pool(X, MaxPool2d(2), transport="udp")  # type: ignore[arg-type]


def torch_modules(client: PoolClient, async_client: AsyncPoolClient, x: torch.Tensor) -> None:
    """A remote layer takes what `pool` takes, and a model keeps its type unless it is replaced itself."""
    remote = RemotePool(client, ["MaxPool2d(2)", nn.AvgPool2d(2)])
    assert_type(remote.layers, tuple[Layer, ...])
    assert_type(remote.client, PoolClient)
    assert_type(remote.forward(x), torch.Tensor | tuple[torch.Tensor, torch.Tensor])
    assert_type(remote.forward(x, x, output_size=x.size()), torch.Tensor | tuple[torch.Tensor, torch.Tensor])
    assert_type(replace_pooling(nn.Sequential(), client), nn.Sequential | RemotePool)
    RemotePool(async_client, MaxPool2d(2))  # type: ignore[arg-type]
    RemotePool(client, 2)  # type: ignore[arg-type]
    replace_pooling(client, nn.Sequential())  # type: ignore[type-var, arg-type]


async def nodes(client: PoolClient, async_client: AsyncPoolClient) -> None:
    """Nodes of ONNX and layers of Keras have layers, and run on a client."""
    node = from_node("MaxPool", {"kernel_shape": [2, 2]}, opset=17, indices=True)
    assert_type(node, OnnxPooling)
    assert_type(node.layer, Layer | None)
    assert_type(node.run(client, X, None), tuple[np.ndarray[Any, np.dtype[Any]], ...])
    result = await async_client.pool(**node.arguments(X))
    assert_type(node.outputs(result, X.shape), tuple[np.ndarray[Any, np.dtype[Any]], ...])
    pooling = from_layer(object())
    assert_type(pooling, KerasPooling)
    assert_type(pooling.run(client, X, mask=X), np.ndarray[Any, np.dtype[Any]])
    from_node("MaxPool", [("kernel_shape", [2, 2])])  # type: ignore[arg-type]
    node.run(async_client, X)  # type: ignore[arg-type]
