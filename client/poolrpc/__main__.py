"""`python -m poolrpc` is the command `poolrpc`."""

import sys

from poolrpc.cli import main

if __name__ == "__main__":
    sys.exit(main())
