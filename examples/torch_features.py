"""Extract features from a photo with a PyTorch model whose pooling layers run on a server.

python examples/torch_features.py photo.jpg features.png --address 127.0.0.1:50051

The model is the beginning of HMAX (Serre et al., 2007, "Robust Object Recognition with Cortex-Like Mechanisms"): Gabor
filters, each for the edges of one direction, and maxima that keep the strongest answer of a neighbourhood; then
averages of a grid of 4 x 4, so that a photo of any size has 128 features. `replace_pooling` puts remote layers in the
place of the model's own, and the features keep their bits. The picture shows the maxima, with a colour for each
direction.
"""

import argparse
import copy
import math

import numpy as np
import torch
from PIL import Image
from torch import nn

from poolrpc import PoolClient
from poolrpc.torch import replace_pooling

DIRECTIONS, SIZE = 8, 11
WAVELENGTH, SIGMA, GAMMA = 5.6, 4.5, 0.3  # in pixels, but for the ratio gamma: HMAX's filters of this size


def gabor_filters() -> torch.Tensor:
    """Return the filters, of (directions, 1, size, size), with a mean of 0 and a norm of 1."""
    positions = torch.arange(SIZE) - SIZE // 2
    y, x = torch.meshgrid(positions, positions, indexing="ij")
    angles = torch.arange(DIRECTIONS).view(-1, 1, 1) * math.pi / DIRECTIONS
    along, across = x * torch.sin(angles) - y * torch.cos(angles), x * torch.cos(angles) + y * torch.sin(angles)
    filters = torch.exp(-(across**2 + (GAMMA * along) ** 2) / (2 * SIGMA**2))
    filters = filters * torch.cos(2 * math.pi * across / WAVELENGTH)
    filters = filters - filters.mean((1, 2), keepdim=True)
    return (filters / filters.norm(dim=(1, 2), keepdim=True)).unsqueeze(1)


def feature_extractor() -> nn.Sequential:
    """Return the model."""
    convolution = nn.Conv2d(1, DIRECTIONS, SIZE, padding=SIZE // 2, bias=False)
    convolution.weight = nn.Parameter(gabor_filters(), requires_grad=False)
    layers = [convolution, nn.ReLU(), nn.MaxPool2d(8, stride=4), nn.AdaptiveAvgPool2d(4), nn.Flatten()]
    return nn.Sequential(*layers).eval()


def picture(maxima: torch.Tensor) -> Image.Image:
    """Return the direction of the strongest maximum of each cell as a colour, and its strength as brightness."""
    strongest, directions = maxima.max(0)
    brightness = (strongest / strongest.max()).sqrt() * 255
    channels = (directions * 256 // DIRECTIONS, torch.full_like(directions, 200), brightness)
    pixels = np.stack([each.to(torch.uint8).numpy() for each in channels], -1).repeat(3, 0).repeat(3, 1)
    return Image.frombytes("HSV", pixels.shape[1::-1], pixels.tobytes()).convert("RGB")


def main() -> None:
    """Read the command line, extract the features with and without a server, and draw them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photo")
    parser.add_argument("picture")
    parser.add_argument("--address", default="127.0.0.1:50051")
    options = parser.parse_args()
    grey = np.asarray(Image.open(options.photo).convert("L"), np.float32) / 255
    x = torch.from_numpy(grey)[None, None]
    model = feature_extractor()
    with PoolClient(options.address) as client, torch.no_grad():
        remote = replace_pooling(copy.deepcopy(model), client)
        maxima = remote[:3](x)
        features = remote[3:](maxima)
        print(remote)
        print(f"{tuple(x.shape)} -> maxima of {tuple(maxima.shape)} -> features of {tuple(features.shape)}")
        print("the same bits as with the model's own pooling:", torch.equal(features, model(x)))
    picture(maxima[0]).save(options.picture)


if __name__ == "__main__":
    main()
