"""The transports, one file each: how a call's tensors are sent and its results received."""
