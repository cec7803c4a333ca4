"""A web service that pools photos, with FastAPI: its process needs the client and Pillow, but not torch.

uvicorn --app-dir examples fastapi_service:app
curl --data-binary @photo.jpg 'http://127.0.0.1:8000/pool?layer=MaxPool2d(4)' -o pooled.png

It needs `pip install 'poolrpc[images]' fastapi uvicorn`, and a server at POOLRPC_ADDRESS, or else 127.0.0.1:50051. All
requests share one client. A rejected call is a response with the error's text: 422 with the field that is wrong, 413
for a photo that is too large, 503 with Retry-After while the server is full or away.
"""

import io
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from PIL import Image, UnidentifiedImageError

from poolrpc import AsyncPoolClient, InvalidArgumentError, PoolError, Round, ToDtype, parse_chain

MAX_BYTES = 20 * 2**20
STATUS = {
    "INVALID_ARGUMENT": 422,
    "UNIMPLEMENTED": 422,
    "RESOURCE_EXHAUSTED": 413,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Keep a client open as long as the service runs."""
    async with AsyncPoolClient(os.environ.get("POOLRPC_ADDRESS", "127.0.0.1:50051"), timeout=10) as client:
        app.state.client = client
        yield


app = FastAPI(title="Pooling of photos", lifespan=lifespan)


@app.exception_handler(PoolError)
async def rejected(_: Request, error: PoolError) -> JSONResponse:
    """Answer with the error's status and text, and with the fields that are wrong."""
    violations = error.violations if isinstance(error, InvalidArgumentError) else ()
    fields = [each.field for each in violations if each.field]
    status = STATUS.get(error.code, 500)
    headers = {"Retry-After": "1"} if error.code == "UNAVAILABLE" else {}
    return JSONResponse({"detail": error.message, "fields": fields}, status, headers)


@app.post("/pool", response_class=Response)
async def pool(request: Request, layer: str = "MaxPool2d(4)") -> Response:
    """Pool the photo in the body with a layer or a list of layers, and return a PNG."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BYTES:
            raise HTTPException(413, f"expected a photo of at most {MAX_BYTES} bytes")
    # Averages are computed from floats, and rounded again; maxima remain what they are.
    steps = [ToDtype("float32"), *parse_chain(layer), Round(), ToDtype("uint8")]
    pixels = await run_in_threadpool(decode, bytes(body))
    result = await request.app.state.client.pool(pixels, steps, layout="NHWC")
    png = await run_in_threadpool(encode, result.output)
    return Response(png, media_type="image/png", headers={"X-Shape": "x".join(map(str, result.shape))})


def decode(photo: bytes) -> np.ndarray:
    """Return the pixels of a photo, (H, W, 3)."""
    try:
        return np.asarray(Image.open(io.BytesIO(photo)).convert("RGB"))
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise HTTPException(422, f"expected a photo, got {error}") from error


def encode(pixels: np.ndarray) -> bytes:
    """Return pixels as a PNG."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
