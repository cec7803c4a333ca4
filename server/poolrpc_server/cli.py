"""The command `poolrpc-server`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

try:
    from poolrpc_server import config
    from poolrpc_server.telemetry import logs
except ImportError:
    # The thin install has this command too, but not what it needs.
    sys.stderr.write("poolrpc-server: the server needs its extra: pip install 'poolrpc[server]'\n")
    sys.exit(2)

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and give its exit status.

    0 after a clean stop, 1 where workers can't be started, 2 where a setting is wrong, app.FAILED where the server
    can't go on and wants to be started again.
    """
    try:
        settings = config.parse(arguments)
        logs.configure(settings.log_format, settings.log_level)
        if settings.workers > 1:
            from poolrpc_server.workers import supervisor  # noqa: PLC0415 - one process needs none of it

            try:
                return supervisor.supervise(settings)
            except supervisor.WorkersError as error:
                print(f"poolrpc-server: {error}", file=sys.stderr)  # noqa: T201 - a command's way to speak
                return supervisor.ENDED
        # Not before the settings are known to be right: torch takes a second or two to import.
        from poolrpc_server.app import serve  # noqa: PLC0415

        return serve(settings)
    except config.ConfigError as error:
        print(f"poolrpc-server: {error}", file=sys.stderr)  # noqa: T201 - a command's way to speak
        return 2
