"""Preprocess a folder of photos for a model of ImageNet: the photos are sent as uint8, and come back as float32.

python examples/preprocess.py photos batch.npy --sheet sheet.jpg --address 127.0.0.1:50051

The server scales the values to 0 to 1, averages the centre of each photo to 224 x 224 cells, and normalises them. The
sheet shows the first photos as the model gets them. Neither torch nor torchvision is needed here, only Pillow:
pip install 'poolrpc[images]'.
"""

import argparse
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
SHOWN = 8


def centre(path: Path) -> np.ndarray:
    """Return the square in the centre of a photo, as an array of (H, W, 3)."""
    pixels = np.asarray(Image.open(path).convert("RGB"))
    height, width, _ = pixels.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return pixels[top : top + side, left : left + side]


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder")
parser.add_argument("batch", help="file for the batch, .npy")
parser.add_argument("--sheet", help=f"file for a picture of the first {SHOWN} photos")
parser.add_argument("--address", default="127.0.0.1:50051")
options = parser.parse_args()

paths = sorted(path for path in Path(options.folder).iterdir() if path.suffix.lower() in {".jpg", ".jpeg", ".png"})
batch = np.empty((len(paths), SIZE, SIZE, 3), np.float32)
with PoolClient(options.address) as client:
    # The next photos are read and sent while the server computes.
    results = client.map(map(centre, paths), STEPS, layout="NHWC")
    for image, result in zip(batch, results, strict=True):
        image[...] = result.output
np.save(options.batch, batch.transpose(0, 3, 1, 2))  # (N, 3, 224, 224), as models take it
if options.sheet:
    shown = batch[:SHOWN]
    grey = (shown - shown.min()) / np.ptp(shown) * 255
    Image.fromarray(np.hstack(grey.astype(np.uint8))).save(options.sheet)
print(f"{len(paths)} photos as {batch.dtype} {(len(paths), 3, SIZE, SIZE)}")
