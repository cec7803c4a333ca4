"""The engine and its kernels: the only code that imports torch."""
