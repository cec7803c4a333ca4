"""Benchmarks: ratios of interleaved runs in one process tree, each with its baseline."""
