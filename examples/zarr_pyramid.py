"""Add the coarser levels of a multiscale pyramid to an OME-Zarr group, which has a volume (z, y, x) as its array "0".

python examples/zarr_pyramid.py volume.zarr --levels 4 --reduce average --address unix:/run/poolrpc/pool.sock

Each level halves y and x, as pyramids of electron microscopy do. A chunk of slices is read once, and all of its levels
come from one call. Levels of integers are averages of the level before, rounded to integers; `max` and `min` suit
labels. If the group does not exist, `--synthetic 64x512x512` makes one. It needs `pip install zarr`.
"""

import argparse

import numpy as np
import zarr

from poolrpc import AvgPool2d, Layer, MaxPool2d, PoolClient, Round, ToDtype


def chain_of(reduce: str, dtype: np.dtype, levels: int) -> tuple[list[Layer], list[int]]:
    """Return the layers of a pyramid, and the numbers of those whose outputs are its levels."""
    # At an odd size, the last window has the cells that there are.
    if reduce != "average":
        level: list[Layer] = [MaxPool2d(2, ceil_mode=True)]
    elif dtype.kind == "f":
        level = [AvgPool2d(2, ceil_mode=True)]
    else:
        level = [ToDtype("float32"), AvgPool2d(2, ceil_mode=True), Round(), ToDtype(dtype.name)]
    return level * levels, [len(level) * number - 1 for number in range(1, levels + 1)]


def opposite(slices: np.ndarray) -> np.ndarray:
    """Return cells in the opposite order, so that their max is the min of the given ones."""
    return -slices if slices.dtype.kind == "f" else ~slices


def add_levels(group: zarr.Group, client: PoolClient, reduce: str, levels: int) -> None:
    """Write the levels of the group's array "0", and the metadata of OME-Zarr 0.5."""
    volume = group["0"]
    chain, steps = chain_of(reduce, volume.dtype, levels)
    depth, height, width = volume.shape
    for level in range(1, levels + 1):
        shape = (depth, -(-height // 2**level), -(-width // 2**level))
        chunks = tuple(map(min, volume.chunks, shape))
        group.create_array(str(level), shape=shape, chunks=chunks, dtype=volume.dtype, overwrite=True)
    for start in range(0, depth, volume.chunks[0]):
        slices = volume[start : start + volume.chunks[0]]
        results = client.pool_steps(opposite(slices) if reduce == "min" else slices, chain, steps)
        for level, result in enumerate(results, 1):
            output = opposite(result.output) if reduce == "min" else result.output
            group[str(level)][start : start + len(slices)] = output
    datasets = [
        {"path": str(level), "coordinateTransformations": [{"type": "scale", "scale": [1, 2**level, 2**level]}]}
        for level in range(levels + 1)
    ]
    axes = [{"name": name, "type": "space"} for name in "zyx"]
    group.attrs["ome"] = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": datasets, "type": reduce}]}


def synthetic(path: str, shape: tuple[int, ...], dtype: str) -> zarr.Group:
    """Make a group with a volume of smooth random values."""
    group = zarr.create_group(path)
    chunks = tuple(map(min, (16, 256, 256), shape))
    volume = group.create_array("0", shape=shape, chunks=chunks, dtype=dtype)
    rng, largest = np.random.default_rng(0), np.iinfo(dtype).max if np.dtype(dtype).kind in "iu" else 1
    for start in range(0, shape[0], chunks[0]):
        part = (min(chunks[0], shape[0] - start), *shape[1:])
        volume[start : start + part[0]] = (rng.random(part, np.float32) * largest).astype(dtype)
    return group


def main() -> None:
    """Read the command line, add the levels, and print their shapes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path")
    parser.add_argument("--levels", type=int, default=4)
    parser.add_argument("--reduce", choices=("average", "max", "min"), default="average")
    parser.add_argument("--address", default="127.0.0.1:50051")
    parser.add_argument("--synthetic", metavar="SHAPE", help="make a volume of this shape, such as 64x512x512")
    parser.add_argument("--dtype", default="uint8", help="dtype of the synthetic volume [default: uint8]")
    options = parser.parse_args()
    if options.synthetic:
        group = synthetic(options.path, tuple(map(int, options.synthetic.split("x"))), options.dtype)
    else:
        group = zarr.open_group(options.path, mode="r+")
    with PoolClient(options.address) as client:
        add_levels(group, client, options.reduce, options.levels)
    for level in range(options.levels + 1):
        print(level, group[str(level)].dtype, group[str(level)].shape)


if __name__ == "__main__":
    main()
