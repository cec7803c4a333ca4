"""Values to and from bytes; shared with the server."""
