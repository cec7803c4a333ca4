"""The transports: how the bytes of calls arrive."""
