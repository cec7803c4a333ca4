"""What the `poolrpc` command prints and reads."""
