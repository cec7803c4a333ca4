"""Values to bytes and back; client and server share it."""
