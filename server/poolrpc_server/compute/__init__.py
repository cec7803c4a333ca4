"""The device and the kernels: the only code that imports torch."""
