"""The command `poolrpc-server`, also as `python -m poolrpc_server`."""

import os
import sys

from poolrpc._interrupt import interrupt_ends_process
from poolrpc_server.log_format import find_log_format
from poolrpc_server.standard_streams import open_standard_streams


def main() -> int:
    """Run the command and return its exit status."""
    open_standard_streams()  # before anything else opens a file and keeps it, as libffi does when ctypes is imported
    if find_log_format() == "json":
        # Lines of gRPC's C++ are no JSON. gRPC reads the variable when it is imported.
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    with interrupt_ends_process():
        from poolrpc_server import cli  # noqa: PLC0415 - takes tenths of a second
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
