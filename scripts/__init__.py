"""What the Makefile runs, and what the demo, the tests and the benchmarks share."""
