"""Preprocess a folder of photos for a model of ImageNet: the photos are sent as uint8, and come back as float32.

python examples/preprocess.py 127.0.0.1:50051 photos batch.npy

The server scales the values to 0 to 1, averages the centre of each photo to 224 x 224 cells, and normalises them.
Neither torch nor torchvision is needed here, only Pillow: pip install 'poolrpc[images]'.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from poolrpc import AdaptiveAvgPool2d, Normalize, PoolClient, ToDtype

SIZE = 224
STEPS = [
    ToDtype("float32", scale=True),
    AdaptiveAvgPool2d(SIZE),
    Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),  # as for torchvision's models
]


def centre(path: Path) -> np.ndarray:
    """Return the square in the centre of a photo, as an array of (H, W, 3)."""
    pixels = np.asarray(Image.open(path).convert("RGB"))
    height, width, _ = pixels.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return pixels[top : top + side, left : left + side]


address, folder, target = sys.argv[1:]
paths = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in {".jpg", ".jpeg", ".png"})
batch = np.empty((len(paths), SIZE, SIZE, 3), np.float32)
with PoolClient(address) as client:
    # The next photos are read and sent while the server computes.
    results = client.map(map(centre, paths), STEPS, layout="NHWC")
    for image, result in zip(batch, results, strict=True):
        image[...] = result.output
np.save(target, batch.transpose(0, 3, 1, 2))  # (N, 3, 224, 224), as models take it
print(f"{len(paths)} photos as {batch.dtype} {(len(paths), 3, SIZE, SIZE)}")
