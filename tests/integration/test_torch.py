"""poolrpc.torch: remote layers in PyTorch models, against the same models with torch's own layers."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn

import poolrpc.torch
from poolrpc import (
    AsyncPoolClient,
    AvgPool2d,
    FractionalMaxPool2d,
    InvalidArgumentError,
    MaxPool2d,
    PoolClient,
    PoolError,
    UnsupportedError,
)
from poolrpc.torch import RemotePool, replace_pooling

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SIZES = {1: (50,), 2: (17, 19), 3: (9, 10, 11)}


@pytest.fixture
def client(address: str) -> Iterator[PoolClient]:
    """Return a client of the server."""
    with PoolClient(address) as made:
        yield made


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    """Turn gradients off: a remote layer has none."""
    with torch.no_grad():
        yield


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return a tensor of normal random numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(dtype)


def assert_same(ours: Any, expected: Any) -> None:
    """Check that tensors, or tuples of them, have the same values, dtype, device and memory format."""
    if isinstance(expected, tuple):
        assert len(ours) == len(expected)
        for each, other in zip(ours, expected, strict=True):
            assert_same(each, other)
        return
    assert type(ours) is torch.Tensor
    assert (ours.dtype, ours.device, ours.shape) == (expected.dtype, expected.device, expected.shape)
    assert ours.stride() == expected.stride()
    assert not ours.requires_grad
    assert torch.equal(ours, expected)


MODULES = [
    nn.MaxPool1d(3, 2, 1, return_indices=True, ceil_mode=True),
    nn.MaxPool2d(3, 2, 1, dilation=(1, 2)),
    nn.MaxPool3d(2, return_indices=True),
    nn.AvgPool1d(3, 2, 1, ceil_mode=True, count_include_pad=False),
    nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
    nn.AvgPool2d((3, 2), 1, divisor_override=5),
    nn.AvgPool3d(3, 2, 1, count_include_pad=False),
    nn.LPPool1d(2, 3),
    nn.LPPool2d(1.0, (3, 2), stride=1, ceil_mode=True),
    # Before torch 2.12 it returns ones, and the server the maxima.
    *([nn.LPPool3d(float("inf"), 2)] if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 12) else []),
    nn.AdaptiveMaxPool1d(7, return_indices=True),
    nn.AdaptiveMaxPool2d((None, 7)),
    nn.AdaptiveMaxPool3d((3, 4, 5), return_indices=True),
    nn.AdaptiveAvgPool1d(7),
    nn.AdaptiveAvgPool2d((5, None)),
    nn.AdaptiveAvgPool3d((None, 1, 1)),
]


@pytest.mark.parametrize("batched", [True, False], ids=["batched", "one"])
@pytest.mark.parametrize("module", MODULES, ids=str)
def test_a_module_of_torch_and_its_remote_one_are_equal(client: PoolClient, module: nn.Module, batched: bool) -> None:  # noqa: FBT001 - a case
    """The output, and the indices, have torch's values, dtype, shape and strides."""
    x = draw(*([2] if batched else []), 3, *SIZES[int(type(module).__name__[-2])])
    assert_same(RemotePool(client, module)(x), module(x))


@pytest.mark.parametrize("sized", [False, True], ids=["default size", "output_size"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_maxima_are_put_back(client: PoolClient, dims: int, sized: bool) -> None:  # noqa: FBT001 - a case
    """MaxUnpool takes the indices, and output_size as torch does: of the axes, or of the whole tensor."""
    kernel_size = 3 if sized else 2
    pool: Callable[..., Any] = getattr(nn, f"MaxPool{dims}d")(kernel_size, 2, return_indices=True)
    unpool = getattr(nn, f"MaxUnpool{dims}d")(kernel_size, 2)
    remote = RemotePool(client, unpool)
    x = draw(2, 3, *(size // 2 * 2 for size in SIZES[dims]))
    output, indices = pool(x)
    if not sized:
        assert_same(remote(output, indices), unpool(output, indices))
        return
    assert_same(remote(output, indices, x.size()), unpool(output, indices, x.size()))
    assert_same(
        remote(output, indices, output_size=[*x.shape[2:]]), x.new_zeros(()) + unpool(output, indices, x.size())
    )


def test_indices_and_a_size_that_do_not_fit_are_rejected(client: PoolClient) -> None:
    """A layer without indices takes none, MaxUnpool needs them, and output_size is within torch's bounds."""
    x = draw(1, 1, 4, 4)
    output, indices = nn.MaxPool2d(2, return_indices=True)(x)
    unpool = RemotePool(client, nn.MaxUnpool2d(2))
    for call, match in (
        (lambda: RemotePool(client, MaxPool2d(2))(x, output_size=(2, 2)), "output_size: expected an output_size only"),
        (lambda: RemotePool(client, MaxPool2d(2))(output, indices), "indices"),
        (lambda: unpool(output), "indices"),
        (lambda: unpool(output, indices, (9, 9)), "output_size"),
        (lambda: unpool(output, indices, (1, 4, 4)), "output_size"),
        (lambda: unpool(np.ones((1, 1, 2, 2)), indices), "input: expected a torch.Tensor, got 'ndarray'"),
    ):
        with pytest.raises(InvalidArgumentError, match=match):
            call()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.uint8, torch.int32], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_the_dtype_and_the_memory_format_are_kept(
    client: PoolClient, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    """The output has the input's dtype and memory format, and the indices its memory format."""
    x = draw(2, 5, 9, 8).mul(9).to(dtype).contiguous(memory_format=memory_format)
    module = nn.MaxPool2d(3, 2, 1)
    expected = module(x) if dtype.is_floating_point else module(x.double()).to(dtype)
    assert_same(RemotePool(client, module)(x), expected)
    if dtype.is_floating_point:
        indexed = nn.MaxPool2d(3, 2, 1, return_indices=True)
        assert_same(RemotePool(client, indexed)(x), indexed(x))


def test_channels_last_of_three_axes_is_kept(client: PoolClient) -> None:
    """The same holds for channels_last_3d, and for MaxUnpool, whose indices may have another memory format."""
    x = draw(2, 3, 6, 6, 6).contiguous(memory_format=torch.channels_last_3d)
    pooled = RemotePool(client, nn.MaxPool3d(2))(x)
    assert pooled.is_contiguous(memory_format=torch.channels_last_3d)
    assert torch.equal(pooled, nn.MaxPool3d(2)(x))
    x = draw(2, 3, 6, 6).contiguous(memory_format=torch.channels_last)
    output, indices = nn.MaxPool2d(2, return_indices=True)(x)
    for each in (indices, indices.contiguous()):
        back = RemotePool(client, nn.MaxUnpool2d(2))(output, each)
        assert back.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(back, nn.MaxUnpool2d(2)(output, indices))


def test_a_tensor_in_channels_last_is_sent_as_it_is(client: PoolClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is sent as NHWC, without a copy to another layout."""
    sent: list[tuple[Any, str]] = []
    pool = client.pool

    def seen(x: Any, *arguments: Any, layout: Any, **options: Any) -> Any:
        sent.append((x, layout))
        return pool(x, *arguments, layout=layout, **options)

    monkeypatch.setattr(client, "pool", seen)
    x = draw(2, 5, 9, 8).contiguous(memory_format=torch.channels_last)
    RemotePool(client, nn.MaxPool2d(2))(x)
    RemotePool(client, nn.MaxPool2d(2))(x.contiguous())
    (last, layout), (first, other) = sent
    assert (layout, other) == ("NHWC", "NCHW")
    assert last.is_contiguous()
    assert last.data_ptr() == x.data_ptr()
    assert first.is_contiguous()


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, :, ::2],
        lambda x: x.transpose(2, 3),
        lambda x: x[:, ::2],
        lambda x: x.expand(2, 3, 9, 8),
        lambda x: x[:0],
    ],
    ids=["strided", "transposed", "every other channel", "expanded", "empty"],
)
def test_any_strides_are_pooled(client: PoolClient, view: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """A view of any strides, and a batch of none, have torch's values."""
    x = view(draw(1, 3, 9, 8))
    assert torch.equal(RemotePool(client, nn.MaxPool2d(2))(x), nn.MaxPool2d(2)(x))


def test_an_output_is_its_own(client: PoolClient) -> None:
    """An output can be written to, and shares no memory with the input or another output."""
    remote, x = RemotePool(client, MaxPool2d(2)), draw(1, 1, 4, 4)
    first, second = remote(x), remote(x)
    first.add_(1)
    assert torch.equal(second, nn.MaxPool2d(2)(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_an_input_that_requires_a_gradient_is_rejected(
    client: PoolClient, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    """The error has the ways out, which work: detach() and torch.no_grad()."""
    remote = RemotePool(client, MaxPool2d(2))
    x = draw(1, 2, 4, 4, dtype=dtype).contiguous(memory_format=memory_format).requires_grad_()
    with torch.enable_grad(), pytest.raises(InvalidArgumentError, match=r"^input: .*detach\(\), or torch.no_grad\(\)"):
        remote(x)
    with torch.enable_grad():
        assert torch.equal(remote(x.detach()), nn.MaxPool2d(2)(x.detach()))
    assert torch.equal(remote(x), nn.MaxPool2d(2)(x.detach()))


def test_what_is_sparse_is_rejected(client: PoolClient) -> None:
    """A tensor that NumPy cannot represent is rejected as by the client."""
    with pytest.raises(PoolError, match="NumPy can represent"):
        RemotePool(client, MaxPool2d(2))(draw(1, 1, 4, 4).to_sparse())


def test_bfloat16_needs_nothing_else(address: str) -> None:
    """Without ml_dtypes, RemotePool pools bfloat16, and a call of the client still says what it needs."""
    program = f"""
import sys
sys.modules["ml_dtypes"] = None
import torch, poolrpc
from poolrpc.torch import RemotePool
x = torch.randn(2, 3, 9, 8).bfloat16()
module = torch.nn.MaxPool2d(2, return_indices=True)
with poolrpc.PoolClient({address!r}) as client:
    for each in (x, x.contiguous(memory_format=torch.channels_last), torch.randn(64, 256, 32, 32).bfloat16(), x[:0]):
        output, indices = RemotePool(client, module)(each)
        expected = module(each)
        print(output.dtype, torch.equal(output, expected[0]), torch.equal(indices, expected[1]))
    try:
        client.pool(x, module)
    except poolrpc.UnsupportedError as error:
        print(error)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)  # noqa: S603 - ours
    assert ended.stdout.splitlines() == [
        *["torch.bfloat16 True True"] * 4,
        "expected ml_dtypes to be installed, for bfloat16: pip install 'poolrpc[bfloat16]'",
    ]


def test_a_remote_layer_takes_what_the_client_takes(client: PoolClient) -> None:
    """An expression, a list and a Sequential are chains; the repr has the layers and the address."""
    x = draw(1, 3, 8, 8)
    expected = nn.AvgPool2d(2)(nn.MaxPool2d(2)(x))
    chain = [MaxPool2d(2), AvgPool2d(2)]
    for layer in (chain, "[MaxPool2d(2), AvgPool2d(2)]", nn.Sequential(nn.MaxPool2d(2), nn.AvgPool2d(2))):
        remote = RemotePool(client, layer)
        assert torch.equal(remote(x), expected)
    assert RemotePool(client, chain).layers == tuple(chain)
    assert repr(RemotePool(client, chain[0])) == f"RemotePool(MaxPool2d(2), address={client.address!r})"
    assert repr(RemotePool(client, chain)).startswith("RemotePool([MaxPool2d(2), AvgPool2d(2)], address=")
    with pytest.raises(InvalidArgumentError, match=r"torch\.nn\.ReLU"):
        RemotePool(client, nn.ReLU())


async def test_another_client_is_rejected(address: str) -> None:
    """A module is called without await, so the asyncio client can't be its client."""
    async with AsyncPoolClient(address) as client:
        for other in (client, None, address):
            with pytest.raises(InvalidArgumentError, match=r"^client: expected a PoolClient, got"):
                RemotePool(other, MaxPool2d(2))  # type: ignore[arg-type]


def test_a_copy_uses_the_same_client(client: PoolClient) -> None:
    """A deep copy of a model works, and a model's state has nothing of the remote layers."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), RemotePool(client, MaxPool2d(2)))
    made = copy.deepcopy(model)
    assert made[1] is not model[1]
    assert made[1].client is client
    assert list(model.state_dict()) == ["0.weight", "0.bias"]
    x = draw(1, 3, 8, 8)
    assert torch.equal(made(x), model(x))


def test_an_error_of_the_client_is_that_of_the_call(client: PoolClient) -> None:
    """What the server or the client rejects is raised as by the client's own calls."""
    with pytest.raises(InvalidArgumentError, match="shape"):
        RemotePool(client, MaxPool2d(2))(draw(8, 8))
    with pytest.raises(UnsupportedError):
        RemotePool(client, AvgPool2d(2))(torch.ones(1, 1, 4, 4, dtype=torch.int32))
    client.close()
    with pytest.raises(PoolError, match="closed"):
        RemotePool(client, MaxPool2d(2))(draw(1, 1, 4, 4))


class Block(nn.Module):
    """A residual block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add the body's output."""
        return x + self.body(x)


class ResNet(nn.Module):
    """A small ResNet: a stem with a MaxPool, blocks, and an adaptive average."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 7, 2, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        self.blocks = nn.Sequential(Block(8), Block(8))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the scores of ten classes."""
        return self.fc(self.avgpool(self.blocks(self.stem(x))).flatten(1))


class Inception(nn.Module):
    """A small Inception: branches in a ModuleList, with averages that leave out the padding; a pool used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.branches = nn.ModuleList(
            [
                nn.Sequential(nn.AvgPool2d(3, 1, 1, count_include_pad=False), nn.Conv2d(3, 4, 1)),
                nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.Conv2d(3, 4, 1)),
                nn.Conv2d(3, 4, 3, padding=1),
            ]
        )
        self.heads = nn.ModuleDict({"mean": nn.AdaptiveAvgPool2d(1), "power": nn.LPPool2d(2, 3)})
        self.same = self.pool

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the features of both heads."""
        x = torch.cat([branch(self.pool(x)) for branch in self.branches], 1)
        x = self.same(x)
        return torch.cat([each(x).flatten(1) for each in self.heads.values()], 1)


class SegNet(nn.Module):
    """A small SegNet: the decoder puts maxima back where the encoder's indices say that they were."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList([nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)])
        self.decoder = nn.ModuleList([nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 2, 3, padding=1)])
        self.pool, self.unpool = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the scores of two classes for every pixel."""
        steps = []
        for convolution in self.encoder:
            x = convolution(x).relu()
            size = x.size()
            x, indices = self.pool(x)
            steps.append((indices, size))
        for convolution, (indices, size) in zip(self.decoder, reversed(steps), strict=True):
            x = convolution(self.unpool(x, indices, output_size=size))
        return x


POOLING = tuple(getattr(nn, name) for name in nn.modules.pooling.__all__ if isinstance(getattr(nn, name), type))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    ("cls", "count"), [(ResNet, 2), (Inception, 5), (SegNet, 2)], ids=lambda each: getattr(each, "__name__", "")
)
def test_a_model_with_remote_layers_has_equal_outputs(
    client: PoolClient, cls: type[nn.Module], count: int, memory_format: torch.memory_format
) -> None:
    """Every pooling module of the model is replaced, in place, and its output and state are the same."""
    torch.manual_seed(3)
    model = cls().eval()
    x = draw(2, 3, 45, 37).contiguous(memory_format=memory_format)
    expected, state = model(x), model.state_dict()
    assert replace_pooling(model, client) is model
    assert not any(isinstance(each, POOLING) for each in model.modules())
    assert sum(isinstance(each, RemotePool) for each in model.modules()) == count
    assert model.state_dict().keys() == state.keys()
    if memory_format is torch.contiguous_format:
        assert torch.equal(model(x), expected)
    else:  # torch adds up averages in another order
        torch.testing.assert_close(model(x), expected)


def test_a_module_that_is_used_twice_is_replaced_by_one(client: PoolClient) -> None:
    """Under two names, and twice in a Sequential, it remains one module."""
    pool = nn.MaxPool2d(2)
    model = nn.Sequential(pool, nn.Identity(), pool, nn.Sequential(pool))
    x = draw(1, 3, 16, 16)
    expected = model(x)
    replace_pooling(model, client)
    assert model[0] is model[2] is model[3][0]
    assert isinstance(model[0], RemotePool)
    assert torch.equal(model(x), expected)


def test_a_model_that_is_a_pooling_module_is_replaced(client: PoolClient) -> None:
    """The result is the remote module, and other models are returned as they are."""
    remote = replace_pooling(nn.MaxPool2d(2).eval(), client)
    assert isinstance(remote, RemotePool)
    assert not remote.training
    assert replace_pooling(remote, client) is remote
    convolution = nn.Conv2d(1, 1, 1)
    with pytest.warns(UserWarning, match="no pooling modules"):
        assert replace_pooling(convolution, client) is convolution


class Doubled(nn.MaxPool2d):
    """A pooling layer with a forward of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return twice the maxima."""
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        (Doubled(2), "^model.1.0: .*Doubled"),
        (nn.FractionalMaxPool2d(2, output_ratio=0.5), r"^model.1.0: .*FractionalMaxPool2d\(2, output_ratio=0.5\)"),
        (nn.MaxPool2d(0), "^model.1.0.kernel_size: "),
    ],
    ids=["forward", "random", "parameter"],
)
def test_a_module_that_cannot_be_replaced_is_named(client: PoolClient, bad: nn.Module, match: str) -> None:
    """The error has its path in the model, and no other module has been replaced."""
    model = nn.Sequential(nn.MaxPool2d(2), nn.Sequential(bad), nn.AvgPool2d(2))
    with pytest.raises(InvalidArgumentError, match=match):
        replace_pooling(model, client)
    assert not any(isinstance(each, RemotePool) for each in model.modules())


def test_hooks_are_not_lost(client: PoolClient) -> None:
    """A module with a forward hook is rejected, because its replacement would not have it."""
    model = nn.Sequential(nn.MaxPool2d(2))
    model[0].register_forward_hook(lambda *_: None)
    with pytest.raises(InvalidArgumentError, match=r"^model.0: expected a module without forward hooks"):
        replace_pooling(model, client)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is (not supported in Python 3.14|deprecated):FutureWarning")
def test_a_scripted_model_is_rejected(client: PoolClient) -> None:
    """Its modules can't be replaced, and none of them would be."""
    scripted = torch.jit.script(nn.Sequential(nn.MaxPool2d(2)))
    for model in (scripted, nn.Sequential(nn.ReLU(), scripted)):
        with pytest.raises(InvalidArgumentError, match=r"^model(\.1)?: .*TorchScript"):
            replace_pooling(model, client)


def test_random_windows_are_replaced_by_hand(client: PoolClient) -> None:
    """A remote layer with a seed takes the place of a FractionalMaxPool, and replace_pooling leaves it as it is."""
    remote = RemotePool(client, FractionalMaxPool2d(2, output_ratio=0.5, seed=7))
    model = replace_pooling(nn.Sequential(remote, nn.MaxPool2d(2)), client)
    assert model[0] is remote  # type: ignore[index]
    assert model(draw(1, 2, 16, 16)).shape == (1, 2, 4, 4)


def test_the_module_offers_what_it_says() -> None:
    """Its public names are its own."""
    assert poolrpc.torch.__all__ == ["RemotePool", "replace_pooling"]
    assert RemotePool.__module__ == replace_pooling.__module__ == "poolrpc.torch"
