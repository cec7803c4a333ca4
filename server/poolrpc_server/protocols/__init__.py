"""What the bytes of a call mean: message to request to message."""
