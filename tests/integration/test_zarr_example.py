"""examples/zarr_pyramid.py on a synthetic volume, compared with NumPy, and with tinybrain if it is installed."""

from __future__ import annotations

import subprocess
import sys
import warnings
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import zarr

if TYPE_CHECKING:
    from collections.abc import Callable

EXAMPLE = Path(__file__).parents[2] / "examples" / "zarr_pyramid.py"
LEVELS = 3


def halved(volume: np.ndarray, reduce: str) -> np.ndarray:
    """Return the next level, by NumPy; the last window of an odd axis has the cells that there are."""
    depth, height, width = volume.shape
    cells = np.full((depth, -(-height // 2) * 2, -(-width // 2) * 2), np.nan)
    cells[:, :height, :width] = volume
    windows = cells.reshape(depth, cells.shape[1] // 2, 2, cells.shape[2] // 2, 2)
    functions: dict[str, Callable[..., np.ndarray]] = {"average": np.nanmean, "max": np.nanmax, "min": np.nanmin}
    level = functions[reduce](windows, axis=(2, 4))
    return (level if volume.dtype.kind == "f" else np.rint(level)).astype(volume.dtype)


@pytest.mark.parametrize(
    ("dtype", "reduce", "height"),
    [
        ("uint8", "average", 101),
        ("uint16", "average", 96),
        ("uint16", "max", 101),
        ("uint16", "max", 96),
        ("uint8", "min", 96),
    ],
)
def test_every_level_is_numpys(unix_address: str, tmp_path: Path, dtype: str, reduce: str, height: int) -> None:
    """Chunks of slices, odd sizes and partial chunks have the levels of the whole volume, and OME-Zarr's metadata."""
    path, shape = tmp_path / "volume.zarr", f"20x{height}x64"
    options = ["--levels", str(LEVELS), "--reduce", reduce, "--address", unix_address]
    command = [sys.executable, EXAMPLE, path, *options, "--synthetic", shape, "--dtype", dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own command
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1] == f"1 {dtype} (20, {-(-height // 2)}, 32)"
    group = zarr.open_group(path, mode="r")
    levels = [np.asarray(group[str(number)][:]) for number in range(LEVELS + 1)]
    for fine, coarse in pairwise(levels):
        np.testing.assert_array_equal(coarse, halved(fine, reduce))
    (multiscale,) = group.attrs["ome"]["multiscales"]
    assert [each["path"] for each in multiscale["datasets"]] == ["0", "1", "2", "3"]
    assert multiscale["datasets"][2]["coordinateTransformations"] == [{"type": "scale", "scale": [1, 4, 4]}]
    # Its averages of integers are truncated, and it has no maxima of an odd axis.
    if find_spec("tinybrain") and reduce != "average" and height % 2**LEVELS == 0:
        from tinybrain import downsample  # noqa: PLC0415 - optional

        function = getattr(downsample, f"downsample_with_{reduce}_pooling")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of how it calls NumPy
            expected = function(levels[0].T, (2, 2, 1), num_mips=LEVELS)
        for ours, theirs in zip(levels[1:], expected, strict=True):
            np.testing.assert_array_equal(ours, theirs.T)
