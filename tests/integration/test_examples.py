"""The examples, run as scripts with a server."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import poolrpc_server

EXAMPLES = Path(__file__).parents[2] / "examples"
MEAN, STD = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))


def test_photos_are_preprocessed_as_by_torch(tmp_path: Path) -> None:
    """The batch that examples/preprocess.py saves has torch's bits for the same steps on the same photos."""
    photos = tmp_path / "photos"
    photos.mkdir()
    random = np.random.default_rng(0)
    shapes = [(300, 260), (224, 500), (101, 97), (300, 260)]
    expected = []
    for number, (height, width) in enumerate(shapes):
        pixels = random.integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(photos / f"{number}.png")
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        square = torch.from_numpy(pixels[top : top + side, left : left + side].copy()).movedim(-1, 0)
        scaled = square.to(torch.float32).mul_(1 / 255)
        averaged = torch.nn.AdaptiveAvgPool2d(224)(scaled.contiguous())
        expected.append(averaged.sub(MEAN.view(-1, 1, 1)).div_(STD.view(-1, 1, 1)))
    (photos / "notes.txt").write_text("not a photo")
    with poolrpc_server.embedded() as client:
        command = [sys.executable, EXAMPLES / "preprocess.py", client.address, photos, tmp_path / "batch.npy"]
        ran = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603 - our example
    assert ran.stdout == "4 photos as float32 (4, 3, 224, 224)\n"
    assert torch.equal(torch.from_numpy(np.load(tmp_path / "batch.npy")), torch.stack(expected))
