"""Several server processes on the same addresses."""
