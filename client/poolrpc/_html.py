"""Values as HTML tables, which Jupyter shows."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

    from poolrpc._transport.result import PoolResult
    from poolrpc._wire.codec import ServerInfo
    from poolrpc.tensors import Array

SHOWN_CELLS = 64
"""The most cells of an array whose values are shown."""


def result_table(result: PoolResult) -> str:
    """Return a table of a result: its dtypes and shapes, the transport, and the values of small arrays."""
    rows = [("output", _described(result.output))]
    if len(result.shapes) > 1:
        rows.append(("shapes", escape(" → ".join(map(str, result.shapes)))))
    if result.indices is not None:
        rows.append(("indices", _described(result.indices)))
    return _table([*rows, ("transport", escape(result.transport))])


def info_table(info: ServerInfo) -> str:
    """Return a table of a server's description, with the layers of the same dtypes in one row."""
    by_dtypes: dict[tuple[str, ...], list[str]] = {}
    for name, dtypes in info.layers.items():
        by_dtypes.setdefault(dtypes, []).append(name)
    rows = [
        ("version", info.version),
        ("torch", info.torch_version),
        ("device", info.device),
        ("threads", str(info.threads)),
        *info.features.items(),
        *((name, str(limit)) for name, limit in info.limits.items()),
        *((", ".join(dtypes), ", ".join(names)) for dtypes, names in by_dtypes.items()),
    ]
    return _table((name, escape(value)) for name, value in rows)


def _described(array: Array) -> str:
    text = escape(f"{array.dtype.name} {array.shape}")
    if not 0 < array.size <= SHOWN_CELLS:
        return text
    return f"{text}<pre>{escape(np.array2string(array, threshold=SHOWN_CELLS))}</pre>"


def _table(rows: Iterable[tuple[str, str]]) -> str:
    """Return a table of rows of a text, which is escaped, and a cell, which is HTML."""
    lines = (f"<tr><th>{escape(name)}</th><td style='text-align: left'>{cell}</td></tr>" for name, cell in rows)
    return f"<table>{''.join(lines)}</table>"
