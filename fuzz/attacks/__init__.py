"""Attacks on a running server, each next to a good client that must not notice it; `python -m fuzz attacks`."""
