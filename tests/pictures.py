"""Pictures that are stored in the repository, compared with those that a test made."""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from pathlib import Path

UPDATE = "POOLRPC_UPDATE_EXAMPLES" in os.environ
"""Whether tests store what they made, instead of comparing it with what is stored."""

DIFFERENT, MAX_DIFFERENT = 16, 10
"""A pixel is different if its value differs by more; so many are allowed, because decoders and processors may round."""


def same_picture(one: bytes, two: bytes) -> bool:
    """Return whether two pictures look the same: one number drawn differently is more than is allowed."""
    a, b = (np.asarray(Image.open(io.BytesIO(each)).convert("RGB"), np.int16) for each in (one, two))
    return a.shape == b.shape and bool((abs(a - b).max(-1) > DIFFERENT).sum() <= MAX_DIFFERENT)


def check_picture(made: bytes, stored: Path) -> None:
    """Check that a picture looks like the stored one, or store it."""
    if UPDATE:
        if not stored.exists() or not same_picture(made, stored.read_bytes()):
            stored.parent.mkdir(exist_ok=True)
            stored.write_bytes(made)
        return
    assert same_picture(made, stored.read_bytes()), f"{stored} differs: POOLRPC_UPDATE_EXAMPLES=1 stores a new one"
