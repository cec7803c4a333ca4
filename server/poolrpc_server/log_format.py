"""The format of the log, found before the settings are read: an error in them is reported in it too."""

from __future__ import annotations

import argparse
import os
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def find_log_format(arguments: Sequence[str] | None = None) -> str:
    """Return the format that flags, environment or configuration file name, whatever else is wrong; empty for none.

    Args:
        arguments: The command line. None: that of the process.

    """
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("--log-format", default=os.environ.get("POOLRPC_LOG_FORMAT", ""))
    parser.add_argument("--config", default=os.environ.get("POOLRPC_CONFIG", ""))
    try:
        known, _ = parser.parse_known_args(arguments)
    except argparse.ArgumentError:  # a flag without its value
        return ""
    if known.log_format or not known.config:
        return str(known.log_format)
    try:
        settings = tomllib.loads(Path(known.config).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    return str(settings.get("log-format", settings.get("log_format", "")))
