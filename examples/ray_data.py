"""Pool a folder of images with Ray Data and write the tensors as Parquet.

python examples/ray_data.py photos pooled --layer 'MaxPool2d(4)'

Each actor has an engine of its own, in its process; with --address it asks a server instead, and needs no torch.
"""

import argparse
from contextlib import ExitStack
from typing import Any

import ray.data

from poolrpc import PoolClient, parse_layer


class Pooling:
    """Images in, pooled images out, batch by batch; Ray makes as many of these as it has room for."""

    def __init__(self, layer: str, address: str) -> None:
        """Make one that has an engine, or the server at `address`."""
        self._layer = parse_layer(layer)
        self._open = ExitStack()
        if address:
            self._client = self._open.enter_context(PoolClient(address))
        else:
            from poolrpc_server import embedded  # noqa: PLC0415 - it imports torch

            self._client = self._open.enter_context(embedded(threads=1))

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Pool a batch; images of one size travel together."""
        results = self._client.map(batch["image"], self._layer, layout="NHWC")
        return {"path": batch["path"], "pooled": [each.output for each in results]}


parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("images", help="folder of images, or any address that Ray Data reads")
parser.add_argument("output", help="folder for the tensors")
parser.add_argument("--layer", default="MaxPool2d(2)", help="as poolrpc's expressions have it")
parser.add_argument("--address", default="", help="of a server; none: each actor has an engine")
parser.add_argument("--actors", type=int, default=1, help="at most")
parser.add_argument("--gpus", type=float, default=0, help="of each actor")
given = parser.parse_args()

images = ray.data.read_images(given.images, mode="RGB", include_paths=True)
pooled = images.map_batches(
    Pooling,
    fn_constructor_args=(given.layer, given.address),
    batch_size=64,
    compute=ray.data.ActorPoolStrategy(min_size=1, max_size=given.actors),
    num_cpus=1,
    num_gpus=given.gpus,
)
pooled.write_parquet(given.output)
