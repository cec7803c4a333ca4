"""examples/ray_data.py on a few images, with an engine in Ray's actors and with a server."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image

from scripts.ray_cluster import IN_NAMESPACE, ray_folder
from scripts.server_process import serving
from tests.installing import ROOT

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

# Writes the columns to an .npz file, because only Ray's environment can read their types.
READ = """
import sys, numpy, ray.data, pyarrow.parquet
rows = pyarrow.parquet.read_table(sys.argv[1]).to_pylist()
numpy.savez(sys.argv[2], **{row["path"].rpartition("/")[2]: numpy.asarray(row["pooled"]) for row in rows})
"""


def run(environment: dict[str, str], *command: object) -> None:
    """Run a command in Ray's environment, with a Ray cluster of its own."""
    with ray_folder() as folder:
        done = subprocess.run(  # noqa: S603 - our own commands
            [*IN_NAMESPACE, "python", *map(str, command)],
            capture_output=True,
            text=True,
            check=False,
            env={**environment, "RAY_TMPDIR": folder},
            timeout=300,
        )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of two sizes."""
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for i in range(5):
        shape = (20, 30, 3) if i < 3 else (17, 9, 3)
        Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.mark.parametrize("where", ["engine", "server"])
def test_every_image_is_pooled(ray_environment: dict[str, str], photos: Path, tmp_path: Path, where: str) -> None:
    """The result for each image equals torch's, in the layout of the image."""
    command = [ROOT / "examples/ray_data.py", photos, tmp_path / "pooled", "--layer", "MaxPool2d(4)"]
    if where == "engine":
        run(ray_environment, *command)
    else:
        with serving(listen=f"unix:{tmp_path / 'pool.sock'}") as server:
            run(ray_environment, *command, "--address", server.address)
    run(ray_environment, "-c", READ, tmp_path / "pooled", tmp_path / "pooled.npz")
    with np.load(tmp_path / "pooled.npz") as pooled:
        for path in photos.iterdir():
            image = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)
            expected = torch.nn.functional.max_pool2d(image.float(), 4).byte().permute(1, 2, 0)
            assert torch.equal(torch.from_numpy(pooled[path.name]), expected)
        assert len(pooled.files) == 5
