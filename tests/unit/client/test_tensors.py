"""Tensors: conversion of array-like objects, and arrays to and from bytes."""

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image as PillowImage

from poolrpc import InvalidArgumentError, PoolError, UnsupportedError
from poolrpc._transport.unary import copy_tensors
from poolrpc.tensors import (
    ITEM_BYTES,
    TensorSpec,
    array_bytes,
    as_array,
    numpy_dtype,
    spec_of,
    split_tensors,
    tensor_ranges,
)

VALUES = np.arange(24, dtype=np.float32).reshape(2, 3, 4)


class DlpackOnly:
    """An object with DLPack only."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **arguments):
        return self.array.__dlpack__(**arguments)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


class ArrayOnly:
    """An object with `__array__` only."""

    def __array__(self, dtype=None, copy=None):
        return VALUES


class InterfaceOnly:
    """An object with `__array_interface__` only."""

    def __init__(self, array):
        self.array = array
        self.__array_interface__ = array.__array_interface__


class Image(torch.Tensor):
    """A subclass of torch's tensor in another module, as torchvision has."""


def read_only(array):
    """Return a read-only copy."""
    array = array.copy()
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    "x",
    [
        VALUES,
        VALUES.astype(">f4"),
        read_only(VALUES),
        np.asfortranarray(VALUES),
        np.repeat(VALUES, 2, axis=2)[:, :, ::2],
        VALUES[::-1][::-1],
        np.ascontiguousarray(VALUES.transpose(2, 0, 1)).transpose(1, 2, 0),
        torch.from_numpy(VALUES),
        torch.from_numpy(np.ascontiguousarray(VALUES.transpose(2, 0, 1))).permute(1, 2, 0),
        torch.from_numpy(VALUES).to("cpu").as_subclass(Image),
        DlpackOnly(VALUES),
        DlpackOnly(torch.from_numpy(VALUES)),
        ArrayOnly(),
        InterfaceOnly(VALUES),
        np.ma.masked_array(VALUES),
        VALUES.view(np.memmap),
    ],
    ids=[
        "plain",
        "big-endian",
        "read-only",
        "Fortran order",
        "strided",
        "reversed twice",
        "transposed",
        "torch",
        "torch transposed",
        "torch subclass",
        "DLPack of NumPy",
        "DLPack of torch",
        "__array__",
        "__array_interface__",
        "masked nowhere",
        "memmap",
    ],
)
def test_array_like_objects_become_the_same_array(x):
    """Any strides, byte order, flags, subclass and protocol become a plain C-contiguous array."""
    array = as_array(x)
    assert type(array) is np.ndarray
    assert (array.dtype, array.shape) == (np.dtype("<f4"), (2, 3, 4))
    assert array.flags.c_contiguous
    assert np.array_equal(array, VALUES)


def test_contiguous_tensors_are_not_copied():
    """A contiguous array and a contiguous torch tensor keep their memory."""
    assert as_array(VALUES) is VALUES
    tensor = torch.zeros(2, 3)
    assert as_array(tensor).ctypes.data == tensor.data_ptr()


@pytest.mark.parametrize("kind", [np.float16, np.int64, np.int16, np.float64])
def test_a_big_endian_array_keeps_its_values(kind):
    """A big-endian array of any width becomes little-endian with the same values."""
    values = np.array([[1, 2], [3, 258]], kind)
    swapped = as_array(values.astype(values.dtype.newbyteorder(">")))
    assert np.array_equal(swapped, values)
    assert bytes(array_bytes(swapped)) == values.tobytes()


@pytest.mark.parametrize(
    ("x", "shape"),
    [
        (np.float32(3), ()),
        (torch.tensor(3.0), ()),
        (np.empty((0, 3)), (0, 3)),
        (torch.empty(2, 0), (2, 0)),
        ([[1.0, 2.0], [3.0, 4.0]], (2, 2)),
        (((1, 2),), (1, 2)),
        ([], (0,)),
        ([VALUES, VALUES], (2, 2, 3, 4)),
        ([torch.zeros(3), torch.zeros(3)], (2, 3)),
        (VALUES[0].view(np.matrix), (3, 4)),
    ],
    ids=[
        "0-d",
        "torch 0-d",
        "empty",
        "torch empty",
        "list",
        "tuple",
        "no list",
        "list of arrays",
        "of tensors",
        "matrix",
    ],
)
def test_any_shape_is_accepted(x, shape):
    """Scalars, empty arrays, nested lists and matrices become plain arrays of their shapes."""
    array = as_array(x)
    assert type(array) is np.ndarray
    assert array.shape == shape
    assert len(array_bytes(array)) == array.nbytes == spec_of(array).nbytes


@pytest.mark.parametrize(
    "x",
    [
        torch.tensor([[1.5, -2.0], [float("inf"), 0.0]], dtype=torch.bfloat16),
        torch.tensor([[1.5, float("inf")], [-2.0, 0.0]], dtype=torch.bfloat16).T,
        torch.tensor([[1.5, -2.0], [float("inf"), 0.0]], dtype=torch.bfloat16).as_subclass(Image),
        np.array([[1.5, -2.0], [np.inf, 0.0]], ml_dtypes.bfloat16),
        np.array([[1.5, np.inf], [-2.0, 0.0]], ml_dtypes.bfloat16).T,
    ],
    ids=["torch", "torch transposed", "torch subclass", "NumPy", "NumPy transposed"],
)
def test_bfloat16_keeps_its_bits(x):
    """The bfloat16 of torch and of ml_dtypes become the same array."""
    array = as_array(x)
    assert (spec_of(array), array.flags.c_contiguous) == (TensorSpec("bfloat16", (2, 2)), True)
    assert bytes(array_bytes(array)) == np.array([0x3FC0, 0xC000, 0x7F80, 0], "<u2").tobytes()


@pytest.mark.parametrize(
    ("mode", "shape", "dtype"),
    [
        ("L", (4, 5, 1), "uint8"),
        ("LA", (4, 5, 2), "uint8"),
        ("RGB", (4, 5, 3), "uint8"),
        ("RGBA", (4, 5, 4), "uint8"),
        ("CMYK", (4, 5, 4), "uint8"),
        ("I", (4, 5, 1), "int32"),
        ("F", (4, 5, 1), "float32"),
    ],
)
def test_an_image_has_its_channels_last(mode, shape, dtype):
    """An image of Pillow, also of one channel, becomes (H, W, C) of its own dtype, and a list of images a batch."""
    image = PillowImage.new(mode, (5, 4))
    assert (as_array(image).shape, as_array(image).dtype) == (shape, np.dtype(dtype))
    assert as_array([image, image]).shape == as_array((image, image)).shape == (2, *shape)


def test_an_image_in_another_layout_is_rejected():
    """As channels first, an image's width and channels would be pooled."""
    image = PillowImage.new("RGB", (5, 4))
    for x in (image, [image], (image, image)):
        with pytest.raises(InvalidArgumentError, match=r"^layout: expected NHWC for an image.*, got NCHW"):
            as_array(x, "NCHW")


@pytest.mark.parametrize("mode", ["P", "PA"])
def test_an_image_with_a_palette_is_rejected(mode):
    """The maximum of palette indices is not a colour; the message says how to convert them."""
    for x in (PillowImage.new(mode, (5, 4)), [PillowImage.new(mode, (5, 4))]):
        with pytest.raises(InvalidArgumentError, match=r"^input: expected an image of values.*convert\(\)"):
            as_array(x)


@pytest.mark.parametrize(
    "x",
    [None, 3, 3.0, "[[1]]", b"1", {1: 2}, {1}, object(), range(3), (i for i in [1]), len],
    ids=lambda x: type(x).__name__,
)
def test_other_objects_are_rejected(x):
    """A Python scalar, a string, a mapping and an iterator are rejected with their type."""
    with pytest.raises(InvalidArgumentError, match=r"^input: expected an array, a tensor or a nested list") as raised:
        as_array(x)
    assert type(x).__name__ in str(raised.value)


@torch.enable_grad()  # an engine that ran in this thread has switched it off
def tensors_with_a_gradient():
    """Return tensors whose gradient torch records, in each of the ways in which it does."""
    leaf = torch.from_numpy(VALUES.copy()).requires_grad_()
    return {
        "leaf": leaf,
        "parameter": torch.nn.Parameter(leaf.detach()),
        "computed": leaf * 2,
        "subclass": leaf.detach().as_subclass(Image).requires_grad_(),
        "bfloat16": torch.ones(2, dtype=torch.bfloat16, requires_grad=True),
    }


@pytest.mark.parametrize("kind", tensors_with_a_gradient())
def test_a_tensor_that_needs_a_gradient_is_rejected(kind):
    """A model with a remote layer in it would not learn, and nothing would say so; without gradients it is taken."""
    x = tensors_with_a_gradient()[kind]
    with (
        torch.enable_grad(),
        pytest.raises(InvalidArgumentError, match=r"^input: .*requires_grad.*detach\(\), or torch.no_grad\(\)"),
    ):
        as_array(x)
    expected = as_array(x.detach())
    with torch.no_grad():
        assert np.array_equal(as_array(x), expected)


@pytest.mark.parametrize(
    "x",
    [
        np.ma.masked_array(VALUES, VALUES > 0),
        np.ma.masked_array(VALUES, VALUES > 0)[:, 1:],
        np.ma.masked_array(VALUES, VALUES > 0).astype(">f4"),
        [[1.0, np.ma.masked]],
        [np.ma.masked_array([1.0, 2.0], [True, False])],
        (([np.ma.masked_array([1.0], [True])],),),
    ],
    ids=["array", "view", "big-endian", "masked", "list of arrays", "nested"],
)
def test_masked_values_are_rejected(x):
    """NumPy would take what is behind the mask; the message says how to fill it."""
    with pytest.raises(InvalidArgumentError, match=r"^input: expected an array without a mask.*filled\(value\)"):
        as_array(x)


def nested(depth):
    """Return a list nested this deep."""
    made = [1]
    for _ in range(depth):
        made = [made]
    return made


def endless():
    """Return a list that contains itself."""
    made = []
    made.append(made)
    return made


@pytest.mark.parametrize(
    "x", [[[1, 2], [3]], [[1], 2], nested(100), endless()], ids=["ragged", "mixed", "deep", "endless"]
)
def test_an_invalid_list_is_rejected(x):
    """A ragged or too deeply nested list is an error of the input."""
    with pytest.raises(InvalidArgumentError, match=r"^input: "):
        as_array(x)


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(2, dtype=torch.float8_e4m3fn),
        torch.eye(2).to_sparse(),
        torch.zeros(2, device="meta"),
        DlpackOnly(torch.zeros(2, dtype=torch.bfloat16)),
    ],
    ids=["float8", "sparse", "meta", "DLPack of bfloat16"],
)
def test_a_tensor_that_numpy_cannot_represent_is_rejected(x):
    """Whatever error NumPy or torch raises on conversion becomes a PoolError."""
    with pytest.raises(PoolError):
        spec_of(as_array(x))


@pytest.mark.parametrize(
    "array",
    [
        np.zeros(2, np.complex64),
        np.zeros(2, np.uint32),
        np.zeros(2, np.longdouble),
        np.array(["a" * 10_000]),
        np.array([None]),
        np.zeros(2, "M8[s]"),
        np.zeros(2, [("a", "f4")]),
        np.zeros(2, ml_dtypes.float8_e4m3fn),
    ],
    ids=lambda array: array.dtype.name[:20],
)
def test_an_unsupported_dtype_is_named(array):
    """An array of another dtype is rejected with the supported dtypes."""
    with pytest.raises(UnsupportedError, match=r"^expected one of float16, bfloat16, float32, ") as raised:
        spec_of(array)
    assert raised.value.reason == "DTYPE"
    assert raised.value.metadata == {"dtypes": ",".join(ITEM_BYTES)}
    assert len(str(raised.value)) < 300


@pytest.mark.parametrize("name", ITEM_BYTES)
def test_a_dtypes_name_round_trips(name):
    """Every dtype of the wire is NumPy's little-endian dtype of that name and width."""
    dtype = numpy_dtype(name)
    assert (dtype.name, dtype.itemsize) == (name, ITEM_BYTES[name])
    assert dtype.byteorder in "=|<"
    assert spec_of(np.zeros((2, 3), dtype), "NHWC") == TensorSpec(name, (2, 3), "NHWC")


ARRAYS = st.sampled_from(list(ITEM_BYTES)).flatmap(
    lambda name: arrays.arrays(
        np.dtype(f"u{ITEM_BYTES[name]}"), arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
    ).map(lambda bits: bits.view(numpy_dtype(name)))
)


def decoded(spec, data):
    """Return the only tensor in a response's payload."""
    (array,) = copy_tensors(tensor_ranges([spec]), data, ())
    return array


@given(ARRAYS)
def test_an_array_round_trips(array):
    """Any array is decoded from its bytes and its spec, bit for bit."""
    spec, data = spec_of(array), array_bytes(as_array(array))
    assert spec.numel == array.size
    back = decoded(spec, bytes(data))
    assert (back.dtype, back.shape) == (array.dtype, array.shape)
    assert back.tobytes() == array.tobytes()


def test_a_decoded_array_is_independent():
    """A decoded array is writable, and shares no memory with its bytes."""
    data = bytearray(VALUES.tobytes())
    array = decoded(TensorSpec("float32", (2, 3, 4)), memoryview(data))
    data[:4] = b"\xff" * 4
    assert np.array_equal(array, VALUES)
    array[0, 0, 0] = 9
    assert bytes(data[:4]) == b"\xff" * 4
    assert array.flags.owndata or array.base.flags.owndata


@given(st.lists(ARRAYS, max_size=4))
def test_split_tensors_returns_views(tensors):
    """Concatenated tensors are split where each begins, without a copy."""
    payload = b"".join(array_bytes(as_array(array)) for array in tensors)
    pieces = split_tensors(payload, [spec_of(array) for array in tensors])
    assert [bytes(piece) for piece in pieces] == [array.tobytes() for array in tensors]
    assert all(piece.obj is payload for piece in pieces)


@pytest.mark.parametrize("length", [0, 23, 25, 1000])
def test_a_payload_of_another_length_is_rejected(length):
    """A payload with too few or too many bytes is rejected with both lengths."""
    specs = [TensorSpec("float32", (1, 1, 2)), TensorSpec("int64", (1, 1, 2))]
    expected = rf"^payload: expected 24 bytes for float32 \(1, 1, 2\) and int64 \(1, 1, 2\), got {length}$"
    with pytest.raises(InvalidArgumentError, match=expected):
        split_tensors(bytes(length), specs)


def test_the_size_of_a_spec_does_not_overflow():
    """Elements and bytes are Python's integers; NumPy's product of these axes is 0."""
    spec = TensorSpec("float64", (2**32, 2**32, 1, 16))
    assert (spec.numel, spec.nbytes) == (2**68, 2**71)
