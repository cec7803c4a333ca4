"""What happens to one call, whatever its transport and protocol."""
