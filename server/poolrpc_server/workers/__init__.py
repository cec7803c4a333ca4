"""Several server processes (workers) on the same addresses, and the supervisor that starts them."""
