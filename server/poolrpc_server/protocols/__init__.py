"""The protocols: what the bytes of a call mean, as a request and as its response."""
