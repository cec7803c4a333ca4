"""A demonstration: pool a photograph with a chain and with branches, and check worked examples.

Starts a server on a free port, pools with the installed command and with the client, prints the computed shapes, and
writes pictures to demo/. The exit status is 1 if an output is not the expected one.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("agg")

import matplotlib.pyplot as plt
import numpy as np

from poolrpc import AdaptiveAvgPool2d, AdaptiveMaxPool2d, AvgPool2d, Layer, MaxPool2d, PoolClient
from scripts.server_process import serving

PHOTOGRAPH = Path(mpl.get_data_path()) / "sample_data" / "grace_hopper.jpg"
FOLDER = Path(__file__).parent.parent / "demo"
CHAIN = "[MaxPool2d(4), AvgPool2d(2)]"
BRANCHES = ("MaxPool2d(8)", "AvgPool2d(8)", "FractionalMaxPool2d(3, output_ratio=0.2)", "AdaptiveAvgPool2d((32, 32))")

COUNT = np.arange(1, 17, dtype=np.float32).reshape(1, 1, 4, 4)
PLANE = np.array([[1, 3, 2, 4], [5, 6, 8, 7], [4, 2, 1, 0], [9, 7, 3, 2]], np.float32).reshape(1, 1, 4, 4)
EXAMPLES: list[tuple[str, np.ndarray, Layer, list[list[float]]]] = [
    ("1..16", COUNT, MaxPool2d(2, 2), [[6, 8], [14, 16]]),
    ("1..16", COUNT, AvgPool2d(2, 2), [[3.5, 5.5], [11.5, 13.5]]),
    ("the plane", PLANE, MaxPool2d(2, 2), [[6, 8], [9, 3]]),
    ("the plane", PLANE, AdaptiveAvgPool2d((1, 1)), [[4.0]]),
    ("the plane", PLANE, AdaptiveMaxPool2d((1, 1)), [[9.0]]),
]


def command(address: str, *arguments: str) -> None:
    """Print and run a `poolrpc` command."""
    print("$ poolrpc", shlex.join(arguments), flush=True)
    program = Path(sys.executable).with_name("poolrpc")
    subprocess.run([program, *arguments, "--address", address], check=True)  # noqa: S603 - our own command
    print(flush=True)


def pool_photograph(address: str) -> None:
    """Pool the photograph with a chain and with branches, and draw the input and the outputs."""
    photograph = str(PHOTOGRAPH)
    command(address, "pool", photograph, "--layer", CHAIN, "--save", str(FOLDER / "chain.png"))
    layers = [word for branch in BRANCHES for word in ("--layer", branch)]
    command(address, "pool", photograph, *layers, "--save", str(FOLDER / "branch.png"))
    pictures = [(PHOTOGRAPH, "input"), (FOLDER / "chain.png", CHAIN)]
    pictures += [(FOLDER / f"branch-{i}.png", branch) for i, branch in enumerate(BRANCHES)]
    figure, axes = plt.subplots(1, len(pictures), figsize=(3.2 * len(pictures), 4.4), layout="constrained")
    for axis, (path, title) in zip(axes, pictures, strict=True):
        image = plt.imread(path)
        axis.imshow(image, interpolation="nearest")
        axis.set_title(f"{title}\n{image.shape[0]} x {image.shape[1]}", fontsize=9)
        axis.axis("off")
    figure.savefig(FOLDER / "pooled.png", dpi=110)


def check_examples(address: str) -> bool:
    """Run the worked examples and return whether every output is the expected one."""
    correct = True
    with PoolClient(address) as client:
        for name, x, layer, expected in EXAMPLES:
            result = client.pool(x, layer)
            same = result.output[0, 0].tolist() == expected
            correct &= same
            verdict = "as expected" if same else f"WRONG, expected {expected}"
            print(f"{layer!r} on {name}: {x.shape} -> {result.shape}  {result.output[0, 0].tolist()}  {verdict}")
    return correct


def main() -> int:
    """Run the demonstration and return its exit status."""
    FOLDER.mkdir(exist_ok=True)
    with serving() as server:
        print(
            f"serving at {server.address}: torch {server.start_line['torch']} on {server.start_line['device']}\n",
            flush=True,
        )
        pool_photograph(server.address)
        command(server.address, "explain", "MaxPool2d(2, 2)", "--input", str(PLANE[0, 0].astype(int).tolist()))
        correct = check_examples(server.address)
    print(f"\npictures: {FOLDER.name}/pooled.png" if correct else "\nan output was wrong")
    return 0 if correct else 1


if __name__ == "__main__":
    sys.exit(main())
