"""The command `poolrpc-server`."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from poolrpc._interrupt import INTERRUPTED, interrupt_ends_process
from poolrpc_server.log_format import find_log_format

try:
    from poolrpc_server.config import Config, ConfigError
    from poolrpc_server.config_sources import parse, unknown_variables
    from poolrpc_server.process import log_starting
    from poolrpc_server.sockets import AddressInUseError, require_free
    from poolrpc_server.telemetry import logs
except ImportError:
    # An install without the extra has this command too, but not the packages that the server needs.
    sys.stderr.write("poolrpc-server: the server needs its extra: pip install 'poolrpc[server]'\n")
    sys.exit(2)

if TYPE_CHECKING:
    from collections.abc import Sequence


ADDRESS_IN_USE = 75
"""Exit status if another process has an address, which may be free later: EX_TEMPFAIL of sysexits.h."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status.

    Args:
        arguments: The command line. None: that of the process.

    Returns:
        0 after a clean stop, 1 if the workers do not start or had to be killed, 2 if a setting is wrong,
        ADDRESS_IN_USE, 130 after Ctrl-C before the server serves. A server that fails and should be started again ends
        the process itself, with the status app.FAILED.

    """
    log_format = find_log_format(arguments)
    try:
        settings = parse(arguments)
        logs.configure(settings.log_format, settings.log_level)
        if arguments is None:
            logs.adopt_process()
        for variable, closest in unknown_variables(os.environ).items():
            hint = f"did you mean {closest}?" if closest else "poolrpc-server --help has all names"
            logs.log.warning("unknown environment variable", variable=variable, hint=hint)
        _require_free_addresses(settings)
        if settings.workers > 1:
            from poolrpc_server.workers import supervisor  # noqa: PLC0415 - not needed for a single process

            try:
                return supervisor.supervise(settings)
            except supervisor.WorkersError as error:
                _report(error, log_format)
                return supervisor.WORKERS_FAILED
        log_starting(settings.listen, settings.workers)
        with interrupt_ends_process():
            # Imported once the settings are known to be valid: torch takes a second or two to import.
            from poolrpc_server.app import serve  # noqa: PLC0415

        return serve(settings)
    except KeyboardInterrupt:  # before the server handles SIGINT itself
        return INTERRUPTED
    except ConfigError as error:
        _report(error, log_format)
        return ADDRESS_IN_USE if isinstance(error.__cause__, AddressInUseError) else 2


def _report(error: Exception, log_format: str) -> None:
    """Write why the server does not start: as a line of text or, if the log is JSON, of JSON."""
    if log_format == "json":
        logs.configure(log_format, "info")
        logs.log.critical("failed", reason=str(error))
    else:
        print(f"poolrpc-server: {error}", file=sys.stderr)  # noqa: T201 - a command's output


def _require_free_addresses(settings: Config) -> None:
    addresses = [("listen", each) for each in settings.listen]
    addresses += [("metrics", settings.metrics), ("probes", settings.probes), ("explorer", settings.explorer)]
    for name, address in addresses:
        try:
            if address:
                require_free(address)
        except ValueError as error:
            raise ConfigError(f"{name}: {error}") from error
