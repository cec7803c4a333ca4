"""Tensors in files, for the command: images by PIL, and NumPy's .npy and .npz."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from poolrpc.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from poolrpc.chains import Chain
    from poolrpc.client import PoolResult
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
    if path.suffix not in (".npy", ".npz"):
        image = np.asarray(_image_module().open(path).convert("RGB"))
        whole = all("uint8" in layer.dtypes for chain in branches for layer in chain)
        return Source(image if whole else image.astype(np.float32), "NHWC")
    try:
        held = np.load(path)
        if isinstance(held, np.ndarray):
            return Source(held, "NCHW")
        with held:
            name = "x" if "x" in held.files or len(held.files) != 1 else held.files[0]
            if name not in held.files:
                msg = f"expected an array named x in {path}, got {', '.join(held.files) or 'none'}"
                raise InvalidArgumentError(msg, field="file")
            return Source(held[name], "NCHW", held["indices"] if "indices" in held.files else None)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        if isinstance(error, InvalidArgumentError):
            raise
        raise InvalidArgumentError(f"expected an array in {path}: {error}", field="file") from None


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
