"""The standard streams of a process that was started without them, as by `poolrpc-server 2>&-`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

STANDARD = (0, 1, 2)
"""Descriptors of standard input, output and error."""


def open_standard_streams() -> None:
    """Open those of the standard streams that are closed, on /dev/null.

    Otherwise the next socket or file gets such a descriptor, and what libraries print goes into it.
    """
    for descriptor in STANDARD:
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)
            os.set_inheritable(descriptor, True)  # worker processes have the same streams
    if sys.stdout is None:
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 - for as long as the process lives
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - as above
