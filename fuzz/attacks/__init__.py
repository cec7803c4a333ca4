"""Attacks on a running server, each beside a good client that must not notice it; `python -m fuzz attacks`."""
