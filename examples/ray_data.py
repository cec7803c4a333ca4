"""Pool a folder of images with Ray Data and write the tensors as Parquet.

python examples/ray_data.py photos pooled --layer 'MaxPool2d(4)'

Each actor runs an engine in its own process. With --address the actors call a server instead, and need no torch.
"""

import argparse
from contextlib import ExitStack
from typing import Any

import ray.data

from poolrpc import PoolClient, parse_layer


class Pooling:
    """An actor that pools batches of images."""

    def __init__(self, layer: str, address: str) -> None:
        """Connect to the server at `address`, or start an engine if it is empty."""
        self._layer = parse_layer(layer)
        self._open = ExitStack()
        if address:
            self._client = self._open.enter_context(PoolClient(address))
        else:
            from poolrpc_server import embedded  # noqa: PLC0415 - imports torch

            self._client = self._open.enter_context(embedded(threads=1))

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Pool a batch; images of the same size share requests."""
        results = self._client.map(batch["image"], self._layer, layout="NHWC")
        return {"path": batch["path"], "pooled": [each.output for each in results]}


parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("images", help="folder of images, or any path that Ray Data reads")
parser.add_argument("output", help="folder to write the tensors to")
parser.add_argument("--layer", default="MaxPool2d(2)", help="layer to run, as an expression (default: %(default)s)")
parser.add_argument("--address", default="", help="address of a server (default: an engine in each actor)")
parser.add_argument("--actors", type=int, default=1, help="maximum number of actors (default: %(default)s)")
parser.add_argument("--gpus", type=float, default=0, help="GPUs for each actor (default: %(default)s)")
arguments = parser.parse_args()

images = ray.data.read_images(arguments.images, mode="RGB", include_paths=True)
pooled = images.map_batches(
    Pooling,
    fn_constructor_args=(arguments.layer, arguments.address),
    batch_size=64,
    compute=ray.data.ActorPoolStrategy(min_size=1, max_size=arguments.actors),
    num_cpus=1,
    num_gpus=arguments.gpus,
)
pooled.write_parquet(arguments.output)
