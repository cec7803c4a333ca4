"""Programs of a test that run in a server's own processes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def injected(folder: Path, program: str) -> dict[str, str]:
    """Return an environment in which each process of a server runs a program, indented by 4 spaces, when it starts."""
    (folder / "sitecustomize.py").write_text(
        f"import sys\nif any('poolrpc_server' in each for each in sys.orig_argv):\n{program}"
    )
    return {"PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])}
