"""Conversion of values to and from bytes; shared with the server."""
