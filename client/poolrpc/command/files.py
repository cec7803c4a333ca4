"""Tensors in files: images, and NumPy's .npy and .npz; what is written can be read again."""

from __future__ import annotations

import io
import os
import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, BinaryIO
from zipfile import ZipFile

import numpy as np

from poolrpc._shapes.rules import clip
from poolrpc.chains import spatial_dims
from poolrpc.command.images import check_format, encode_image, read_image
from poolrpc.errors import InvalidArgumentError
from poolrpc.layers import ToDtype
from poolrpc.tensors import LAYOUTS, numpy_dtype

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from poolrpc._transport.join import Join
    from poolrpc._transport.result import PoolResult
    from poolrpc.chains import Chain
    from poolrpc.command.images import ImageKind
    from poolrpc.layers import Layer
    from poolrpc.tensors import Array, Layout

OPERANDS = ("weights", "offsets", "lengths", "ids", "boxes")
"""The names of operands besides indices: of arrays in a .npz, and of flags."""

STDIN = Path("-")
"""The name that stands for the standard input."""

WIDER = {"uint8": "float32", "uint16": "float32", "int32": "float64"}
"""The dtype that represents an image's integers exactly, to which they are converted for layers that do not take these.
"""


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """The contents of an input file.

    Attributes:
        x: The tensor, as it is in the file.
        layout: The layout that the file states: NHWC for an image; None for an array without one.
        indices: The array `indices` of a .npz; None if there is none.
        image: The kind of the image; None for an array.
        notes: What was left out of the tensor, one sentence each.
        operands: The other arrays of a .npz that may be operands, by their names.

    """

    x: Array
    layout: Layout | None = None
    indices: Array | None = None
    image: ImageKind | None = None
    notes: tuple[str, ...] = ()
    operands: dict[str, Array] = field(default_factory=dict)

    def layout_for(self, chosen: Layout | None) -> Layout:
        """Return the layout of the tensor.

        Args:
            chosen: The layout that the user chose; None: the file's, or else NCHW.

        Raises:
            InvalidArgumentError: The file states another layout than the user.

        """
        if chosen and self.layout and chosen != self.layout:
            msg = f"expected {self.layout}, which is the layout of the file, got {chosen}"
            raise InvalidArgumentError(msg, field="layout")
        return self.layout or chosen or "NCHW"

    def converted_for(self, operand: str) -> Source:
        """Return the source for layers that take an operand, before which there can be no conversion of an image.

        Args:
            operand: Its name; empty: there is none.

        """
        wider = WIDER.get(self.x.dtype.name)
        if self.image is None or operand not in {"weights", "boxes"} or wider is None:
            return self
        return replace(self, x=self.x.astype(wider))

    def layers_for(self, branches: Sequence[Chain]) -> tuple[Chain, ...]:
        """Return the layers of a call, with a conversion before each that does not take an image's integers.

        The image is sent as it is; the server converts it.

        Args:
            branches: The layers that the user chose.

        Raises:
            InvalidArgumentError: The tensor is an image, and the layers are not 2d.

        """
        if self.image is None:
            return (*branches,)
        if spatial_dims(branches) != 2:  # noqa: PLR2004 - the axes of an image
            layer = branches[0][0]
            msg = f"expected 2d layers for an image, which is (H, W, C), got {layer!r}"
            raise InvalidArgumentError(msg, field="layer")
        return tuple(_with_conversions(chain, self.x.dtype.name) for chain in branches)


def _with_conversions(chain: Chain, dtype: str) -> Chain:
    made: list[Layer] = []
    for layer in chain:
        wider = WIDER.get(dtype)
        if dtype not in layer.dtypes and wider in layer.dtypes:
            made.append(ToDtype(wider))
            dtype = wider
        made.append(layer)
        dtype = layer.output_dtype(dtype)
    return tuple(made)


def load(path: Path) -> Source:
    """Read a tensor from a file.

    Args:
        path: An image, a .npy, or a .npz with the array `x` (or a single array of any name), and optionally `layout`
            and an operand by its name, such as `indices`; or STDIN for one of these on the standard input.

    Raises:
        InvalidArgumentError: The file has none of these formats, or can be read in part only.
        OSError: The file can't be read.

    """
    if path == STDIN:
        return _load(io.BytesIO(sys.stdin.buffer.read()), path)
    with path.open("rb") as file:
        return _load(file, path)


def _load(file: BinaryIO, path: Path) -> Source:
    try:
        start = file.read(4)
        file.seek(0)
        is_array = path.suffix.lower() in (".npy", ".npz") or start in (b"\x93NUM", b"PK\x03\x04", b"PK\x05\x06")
        if is_array:
            return _load_arrays(file)
        pixels, kind, notes = read_image(file)
        return Source(pixels, "NHWC", None, kind, notes)
    except InvalidArgumentError as error:
        raise InvalidArgumentError(f"{path}: {error.violations[0].description}", field="file") from None
    except Exception as error:  # noqa: BLE001 - NumPy, zipfile, zlib and PIL raise a dozen types for damaged files
        reason = str(error) or type(error).__name__
        msg = f"expected an image, a .npy or a .npz, got {path}: {reason}"
        raise InvalidArgumentError(msg, field="file") from None


def _load_arrays(file: BinaryIO) -> Source:
    loaded = np.load(file)
    if isinstance(loaded, np.ndarray):
        return Source(_numbers(loaded))
    with loaded:
        others = [each for each in loaded.files if each not in ("x", "indices", "layout", *OPERANDS)]
        name = others.pop() if "x" not in loaded.files and len(others) == 1 else "x"
        if name not in loaded.files:
            raise InvalidArgumentError(f"expected an array named x, got {', '.join(loaded.files) or 'none'}")
        arrays = {each: loaded[each] for each in (name, "indices", "layout", *OPERANDS) if each in loaded.files}
    if not all(isinstance(each, np.ndarray) for each in arrays.values()):
        raise ValueError("a member is not an array")
    arrays[name] = _numbers(arrays[name])
    layout = str(arrays["layout"]) if "layout" in arrays else None
    if layout not in (None, *LAYOUTS):
        raise InvalidArgumentError(f"expected the layout {' or '.join(LAYOUTS)}, got {clip(layout)}")
    notes = (f"the arrays {', '.join(others)} are left out",) if others else ()
    operands = {each: arrays[each] for each in OPERANDS if each in arrays}
    return Source(arrays[name], layout, arrays.get("indices"), None, notes, operands)


def _numbers(array: Array) -> Array:
    # NumPy's files have no bfloat16: they hold it as two bytes without a meaning.
    return array.view(numpy_dtype("bfloat16")) if array.dtype == np.dtype("V2") else array


def paths_of(path: Path, branches: int) -> list[Path]:
    """Return the file of each branch: the path itself, or numbered ones if there are several: out-0.png, out-1.png."""
    return [path] if branches == 1 else [path.with_stem(f"{path.stem}-{i}") for i in range(branches)]


@dataclass(frozen=True, slots=True)
class Target:
    """The files for the results of a call.

    Attributes:
        paths: The file of each branch.
        format: "npy", "npz", or Pillow's name of an image format.
        image: The kind of the input; None if it is not an image.
        layout: The layout of the results.
        channels_axis: Where the last axis of an output belongs in a .npy, counted from the end; None: where it is.

    """

    paths: tuple[Path, ...]
    format: str
    image: ImageKind | None
    layout: Layout
    channels_axis: int | None = None

    @property
    def remark(self) -> str:
        """What a reader of the files has to know."""
        return " as NCHW" if self.channels_axis is not None else ""

    def save(self, results: Sequence[PoolResult]) -> tuple[str, ...]:
        """Write the results, each file completely or not at all.

        A .npz has the arrays x, layout and, if the layer returns them, indices.

        Returns:
            What was changed, one sentence each.

        Raises:
            InvalidArgumentError: An output has no value for a pixel.
            OSError: A file can't be written.

        """
        notes: list[str] = []
        for path, result in zip(self.paths, results, strict=True):
            if self.format == "npz":
                arrays = {"x": result.output, "layout": np.array(self.layout)}
                if result.indices is not None:
                    arrays["indices"] = result.indices
                # Not by np.savez: before NumPy 2.2 it leaves the archive open if the disk is full.
                with replacing(path) as file, ZipFile(file, "w") as archive:
                    for name, array in arrays.items():
                        with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                            np.lib.format.write_array(member, array, allow_pickle=False)
            elif self.format == "npy":
                output = result.output
                if self.channels_axis is not None:
                    output = np.ascontiguousarray(np.moveaxis(output, -1, self.channels_axis))
                with replacing(path) as file:
                    # Not the file itself, for which NumPy raises an error without the cause when the disk is full.
                    np.save(SimpleNamespace(write=file.write), output)
            elif self.image is not None:
                data, changes = encode_image(result.output, self.image, self.format)
                notes += changes
                with replacing(path) as file:
                    file.write(data)
        return tuple(notes)


def target_for(
    path: Path, source: Source, branches: Sequence[Chain], chosen: Layout | None, join: Join | None = None
) -> Target:
    """Return the files for the results of a call, and check that they can hold these, before the call.

    Args:
        path: The file, whose suffix selects the format; numbered if there are several branches.
        source: The input.
        branches: The layers.
        chosen: The layout that the user chose; None if none. A .npy is NCHW without one, because it is read so.
        join: How the outputs are joined to one; None: they stay apart.

    Raises:
        InvalidArgumentError: The folder is missing, or the format can't hold the results as they are.

    """
    if not path.parent.is_dir():
        raise InvalidArgumentError(f"expected a file in an existing folder, got {path}", field="save")
    layout, suffix = source.layout_for(chosen), path.suffix.lower()
    paths = tuple(paths_of(path, 1 if join else len(branches)))
    if suffix == ".npz":
        return Target(paths, "npz", source.image, layout)
    if any(chain[-1].returns_indices for chain in branches):
        msg = f"expected .npz for a layer with return_indices, since other formats have no indices, got {path}"
        raise InvalidArgumentError(msg, field="save")
    if suffix == ".npy":
        dims = spatial_dims(branches) or source.x.ndim - 2
        moved = layout == "NHWC" and not chosen and join != "flatten"
        return Target(paths, "npy", source.image, layout, -1 - dims if moved else None)
    if join in {"cat", "flatten"}:
        msg = f"expected .npy or .npz for outputs that are joined by {join}, got {path}"
        raise InvalidArgumentError(msg, field="save")
    if source.image is None or any(layer.operand == "boxes" for chain in branches for layer in chain):
        msg = f"expected .npy or .npz for an output that is not an image, got {path}"
        raise InvalidArgumentError(msg, field="save")
    return Target(paths, check_format(path.suffix, source.image), source.image, layout)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing, which takes the place of `path` when it is complete."""
    actual = path.resolve()
    if actual.exists() and not actual.is_file():  # a device or a pipe
        with actual.open("wb") as file:
            yield file
        return
    temporary = actual.with_name(f".{actual.name}.{os.getpid()}-{threading.get_ident()}")
    try:
        with temporary.open("xb") as file:
            yield file
        temporary.replace(actual)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno:
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from None
        raise
