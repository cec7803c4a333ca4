"""Remote layers for PyTorch: modules that pool torch tensors on a server. It needs torch, which poolrpc does not.

Examples:
    >>> import poolrpc_server
    >>> import torch
    >>> from poolrpc.torch import RemotePool, replace_pooling
    >>> with poolrpc_server.embedded() as client, torch.no_grad():
    ...     pool = RemotePool(client, torch.nn.MaxPool2d(2))
    ...     model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.AvgPool2d(2))
    ...     replaced = replace_pooling(model, client)
    ...     pool(torch.zeros(1, 64, 56, 56)).shape, replaced(torch.zeros(1, 3, 10, 10)).shape
    (torch.Size([1, 64, 28, 28]), torch.Size([1, 8, 4, 4]))

"""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np
import torch
from torch import nn

from poolrpc._shapes.rules import clip
from poolrpc.chains import as_chain
from poolrpc.client import PoolClient
from poolrpc.errors import InvalidArgumentError
from poolrpc.layers import MaxUnpool1d, MaxUnpool2d, MaxUnpool3d
from poolrpc.modules import layers_of, pooling_name
from poolrpc.tensors import BFLOAT16_BITS, check_no_gradient, dtype_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from poolrpc.chains import Chain, ChainLike
    from poolrpc.tensors import Array, Layout

__all__ = ["RemotePool", "replace_pooling"]

M = TypeVar("M", bound=nn.Module)

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
"""The memory format of channels last, by the number of axes of a tensor."""


class RemotePool(nn.Module):
    """A module that runs a pooling layer, or a chain of layers, on a server.

    It takes the place of a torch.nn pooling module: the output is a tensor on the input's device, of its dtype and its
    memory format (a tensor in channels_last is sent as it is), and has no gradient. It has no parameters, and is the
    same in training and evaluation mode.

    Args:
        client: The client, which the module uses and does not close. A copy of the module uses the same client.
        layer: A layer, an expression, a module of torch.nn, or several of these in order, as PoolClient.pool takes it.

    Attributes:
        client: The client.
        layers: The layers, as a tuple.

    Raises:
        InvalidArgumentError: The client is not a PoolClient, or the layer is not one that the server has.

    Examples:
        >>> import poolrpc_server
        >>> import torch
        >>> from poolrpc.torch import RemotePool
        >>> with poolrpc_server.embedded() as client:
        ...     pool = RemotePool(client, torch.nn.MaxPool2d(2, return_indices=True))
        ...     unpool = RemotePool(client, torch.nn.MaxUnpool2d(2))
        ...     output, indices = pool(torch.arange(16.0).reshape(1, 1, 4, 4))
        ...     unpool(output, indices)[0, 0].tolist()
        [[0.0, 0.0, 0.0, 0.0], [0.0, 5.0, 0.0, 7.0], [0.0, 0.0, 0.0, 0.0], [0.0, 13.0, 0.0, 15.0]]

    """

    def __init__(self, client: PoolClient, layer: ChainLike) -> None:
        super().__init__()
        if not isinstance(client, PoolClient):
            raise InvalidArgumentError(f"expected a PoolClient, got {clip(client)}", field="client")
        self.client = client
        self.layers = as_chain(layer)

    def forward(
        self,
        input: torch.Tensor,  # noqa: A002 - torch's name
        indices: torch.Tensor | None = None,
        output_size: Sequence[int] | None = None,
        **operand: Any,  # noqa: ANN401 - checked by the client
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Pool a tensor.

        Args:
            input: The tensor, (N, C, spatial...) or (C, spatial...), that requires no gradient.
            indices: For MaxUnpool: the indices of the maxima, int64, of the input's shape.
            output_size: For MaxUnpool: the spatial shape of the output, or the whole one of a batched tensor. None: the
                layer's own.
            **operand: The second tensor of another layer that takes one, as in PoolClient.pool: weights, offsets,
                lengths, ids or boxes.

        Returns:
            The output; or the output and the indices (int64), if the last layer has return_indices.

        Raises:
            InvalidArgumentError: The input is not a tensor, or requires a gradient, or an argument does not fit.
            PoolError: As in PoolClient.pool.

        """
        if not isinstance(input, torch.Tensor):
            raise InvalidArgumentError(f"expected a torch.Tensor, got {clip(type(input).__name__)}", field="input")
        layout = _layout(input)
        result = self.client.pool(
            _to_client(input, layout),
            self.layers if output_size is None else self._resized(output_size),
            layout=layout,
            **(operand if indices is None else {"indices": _to_client(indices, layout), **operand}),
        )
        output = _from_client(result.output, layout, input.device)
        return output if result.indices is None else (output, _from_client(result.indices, layout, input.device))

    def extra_repr(self) -> str:
        """Return the layers and the client's address."""
        layers = self.layers[0] if len(self.layers) == 1 else [*self.layers]
        return f"{layers!r}, address={self.client.address!r}"

    def _resized(self, output_size: Sequence[int]) -> Chain:
        """Return the layers with another size of the output, as a call of torch's MaxUnpool has one."""
        first = self.layers[0]
        if not isinstance(first, MaxUnpool1d | MaxUnpool2d | MaxUnpool3d):
            raise InvalidArgumentError(
                f"expected an output_size only for MaxUnpool, got {first.name}", field="output_size"
            )
        sizes = tuple(output_size)
        if len(sizes) == first.spatial_dims + 2:
            sizes = sizes[2:]
        return (replace(first, output_size=sizes), *self.layers[1:])

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy the module, but not its client, which has a connection."""
        memo[id(self.client)] = self.client
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made


def replace_pooling(model: M, client: PoolClient) -> M | RemotePool:
    """Replace every pooling module of a model by a RemotePool, in place.

    The outputs are the same, bit for bit if the server has the same kind of device. Two layers may differ in the last
    bits: averages of tensors in channels_last, which torch adds up in another order, and LPPool with a norm other than
    1, 2 and infinity. Two things stay as they are: functions such as torch.nn.functional.max_pool2d, and modules that
    are not registered in the model (in a plain list, for example). If a module can't be replaced, nothing is. A model
    without pooling modules is returned as it is, with a warning.

    Args:
        model: The model. A module that it uses several times is replaced by one. To keep it, pass copy.deepcopy(model).
        client: The client, which the model uses and does not close.

    Returns:
        The model; or the RemotePool, if the model is a pooling module itself.

    Raises:
        InvalidArgumentError: A pooling module computes something else than torch.nn's, has hooks, has parameters that
            no layer has, or has random windows (FractionalMaxPool, in place of which a RemotePool of poolrpc's layer
            with a seed can be used); or the model is one of TorchScript, whose modules can't be replaced.

    Examples:
        >>> import poolrpc_server
        >>> import torch
        >>> from poolrpc.torch import replace_pooling
        >>> model = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.MaxPool2d(2))
        >>> with poolrpc_server.embedded() as client:
        ...     model = replace_pooling(model, client)
        ...     model(torch.zeros(1, 64, 56, 56)).shape
        torch.Size([1, 64, 28, 28])

    """
    made: dict[int, RemotePool] = {}
    found: list[tuple[str, RemotePool]] = []
    for name, module in model.named_modules(remove_duplicate=False):
        path = f"model.{name}" if name else "model"
        if isinstance(module, torch.jit.ScriptModule):
            msg = "expected a module that can be replaced, got one of TorchScript; replace it before torch.jit.script"
            raise InvalidArgumentError(msg, field=path)
        if not pooling_name(module):
            continue
        if id(module) not in made:
            made[id(module)] = RemotePool(client, layers_of(module, path)).train(module.training)
        found.append((name, made[id(module)]))
    if not found and not any(isinstance(module, RemotePool) for module in model.modules()):
        text = "the model has no pooling modules, and is unchanged; calls such as torch.nn.functional.max_pool2d stay"
        warnings.warn(text, stacklevel=2)
    for name, remote in found:
        if not name:
            return remote
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, remote)
    return model


def _layout(x: torch.Tensor) -> Layout:
    """Return the layout in which the bytes of a tensor can be sent as they are; "NCHW" if there is none."""
    last = CHANNELS_LAST.get(x.dim())
    if last is None or x.layout is not torch.strided or x.is_contiguous() or not x.is_contiguous(memory_format=last):
        return "NCHW"
    return "NHWC"


def _to_client(x: torch.Tensor, layout: Layout) -> torch.Tensor | Array:
    """Return a tensor as the client takes it."""
    if layout == "NHWC":
        x = x.movedim(1, -1)
    if x.dtype is not torch.bfloat16:
        return x
    # As bits, because the client converts bfloat16 only with ml_dtypes.
    check_no_gradient(x)
    return x.detach().cpu().view(torch.int16).numpy().view(BFLOAT16_BITS)


def _from_client(array: Array, layout: Layout, device: torch.device) -> torch.Tensor:
    """Return an array of a result as a tensor."""
    bits = dtype_name(array.dtype) == "bfloat16"
    x = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16) if bits else torch.from_numpy(array)
    return (x.movedim(-1, 1) if layout == "NHWC" else x).to(device)
