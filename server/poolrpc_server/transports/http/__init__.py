"""HTTP/1.1: the explorer's page, and calls of the JSON protocol."""
