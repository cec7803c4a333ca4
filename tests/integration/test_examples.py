"""The examples, run as scripts with a server; those that make pictures make the ones in docs/examples.md.

`POOLRPC_UPDATE_EXAMPLES=1 pytest tests/integration/test_examples.py` stores the pictures instead.
"""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import matplotlib as mpl
import numpy as np
import pytest
import torch
from PIL import Image

from tests.pictures import check_picture

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
EXAMPLES, PICTURES = ROOT / "examples", ROOT / "docs/figures/examples"
PHOTO = Path(mpl.get_data_path()) / "sample_data/grace_hopper.jpg"
MEAN, STD = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))


def run(example: str, *arguments: object) -> str:
    """Run an example, and return what it printed."""
    command = [sys.executable, EXAMPLES / example, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our example
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_photos_are_preprocessed_as_by_torch(address: str, tmp_path: Path) -> None:
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
    printed = run("preprocess.py", photos, tmp_path / "batch.npy", "--address", address)
    assert printed == "4 photos as float32 (4, 3, 224, 224)\n"
    assert torch.equal(torch.from_numpy(np.load(tmp_path / "batch.npy")), torch.stack(expected))


def test_the_sheet_of_preprocessed_photos(address: str, tmp_path: Path) -> None:
    """examples/preprocess.py draws the photos as the model gets them, next to each other."""
    photos = tmp_path / "photos"
    photos.mkdir()
    photo = Image.open(PHOTO)
    photo.save(photos / "a.png")
    photo.crop((100, 50, 350, 300)).save(photos / "b.png")
    photo.convert("L").save(photos / "c.png")
    sheet = tmp_path / "sheet.jpg"
    run("preprocess.py", photos, tmp_path / "batch.npy", "--sheet", sheet, "--address", address)
    check_picture(sheet.read_bytes(), PICTURES / "preprocess.jpg")


def test_features_of_a_model_with_remote_pooling(address: str, tmp_path: Path) -> None:
    """The features have the bits of the model's own pooling, and the picture shows the edges by their direction."""
    picture = tmp_path / "features.png"
    printed = run("torch_features.py", PHOTO, picture, "--address", address)
    assert "the same bits as with the model's own pooling: True\n" in printed
    assert printed.count("RemotePool(") == 2
    check_picture(picture.read_bytes(), PICTURES / "torch_features.png")


@pytest.mark.parametrize(
    ("query", "first"),
    [
        ("when do patent licenses terminate", "or contributory patent infringement, then any patent licenses"),
        ("trademarks", "6. Trademarks. This License does not grant permission to use the trade"),
    ],
)
def test_pages_are_found_by_their_words(address: str, tmp_path: Path, query: str, first: str) -> None:
    """examples/page_index.py finds the page and the row of the licence that a query means."""
    picture = tmp_path / "found.png"
    printed = run("page_index.py", ROOT / "LICENSE", query, picture, "--address", address).splitlines()
    assert len(printed) == 4
    assert first in printed[1]
    if query == "trademarks":
        check_picture(picture.read_bytes(), PICTURES / "page_index.png")


@contextmanager
def web_service(pool_address: str) -> Iterator[str]:
    """Run examples/fastapi_service.py on a free port, and yield its URL."""
    command = [sys.executable, "-m", "uvicorn", "--app-dir", EXAMPLES, "fastapi_service:app", "--port", "0"]
    environment = {**os.environ, "POOLRPC_ADDRESS": pool_address}
    process = subprocess.Popen(  # noqa: S603 - our example
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert process.stderr is not None
    with process:
        try:
            found = next(filter(None, (re.search(r"running on (http://[\d.:]+)", line) for line in process.stderr)))
            yield found[1]
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def service(address: str) -> Iterator[str]:
    """Return the URL of examples/fastapi_service.py, in front of the shared server."""
    with web_service(address) as url:
        yield url


def post(url: str, layer: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
    """Send a photo; return the status, the headers and the body of the response."""
    request = urllib.request.Request(f"{url}/pool?layer={quote(layer)}", body)  # noqa: S310 - http
    try:
        with urllib.request.urlopen(request, timeout=60) as response:  # noqa: S310 - http
            return response.status, dict(response.headers), response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, dict(error.headers), error.read()


def test_a_photo_is_pooled_by_the_web_service(service: str) -> None:
    """The response is a PNG of the maxima, or of the rounded averages, of the photo."""
    pixels = np.asarray(Image.open(PHOTO).convert("RGB"))
    cells = pixels.reshape(150, 4, 128, 4, 3)
    status, headers, png = post(service, "MaxPool2d(4)", PHOTO.read_bytes())
    assert (status, headers["x-shape"], headers["content-type"]) == (200, "150x128x3", "image/png")
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png))), cells.max((1, 3)))
    check_picture(png, PICTURES / "fastapi_service.png")
    status, _, png = post(service, "[MaxPool2d(4), AvgPool2d(2)]", PHOTO.read_bytes())
    averages = cells.max((1, 3)).reshape(75, 2, 64, 2, 3).mean((1, 3))
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png))), np.rint(averages))


@pytest.mark.parametrize(
    ("layer", "body", "status", "detail", "fields"),
    [
        ("MaxPool2d(0)", PHOTO.read_bytes(), 422, "kernel_size: expected 1 to 65535, got 0", []),
        (
            "MaxPool2d(700)",
            PHOTO.read_bytes(),
            422,
            "on plane (600, 512)",
            ["branches[0].layers[1].max_pool.kernel_size"],
        ),
        ("Softmax(1)", PHOTO.read_bytes(), 422, "got 'Softmax'", []),
        ("MaxPool2d(2)", b"not a photo", 422, "expected a photo", None),
        ("MaxPool2d(2)", bytes(20 * 2**20 + 1), 413, "expected a photo of at most 20971520 bytes", None),
    ],
    ids=["parameter", "shape", "name", "photo", "size"],
)
def test_what_the_web_service_rejects(  # noqa: PLR0913 - the columns of a table
    service: str, *, layer: str, body: bytes, status: int, detail: str, fields: list[str] | None
) -> None:
    """A wrong parameter, layer or photo is a status of HTTP with a text that says what was expected."""
    got, _, answer = post(service, layer, body)
    said = json.loads(answer)
    assert got == status
    assert detail in said["detail"]
    assert said.get("fields") == fields


def test_the_web_service_without_a_server(tmp_path: Path) -> None:
    """While no server is at the address, the response asks the caller to try again."""
    with web_service(f"unix:{tmp_path / 'none.sock'}") as url:
        status, headers, _ = post(url, "MaxPool2d(8)", PHOTO.read_bytes())
    assert (status, headers["retry-after"]) == (503, "1")
