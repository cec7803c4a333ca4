"""Errors as JSON objects, with the paths that the fields have in JSON requests."""

from __future__ import annotations

import re
from typing import Any

from poolrpc.errors import InvalidArgumentError, PoolError, UnavailableError

LAYER_PATH = re.compile(r"branches\[(\d+)\]\.layers\[(\d+)\](?:\.\w+)?")
"""The path of a layer in the errors that all protocols share, with the name of its family."""


def error_object(error: PoolError) -> dict[str, Any]:
    """Return an error as the JSON object of an answer: code, reason, message, and what else there is."""
    found: dict[str, Any] = {"code": error.code, "reason": error.reason, "message": _json_paths(error.message)}
    if isinstance(error, InvalidArgumentError):
        found["fields"] = [{"field": _json_paths(each.field), "message": each.description} for each in error.violations]
    if error.metadata:
        found["metadata"] = error.metadata
    if isinstance(error, UnavailableError) and error.retry_delay is not None:
        found["retry_seconds"] = error.retry_delay
    return {"error": found}


def _json_paths(text: str) -> str:
    return LAYER_PATH.sub(lambda at: f"branches[{int(at[1]) - 1}][{at[2]}]" if int(at[1]) else f"layer[{at[2]}]", text)
