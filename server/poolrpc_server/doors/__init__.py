"""The protocols that calls come by: each turns a message into a Call and the results into a message, nothing else."""
