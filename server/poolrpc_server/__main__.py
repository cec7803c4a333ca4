"""Run the command `poolrpc-server` as `python -m poolrpc_server`."""

import sys

from poolrpc_server.cli import main

if __name__ == "__main__":
    sys.exit(main())
