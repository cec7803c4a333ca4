"""Explanations and files of the `poolrpc` command."""
