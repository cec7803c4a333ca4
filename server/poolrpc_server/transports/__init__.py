"""How the bytes of calls arrive."""
