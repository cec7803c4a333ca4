"""The Open Inference Protocol v2, which Triton's clients use."""
