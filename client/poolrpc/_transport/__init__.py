"""How a call's tensors travel, one file a path."""
