"""Programs that the Makefile runs, and code that the demo, the tests and the benchmarks share."""
