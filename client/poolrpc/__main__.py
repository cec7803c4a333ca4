"""The command `poolrpc`, also as `python -m poolrpc`."""

import sys

from poolrpc._interrupt import interrupt_ends_process


def main() -> int:
    """Run the command and return its exit status."""
    with interrupt_ends_process():
        from poolrpc import cli  # noqa: PLC0415 - takes tenths of a second
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
