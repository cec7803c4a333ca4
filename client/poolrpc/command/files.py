"""Tensors in files, for the command: images by PIL, and NumPy's .npy and .npz."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from poolrpc.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from poolrpc._transport.transfer import PoolResult
    from poolrpc.chains import Chain
    from poolrpc.tensors import Array


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """What a file held.

    Attributes:
        x: The tensor.
        layout: Its layout: NHWC for an image, NCHW for an array.
        indices: What a .npz had beside it under that name.

    """

    x: Array
    layout: str
    indices: Array | None = None


def load(path: Path, branches: Sequence[Chain]) -> Source:
    """Read a tensor.

    Args:
        path: An image, a .npy, or a .npz with `x` (or a single array) and perhaps `indices`.
        branches: What it is for: an image becomes float32 (0 to 255) where a layer takes no integers.

    Raises:
        InvalidArgumentError: The file is none of these.
        OSError: It can't be read.

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
    whole = all("uint8" in layer.dtypes for chain in branches for layer in chain)
    return Source(image if whole else image.astype(np.float32), "NHWC")


def _load_arrays(file: BinaryIO, _: Sequence[Chain]) -> Source:
    held = np.load(file)
    if isinstance(held, np.ndarray):
        return Source(held, "NCHW")
    with held:
        name = "x" if "x" in held.files or len(held.files) != 1 else held.files[0]
        if name not in held.files:
            msg = f"expected an array named x in {file.name}, got {', '.join(held.files) or 'none'}"
            raise InvalidArgumentError(msg, field="file")
        arrays = [held[each] for each in (name, "indices") if each in held.files]
    if not all(isinstance(each, np.ndarray) for each in arrays):
        raise ValueError("a member of it is no array")
    return Source(arrays[0], "NCHW", *arrays[1:])


def save(path: Path, results: Sequence[PoolResult], source: Source) -> list[Path]:
    """Write the outputs, one file each unless it is a .npz; several are numbered: out-0.png, out-1.png.

    Raises:
        InvalidArgumentError: An output is no image.
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
        msg = f"expected .npy or .npz for what is no image, got {path}"
        raise InvalidArgumentError(msg, field="save")
    try:
        _image_module().fromarray(np.clip(np.rint(output), 0, 255).astype(np.uint8)).save(path)
    except ValueError as error:
        raise InvalidArgumentError(f"expected an image's suffix, got {path}: {error}", field="save") from None


def _image_module() -> Any:  # noqa: ANN401 - PIL's module, which is optional
    try:
        from PIL import Image  # noqa: PLC0415 - optional, and only images need it
    except ImportError:
        raise InvalidArgumentError("images need Pillow: pip install 'poolrpc[viz]'", field="file") from None
    return Image
