"""The Open Inference Protocol v2, as Triton's clients speak it."""
