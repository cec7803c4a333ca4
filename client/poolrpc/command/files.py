"""Tensors in files: images, which Pillow reads and writes, and NumPy's .npy and .npz."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from poolrpc.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from poolrpc._transport.result import PoolResult
    from poolrpc.chains import Chain
    from poolrpc.tensors import Array, Layout


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """The contents of an input file.

    Attributes:
        x: The tensor.
        layout: Its layout: NHWC for an image, NCHW for an array.
        indices: The array `indices` of a .npz; None if there is none.

    """

    x: Array
    layout: Layout
    indices: Array | None = None


def load(path: Path, branches: Sequence[Chain]) -> Source:
    """Read a tensor from a file.

    Args:
        path: An image, a .npy, or a .npz with the array `x` (or a single array of any name) and optionally `indices`.
        branches: The layers for the tensor. An image becomes uint8, or float32 (0 to 255) if a layer takes no integers.

    Raises:
        InvalidArgumentError: The file has none of these formats.
        OSError: The file can't be read.

    """
    with path.open("rb") as file:
        try:
            return (_load_arrays if path.suffix in (".npy", ".npz") else _load_image)(file, branches)
        except InvalidArgumentError:
            raise
        except Exception as error:  # noqa: BLE001 - NumPy, zipfile, zlib and PIL raise a dozen types for damaged files
            msg = f"expected an image, a .npy or a .npz, got {path}: {error}"
            raise InvalidArgumentError(msg, field="file") from None


def _load_image(file: BinaryIO, branches: Sequence[Chain]) -> Source:
    image = np.asarray(_image_module().open(file).convert("RGB"))
    integers = all("uint8" in layer.dtypes for chain in branches for layer in chain)
    return Source(image if integers else image.astype(np.float32), "NHWC")


def _load_arrays(file: BinaryIO, _: Sequence[Chain]) -> Source:
    loaded = np.load(file)
    if isinstance(loaded, np.ndarray):
        return Source(loaded, "NCHW")
    with loaded:
        name = "x" if "x" in loaded.files or len(loaded.files) != 1 else loaded.files[0]
        if name not in loaded.files:
            msg = f"expected an array named x in {file.name}, got {', '.join(loaded.files) or 'none'}"
            raise InvalidArgumentError(msg, field="file")
        arrays = [loaded[each] for each in (name, "indices") if each in loaded.files]
    if not all(isinstance(each, np.ndarray) for each in arrays):
        raise ValueError("a member is not an array")
    return Source(arrays[0], "NCHW", *arrays[1:])


def save(path: Path, results: Sequence[PoolResult], source: Source) -> list[Path]:
    """Write the outputs of all branches to files.

    Args:
        path: The file. A .npz holds the outputs of all branches, and their indices. Other formats have one file per
            branch, numbered if there are several: out-0.png, out-1.png.
        results: The results of the branches.
        source: The input, which decides whether outputs are images.

    Returns:
        The files that were written.

    Raises:
        InvalidArgumentError: An output is not an image, and the suffix is neither .npy nor .npz.
        OSError: A file can't be written.

    """
    if path.suffix == ".npz":
        arrays: dict[str, Any] = {}
        for i, result in enumerate(results):
            end = f"_{i}" if i else ""
            arrays[f"output{end}"] = result.output
            if result.indices is not None:
                arrays[f"indices{end}"] = result.indices
        np.savez(path, **arrays)
        return [path]
    numbered = len(results) > 1
    paths = [path.with_stem(f"{path.stem}-{i}") if numbered else path for i in range(len(results))]
    for target, result in zip(paths, results, strict=True):
        if target.suffix == ".npy":
            np.save(target, result.output)
        else:
            _save_image(target, result.output, source)
    return paths


def _save_image(path: Path, output: Array, source: Source) -> None:
    if source.layout != "NHWC" or output.ndim != 3:  # noqa: PLR2004 - (H, W, C)
        msg = f"expected .npy or .npz for an output that is not an image, got {path}"
        raise InvalidArgumentError(msg, field="save")
    try:
        _image_module().fromarray(np.clip(np.rint(output), 0, 255).astype(np.uint8)).save(path)
    except ValueError as error:
        raise InvalidArgumentError(
            f"expected the suffix of an image format, got {path}: {error}", field="save"
        ) from None


def _image_module() -> Any:  # noqa: ANN401 - PIL's module, which is optional
    try:
        from PIL import Image  # noqa: PLC0415 - optional, and only images need it
    except ImportError:
        msg = "expected Pillow to be installed, for images: pip install 'poolrpc[viz]'"
        raise InvalidArgumentError(msg, field="file") from None
    return Image
